"""Memory that a process gives back while it writes what lies there, and objects that it need not look through."""

from __future__ import annotations

import gc
import mmap
import weakref

import numpy as np
import torch

from megatron_vlmoe.runtime.forked_memory import SharedPages
from megatron_vlmoe.runtime.memory import settled_objects
from megatron_vlmoe.train.checkpoint_writing import with_own_storage

PAGE = mmap.PAGESIZE


def buffer(pages: int) -> torch.Tensor:
    """Bytes from the beginning of a page on, none of them 0."""
    memory = torch.from_numpy(np.frombuffer(mmap.mmap(-1, pages * PAGE, mmap.MAP_PRIVATE), "uint8"))
    return memory.fill_(7)


def empty_bytes(memory: torch.Tensor) -> list[tuple[int, int]]:
    """Where there are zeros, from and to."""
    edges = torch.nonzero(torch.diff(torch.nn.functional.pad((memory == 0).int(), (1, 1))))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def test_only_whole_pages_of_tensors_are_given_back() -> None:
    memory = buffer(10)
    tensor = memory[PAGE + 100 : 5 * PAGE + 10]
    other = memory[7 * PAGE : 7 * PAGE + 50]
    pages = SharedPages([other, tensor, memory[:0]])
    pages.give_back(memory[:0])
    assert empty_bytes(memory) == []
    pages.give_back(tensor)
    assert empty_bytes(memory) == [(2 * PAGE, 5 * PAGE)]
    pages.give_back(other)
    assert empty_bytes(memory) == [(2 * PAGE, 5 * PAGE)]


def test_a_page_goes_when_the_last_tensor_in_it_has_been_read() -> None:
    memory = buffer(8)
    # Two neighbours that meet inside a page, and a second tensor over the first.
    first, second = memory[PAGE : 3 * PAGE + 9], memory[3 * PAGE + 9 : 6 * PAGE]
    again = memory[PAGE : 2 * PAGE]
    pages = SharedPages([second, again, first])
    pages.give_back(first)
    assert empty_bytes(memory) == [(2 * PAGE, 3 * PAGE)]
    pages.give_back(second)
    assert empty_bytes(memory) == [(2 * PAGE, 6 * PAGE)]
    pages.give_back(again)
    assert empty_bytes(memory) == [(PAGE, 6 * PAGE)]


def test_a_piece_of_a_buffer_has_a_storage_of_its_own() -> None:
    for kind in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
        whole = torch.arange(24).to(kind)
        piece = torch.nn.Parameter(whole[4:16].view(3, 4), requires_grad=False)
        alias = with_own_storage(piece)
        assert alias.untyped_storage().nbytes() == 12 * whole.itemsize
        assert alias.dtype == kind and torch.equal(alias, piece)
        whole.zero_()
        assert not alias.any(), "no copy"
    scalar = torch.arange(3.0)[1]
    assert with_own_storage(scalar).shape == () and with_own_storage(scalar) == 1.0
    # What is a storage already, and what has gaps, stays as it is.
    assert with_own_storage(whole) is whole
    with_gaps = torch.arange(24).view(4, 6)[:, :2]
    assert with_own_storage(with_gaps) is with_gaps


class Circle:
    """An object that refers to itself."""

    def __init__(self) -> None:
        self.own = self


def test_objects_of_a_run_are_passed_over_until_it_ends() -> None:
    dead, alive = Circle(), Circle()
    watched = [weakref.ref(dead), weakref.ref(alive)]
    del dead
    with settled_objects():
        assert watched[0]() is None
        del alive
        later = weakref.ref(Circle())
        gc.collect()
        assert watched[1]() is not None and later() is None
    gc.collect()
    assert watched[1]() is None
