"""Memory of a process: of one that handles one large tensor after another, and of one that trains for long."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator

# <malloc.h> of glibc.
_M_MMAP_THRESHOLD = -3


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
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(_M_MMAP_THRESHOLD, above) == 1


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
