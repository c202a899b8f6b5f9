"""What batches of pretraining and fine-tuning share: which part a process needs, its tensors, and who makes it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.runtime.machine import check_shared_memory, loader_workers
from megatron_vlmoe.runtime.ranks import Ranks
from megatron_vlmoe.stream.batch import Batch, map_values
from megatron_vlmoe.stream.layout import StreamLayout


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
        data, tensor = (ranks.data, ranks.data_size), (ranks.tensor, ranks.tensor_size)
        return cls(*data, *tensor, ranks.is_first_stage, ranks.is_last_stage)

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


def batch_numbers(first: int, count: int | None) -> range:
    """``count`` numbers from ``first`` on; of None more than any run comes to."""
    return range(first, sys.maxsize if count is None else first + count)


def batch_bytes(config: RunConfig, share: BatchShare) -> int:
    """Bytes of the pixels in a micro-batch of a process, beside which the rest is small."""
    if not share.first_stage:
        return 0
    layout = StreamLayout.of(config)
    return (layout.images + layout.pairs) // share.tensor_size * 3 * config.model.image_size**2


@dataclass(frozen=True)
class _ErrorsAsValues(Dataset[Any]):
    """A DataLoader would wrap a worker's error in a traceback."""

    dataset: Dataset[Any]

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.dataset[key]
        except DataError as error:
            return error


class Loader:
    """The batches of a dataset in order, made ahead by worker processes; may be iterated over again.

    A worker's `DataError` is raised as it was.

    Args:
        dataset: a batch by its key.
        keys: of the batches that are wanted; each iteration goes through them from the start.
        workers: processes; 0 makes the batches in this one, -1 takes as many as this rank has cores for.
        prefetch: batches that each worker makes ahead.
        batch_bytes: about what a batch takes, to find out whether the machine has room; 0: does not ask.

    Raises:
        StartupError: if shared memory is too small.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        keys: Iterable[Any],
        workers: int,
        prefetch: int = 2,
        batch_bytes: int = 0,
    ) -> None:
        workers = loader_workers() if workers < 0 else workers
        if workers:
            # One more is in use.
            check_shared_memory(batch_bytes, workers * max(1, prefetch) + 1)
        self._loader: DataLoader[Any] = DataLoader(
            _ErrorsAsValues(dataset),
            batch_size=None,
            # A DataLoader only iterates over it.
            sampler=keys,  # type: ignore[arg-type]
            num_workers=workers,
            persistent_workers=workers > 0,
            prefetch_factor=max(1, prefetch) if workers else None,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_limit_threads,
            # The base seed of workers would otherwise be drawn from the global generator.
            generator=torch.Generator(),
        )

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            if isinstance(batch, DataError):
                raise batch
            yield batch


def _limit_threads(worker: int) -> None:
    del worker
    torch.set_num_threads(1)
