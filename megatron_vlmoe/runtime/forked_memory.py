"""Memory that a forked process shares with its parent until one of them writes to it."""

from __future__ import annotations

import bisect
import ctypes
import mmap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

# <sys/mman.h> of Linux.
_MADV_DONTNEED = 4
# Here, not where it is called: a library must not be loaded in a forked child, whose locks may be held by nobody.
_madvise = ctypes.CDLL(None).madvise


@dataclass(frozen=True)
class _Region:
    """Memory from a byte on, all of it in tensors: its first whole page, and the tensors to be read from each."""

    start: int
    first: int
    readers: NDArray[np.uint16]


class SharedPages:
    """The pages of a forked process that lie wholly in some tensors, which it reads once each and then gives back.

    A page that both processes still have is copied when the parent writes to it. Given back, it is the parent's alone,
    and costs it nothing; a huge page stays one.

    Args:
        tensors: all that will be read, contiguous. They may share memory with each other; what else lies in their
            pages stays.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.regions: list[_Region] = []
        for start, end in _without_gaps(sorted(_range(own) for own in tensors if own.nbytes)):
            first, last = -(-start // mmap.PAGESIZE), end // mmap.PAGESIZE
            self.regions.append(_Region(start, first, np.zeros(max(last - first, 0), np.uint16)))
        self.starts = [region.start for region in self.regions]
        for tensor in tensors:
            self._pages(tensor)[1][:] += 1

    def give_back(self, tensor: Tensor) -> None:
        """After a tensor of those has been read: its pages that no other one needs become empty in this process."""
        first, readers = self._pages(tensor)
        readers -= 1
        edges = np.flatnonzero(np.diff(np.concatenate(([False], readers == 0, [False]))))
        for begin, end in edges.reshape(-1, 2).tolist():
            address, size = (first + begin) * mmap.PAGESIZE, (end - begin) * mmap.PAGESIZE
            _madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), _MADV_DONTNEED)

    def _pages(self, tensor: Tensor) -> tuple[int, NDArray[np.uint16]]:
        """Of the pages that a tensor touches the number of the first, and how many tensors are still to be read."""
        start, end = _range(tensor)
        if start == end:
            return 0, np.zeros(0, np.uint16)
        region = self.regions[bisect.bisect_right(self.starts, start) - 1]
        begin = max(start // mmap.PAGESIZE - region.first, 0)
        stop = max(-(-end // mmap.PAGESIZE) - region.first, 0)
        return region.first + begin, region.readers[begin:stop]


def _range(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes


def _without_gaps(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted ranges, those joined that touch."""
    joined: list[tuple[int, int]] = []
    for start, end in ranges:
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((start, end))
    return joined
