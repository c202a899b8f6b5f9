"""Evaluation: runs over every item once, in order, on all ranks, and brings what it found together on rank 0.

Items come in micro-batches of one size. The last ones are filled up with copies of the first item, which are marked and
left out of every result, so that all ranks run the same number of forward passes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset

from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.config.tasks import SampleShape
from megatron_vlmoe.data.collate import BatchShare, Loader, to_tensors
from megatron_vlmoe.finetune.data import TaskData
from megatron_vlmoe.runtime.distributed import Ranks, is_rank_zero
from megatron_vlmoe.stream.batch import Batch
from megatron_vlmoe.stream.layout import StreamLayout
from megatron_vlmoe.train.step import StepRunner

Array = np.ndarray[Any, Any]
Found = dict[str, Array]
Reduce = Callable[[Batch, Mapping[str, Tensor]], Found]
# Micro-batches of one call of the schedule, between which a rank that runs ahead waits for the others.
MOST_MICRO_BATCHES = 64


@dataclass(frozen=True)
class EvalItems:
    """What an evaluation runs over.

    Args:
        count: how many items there are.
        shape: what an item puts into the stream.
        batch: from the numbers of items to the parts of a micro-batch; pickles, so that loader workers can have it.
    """

    count: int
    shape: SampleShape
    batch: Callable[[Sequence[int]], dict[str, Any]]


class EvalMicroBatches(Dataset[Batch]):
    """Local micro-batch number to batch, for `Loader`; every data-parallel rank has `count` of them."""

    def __init__(self, items: EvalItems, config: FinetuneConfig, share: BatchShare) -> None:
        self.items, self.share, self.size = items, share, config.task.eval_batch
        self.count = max(1, -(-items.count // (self.size * share.data_size)))
        pipeline = config.parallel.pipeline_model_parallel_size
        if config.parallel.virtual_pipeline_model_parallel_size > 1:
            # Interleaving takes micro-batches in multiples of the stages.
            self.count = -(-self.count // pipeline) * pipeline

    def __getitem__(self, local: int) -> Batch:
        """The batch with ``samples [n]``, numbers of items, and ``valid [n]``, False for copies. Raises DataError."""
        first = (local * self.share.data_size + self.share.data_rank) * self.size
        numbers, total = range(first, first + self.size), self.items.count
        items = [number if number < total else 0 for number in numbers]
        marks = {
            "samples": np.array(items, dtype=np.int64),
            "valid": np.array([number < total for number in numbers]),
            "micro_batch": np.array(local),
        }
        return to_tensors(self.items.batch(items) | marks)


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


class CoverageError(RuntimeError):
    """An evaluation that did not see every item exactly once."""


def evaluate_items(
    runner: StepRunner,
    data: TaskData,
    items: EvalItems,
    reduce: Reduce,
    ranks: Ranks,
) -> Optional[Found]:
    """What the model says of every evaluation item.

    Every rank must call it.

    Args:
        runner: the model.
        data: of the run.
        items: the items.
        reduce: from a micro-batch and the heads' outputs to what is wanted of every item, ``[n, ...]`` each; little
            enough for rank 0 to hold for all items.
        ranks: where this process stands.

    Returns:
        On rank 0 what `reduce` gave ``[items, ...]`` in the order of the items; None elsewhere.

    Raises:
        CoverageError: on rank 0, if an item is missing or came twice.
    """
    config, options = data.config, data.config.data
    dataset = EvalMicroBatches(items, config, data.share)
    layout = eval_layout(config, items.shape)
    batches = iter(Loader(dataset, range(dataset.count), options.num_workers, options.prefetch))

    def measure(batch: Batch, outputs: Mapping[str, Tensor]) -> Found:
        valid = batch["valid"].cpu().numpy()
        kept = {name: value[valid] for name, value in reduce(batch, outputs).items()}
        kept["samples"] = batch["samples"].cpu().numpy()[valid]
        return kept

    results: list[Found] = []
    left = dataset.count
    pipeline = config.parallel.pipeline_model_parallel_size
    most = max(1, MOST_MICRO_BATCHES // pipeline) * pipeline
    while left:
        count = min(left, most)
        results += runner.evaluate(itertools.islice(batches, count), count, measure, layout=layout)
        left -= count
    # All tensor-parallel ranks of the last stage hold the same; the first one speaks for them.
    mine = results if ranks.is_last_stage and ranks.tensor == 0 else []
    gathered = gather_to_first(mine)
    return None if gathered is None else in_order(gathered, items.count)


def output(name: str) -> Reduce:
    """Keeps one output of the heads as it is."""
    return lambda batch, outputs: {name: to_numpy(outputs[name])}


def to_numpy(value: Tensor) -> Array:
    """In single precision on the host."""
    return value.float().cpu().numpy()


def gather_to_first(mine: list[Any]) -> Optional[list[Any]]:
    """The lists of all ranks, one after another, on rank 0; None elsewhere."""
    if dist.get_world_size() == 1:
        return mine
    places: Optional[list[Any]] = [None] * dist.get_world_size() if is_rank_zero() else None
    dist.gather_object(mine, places, dst=0)
    return None if places is None else [item for part in places for item in part]


def in_order(parts: Sequence[Mapping[str, Any]], count: int) -> Found:
    """Parts with their items' numbers under `samples`, as one table in the order of the items.

    Raises:
        CoverageError: if an item is missing or came twice.
    """
    numbers = np.concatenate([part["samples"] for part in parts])
    order = np.argsort(numbers, kind="stable")
    if not np.array_equal(numbers[order], np.arange(count)):
        seen = np.bincount(numbers, minlength=count)
        raise CoverageError(
            f"evaluation of {count} items: {int((seen == 0).sum())} missing, "
            f"{int((seen > 1).sum())} more than once"
        )
    names = [name for name in parts[0] if name != "samples"]
    return {name: np.concatenate([part[name] for part in parts])[order] for name in names}


def share_metrics(metrics: Optional[Mapping[str, float]]) -> dict[str, float]:
    """Rank 0's metrics on every rank."""
    box: list[Any] = [metrics]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    return dict(box[0])
