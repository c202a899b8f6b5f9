"""What the contenders of the benchmark `moe_layer` compute: weights, tokens, their assignment, and what must come out.

Tokens are made so that the router's weight decides how they spread: every contender routes by itself, and all carry
out the same assignments. No auxiliary loss and no noise.

Letters: T tokens, D width, F = 4 D inner width, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Literal, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_vlmoe.benchmarks.compare import require_close
from megatron_vlmoe.runtime.distributed import device

# Logits of the chosen experts, best first; every other logit is 0.
CHOSEN_LOGITS = (4.0, 3.0)


@dataclass(frozen=True)
class Case:
    """What is measured.

    Args:
        tokens: T, a multiple of 128.
        width: D.
        experts: E.
        topk: K, 1 or 2.
        load: `balanced` gives every expert the same number of tokens, `skewed` from 1.75 to 0.25 times their mean, from
            the first to the last. Nothing is dropped in either: fixed capacity has the slots that the fullest needs.
        gradients: `new` ones in every pass, as PyTorch makes them, or added to buffers that stay (`main_grad`), as in
            training with megatron-core.
    """

    tokens: int
    width: int
    experts: int
    topk: int
    load: Literal["balanced", "skewed"]
    gradients: Literal["new", "main_grad"] = "new"


class Problem(NamedTuple):
    """The weights and tokens that all contenders of a case share, and what must come out.

    Args:
        router: ``[E, D]``.
        fc1: ``[E, F, D]``; fc2: ``[E, D, F]``. Biases are zero.
        tokens: ``[T, D]``.
        upstream: gradient of the outputs ``[T, D]``.
        expert: chosen experts ``[T, K]``; gate: their softmax over all E.
        capacity_factor: smallest that drops nothing.
    """

    case: Case
    router: Tensor
    fc1: Tensor
    fc2: Tensor
    tokens: Tensor
    upstream: Tensor
    expert: Tensor
    gate: Tensor
    capacity_factor: float


def make_problem(case: Case, dtype: torch.dtype) -> Problem:
    """Weights, tokens and their assignment, from a fixed seed, on the device."""
    generator = torch.Generator().manual_seed(1)
    width, inner, experts = case.width, 4 * case.width, case.experts
    if experts > width:
        raise ValueError(f"{experts} experts need a width of at least {experts}, got {width}")
    router = torch.linalg.qr(torch.randn(width, experts, generator=generator)).Q.T.contiguous()
    if case.load == "balanced":
        share = torch.ones(experts)
    else:
        share = torch.linspace(1.75, 0.25, experts)
    # Largest remainders, so that counts add up to T.
    exact = share / share.sum() * case.tokens
    counts = exact.floor().long()
    order = (exact - counts).argsort(descending=True, stable=True)
    counts[order[: case.tokens - int(counts.sum())]] += 1
    first = torch.repeat_interleave(torch.arange(experts), counts)
    first = first[torch.randperm(case.tokens, generator=generator)]
    # The second choice is as unevenly spread as the first, only to other experts.
    chosen = torch.stack([(first + choice) % experts for choice in range(case.topk)], dim=1)
    tokens = torch.randn(case.tokens, width, generator=generator)
    tokens -= tokens @ router.T @ router
    logits = torch.zeros(case.tokens, experts)
    logits.scatter_(1, chosen, torch.tensor(CHOSEN_LOGITS[: case.topk]).expand_as(chosen))
    tokens += logits @ router
    load = torch.bincount(chosen.flatten(), minlength=experts)

    def placed(value: Tensor) -> Tensor:
        return value.to(device(), dtype)

    return Problem(
        case=case,
        router=router.to(device()),
        fc1=placed(torch.randn(experts, inner, width, generator=generator) * width**-0.5),
        fc2=placed(torch.randn(experts, width, inner, generator=generator) * inner**-0.5),
        tokens=placed(tokens),
        upstream=placed(torch.randn(case.tokens, width, generator=generator)),
        expert=chosen.to(device()),
        gate=torch.softmax(logits, dim=1).gather(1, chosen).to(device()),
        capacity_factor=float(load.max()) * experts / (case.tokens * case.topk),
    )


class Layer(NamedTuple):
    """A built contender.

    Args:
        forward: the layer as a function ``[T, D]`` to ``[T, D]``.
        parameters: those that get gradients.
        gates_of_chosen: whether a token's gates are divided by their sum.
        gelu_approximation: `none`, or `tanh` where it has no other GELU.
    """

    forward: Callable[[Tensor], Tensor]
    parameters: Sequence[nn.Parameter]
    gates_of_chosen: bool = False
    gelu_approximation: str = "none"


def check(problem: Problem, name: str, layer: Layer) -> None:
    """Compares a contender's outputs and the gradient of the tokens with those of a plain loop over experts.

    Raises:
        RuntimeError: they differ by more than rounding.
    """
    tokens = problem.tokens.detach().requires_grad_()
    output = layer.forward(tokens)
    (found,) = torch.autograd.grad(output, tokens, problem.upstream)
    gate, kind = problem.gate, layer.gelu_approximation
    if layer.gates_of_chosen:
        gate = gate / gate.sum(dim=1, keepdim=True)
    expected = torch.zeros_like(tokens)
    through = torch.zeros_like(tokens)
    dot = torch.zeros_like(gate)
    with torch.no_grad():
        for number in range(problem.case.experts):
            token, choice = torch.where(problem.expert == number)
            own = gate[token, choice, None].to(tokens.dtype)
            inner = tokens[token] @ problem.fc1[number].T
            result = F.gelu(inner, approximate=kind) @ problem.fc2[number].T
            expected.index_add_(0, token, own * result)
            dot[token, choice] = (result * problem.upstream[token]).sum(dim=1).to(dot.dtype)
            grad = (own * problem.upstream[token]) @ problem.fc2[number]
            grad = torch.ops.aten.gelu_backward(grad, inner, approximate=kind)
            through.index_add_(0, token, grad @ problem.fc1[number])
    # The part of the gradient that goes through the gates.
    logits = (tokens.detach().float() @ problem.router.T).requires_grad_()
    gates = torch.softmax(logits, dim=1).gather(1, problem.expert)
    if layer.gates_of_chosen:
        gates = gates / gates.sum(dim=1, keepdim=True)
    (of_logits,) = torch.autograd.grad(gates, logits, dot)
    through += (of_logits @ problem.router).to(through.dtype)
    for what, own, wanted in (("output", output, expected), ("gradient", found, through)):
        require_close(f"{problem.case}: the {what} of {name} is", own, wanted)
