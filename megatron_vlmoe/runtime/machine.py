"""What the machine is called, how many of its cores are for whom, and whether its shared memory is enough."""

from __future__ import annotations

import contextlib
import math
import os
import platform
from pathlib import Path

from megatron_vlmoe.config.errors import StartupError

MOST_WORKERS = 8
"""Loader processes that a rank starts by itself: with 2.6 ms for a view, 8 make the 128 of a micro-batch in 42 ms."""


def cores_of_rank() -> int:
    """Cores that are for this rank alone, at least 1.

    torchrun's processes share what they may use. What Slurm gives a task is the rank's own, also where tasks are not
    bound to their cores. Any other launcher has bound a process that may not use the whole machine.
    """
    cores = len(os.sched_getaffinity(0))
    own = os.environ.get("SLURM_CPUS_PER_TASK")
    if "TORCHELASTIC_RUN_ID" in os.environ or (not own and cores == os.cpu_count()):
        cores //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    elif own:
        cores = min(cores, int(own))
    return max(1, cores)


def loader_workers() -> int:
    """Loader processes for which this rank has cores, one left for itself: 1 to `MOST_WORKERS`."""
    return max(1, min(cores_of_rank() - 1, MOST_WORKERS))


def check_shared_memory(batch: int, ahead: int) -> None:
    """Whether shared memory is large enough for the batches that loader processes hand over, which lie in it.

    Compared with its size, not with what is free: other ranks of this node may be loading already.

    Args:
        batch: bytes of a batch.
        ahead: batches that this rank's loader has at the same time; other ranks of the node have as many.

    Raises:
        StartupError: if it is too small, which would otherwise be a bus error in a loader process.
    """
    try:
        found = os.statvfs("/dev/shm")
    except OSError:
        return
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    needed, size = ranks * ahead * batch / 2**20, found.f_blocks * found.f_frsize / 2**20
    if needed > size:
        raise StartupError(
            f"/dev/shm has {size:.0f} MiB, but {ranks} rank(s) with {ahead} batches of {batch / 2**20:.1f} MiB "
            f"each need {needed:.0f} MiB; start docker with --ipc=host or --shm-size={math.ceil(needed / 512)}g, "
            "or lower data.num_workers or data.prefetch"
        )


def processor_name() -> str:
    """The processor's name as Linux tells it, elsewhere its architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if "model name" in line and (name := line.partition(":")[2].strip()):
                return name
    return platform.machine()
