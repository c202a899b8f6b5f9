"""Writes `PREFIX_codes`, the visual codes of indexed images; `megatron_vlmoe/data/codes.py` says what is in it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.data.augment import CropBox, apply_crop, draw_crop
from megatron_vlmoe.data.codes import HEADER_LENGTH, CodesManifest, codes_prefix
from megatron_vlmoe.data.indexed import IndexedWriter
from megatron_vlmoe.data.loading import Loader
from megatron_vlmoe.data.order import Purpose, keyed_rng
from megatron_vlmoe.prepare.crops import ImageSource, IndexedImages, to_tensor
from megatron_vlmoe.runtime.files import write_text_atomic
from megatron_vlmoe.runtime.progress import Progress
from megatron_vlmoe.tokenizers.image import ImageTokenizer


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
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0.0 < self.min_scale <= 1.0:
            raise ConfigError(f"min_scale must be in (0, 1], not {self.min_scale}")
        if not 0.0 <= self.flip_probability <= 1.0:
            raise ConfigError(f"flip_probability must be in [0, 1], not {self.flip_probability}")
        if self.workers < 0:
            raise ConfigError(f"workers must not be negative, not {self.workers}")


def draw_view(width: int, height: int, image: int, view: int, options: CodesOptions) -> list[int]:
    """Header of a view without its resolution: left, top, width, height, flip.

    A pure function of (seed, image, view) and the image's size.
    """
    rng = keyed_rng(options.seed, Purpose.AUGMENTATION, epoch=view, index=image)
    box = draw_crop(width, height, rng, scale=(options.min_scale, 1.0))
    flip = rng.random() < options.flip_probability
    return [box.left, box.top, box.width, box.height, int(flip)]


class _Views(Dataset[Any]):
    """Image numbers -> headers int32 `[N * V, 6]` and crops uint8 `[N * V, 3, S, S]`, image by image."""

    def __init__(self, source: ImageSource, size: int, options: CodesOptions) -> None:
        self.source = source
        self.size = size
        self.options = options

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        headers, crops = [], []
        for index in indices:
            image = self.source.image(index)
            for view in range(self.options.num_views):
                *box, flip = draw_view(*image.size, index, view, self.options)
                crop = apply_crop(image, CropBox(*box), self.size, flip=bool(flip))
                crops.append(to_tensor(crop))
                headers.append([*box, flip, self.size])
        return torch.tensor(headers, dtype=torch.int32), torch.stack(crops)


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
    for headers, crops in Loader(dataset, batches, options.workers):
        codes = tokenizer.encode(crops.to(tokenizer.device).float().div_(255.0))
        yield torch.cat((headers, codes.to("cpu", torch.int32)), dim=1).numpy()


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
    with (
        Progress("encode", "images", len(source)) as progress,
        IndexedWriter(prefix, np.int32) as writer,
    ):
        for records in _encoded_batches(source, tokenizer, options):
            images = len(records) // options.num_views
            writer.add_documents(
                records.reshape(-1),
                np.full(len(records), length),
                np.full(images, options.num_views),
            )
            progress.add(images)
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
    write_text_atomic(f"{prefix}.json", content)
    progress.finish()
    return manifest
