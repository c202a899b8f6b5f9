"""Independent pieces of CPU work side by side, one thread each, in place of all threads on one after the other."""

from __future__ import annotations

import functools
import os
import threading
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
    # Whether gradients are recorded, and whether tensors are those of inference, are settings of a thread.
    mode = torch.inference_mode() if torch.is_inference_mode_enabled() else torch.no_grad()
    running: list[Future[None]] = []
    try:
        pool = _threads(os.getpid(), threads)
        for _ in range(threads):
            running.append(pool.submit(mode(work), pieces))
    except RuntimeError:
        # A program whose main thread has ended starts no work in others: this one does what is left.
        work(pieces)
    wait(running)
    for done in running:
        done.result()


@functools.lru_cache(maxsize=1)
def _threads(process: int, number: int) -> ThreadPoolExecutor:
    """Threads in which torch uses one; made anew in a process that was forked, which has none."""

    def begin() -> None:
        # Asking comes first: torch sets a thread's number by the process's when the thread first needs it.
        torch.get_num_threads()
        torch.set_num_threads(1)

    pool = ThreadPoolExecutor(number, "host", initializer=begin)
    # All of them now: a thread is only made for work that finds none idle.
    together = threading.Barrier(number)
    wait([pool.submit(together.wait) for _ in range(number)])
    # It is also what later threads of torch begin with.
    torch.set_num_threads(number)
    return pool
