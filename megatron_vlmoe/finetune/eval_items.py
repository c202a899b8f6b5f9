"""What an evaluation runs over: every item once, in order, in micro-batches of one size.

The last micro-batches are filled up with copies of the first item, which are marked and left out of every result, so
that all ranks run the same number of forward passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch.utils.data import Dataset

from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.config.tasks import SampleShape
from megatron_vlmoe.data.collate import BatchShare, to_tensors
from megatron_vlmoe.data.order import SampleRef
from megatron_vlmoe.finetune.samples import TaskSamples
from megatron_vlmoe.stream.batch import Batch
from megatron_vlmoe.stream.layout import StreamLayout

Array = np.ndarray[Any, Any]


class EvalItems(Protocol):
    """What an evaluation runs over."""

    @property
    def shape(self) -> SampleShape:
        """What an item puts into the stream."""
        ...

    def __len__(self) -> int: ...

    def batch(self, numbers: Sequence[int]) -> dict[str, Any]:
        """The parts of a micro-batch with these items."""
        ...


@dataclass(frozen=True)
class SampleItems:
    """The samples of a classification task."""

    samples: TaskSamples

    @property
    def shape(self) -> SampleShape:
        """That of the task."""
        return self.samples.spec.stream

    def __len__(self) -> int:
        return len(self.samples)

    def batch(self, numbers: Sequence[int]) -> dict[str, Any]:
        """As `TaskSamples.batch`."""
        return self.samples.batch([SampleRef(0, 0, number) for number in numbers])


@dataclass(frozen=True)
class ImageItems:
    """The distinct images of a retrieval split."""

    samples: TaskSamples
    shape: SampleShape = SampleShape(images=1)

    def __len__(self) -> int:
        return self.samples.dataset.num_images

    def batch(self, numbers: Sequence[int]) -> dict[str, Any]:
        """The segment `images` and ``samples``, the documents."""
        refs = [SampleRef(0, 0, number) for number in numbers]
        return {
            "samples": np.array(numbers, dtype=np.int64),
            "images": self.samples.images(refs, list(numbers)),
        }


@dataclass(frozen=True)
class TextItems:
    """The captions of a retrieval split."""

    samples: TaskSamples
    shape: SampleShape = SampleShape(texts=1)

    def __len__(self) -> int:
        return self.samples.dataset.num_texts

    def batch(self, numbers: Sequence[int]) -> dict[str, Any]:
        """The segment `texts` and ``samples``, the sequences."""
        return {
            "samples": np.array(numbers, dtype=np.int64),
            "texts": self.samples.texts([(number,) for number in numbers]),
        }


@dataclass(frozen=True)
class PairItems:
    """Candidate pairs ``[n, 2]`` of (image document, caption sequence), for the matching head.

    In order of the images: an image is decoded once for all its pairs in a micro-batch.
    """

    samples: TaskSamples
    pairs: Array
    shape: SampleShape = SampleShape(pairs=1)

    def __len__(self) -> int:
        return len(self.pairs)

    def batch(self, numbers: Sequence[int]) -> dict[str, Any]:
        """The segments `pair_texts` and `pair_images`, and ``samples``, the rows of `pairs`."""
        chosen = self.pairs[list(numbers)].tolist()
        return {
            "samples": np.array(numbers, dtype=np.int64),
            "pair_texts": self.samples.texts([(text,) for _, text in chosen]),
            "pair_images": self.samples.repeated_images([image for image, _ in chosen]),
        }


@dataclass(frozen=True)
class EvalPlan:
    """How evaluation items are cut into micro-batches.

    Args:
        items: number of items.
        micro_batch: items in a micro-batch.
        count: micro-batches of every data-parallel rank.
    """

    items: int
    micro_batch: int
    count: int

    @classmethod
    def of(
        cls, items: int, micro_batch: int, data_size: int, pipeline: int, virtual: int
    ) -> EvalPlan:
        """The plan of a layout.

        Args:
            items: number of items.
            micro_batch: items in a micro-batch.
            data_size: data-parallel size.
            pipeline: pipeline stages.
            virtual: model chunks per stage; interleaving takes micro-batches in multiples of the stages.
        """
        count = max(1, -(-items // (micro_batch * data_size)))
        if virtual > 1:
            count = -(-count // pipeline) * pipeline
        return cls(items, micro_batch, count)

    def numbers(self, local: int, share: BatchShare) -> range:
        """Items of a rank's `local`-th micro-batch; those from `items` on are copies of the first."""
        first = (local * share.data_size + share.data_rank) * self.micro_batch
        return range(first, first + self.micro_batch)


class EvalMicroBatches(Dataset[Batch]):
    """Local micro-batch number to batch, for `Loader`."""

    def __init__(self, items: EvalItems, plan: EvalPlan, share: BatchShare) -> None:
        self.items, self.plan, self.share = items, plan, share

    def __getitem__(self, local: int) -> Batch:
        """The batch with ``valid [n]``, False for copies. Raises DataError."""
        numbers = self.plan.numbers(local, self.share)
        real = np.array([number < self.plan.items for number in numbers])
        batch = self.items.batch([number if number < self.plan.items else 0 for number in numbers])
        batch |= {"valid": real, "micro_batch": np.array(local)}
        return to_tensors(batch)


def eval_layout(config: FinetuneConfig, shape: SampleShape) -> StreamLayout:
    """The stream of one evaluation micro-batch."""
    count, model = config.task.eval_batch, config.model
    return StreamLayout(
        texts=shape.texts * count,
        pairs=shape.pairs * count,
        images=shape.images * count,
        text_length=model.text_length,
        pair_text_length=model.pair_text_length,
        image_length=model.image_length,
    )
