"""How long each rank computes, to find the one that the others wait for."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from megatron_vlmoe.runtime.ranks import Ranks

PATIENCE = 3
"""Logged steps in a row at which a rank must be slow: anything may hold one up for a moment."""


class ForwardTimer:
    """Time of the forward passes of training, by the device's own clock where there is a GPU.

    The backward pass ends in collectives, in which fast ranks wait for slow ones; the forward pass has them only with
    tensor or expert parallelism.
    """

    def __init__(self) -> None:
        self._on_gpu = torch.cuda.is_available()
        self._seconds, self._passes = 0.0, 0
        self._events: list[tuple[Any, Any]] = []

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """Around a forward pass."""
        self._passes += 1
        if self._on_gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
            return
        start = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - start

    def take(self) -> float:
        """Mean seconds of the passes since it was last asked; waits for the device, as a logged step does anyway."""
        for begin, end in self._events:
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1e3
        mean = self._seconds / max(self._passes, 1)
        self._seconds, self._passes = 0.0, 0
        self._events.clear()
        return mean


class StragglerWatch:
    """Says once which ranks are slow, when they have been so at several logged steps in a row.

    Args:
        factor: a rank is slow that takes longer than this multiple of the median rank of its pipeline stage.
        ranks: sizes of the layout.
    """

    def __init__(self, factor: float, ranks: Ranks) -> None:
        self.factor, self.ranks = factor, ranks
        self._times_slow: dict[int, int] = {}

    def report(self, seconds: Sequence[float]) -> str:
        """Which ranks have become slow, in words; empty if none has.

        Args:
            seconds: of a forward pass, by rank; stages follow each other.
        """
        size = len(seconds) // self.ranks.pipeline_size
        slow = {}
        for rank, own in enumerate(seconds):
            stage = seconds[rank // size * size : (rank // size + 1) * size]
            median = statistics.median(stage)
            if own > self.factor * median:
                slow[rank] = own / median
        self._times_slow = {rank: self._times_slow.get(rank, 0) + 1 for rank in slow}
        return "; ".join(
            f"rank {rank} on node {rank // self.ranks.local_world_size} takes {slow[rank]:.2f} times as long as the "
            "median rank"
            for rank, times in self._times_slow.items()
            if times == PATIENCE
        )
