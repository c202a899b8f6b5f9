"""Compiled functions equal what they are made from; without a compiler a run goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vlmoe.model.block import add_branch
from megatron_vlmoe.model.heads import cross_entropy
from megatron_vlmoe.moe.aux_losses import compute_router_statistics, losses_from_statistics
from megatron_vlmoe.moe.experts import batched, bias_gelu
from megatron_vlmoe.moe.routing_ops import route_slots
from megatron_vlmoe.runtime import compiled as module
from megatron_vlmoe.runtime.compiled import compiled

TERMS = ("importance", "load", "z", "gshard")


@pytest.fixture
def fresh() -> Iterator[None]:
    """Nothing has been compiled in this process, and nothing is afterwards."""
    torch._dynamo.reset()
    module._compiled.cache_clear()
    yield
    module._compiled.cache_clear()
    module._Process.failed = False


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == module.__name__]


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def outcome(function: Callable[..., Tensor], *arguments: Any) -> list[Tensor]:
    """Output and gradients."""
    output = function(*arguments)
    leaves = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
    upstream = torch.linspace(0.5, 2.0, output.numel()).view_as(output).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream)]


def losses(wanted: bool, clean: Tensor, noise: Tensor, mask: Tensor) -> Tensor:
    sums = compiled(compute_router_statistics, wanted)(clean, clean + noise, 1, 0.25, TERMS, mask)
    found = compiled(losses_from_statistics, wanted)(sums, TERMS, clean.shape[1], 1)
    return torch.stack(list(found.values()))


@pytest.mark.process
def test_compiled_functions_equal_eager_ones(fresh: None, caplog: pytest.LogCaptureFixture) -> None:
    """With the compiler of this machine, values and gradients; where tokens go is the same."""
    cpp = pytest.importorskip("torch._inductor.cpp_builder")
    try:
        cpp.get_cpp_compiler()
    except Exception as error:
        pytest.skip(f"no C++ compiler: {error}")
    torch.manual_seed(1)
    experts = (draw(2, 5, 4), draw(2, 8, 4), draw(2, 8), draw(2, 4, 8), draw(2, 4))
    branch = (draw(6, 1, 4), draw(6, 1, 4), draw(4), draw(4), torch.rand(6, 1, 1))
    clean, noise, mask = draw(12, 4), torch.randn(12, 4), torch.arange(12) < 9
    logits, labels = draw(6, 128, dtype=torch.bfloat16), torch.tensor([0, 99, -100, 5, 5, -100])
    cases: dict[str, tuple[Callable[[bool], Callable[..., Tensor]], tuple[Any, ...], float]] = {
        "experts": (lambda wanted: partial(batched, compile=wanted), experts, 1e-5),
        "the end of a branch": (lambda wanted: compiled(add_branch, wanted), branch, 1e-5),
        "router losses": (lambda wanted: partial(losses, wanted), (clean, noise, mask), 1e-5),
        "cross entropy": (
            lambda wanted: compiled(cross_entropy, wanted),
            (logits, labels, 100),
            1e-2,
        ),
    }
    for name, (function, arguments, tolerance) in cases.items():
        actual, expected = (outcome(function(wanted), *arguments) for wanted in (True, False))
        for own, plain in zip(actual, expected, strict=True):
            assert plain.abs().max() > 0, name
            torch.testing.assert_close(own, plain, rtol=tolerance, atol=tolerance)
    gate, expert = torch.softmax(noise, dim=1).max(dim=1, keepdim=True)
    routed, plain = (
        vars(compiled(route_slots, wanted)(gate, expert, 4, 2, mask)) for wanted in (True, False)
    )
    assert all(torch.equal(routed[key], plain[key]) for key in plain)
    assert not warnings(caplog), "nothing has fallen back"


def test_one_line_says_that_nothing_is_compiled(
    fresh: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler(function: Any, **options: Any) -> Any:
        def call(*args: Any) -> Any:
            raise RuntimeError("no compiler\nwith its traceback")

        return call

    monkeypatch.setattr(torch, "compile", no_compiler)
    rows, bias = torch.randn(3, 4), torch.randn(4)

    def other(rows: Tensor) -> Tensor:
        return rows + 1

    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(compiled(bias_gelu, True)(rows, bias), F.gelu(rows + bias))
            assert torch.equal(compiled(other, True)(rows), rows + 1)
    (text,) = warnings(caplog)
    assert "bias_gelu" in text and "no compiler" in text and "\n" not in text
