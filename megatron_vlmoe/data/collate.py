"""The parts of a pretraining micro-batch: samples of one objective, collated for one process.

Letters: n samples of an objective, L tokens, N patches, M masked patches, S pixels along a side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from megatron_vlmoe.data.masking import IGNORED_LABEL
from megatron_vlmoe.data.order import BlendedOrder, SampleRef
from megatron_vlmoe.data.samples import (
    CaptionSamples,
    ImageViews,
    PatchMasks,
    SampleRngs,
    TextSamples,
)
from megatron_vlmoe.runtime.ranks import Ranks
from megatron_vlmoe.stream.batch import Batch, map_values

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class BatchShare:
    """Which part of every batch a process needs.

    Args:
        data_rank: rank among the data-parallel ranks.
        data_size: number of data-parallel ranks.
        tensor_rank: rank among the tensor-parallel ranks; decides whose pixels are decoded.
        tensor_size: number of tensor-parallel ranks.
        first_stage: first pipeline stage: needs the model's pixels.
        last_stage: last pipeline stage: needs visual codes.
    """

    data_rank: int = 0
    data_size: int = 1
    tensor_rank: int = 0
    tensor_size: int = 1
    first_stage: bool = True
    last_stage: bool = True

    @classmethod
    def of(cls, ranks: Ranks) -> BatchShare:
        """The share of a process of the layout."""
        return cls(
            data_rank=ranks.data,
            data_size=ranks.data_size,
            tensor_rank=ranks.tensor,
            tensor_size=ranks.tensor_size,
            first_stage=ranks.is_first_stage,
            last_stage=ranks.is_last_stage,
        )

    def slice(self, count: int) -> slice:
        """This tensor-parallel rank's samples of ``count``."""
        share = count // self.tensor_size
        return slice(self.tensor_rank * share, (self.tensor_rank + 1) * share)


@dataclass(frozen=True)
class MicroBatchNumber:
    """Where a local micro-batch stands in the run.

    Args:
        step: optimizer step, from 0.
        in_step: number among the micro-batches of all data-parallel ranks in this step.
        in_run: the same over the whole run.
    """

    step: int
    in_step: int
    in_run: int

    @classmethod
    def locate(cls, local: int, per_step: int, share: BatchShare) -> MicroBatchNumber:
        """The ``local``-th micro-batch of a rank that has ``per_step`` of them in a step."""
        step, i = divmod(local, per_step)
        in_step = i * share.data_size + share.data_rank
        return cls(step, in_step, step * per_step * share.data_size + in_step)

    def samples(self, micro: int, whole: int) -> range:
        """Numbers of its samples, of ``micro`` per micro-batch and ``whole`` per step."""
        first = self.step * whole + self.in_step * micro
        return range(first, first + micro)


def to_tensors(arrays: dict[str, Any]) -> Batch:
    """A batch from nested NumPy arrays; one that stands in two places becomes one tensor, which a worker sends once."""
    return cast(Batch, map_values(arrays, torch.as_tensor))


def slot_positions(labels: Array, slots: int) -> tuple[Array, Array]:
    """Predicted positions and their labels, in a fixed number of slots.

    Args:
        labels: int64 ``[n, L]``, -100 where not predicted.
        slots: columns of the result, at least as many as any row has labels.

    Returns:
        positions and labels, int64 ``[n, slots]``: ascending, unused slots 0 and -100.
    """
    positions = np.zeros((len(labels), slots), dtype=np.int64)
    values = np.full((len(labels), slots), IGNORED_LABEL, dtype=np.int64)
    for row, line in enumerate(labels):
        found = np.flatnonzero(line != IGNORED_LABEL)
        positions[row, : len(found)] = found
        values[row, : len(found)] = line[found]
    return positions, values


class TextBatches:
    """The text-only part of micro-batches.

    Args:
        order: order of the samples.
        samples: masked texts.
        documents: whether a batch says which document every token is of.
    """

    def __init__(self, order: BlendedOrder, samples: TextSamples, documents: bool) -> None:
        self.order, self.samples, self.documents = order, samples, documents

    def make(self, numbers: range) -> dict[str, Any]:
        """The segment `texts`."""
        made = [self.samples.sample(self.order.locate(number)) for number in numbers]
        labels = np.stack([sample.labels for sample in made])
        positions, values = slot_positions(labels, self.samples.slots)
        texts = {
            "ids": np.stack([sample.ids for sample in made]),
            "positions": positions,
            "labels": values,
            "sample_numbers": np.asarray(numbers, dtype=np.int64),
        }
        if self.documents:
            texts["documents"] = np.stack([sample.documents for sample in made])
        return {"texts": texts}


class PixelBatches:
    """Masks, pixels and codes of the images of one objective.

    Args:
        views: pixels and stored codes.
        masks: how patches are masked.
        rngs: source of the masks.
        sizes: sides of the model's view and of the image tokenizer's view; None for the latter with
            stored codes.
        share: which part this process needs.
    """

    def __init__(
        self,
        views: ImageViews,
        masks: PatchMasks,
        rngs: SampleRngs,
        sizes: tuple[int, int | None],
        share: BatchShare,
    ) -> None:
        self.views, self.masks, self.rngs, self.share = views, masks, rngs, share
        model_size, tokenizer_size = sizes
        wanted = []
        if share.first_stage:
            wanted.append(("pixels", model_size))
        if share.last_stage and tokenizer_size is not None:
            wanted.append(("tokenizer_pixels", tokenizer_size))
        self._views = tuple(wanted)
        self._wants_codes = share.last_stage and tokenizer_size is None

    def make(self, refs: list[SampleRef], images: list[int]) -> dict[str, Array]:
        """An image segment: masks and codes of all samples, pixels of this tensor-parallel rank's share."""
        masks = np.stack([self.masks.draw(self.rngs, ref) for ref in refs])
        # Every mask has as many patches.
        positions = np.nonzero(masks)[1].reshape(len(masks), -1).astype(np.int64)
        segment = {"mask": masks, "positions": positions}
        if self._wants_codes:
            segment["labels"] = np.stack(
                [
                    np.asarray(self.views.stored_view(ref, image).codes).reshape(-1)[mask]
                    for ref, image, mask in zip(refs, images, masks, strict=True)
                ]
            ).astype(np.int64)
        if self._views:
            segment |= self._pixels(refs, images)
        return segment

    def _pixels(self, refs: list[SampleRef], images: list[int]) -> dict[str, Array]:
        own = self.share.slice(len(refs))
        # Views of equal size are equal: one array serves both keys.
        sizes = sorted({size for _, size in self._views})
        count = own.stop - own.start
        out = {size: np.empty((count, 3, size, size), dtype=np.uint8) for size in sizes}
        for row, (ref, image) in enumerate(zip(refs[own], images[own], strict=True)):
            for size, view in zip(sizes, self.views.pixels(ref, image, sizes), strict=True):
                out[size][row] = view
        return {name: out[size] for name, size in self._views}


class ImageBatches:
    """The image-only part of micro-batches.

    Args:
        order: order of the samples.
        first_documents: of each dataset, the document of sample index 0.
        pixels: masks, pixels and codes.
    """

    def __init__(
        self, order: BlendedOrder, first_documents: list[int], pixels: PixelBatches
    ) -> None:
        self.order, self.first_documents, self.pixels = order, first_documents, pixels

    def make(self, numbers: range) -> dict[str, Any]:
        """The segment `images`."""
        refs = [self.order.locate(number) for number in numbers]
        images = [self.first_documents[ref.dataset] + ref.index for ref in refs]
        segment = self.pixels.make(refs, images)
        return {"images": segment | {"sample_numbers": np.asarray(numbers, dtype=np.int64)}}


class PairBatches:
    """The image-text part of micro-batches."""

    def __init__(self, order: BlendedOrder, captions: CaptionSamples, pixels: PixelBatches) -> None:
        self.order, self.captions, self.pixels = order, captions, pixels

    def make(self, numbers: range) -> dict[str, Any]:
        """The segments `pair_texts` and `pair_images`, and two counters."""
        refs = [self.order.locate(number) for number in numbers]
        made = [self.captions.sample(ref) for ref in refs]
        labels = np.stack([sample.labels for sample in made])
        positions, values = slot_positions(labels, self.captions.slots)
        sample_numbers = np.asarray(numbers, dtype=np.int64)
        images = self.pixels.make(refs, [sample.image for sample in made])
        return {
            "pair_texts": {
                "ids": np.stack([sample.ids for sample in made]),
                "lengths": np.array([sample.length for sample in made], dtype=np.int64),
                "positions": positions,
                "labels": values,
                "sample_numbers": sample_numbers,
            },
            "pair_images": images | {"sample_numbers": sample_numbers},
            "truncated_captions": np.array(sum(sample.truncated for sample in made)),
            "dropped_caption_masks": np.array(sum(sample.dropped_masks for sample in made)),
        }
