"""Memory of a process: of one that handles one large tensor after another, and of one that trains for long."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from collections.abc import Iterator

# <malloc.h> of glibc.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_MMAP_MAX = -4


def give_back_freed_tensors(above: int = 1 << 20) -> bool:
    """Lets the memory of every freed tensor return to the system at once, for the rest of the process.

    glibc raises the size from which a block has pages of its own, up to 32 MB, with every such block that is freed.
    Smaller tensors then come from its heap, where the little that outlives one leaves a hole too small for the next:
    a converter that holds one tensor at a time ends with many times its memory. A fixed size ends that, at the price
    of fresh pages for every tensor, so training does not ask for it.

    Args:
        above: bytes from which a block has pages of its own.

    Returns:
        False where the C library is another one and nothing was done.
    """
    return _set(_M_MMAP_MAX, 1 << 16) and _set(_M_MMAP_THRESHOLD, above)


def keep_freed_tensors() -> bool:
    """Lets the memory of freed tensors stay with the process for the next ones, for the rest of it.

    A training step needs the memory that the step before has freed. glibc returns blocks of more than 32 MB to the
    system, and what is free at the end of its heap, and gets back pages that have to be cleared: a tenth of a step or
    more, and much more whenever the system is short of pages.

    Returns:
        False where the C library is another one, or the user has told it what to do, and nothing was done.
    """
    told = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
    if any(name in os.environ for name in told) or "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    return _set(_M_MMAP_MAX, 0) and _set(_M_TRIM_THRESHOLD, -1)


def keep_no_large_blocks() -> bool:
    """Ends `keep_freed_tensors` in a forked process: glibc goes on as where it has met the largest blocks it adapts to.

    Returns:
        False where the C library is another one and nothing was done.
    """
    return (
        _set(_M_MMAP_MAX, 1 << 16)
        and _set(_M_MMAP_THRESHOLD, 32 << 20)
        and _set(_M_TRIM_THRESHOLD, 64 << 20)
    )


def _set(option: int, value: int) -> bool:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(option, value) == 1


@contextlib.contextmanager
def settled_objects() -> Iterator[None]:
    """Around a long run: Python's garbage collector passes over what is there when it begins.

    With torch and megatron-core imported and a model built that are half a million objects, which a full collection
    looks through in a quarter of a second; megatron-core asks for one per optimizer in every save. What becomes garbage
    meanwhile and refers to itself is collected when the run is over.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
