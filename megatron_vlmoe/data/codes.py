"""Stored visual codes, `PREFIX_codes`: views of each image as (crop box, flip, resolution, codes).

`PREFIX_codes.bin` and `.idx` are an indexed file of int32: a document per image, in the order of
`PREFIX_image`, and in it a sequence per view:

    left, top, width, height, flip (0 or 1), resolution, then grid^2 codes row by row

The box is in pixels of the stored image; the box resized to `resolution` x `resolution` and then
mirrored if `flip` gave the codes. `PREFIX_codes.json` is written last.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.data.augment import CropBox
from megatron_vlmoe.data.indexed import IndexedReader, IndexedWriter
from megatron_vlmoe.data.manifest import FileRecord, ShardRecord, part_prefix
from megatron_vlmoe.runtime.files import write_text_atomic
from megatron_vlmoe.runtime.json_files import read_versioned

FORMAT_VERSION = 1
HEADER_LENGTH = 6


@dataclass(frozen=True)
class StoredView:
    """One view of one image."""

    box: CropBox
    """In pixels of the stored image."""
    flip: bool
    """Mirrored left to right, after the crop."""
    resolution: int
    """Side in pixels at which the image tokenizer saw the crop."""
    codes: npt.NDArray[np.int64]
    """`[grid^2]`, row-major."""


@dataclass(frozen=True)
class CodesManifest:
    """Contents of `PREFIX_codes.json`."""

    num_images: int
    num_views: int
    """Views of every image."""
    resolution: int
    """Input side of the image tokenizer in pixels."""
    grid: int
    """Codes per side of a view."""
    num_codes: int
    """Size of the visual vocabulary."""
    tokenizer_fingerprint: str
    """`ImageTokenizer.fingerprint` of the tokenizer that made the codes."""
    image_bytes: int
    """Size of the `PREFIX_image.bin` that was encoded."""
    seed: int
    """Of the crops."""
    min_scale: float
    """Smallest crop as a share of the image's area."""
    flip_probability: float
    files: dict[str, FileRecord]
    """By suffix, `.bin` and `.idx`."""
    shard: ShardRecord | None = None
    """Of one shard of a run (``--shard``), whose images are a stretch of all; None: the codes are whole."""
    format_version: int = FORMAT_VERSION


def codes_prefix(prefix: str | Path) -> str:
    """Path prefix of the codes of a dataset: `PREFIX_codes`."""
    return part_prefix(prefix, "codes")


def load_codes_manifest(path: str) -> CodesManifest:
    """Reads the manifest of the codes whose files begin with a path. Raises DataError."""

    def make(raw: Any) -> CodesManifest:
        files = {suffix: FileRecord(**record) for suffix, record in raw["files"].items()}
        shard = raw.get("shard") and ShardRecord(**raw["shard"])
        made = CodesManifest(**{**raw, "files": files, "shard": shard})
        names = ("num_images", "num_views", "resolution", "grid", "num_codes", "image_bytes")
        for name in names:
            if type(value := getattr(made, name)) is not int or value < 0:
                raise ValueError(f"{name} is {value!r}")
        if not isinstance(made.tokenizer_fingerprint, str):
            raise ValueError(f"tokenizer_fingerprint is {made.tokenizer_fingerprint!r}")
        if files.keys() != {".bin", ".idx"}:
            raise ValueError(f"files are {', '.join(files) or 'none'}")
        return made

    what, missing = "a manifest of codes", "not found (no codes, or encoding did not end)"
    return read_versioned(Path(f"{path}.json"), FORMAT_VERSION, what, missing, make)


def publish_codes(writer: IndexedWriter, manifest: CodesManifest) -> None:
    """Gives complete files of codes their names, and writes their manifest last.

    The manifest of earlier codes goes first: it must not vouch for new files.
    """
    path = Path(f"{writer.path_prefix}.json")
    path.unlink(missing_ok=True)
    writer.publish()
    content = json.dumps(dataclasses.asdict(manifest), indent=2, sort_keys=True) + "\n"
    write_text_atomic(path, content)


class CodesReader:
    """Reads `PREFIX_codes`; it pickles as its path, so that data loader workers can have it.

    Raises DataError (one line) if a file is missing, truncated or not what its manifest says.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.path = codes_prefix(prefix)
        self.manifest = load_codes_manifest(self.path)
        self._reader = IndexedReader(self.path)
        manifest, reader = self.manifest, self._reader
        for suffix, record in manifest.files.items():
            size = os.path.getsize(f"{self.path}{suffix}")
            if size != record.size:
                raise DataError(
                    f"{self.path}{suffix}: {size} bytes, but its manifest says {record.size}"
                )
        views = manifest.num_images * manifest.num_views
        if (reader.num_documents, reader.num_sequences) != (manifest.num_images, views):
            raise DataError(
                f"{self.path}.idx: {reader.num_documents} images with {reader.num_sequences} "
                f"views, but its manifest says {manifest.num_images} with {views}"
            )
        if reader.num_items != views * (HEADER_LENGTH + manifest.grid**2):
            raise DataError(f"{self.path}.bin: not {manifest.grid**2} codes in every view")

    def view(self, image: int, view: int) -> StoredView:
        """View `view` of image `image`; IndexError outside, DataError for a damaged record."""
        images, views = self.manifest.num_images, self.manifest.num_views
        if not (0 <= image < images and 0 <= view < views):
            raise IndexError(
                f"{self.path}: view {view} of image {image}; there are {views} views of {images} images"
            )
        record = self._reader.sequence(image * views + view)
        if len(record) != HEADER_LENGTH + self.manifest.grid**2:
            raise DataError(f"{self.path}.bin: image {image} view {view} has {len(record)} items")
        left, top, width, height, flip, resolution = record[:HEADER_LENGTH].tolist()
        codes = record[HEADER_LENGTH:].astype(np.int64)
        if min(left, top) < 0 or min(width, height) < 1 or flip not in (0, 1):
            raise DataError(f"{self.path}.bin: image {image} view {view} has an impossible crop")
        if codes.min() < 0 or codes.max() >= self.manifest.num_codes:
            raise DataError(
                f"{self.path}.bin: image {image} view {view} has a code outside "
                f"0..{self.manifest.num_codes - 1}"
            )
        return StoredView(CropBox(left, top, width, height), bool(flip), resolution, codes)


def check_codes(prefix: str | Path, fingerprint: str, num_images: int, grid: int) -> CodesReader:
    """Opens `PREFIX_codes` and checks that it fits the run.

    Raises:
        DataError: one line if the codes are of another tokenizer, of other images or another grid,
            or if a file is missing or truncated.
    """
    reader = CodesReader(prefix)
    name, manifest = f"{reader.path}.json", reader.manifest
    if manifest.tokenizer_fingerprint != fingerprint:
        raise DataError(
            f"{name}: made with another image tokenizer (fingerprint "
            f"{manifest.tokenizer_fingerprint[:12]}, in use {fingerprint[:12]})"
        )
    if manifest.num_images != num_images:
        raise DataError(
            f"{name}: codes of {manifest.num_images} images, but the dataset has {num_images}"
        )
    if manifest.grid != grid:
        raise DataError(f"{name}: {manifest.grid} codes per side, but the run needs {grid}")
    images = f"{part_prefix(prefix, 'image')}.bin"
    if os.path.exists(images) and os.path.getsize(images) != manifest.image_bytes:
        raise DataError(f"{name}: made from other images than those in {images}")
    return reader
