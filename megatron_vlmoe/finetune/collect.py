"""Runs evaluation items on all ranks and brings what it found together on rank 0, every item exactly once."""

from __future__ import annotations

import itertools
from typing import Any, Callable, Mapping, Optional, Sequence

import numpy as np
import torch.distributed as dist
from torch import Tensor

from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.finetune.data import TaskData
from megatron_vlmoe.finetune.eval_items import EvalItems, eval_layout
from megatron_vlmoe.runtime.distributed import Ranks, is_rank_zero
from megatron_vlmoe.stream.batch import Batch
from megatron_vlmoe.train.step import StepRunner

# Micro-batches of one call of the schedule, between which a rank that runs ahead waits for the others.
MOST_MICRO_BATCHES = 64
Found = dict[str, np.ndarray[Any, Any]]
Reduce = Callable[[Batch, Mapping[str, Tensor]], Found]


class CoverageError(RuntimeError):
    """An evaluation that did not see every item exactly once."""


def evaluate_items(
    runner: StepRunner,
    data: TaskData,
    items: EvalItems,
    reduce: Reduce,
    ranks: Ranks,
    config: FinetuneConfig,
) -> Optional[Found]:
    """What the model says of every evaluation item.

    Every rank must call it.

    Args:
        runner: the model.
        data: makes the micro-batches.
        items: the items.
        reduce: from a micro-batch and the heads' outputs to what is wanted of every item, ``[n, ...]`` each; little
            enough for rank 0 to hold for all items.
        ranks: where this process stands.
        config: the run.

    Returns:
        On rank 0 what `reduce` gave ``[items, ...]`` in the order of the items; None elsewhere.

    Raises:
        CoverageError: on rank 0, if an item is missing or came twice.
    """
    plan = data.plan(items)
    layout = eval_layout(config, items.shape)
    batches = iter(data.eval_loader(items, plan))

    def measure(batch: Batch, outputs: Mapping[str, Tensor]) -> Found:
        valid = batch["valid"].cpu().numpy()
        kept = {name: value[valid] for name, value in reduce(batch, outputs).items()}
        kept["samples"] = batch["samples"].cpu().numpy()[valid]
        return kept

    results: list[Found] = []
    left = plan.count
    pipeline = config.parallel.pipeline_model_parallel_size
    most = max(1, MOST_MICRO_BATCHES // pipeline) * pipeline
    while left:
        count = min(left, most)
        results += runner.evaluate(itertools.islice(batches, count), count, measure, layout=layout)
        left -= count
    # All tensor-parallel ranks of the last stage hold the same; the first one speaks for them.
    mine = results if ranks.is_last_stage and ranks.tensor == 0 else []
    gathered = gather_to_first(mine)
    return None if gathered is None else in_order(gathered, len(items))


def output(name: str) -> Reduce:
    """Keeps one output of the heads as it is."""
    return lambda batch, outputs: {name: to_numpy(outputs[name])}


def to_numpy(value: Tensor) -> np.ndarray[Any, Any]:
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
