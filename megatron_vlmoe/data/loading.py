"""What worker processes make ahead of time, and errors in the data on their way from them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from megatron_vlmoe.config.errors import DataError


@dataclass(frozen=True)
class Numbers:
    """The numbers from ``first`` on; endless if ``count`` is None."""

    first: int
    count: int | None

    def __iter__(self) -> Iterator[int]:
        if self.count is None:
            return itertools.count(self.first)
        return iter(range(self.first, self.first + self.count))


class Loader:
    """The batches of a dataset in order, made ahead by worker processes; may be iterated over again.

    A DataLoader would wrap a worker's `DataError` in a traceback; here it is raised as it was.

    Args:
        dataset: a batch by its key.
        keys: of the batches that are wanted; each iteration goes through them from the start.
        workers: processes; 0 makes the batches in this one.
        prefetch: batches that each worker makes ahead.
    """

    def __init__(
        self, dataset: Dataset[Any], keys: Iterable[Any], workers: int, prefetch: int = 2
    ) -> None:
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


class _ErrorsAsValues(Dataset[Any]):
    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.dataset[key]
        except DataError as error:
            return error


def _limit_threads(worker: int) -> None:
    del worker
    torch.set_num_threads(1)
