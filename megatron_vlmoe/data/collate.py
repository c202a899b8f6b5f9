"""The parts of a pretraining micro-batch: samples of one objective, collated for one process.

Letters: n samples of an objective, L tokens, N patches, M masked patches, S pixels along a side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_vlmoe.data.masking import IGNORED_LABEL
from megatron_vlmoe.data.order import BlendedOrder, Place
from megatron_vlmoe.data.samples import CaptionSamples, Draws, ImageViews, PatchMasks, TextSamples
from megatron_vlmoe.runtime.ranks import Ranks

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


def masked_positions(masks: Array) -> Array:
    """Ascending patch numbers ``[n, M]`` of masks ``[n, N]`` that have M True in every row."""
    return np.nonzero(masks)[1].reshape(len(masks), -1).astype(np.int64)


class TextBatches:
    """The text-only part of micro-batches."""

    def __init__(self, order: BlendedOrder, samples: TextSamples, segments: bool) -> None:
        self.order, self.samples, self.segments = order, samples, segments

    def make(self, numbers: range) -> dict[str, Array]:
        """``text_ids [n, L]``, ``text_positions`` and ``text_labels [n, slots]``, all int64."""
        made = [self.samples.sample(self.order.locate(number)) for number in numbers]
        labels = np.stack([sample.labels for sample in made])
        positions, values = slot_positions(labels, self.samples.slots)
        batch = {
            "text_ids": np.stack([sample.ids for sample in made]),
            "text_positions": positions,
            "text_labels": values,
            "text_sample_numbers": np.asarray(numbers, dtype=np.int64),
        }
        if self.segments:
            batch["text_segments"] = np.stack([sample.segments for sample in made])
        return batch


class PixelBatches:
    """Masks, pixels and codes of the images of one objective.

    Args:
        prefix: of the batch keys: ``image`` or ``pair``.
        views: pixels and stored codes.
        masks: how patches are masked.
        draws: source of the masks.
        sizes: sides of the model's view and of the image tokenizer's view; None for the latter with
            stored codes.
        share: which part this process needs.
    """

    def __init__(
        self,
        prefix: str,
        views: ImageViews,
        masks: PatchMasks,
        draws: Draws,
        sizes: tuple[int, int | None],
        share: BatchShare,
    ) -> None:
        self.views, self.masks, self.draws, self.share = views, masks, draws, share
        mask = "image_mask" if prefix == "image" else f"{prefix}_image_mask"
        self._mask, self._positions = mask, mask.replace("mask", "positions")
        self._codes = mask.replace("mask", "codes")
        model_size, tokenizer_size = sizes
        wanted = []
        if share.first_stage:
            wanted.append((f"{prefix}_pixels", model_size))
        if share.last_stage and tokenizer_size is not None:
            wanted.append((f"{prefix}_tokenizer_pixels", tokenizer_size))
        self._views = tuple(wanted)
        self._wants_codes = share.last_stage and tokenizer_size is None

    def make(self, places: list[Place], images: list[int]) -> dict[str, Array]:
        """Masks and codes of all samples, pixels of this tensor-parallel rank's share."""
        masks = np.stack([self.masks.draw(self.draws, place) for place in places])
        batch = {self._mask: masks, self._positions: masked_positions(masks)}
        if self._wants_codes:
            batch[self._codes] = np.stack(
                [
                    np.asarray(self.views.stored_view(place, image).codes).reshape(-1)[mask]
                    for place, image, mask in zip(places, images, masks, strict=True)
                ]
            ).astype(np.int64)
        if self._views:
            batch |= self._pixels(places, images)
        return batch

    def _pixels(self, places: list[Place], images: list[int]) -> dict[str, Array]:
        own = self.share.slice(len(places))
        # Views of equal size are equal: one array serves both keys.
        sizes = sorted({size for _, size in self._views})
        count = own.stop - own.start
        out = {size: np.empty((count, 3, size, size), dtype=np.uint8) for size in sizes}
        for row, (place, image) in enumerate(zip(places[own], images[own], strict=True)):
            for size, view in zip(sizes, self.views.pixels(place, image, sizes), strict=True):
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

    def make(self, numbers: range) -> dict[str, Array]:
        """``image_mask bool [n, N]``, ``image_positions [n, M]``, and pixels or codes as needed."""
        places = [self.order.locate(number) for number in numbers]
        images = [self.first_documents[place.dataset] + place.index for place in places]
        batch = self.pixels.make(places, images)
        batch["image_sample_numbers"] = np.asarray(numbers, dtype=np.int64)
        return batch


class PairBatches:
    """The image-text part of micro-batches."""

    def __init__(self, order: BlendedOrder, captions: CaptionSamples, pixels: PixelBatches) -> None:
        self.order, self.captions, self.pixels = order, captions, pixels

    def make(self, numbers: range) -> dict[str, Array]:
        """``pair_ids [n, L]``, ``pair_lengths [n]``, ``pair_text_positions`` and
        ``pair_text_labels [n, slots]``, the image keys, and two counters."""
        places = [self.order.locate(number) for number in numbers]
        made = [self.captions.sample(place) for place in places]
        labels = np.stack([sample.labels for sample in made])
        positions, values = slot_positions(labels, self.captions.layout.slots)
        batch = self.pixels.make(places, [sample.image for sample in made])
        return batch | {
            "pair_ids": np.stack([sample.ids for sample in made]),
            "pair_lengths": np.array([sample.length for sample in made], dtype=np.int64),
            "pair_text_positions": positions,
            "pair_text_labels": values,
            "truncated_captions": np.array(sum(sample.truncated for sample in made)),
            "dropped_caption_masks": np.array(sum(sample.dropped_masks for sample in made)),
            "pair_sample_numbers": np.asarray(numbers, dtype=np.int64),
        }
