"""Independent pieces of CPU work side by side, one thread each, in place of all threads on one after the other."""

from __future__ import annotations

import functools
import os
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Callable, Iterator, Sequence

import torch

Work = Callable[[Iterator[int]], None]
"""Does the pieces whose numbers the iterator gives; without gradient."""

# How much longer than an equal share of all work the largest piece may take: whoever has it last works alone.
LARGEST_SHARE = 1.25
# Handing work to threads takes about as long as this many operations.
SMALLEST_WORK = 20_000_000


def side_by_side(work: Work, operations: Sequence[int]) -> None:
    """Does pieces ``0 .. len(operations) - 1``, the largest first, on as many threads as torch uses in this one.

    A product of few rows is shared badly by several threads: they wait for each other after each. Pieces must not
    write to the same memory. Where there is little to do, one piece is larger than what a thread should get, or torch
    has one thread, this thread does them in order.

    Args:
        work: called by every thread once, all with one iterator.
        operations: floating-point ones of every piece, about.
    """
    threads, total = torch.get_num_threads(), sum(operations)
    is_uneven = max(operations) * threads > LARGEST_SHARE * total
    if threads == 1 or is_uneven or total < SMALLEST_WORK:
        work(iter(range(len(operations))))
        return
    pieces = iter(sorted(range(len(operations)), key=lambda piece: -operations[piece]))
    running = [_threads(os.getpid(), threads).submit(_work, work, pieces) for _ in range(threads)]
    wait(running)
    for done in running:
        done.result()


def _work(work: Work, pieces: Iterator[int]) -> None:
    # Whether gradients are recorded is a setting of a thread.
    with torch.no_grad():
        work(pieces)


@functools.lru_cache(maxsize=1)
def _threads(process: int, number: int) -> ThreadPoolExecutor:
    """Threads in which torch uses one; made anew in a process that was forked, which has none."""
    pool = ThreadPoolExecutor(number, "host", initializer=lambda: torch.set_num_threads(1))
    started: list[Future[None]] = [pool.submit(_started) for _ in range(number)]
    wait(started)
    # It is also what later threads of torch begin with.
    torch.set_num_threads(number)
    return pool


def _started() -> None:
    """Nothing; a thread is made for it."""
