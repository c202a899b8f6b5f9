"""Batch Priority Routing against recorded values and a plain reading of its definition."""

from __future__ import annotations

import math
import random
from typing import Sequence

import pytest
import torch
from test_contract_aux_losses import CLEAN, NOISY
from torch import Tensor

from megatron_vlmoe.moe.routing_ops import batch_priority_route, expert_capacity

SIX = CLEAN.softmax(-1)
NOISY_SIX = NOISY.softmax(-1)
EIGHT = torch.cat(
    [CLEAN, torch.tensor([[1.0, 0.9, -1.0, 0.2], [-0.2, 0.3, 1.7, 0.5]], dtype=torch.float64)]
).softmax(-1)
TIES = torch.tensor(
    [
        [0.4, 0.3, 0.2, 0.1],
        [0.4, 0.3, 0.2, 0.1],
        [0.4, 0.2, 0.3, 0.1],
        [0.6, 0.2, 0.1, 0.1],
        [0.25, 0.25, 0.25, 0.25],
        [0.1, 0.1, 0.4, 0.4],
    ],
    dtype=torch.float64,
)


def bits(keep: Tensor) -> str:
    return " ".join("".join(str(int(b)) for b in row) for row in keep.tolist())


@pytest.mark.parametrize(
    "gates, k, capacity, expected",
    [
        (SIX, 1, 1, "0000 0000 0100 1000 0000 0001"),
        (SIX, 1, 2, "1000 0000 0100 1000 0000 0001"),
        (SIX, 2, 2, "1100 0010 0100 1001 0000 0001"),
        (SIX, 2, 3, "1100 1010 0101 1001 0100 0001"),
        (SIX, 2, 4, "1100 1010 0101 1001 1100 0001"),
        (NOISY_SIX, 1, 1, "0000 0010 0100 1000 0000 0000"),
        (NOISY_SIX, 1, 2, "1000 0010 0100 1000 0010 0000"),
        (NOISY_SIX, 2, 2, "1100 0010 0101 1001 0010 0000"),
        (NOISY_SIX, 2, 3, "1100 0010 0101 1001 0110 1001"),
        (NOISY_SIX, 2, 4, "1100 1010 0101 1001 0110 1001"),
        (EIGHT, 1, 1, "0000 0000 0100 1000 0000 0001 0000 0010"),
        (EIGHT, 1, 2, "1000 0000 0100 1000 0000 0001 0000 0010"),
        (EIGHT, 1, 3, "1000 1000 0100 1000 0000 0001 0000 0010"),
        (EIGHT, 2, 4, "1100 1010 0101 1001 0100 0001 1100 0011"),
        (TIES, 1, 1, "0000 0000 0000 1000 0000 0010"),
        (TIES, 1, 2, "1000 0000 0000 1000 0000 0010"),
        (TIES, 1, 3, "1000 1000 0000 1000 0000 0010"),
        (TIES, 2, 2, "1100 0000 0010 1100 0000 0011"),
    ],
)
def test_golden_choices(gates: Tensor, k: int, capacity: int, expected: str) -> None:
    keep, position = batch_priority_route(gates, k, capacity)
    assert bits(keep) == expected
    assert keep.dtype is torch.bool and keep.shape == position.shape == gates.shape
    assert not position.is_floating_point()
    assert ((position >= 0) == keep).all() and (position[~keep] == -1).all()


def test_golden_positions() -> None:
    keep, position = batch_priority_route(SIX, 2, 6)
    experts = [[0, 1], [0, 2], [1, 3], [0, 3], [0, 1], [3, 0]]
    slots = [[1, 1], [2, 0], [0, 2], [0, 1], [3, 2], [0, 4]]
    for token, (chosen, where) in enumerate(zip(experts, slots)):
        assert sorted(keep[token].nonzero().flatten().tolist()) == sorted(chosen)
        assert position[token, chosen].tolist() == where


def plain_route(
    gates: Sequence[Sequence[float]], k: int, capacity: int, mask: Sequence[bool]
) -> list[list[int]]:
    """The definition, one token after the other: positions, -1 where not kept."""
    tokens = [t for t in range(len(gates)) if mask[t]]
    choices = {t: sorted(range(len(gates[t])), key=lambda e: (-gates[t][e], e))[:k] for t in tokens}
    order = sorted(tokens, key=lambda t: (-max(gates[t]), t))
    position = [[-1] * len(gates[0]) for _ in gates]
    taken = [0] * len(gates[0])
    for rank in range(k):
        for token in order:
            expert = choices[token][rank]
            if taken[expert] < capacity:
                position[token][expert] = taken[expert]
            taken[expert] += 1
    return position


@pytest.mark.parametrize("seed", range(40))
def test_random_cases_with_ties_and_masks(seed: int) -> None:
    rng = random.Random(seed)
    tokens, experts = rng.randint(1, 40), rng.randint(1, 8)
    k, capacity = rng.randint(1, experts), rng.randint(1, tokens)
    # Few values make many ties, between tokens and between experts.
    gates = [[rng.randint(1, 6) / 16 for _ in range(experts)] for _ in range(tokens)]
    mask = [rng.random() < 0.7 for _ in range(tokens)]
    for tensor_mask, plain_mask in ((torch.tensor(mask), mask), (None, [True] * tokens)):
        keep, position = batch_priority_route(torch.tensor(gates), k, capacity, tensor_mask)
        expected = plain_route(gates, k, capacity, plain_mask)
        assert position.tolist() == expected
        assert keep.tolist() == [[p >= 0 for p in row] for row in expected]


def test_masked_tokens_take_no_place() -> None:
    gates = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]])
    keep, position = batch_priority_route(gates, 1, 1, torch.tensor([False, True, True]))
    assert bits(keep) == "00 10 00"
    assert position.tolist() == [[-1, -1], [0, -1], [-1, -1]]
    keep, _ = batch_priority_route(gates, 1, 3, torch.zeros(3, dtype=torch.bool))
    assert not keep.any()


@pytest.mark.parametrize(
    "tokens, factor, expected",
    [
        (12608, 1.05, 414),
        (12608, 1.0, 394),
        (8192, 1.05, 269),
        (8192, 1.0, 256),
        (197, 1.05, 7),
        (128, 1.05, 5),
        (1, 1.05, 1),
        (3, 0.1, 1),
        (20, 64.0, 20),
        (20, 0.0, 20),
        (20, -1.0, 20),
    ],
)
def test_capacity_of_32_experts(tokens: int, factor: float, expected: int) -> None:
    assert expert_capacity(tokens, 32, 1, factor) == expected


def test_capacity_is_the_float_formula() -> None:
    assert expert_capacity(40, 6, 1, 1.05) == 7
    for tokens in (1, 5, 96, 197, 400, 1000):
        for experts in (1, 4, 6, 8):
            for k in range(1, min(2, experts) + 1):
                for factor in (0.5, 1.0, 1.05, 1.1, 2.0):
                    expected = max(1, min(tokens, math.ceil(tokens * k * factor / experts)))
                    value = expert_capacity(tokens, experts, k, factor)
                    assert value == expected and isinstance(value, int)


@pytest.mark.parametrize(
    "tokens, factor, expected", [(12608, 1.05, 416), (8192, 1.05, 272), (197, 1.05, 8)]
)
def test_capacity_is_rounded_up_to_a_multiple(tokens: int, factor: float, expected: int) -> None:
    assert expert_capacity(tokens, 32, 1, factor, multiple_of=4) == expected
