"""What an evaluation runs over: every item once, in order, in micro-batches of one size.

The last micro-batches are filled up with copies of the first item, which are marked and left out of every result, so
that all ranks run the same number of forward passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.config.tasks import SampleShape
from megatron_vlmoe.data.collate import BatchShare
from megatron_vlmoe.data.order import Place
from megatron_vlmoe.finetune.samples import TaskSamples
from megatron_vlmoe.stream.layout import StreamLayout

Array = np.ndarray[Any, Any]


class Sweep(Protocol):
    """Items to run over."""

    @property
    def shape(self) -> SampleShape:
        """What an item puts into the stream."""
        ...

    def __len__(self) -> int: ...

    def batch(self, numbers: Sequence[int]) -> dict[str, Array]:
        """The parts of a micro-batch with these items."""
        ...


@dataclass(frozen=True)
class SampleSweep:
    """The samples of a classification task."""

    samples: TaskSamples

    @property
    def shape(self) -> SampleShape:
        """That of the task."""
        return self.samples.spec.stream

    def __len__(self) -> int:
        return len(self.samples)

    def batch(self, numbers: Sequence[int]) -> dict[str, Array]:
        """As `TaskSamples.batch`."""
        return self.samples.batch([Place(0, 0, number) for number in numbers])


@dataclass(frozen=True)
class ImageSweep:
    """The distinct images of a retrieval split."""

    samples: TaskSamples
    shape: SampleShape = SampleShape(images=1)

    def __len__(self) -> int:
        return self.samples.dataset.num_images

    def batch(self, numbers: Sequence[int]) -> dict[str, Array]:
        """``image_pixels`` and ``samples``, the documents."""
        places = [Place(0, 0, number) for number in numbers]
        return {"samples": np.array(numbers, dtype=np.int64)} | self.samples.images(
            "image", places, list(numbers)
        )


@dataclass(frozen=True)
class TextSweep:
    """The captions of a retrieval split."""

    samples: TaskSamples
    shape: SampleShape = SampleShape(texts=1)

    def __len__(self) -> int:
        return self.samples.dataset.num_texts

    def batch(self, numbers: Sequence[int]) -> dict[str, Array]:
        """``text_ids``, ``text_lengths`` and ``samples``, the sequences."""
        made = self.samples.texts([(number,) for number in numbers])
        return {"samples": np.array(numbers, dtype=np.int64)} | made


@dataclass(frozen=True)
class PairSweep:
    """Candidate pairs ``[n, 2]`` of (image document, caption sequence), for the matching head.

    In order of the images: an image is decoded once for all its pairs in a micro-batch.
    """

    samples: TaskSamples
    pairs: Array
    shape: SampleShape = SampleShape(pairs=1)

    def __len__(self) -> int:
        return len(self.pairs)

    def batch(self, numbers: Sequence[int]) -> dict[str, Array]:
        """``pair_ids``, ``pair_lengths``, ``pair_pixels`` and ``samples``, the places in `pairs`."""
        chosen = self.pairs[list(numbers)].tolist()
        made = self.samples.texts([(text,) for _, text in chosen], "pair")
        pixels = self.samples.repeated_images("pair", [image for image, _ in chosen])
        return {"samples": np.array(numbers, dtype=np.int64)} | made | pixels


@dataclass(frozen=True)
class SweepPlan:
    """How a sweep is cut into micro-batches.

    Args:
        items: length of the sweep.
        micro_batch: items in a micro-batch.
        count: micro-batches of every data-parallel rank.
    """

    items: int
    micro_batch: int
    count: int

    @classmethod
    def of(
        cls, items: int, micro_batch: int, data_size: int, pipeline: int, virtual: int
    ) -> SweepPlan:
        """The plan of a layout.

        Args:
            items: length of the sweep.
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


class SweepMicroBatches(Dataset[Any]):
    """Local micro-batch number to batch, for `Loader`."""

    def __init__(self, sweep: Sweep, plan: SweepPlan, share: BatchShare) -> None:
        self.sweep, self.plan, self.share = sweep, plan, share

    def __getitem__(self, local: int) -> dict[str, Tensor]:
        """The batch with ``valid [n]``, False for copies. Raises DataError."""
        numbers = self.plan.numbers(local, self.share)
        real = np.array([number < self.plan.items for number in numbers])
        batch = self.sweep.batch([number if number < self.plan.items else 0 for number in numbers])
        batch |= {"valid": real, "micro_batch": np.array(local)}
        return {name: torch.as_tensor(value) for name, value in batch.items()}


def sweep_layout(config: FinetuneConfig, shape: SampleShape) -> StreamLayout:
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
