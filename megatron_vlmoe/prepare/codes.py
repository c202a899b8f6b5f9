"""Images for the image tokenizer: the random crops that it trains on, and the codes that it writes.

`PREFIX_codes` holds the codes of indexed images; `megatron_vlmoe/data/codes.py` says what is in it.

Letters: N images of a batch, S side in pixels.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from megatron_vlmoe.config.errors import ConfigError, DataError
from megatron_vlmoe.data.augment import CropBox, apply_crop, decode_image, draw_crop
from megatron_vlmoe.data.codes import (
    HEADER_LENGTH,
    CodesManifest,
    codes_prefix,
    load_codes_manifest,
    publish_codes,
)
from megatron_vlmoe.data.collate import Loader
from megatron_vlmoe.data.image_files import DEFAULT_RULES, ImageRules, read_image_file
from megatron_vlmoe.data.indexed import IndexedReader, IndexedWriter
from megatron_vlmoe.data.manifest import ShardRecord, part_prefix
from megatron_vlmoe.data.order import Purpose, SampleOrder, keyed_rng
from megatron_vlmoe.prepare.readers.images import read_images
from megatron_vlmoe.prepare.readers.records import (
    ImageFile,
    PassedOver,
    Reject,
    kinds_of,
    passed_over_line,
)
from megatron_vlmoe.prepare.shards import Shard
from megatron_vlmoe.prepare.tool import Run, delete_left
from megatron_vlmoe.runtime.files import delete_left_files
from megatron_vlmoe.runtime.progress import Progress
from megatron_vlmoe.tokenizers.image import ImageTokenizer

_EVALUATION_IMAGES = 256


class IndexedImages(Dataset[Image.Image]):
    """The images of an indexed dataset, `PREFIX_image.bin` and `.idx`."""

    def __init__(self, prefix: str) -> None:
        self.prefix = part_prefix(prefix, "image")
        self._reader = IndexedReader(self.prefix)

    def __len__(self) -> int:
        return self._reader.num_sequences

    def __getitem__(self, index: int) -> Image.Image:
        return decode_image(self._reader.sequence(index), f"{self.prefix}.bin: image {index}")


class FolderImages(Dataset[Image.Image]):
    """The images of a folder, at any depth, in sorted order; a damaged tar in it is an error."""

    def __init__(self, folder: str, rules: ImageRules = DEFAULT_RULES) -> None:
        self._rules = rules
        files = list(read_images((folder,)))
        self._files = [file for file in files if isinstance(file, ImageFile)]
        rejects = [file for file in files if isinstance(file, Reject)]
        if rejects:
            raise DataError(str(rejects[0]))
        others = kinds_of(Counter(file for file in files if isinstance(file, PassedOver)))
        if others:
            print(f"{folder}: {passed_over_line(others)}", file=sys.stderr)
        if not self._files:
            raise DataError(f"{folder}: holds no images")

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Image.Image:
        file = self._files[index]
        try:
            return read_image_file(file.read(), self._rules)
        except DataError as error:
            raise DataError(str(Reject(file.source, file.record, str(error)))) from error


ImageSource = IndexedImages | FolderImages | ConcatDataset[Image.Image]
"""Images in RGB by number; a damaged one is a DataError that names it."""


def open_images(paths: Sequence[str], rules: ImageRules = DEFAULT_RULES) -> ImageSource:
    """Indexed prefixes (`PREFIX_image.idx` exists) and image folders, in the given order.

    ``rules`` are for images in folders; indexed ones have had theirs.
    """
    sources: list[IndexedImages | FolderImages] = []
    for path in paths:
        if Path(f"{part_prefix(path, 'image')}.idx").is_file():
            sources.append(IndexedImages(path))
        elif Path(path).is_dir():
            sources.append(FolderImages(path, rules))
        else:
            raise DataError(f"{path}: neither an image folder nor an indexed dataset's prefix")
    return sources[0] if len(sources) == 1 else ConcatDataset(sources)


def to_tensor(image: Image.Image) -> Tensor:
    """uint8 `[3, S, S]`."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


@dataclass(frozen=True, kw_only=True)
class _Cropping:
    """How random crops are drawn."""

    seed: int = 0
    """Crops depend on it and on their numbers only."""
    min_scale: float
    """Smallest crop as a share of the image's area."""
    workers: int = 0
    """Decoding processes, of each rank."""

    def __post_init__(self) -> None:
        if not 0.0 < self.min_scale <= 1.0:
            raise ConfigError(f"min_scale must be in (0, 1], not {self.min_scale}")
        if self.workers < 0:
            raise ConfigError(f"workers must not be negative, not {self.workers}")


@dataclass(frozen=True, kw_only=True)
class CropOptions(_Cropping):
    """What is done to an image before the tokenizer sees it in training, in an order of the seed too."""

    size: int
    """S."""
    batch_size: int
    """Images per step over all ranks."""
    min_scale: float = 0.08
    """As published."""


@dataclass
class _TrainingCrops(Dataset[Any]):
    """Crops at some positions of the endless training order; positions count slots of all steps."""

    source: ImageSource
    options: CropOptions
    order: SampleOrder

    def __getitem__(self, positions: list[int]) -> Tensor:
        crops = []
        for position in positions:
            _, index = self.order.locate(position)
            rng = keyed_rng(self.options.seed, Purpose.AUGMENTATION, index=position)
            image: Image.Image = self.source[index]
            box = draw_crop(*image.size, rng, scale=(self.options.min_scale, 1.0))
            flip = bool(rng.random() < 0.5)
            crops.append(to_tensor(apply_crop(image, box, self.options.size, flip=flip)))
        return torch.stack(crops)


@dataclass
class _WholeImages(Dataset[Any]):
    """Images, each resized as a whole."""

    source: ImageSource
    size: int

    def __getitem__(self, indices: list[int]) -> Tensor:
        images = [self.source[index] for index in indices]
        whole = [apply_crop(one, CropBox.whole(*one.size), self.size) for one in images]
        return torch.stack([to_tensor(image) for image in whole])


class TokenizerCrops:
    """Random resized crops with flips for training, whole images for evaluation."""

    def __init__(self, source: ImageSource, options: CropOptions) -> None:
        self.source = source
        self.options = options
        self.num_images = len(source)

    def training_batches(self, first_step: int, rank: int, world_size: int) -> Iterator[Tensor]:
        """Rank `rank`'s share uint8 `[N / world_size, 3, S, S]` of each batch; endless.

        The batch of a step is the same at any number of ranks and workers.
        """
        share = self.options.batch_size // world_size
        starts = itertools.count(
            first_step * self.options.batch_size + rank * share, self.options.batch_size
        )
        batches = (list(range(start, start + share)) for start in starts)
        order = SampleOrder(self.num_images, self.options.seed)
        dataset = _TrainingCrops(self.source, self.options, order)
        return iter(Loader(dataset, batches, self.options.workers))

    def evaluation_batches(self) -> Iterator[Tensor]:
        """Up to 256 images, spread evenly over the corpus: uint8 `[n, 3, S, S]`."""
        count = min(_EVALUATION_IMAGES, self.num_images)
        chosen = np.linspace(0, self.num_images - 1, count).astype(int)
        size = min(self.options.batch_size, 64)
        batches = [chosen[i : i + size].tolist() for i in range(0, count, size)]
        dataset = _WholeImages(self.source, self.options.size)
        return iter(Loader(dataset, batches, self.options.workers))


@dataclass(frozen=True, kw_only=True)
class CodesOptions(_Cropping):
    """How views are drawn and encoded; view v of image i depends on (seed, i, v) only."""

    num_views: int
    """Views of every image."""
    min_scale: float = 0.2
    """That of BEiT v2's pretraining."""
    flip_probability: float = 0.5
    """Share of mirrored views."""
    batch_size: int = 64
    """Views encoded at once."""

    def __post_init__(self) -> None:
        for name in ("num_views", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0.0 <= self.flip_probability <= 1.0:
            raise ConfigError(f"flip_probability must be in [0, 1], not {self.flip_probability}")
        super().__post_init__()


@dataclass
class _Views(Dataset[Any]):
    """Image numbers -> headers int32 `[N * V, 6]` and crops uint8 `[N * V, 3, S, S]`, image by image."""

    source: ImageSource
    size: int
    options: CodesOptions

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        headers, crops = [], []
        for index in indices:
            image: Image.Image = self.source[index]
            for view in range(self.options.num_views):
                # A pure function of (seed, image, view) and the image's size.
                rng = keyed_rng(self.options.seed, Purpose.AUGMENTATION, epoch=view, index=index)
                box = draw_crop(*image.size, rng, scale=(self.options.min_scale, 1.0))
                flip = bool(rng.random() < self.options.flip_probability)
                crops.append(to_tensor(apply_crop(image, box, self.size, flip=flip)))
                headers.append([box.left, box.top, box.width, box.height, int(flip), self.size])
        return torch.tensor(headers, dtype=torch.int32), torch.stack(crops)


def open_encoder(path: str, bf16: bool) -> ImageTokenizer:
    """The tokenizer that encodes, on the GPU where there is one. Raises DataError."""
    return ImageTokenizer.from_pretrained(
        path,
        device="cuda" if torch.cuda.is_available() else "cpu",
        dtype=torch.bfloat16 if bf16 else torch.float32,
    )


def write_codes(
    images_prefix: str,
    tokenizer: ImageTokenizer,
    options: CodesOptions,
    output_prefix: str | None = None,
    shard: Shard | None = None,
) -> CodesManifest:
    """Encodes every image of `PREFIX_image`, or those of one shard, and writes `PREFIX_codes` (all of it or nothing).

    An image that cannot be decoded ends it with a DataError that names it: codes are matched to images by their number,
    so none can be left out.
    """
    source = IndexedImages(images_prefix)
    prefix = codes_prefix(output_prefix or images_prefix)
    per_batch = max(1, options.batch_size // options.num_views)
    # Shards have whole batches: what an encoder makes of an image may depend on its batch, in the last bit.
    first, end = (shard or Shard(0, 1)).cut(-(-len(source) // per_batch))
    first, end = first * per_batch, min(end * per_batch, len(source))
    batches = (
        list(range(start, min(start + per_batch, len(source))))
        for start in range(first, end, per_batch)
    )
    image_bytes = os.path.getsize(f"{source.prefix}.bin")
    record = None
    if shard is not None:
        common = (image_bytes, len(source), tokenizer.fingerprint, replace(options, workers=0))
        work = hashlib.sha256(f"{common}".encode()).hexdigest()
        record, prefix = ShardRecord(shard.index, shard.count, work), shard.of(prefix)
        if (complete := _complete_codes(prefix, record)) is not None:
            return complete
        delete_left(prefix)
    else:
        delete_left_files(prefix)
    views = _Views(source, tokenizer.image_size, options)
    with Progress("encode", "images", end - first) as progress, ExitStack() as undo:
        writer = IndexedWriter(prefix, np.int32, may_be_empty=shard is not None)
        undo.callback(writer.abort)
        for headers, crops in Loader(views, batches, options.workers):
            codes = tokenizer.encode(crops.to(tokenizer.device).float().div_(255.0))
            records = torch.cat((headers, codes.to("cpu", torch.int32)), dim=1).numpy()
            images = len(records) // options.num_views
            lengths = np.full(len(records), HEADER_LENGTH + tokenizer.grid**2)
            writer.add_documents(records.reshape(-1), lengths, np.full(images, options.num_views))
            progress.add(images)
        manifest = CodesManifest(
            num_images=end - first,
            num_views=options.num_views,
            resolution=tokenizer.image_size,
            grid=tokenizer.grid,
            num_codes=tokenizer.num_codes,
            tokenizer_fingerprint=tokenizer.fingerprint,
            image_bytes=image_bytes,
            seed=options.seed,
            min_scale=options.min_scale,
            flip_probability=options.flip_probability,
            files=writer.finish(),
            shard=record,
        )
        publish_codes(writer, manifest)
    progress.finish()
    return manifest


def _complete_codes(prefix: str, record: ShardRecord) -> CodesManifest | None:
    """The manifest of a shard that is there already; None: it is to be made."""
    try:
        manifest = load_codes_manifest(prefix)
        sizes = {suffix: os.path.getsize(f"{prefix}{suffix}") for suffix in manifest.files}
    except (DataError, OSError):
        return None
    if manifest.shard != record or sizes != {s: f.size for s, f in manifest.files.items()}:
        return None
    print(f"{prefix}: shard is complete, nothing to do", file=sys.stderr)
    return manifest


@dataclass(frozen=True)
class EncodeImages:
    """`write_codes` as the work of a run.

    Attributes:
        images_prefix: of the dataset.
        image_tokenizer: folder or file of the tokenizer.
        bf16: whether it encodes under bf16 autocast.
        options: how views are drawn and encoded.
    """

    images_prefix: str
    image_tokenizer: str
    bf16: bool
    options: CodesOptions

    def __call__(self, run: Run) -> CodesManifest:
        """Encodes the images of one run, or of one shard."""
        tokenizer = open_encoder(self.image_tokenizer, self.bf16)
        if tokenizer.import_report is not None:
            print(tokenizer.import_report.summary())
        options = replace(self.options, workers=run.workers)
        return write_codes(self.images_prefix, tokenizer, options, run.output_prefix, run.shard)
