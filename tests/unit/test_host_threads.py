"""Pieces of work on several threads: each is done once, and what the threads of torch do stays as it was."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Iterator

import pytest
import torch

from megatron_vlmoe.convert.hf import moe_vlmoe
from megatron_vlmoe.moe.experts import one_by_one
from megatron_vlmoe.runtime import host_threads
from megatron_vlmoe.runtime.host_threads import side_by_side


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: Any) -> Iterator[None]:
    """As torch has on two cores, and no piece too small for them."""
    monkeypatch.setattr(host_threads, "SMALLEST_WORK", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def shared(operations: list[int]) -> dict[int, tuple[str, int]]:
    """Of every piece, the thread that did it and how many threads torch had there; the first two wait for each
    other."""
    done: dict[int, tuple[str, int]] = {}
    together = threading.Barrier(2)

    def work(pieces: Iterator[int]) -> None:
        name = threading.current_thread().name
        if name != threading.main_thread().name:
            together.wait(timeout=30)
        for piece in pieces:
            assert piece not in done and not (name.startswith("host") and torch.is_grad_enabled())
            done[piece] = (name, torch.get_num_threads())

    side_by_side(work, operations)
    assert torch.get_num_threads() == 2
    return done


def test_every_piece_is_done_once_with_one_thread_of_torch() -> None:
    done = shared([3, 0, 5, 4, 4])
    assert sorted(done) == [0, 1, 2, 3, 4]
    # Largest first.
    assert list(done)[0] == 2 and list(done)[-1] == 1
    assert all(name.startswith("host") and threads == 1 for name, threads in done.values())


@pytest.mark.parametrize("operations", [[1, 9, 1], [0, 0], [7]])
def test_one_large_piece_gets_all_threads(operations: list[int]) -> None:
    done = shared(operations)
    assert list(done) == list(range(len(operations)))
    assert all(own == (threading.current_thread().name, 2) for own in done.values())


def test_an_error_reaches_the_caller() -> None:
    def work(pieces: Iterator[int]) -> None:
        raise ValueError("in a thread")

    with pytest.raises(ValueError, match="in a thread"):
        side_by_side(work, [1, 1])


def _in_child(results: Any) -> None:
    results.put(sorted(shared([1, 1, 1])))


@pytest.mark.process
def test_a_forked_process_has_threads_of_its_own() -> None:
    shared([1, 1])
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=_in_child, args=(results,))
    child.start()
    assert results.get(timeout=30) == [0, 1, 2]
    child.join(timeout=30)
    assert child.exitcode == 0


def test_pieces_may_write_to_tensors_of_inference() -> None:
    with torch.inference_mode():
        written = torch.zeros(4)

        def work(pieces: Iterator[int]) -> None:
            for piece in pieces:
                written[piece] = piece

        side_by_side(work, [1, 1, 1, 1])
    assert written.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("share", [side_by_side, moe_vlmoe._side_by_side])
def test_a_program_that_ends_computes_in_the_thread_that_it_has(
    share: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads that outlive the main one may start no work in others."""

    def submit(*_: object) -> None:
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    monkeypatch.setattr(ThreadPoolExecutor, "submit", submit)
    done: list[int] = []
    share(done.extend, [1] * 4)
    assert sorted(done) == [0, 1, 2, 3]


def test_experts_side_by_side_are_those_one_by_one() -> None:
    """With an expert without rows and rows of none; outputs, all gradients, and the sums in megatron-core's buffers."""
    torch.manual_seed(0)
    experts, width, inner = 4, 6, 10
    shapes = ((experts, inner, width), (experts, inner), (experts, width, inner), (experts, width))
    values = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    rows, upstream = torch.randn(2, experts, 5, width, dtype=torch.float64)
    counts = torch.tensor([5, 4, 0, 5])
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        parameters = [value.clone().requires_grad_() for value in values]
        buffers = [torch.ones_like(value) for value in values[::2]]
        for parameter, buffer in zip(parameters[::2], buffers):
            parameter.main_grad = buffer  # type: ignore[attr-defined]
        own = rows.clone().requires_grad_()
        output = one_by_one(own, counts, *parameters)
        output.backward(upstream)
        found.append([output, own.grad, *buffers, *(bias.grad for bias in parameters[1::2])])
    for alone, together in zip(*found):
        torch.testing.assert_close(together, alone)
