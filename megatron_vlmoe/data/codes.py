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
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from megatron_vlmoe.data.augment import CropBox, apply_crop, draw_crop
from megatron_vlmoe.data.crops import ImageSource, IndexedImages, to_tensor, worker_loader
from megatron_vlmoe.data.errors import DataError
from megatron_vlmoe.data.indexed import IndexedReader, IndexedWriter
from megatron_vlmoe.data.manifest import FileRecord, part_prefix, sync_directory
from megatron_vlmoe.data.order import Purpose, keyed_rng
from megatron_vlmoe.tokenizers.image import ImageTokenizer
from megatron_vlmoe.tokenizers.vqkd.files import write_atomically

FORMAT_VERSION = 1
HEADER_LENGTH = 6
_PROGRESS_SECONDS = 10.0


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
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True, kw_only=True)
class CodesOptions:
    """How views are drawn and encoded."""

    num_views: int
    """Views of every image."""
    seed: int = 0
    """View v of image i depends on (seed, i, v) only."""
    min_scale: float = 0.2
    """Smallest crop as a share of the image's area (BEiT v2's pretraining)."""
    flip_probability: float = 0.5
    """Share of mirrored views."""
    batch_size: int = 64
    """Views encoded at once."""
    workers: int = 0
    """Decoding processes."""

    def __post_init__(self) -> None:
        for name in ("num_views", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0.0 < self.min_scale <= 1.0:
            raise ValueError(f"min_scale must be in (0, 1], not {self.min_scale}")
        if not 0.0 <= self.flip_probability <= 1.0:
            raise ValueError(f"flip_probability must be in [0, 1], not {self.flip_probability}")
        if self.workers < 0:
            raise ValueError(f"workers must not be negative, not {self.workers}")


def codes_prefix(prefix: str | Path) -> str:
    """Path prefix of the codes of a dataset: `PREFIX_codes`."""
    return part_prefix(prefix, "codes")


class CodesReader:
    """Reads `PREFIX_codes`; it pickles as its path, so that data loader workers can have it.

    Raises DataError (one line) if a file is missing, truncated or not what its manifest says.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.path = codes_prefix(prefix)
        self.manifest = read_codes_manifest(prefix)
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

    @property
    def num_images(self) -> int:
        """Images that have codes."""
        return self.manifest.num_images

    @property
    def num_views(self) -> int:
        """Views of every image."""
        return self.manifest.num_views

    @property
    def grid(self) -> int:
        """Codes per side of a view."""
        return self.manifest.grid

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the image tokenizer that made the codes."""
        return self.manifest.tokenizer_fingerprint

    def view(self, image: int, view: int) -> StoredView:
        """View `view` of image `image`; IndexError outside, DataError for a damaged record."""
        if not (0 <= image < self.num_images and 0 <= view < self.num_views):
            raise IndexError(
                f"{self.path}: view {view} of image {image}; there are {self.num_views} views of "
                f"{self.num_images} images"
            )
        record = self._reader.sequence(image * self.num_views + view)
        if len(record) != HEADER_LENGTH + self.grid**2:
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


def read_codes_manifest(prefix: str | Path) -> CodesManifest:
    """Reads `PREFIX_codes.json`. Raises DataError (one line) if it is missing or damaged."""
    path = Path(f"{codes_prefix(prefix)}.json")
    try:
        raw = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{path}: not found (no codes, or encoding did not end)") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path}: damaged: {error}") from error
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise DataError(
            f"{path}: format version {version} is newer than this program's {FORMAT_VERSION}"
        )
    try:
        files = {suffix: FileRecord(**record) for suffix, record in raw["files"].items()}
        return CodesManifest(**{**raw, "files": files})
    except (TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path}: damaged: not a manifest of codes ({error})") from error


def check_codes(prefix: str | Path, fingerprint: str, num_images: int, grid: int) -> CodesReader:
    """Opens `PREFIX_codes` and checks that it fits the run.

    Args:
        prefix: path prefix of the dataset.
        fingerprint: `ImageTokenizer.fingerprint` of the tokenizer in use.
        num_images: images of the dataset.
        grid: codes per side of an image.

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


def draw_view(width: int, height: int, image: int, view: int, options: CodesOptions) -> list[int]:
    """Header of a view without its resolution: left, top, width, height, flip.

    A pure function of (seed, image, view) and the image's size.
    """
    rng = keyed_rng(options.seed, Purpose.AUGMENTATION, epoch=view, index=image)
    box = draw_crop(width, height, rng, scale=(options.min_scale, 1.0))
    flip = rng.random() < options.flip_probability
    return [box.left, box.top, box.width, box.height, int(flip)]


class _Views(Dataset[Any]):
    """Image number -> headers int32 `[V, 6]` and crops uint8 `[V, 3, S, S]`."""

    def __init__(self, source: ImageSource, size: int, options: CodesOptions) -> None:
        self.source = source
        self.size = size
        self.options = options

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor] | DataError:
        try:
            image = self.source.image(index)
        except DataError as error:
            return error
        headers, crops = [], []
        for view in range(self.options.num_views):
            *box, flip = draw_view(*image.size, index, view, self.options)
            crops.append(to_tensor(apply_crop(image, CropBox(*box), self.size, flip=bool(flip))))
            headers.append([*box, flip, self.size])
        return torch.tensor(headers, dtype=torch.int32), torch.stack(crops)


def _join(items: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    headers, crops = zip(*items, strict=True)
    return torch.cat(headers), torch.cat(crops)


def _encoded_batches(
    source: ImageSource, tokenizer: ImageTokenizer, options: CodesOptions
) -> Iterator[npt.NDArray[np.int32]]:
    """Records `[images of the batch * V, 6 + grid^2]`, image by image."""
    per_batch = max(1, options.batch_size // options.num_views)
    batches = (
        list(range(start, min(start + per_batch, len(source))))
        for start in range(0, len(source), per_batch)
    )
    dataset = _Views(source, tokenizer.image_size, options)
    for headers, crops in worker_loader(dataset, batches, _join, options.workers):
        codes = tokenizer.encode(crops.to(tokenizer.device).float().div_(255.0))
        yield torch.cat((headers, codes.to("cpu", torch.int32)), dim=1).numpy()


def write_codes(
    images_prefix: str,
    tokenizer: ImageTokenizer,
    options: CodesOptions,
    output_prefix: str | None = None,
    progress: Callable[[str], None] = print,
) -> CodesManifest:
    """Encodes every image of `PREFIX_image` and writes `PREFIX_codes` (all of it or nothing).

    An image that cannot be decoded ends it: codes are matched to images by their number, so none
    can be left out.

    Raises:
        DataError: one line that names the file and the image.
    """
    source = IndexedImages(images_prefix)
    prefix = codes_prefix(output_prefix or images_prefix)
    length = HEADER_LENGTH + tokenizer.grid**2
    started = last = time.monotonic()
    with IndexedWriter(prefix, np.int32) as writer:
        for records in _encoded_batches(source, tokenizer, options):
            images = len(records) // options.num_views
            writer.add_documents(
                records.reshape(-1),
                np.full(len(records), length),
                np.full(images, options.num_views),
            )
            now = time.monotonic()
            if now - last > _PROGRESS_SECONDS:
                last, rate = now, writer.num_documents / (now - started)
                progress(f"encoded {writer.num_documents}/{len(source)} images, {rate:.1f} per s")
        manifest = CodesManifest(
            num_images=len(source),
            num_views=options.num_views,
            resolution=tokenizer.image_size,
            grid=tokenizer.grid,
            num_codes=tokenizer.num_codes,
            tokenizer_fingerprint=tokenizer.fingerprint,
            image_bytes=os.path.getsize(f"{source.prefix}.bin"),
            seed=options.seed,
            min_scale=options.min_scale,
            flip_probability=options.flip_probability,
            files=writer.finish(),
        )
        # From here on the old codes, if any, are gone: their manifest must not vouch for new files.
        Path(f"{prefix}.json").unlink(missing_ok=True)
    content = json.dumps(dataclasses.asdict(manifest), indent=2, sort_keys=True) + "\n"
    try:
        write_atomically(Path(f"{prefix}.json"), content.encode())
    except OSError as error:
        raise DataError(f"{prefix}.json: {error.strerror}") from error
    sync_directory(Path(prefix).parent)
    return manifest
