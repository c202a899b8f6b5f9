"""What the machine is called, and how many of its cores are for whom."""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path

MOST_WORKERS = 8
"""Loader processes that a rank starts by itself: with 2.6 ms for a view, 8 make the 128 of a micro-batch in 42 ms."""


def cores_of_rank() -> int:
    """Cores that are for this rank alone, at least 1.

    torchrun's processes share what they may use. What Slurm gives a task is the rank's own, also where tasks are not
    bound to their cores; any other launcher is taken to bind them.
    """
    cores = len(os.sched_getaffinity(0))
    if "TORCHELASTIC_RUN_ID" in os.environ:
        cores //= int(os.environ["LOCAL_WORLD_SIZE"])
    elif own := os.environ.get("SLURM_CPUS_PER_TASK"):
        cores = min(cores, int(own))
    return max(1, cores)


def loader_workers() -> int:
    """Loader processes for which this rank has cores, one left for itself: 1 to `MOST_WORKERS`."""
    return max(1, min(cores_of_rank() - 1, MOST_WORKERS))


def processor_name() -> str:
    """The processor's name as Linux tells it, elsewhere its architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if "model name" in line and (name := line.partition(":")[2].strip()):
                return name
    return platform.machine()
