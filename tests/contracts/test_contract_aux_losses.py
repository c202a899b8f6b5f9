"""Auxiliary losses against values computed with V-MoE's own functions and against finite differences."""

from __future__ import annotations

import math
from typing import Any, Callable

import pytest
import torch
from torch import Tensor

from megatron_vlmoe.moe.aux_losses import (
    gshard_loss,
    importance_loss,
    load_loss,
    vloss,
    z_loss,
)

SIGMA = 0.25
CLEAN = torch.tensor(
    [
        [2.0, 1.0, 0.5, 0.0],
        [1.5, 0.2, 1.4, -0.3],
        [0.1, 2.2, 0.3, 0.9],
        [3.0, 0.4, -0.6, 1.1],
        [0.9, 0.85, 0.8, 0.75],
        [1.6, -0.5, 0.4, 2.1],
    ],
    dtype=torch.float64,
)
NOISE = torch.tensor(
    [
        [0.10, -0.20, 0.05, 0.30],
        [-0.25, 0.15, 0.20, -0.10],
        [0.05, -0.30, 0.40, 0.25],
        [-0.15, 0.35, -0.05, 0.10],
        [-0.10, 0.20, 0.30, -0.40],
        [0.45, -0.15, -0.35, -0.20],
    ],
    dtype=torch.float64,
)
NOISY = CLEAN + NOISE
VISION = torch.tensor([True, True, False, True, False, False])

LOSSES: dict[str, Callable[..., Tensor]] = {
    "importance": lambda a, n, **kw: importance_loss(a, **kw),
    "load k=1": lambda a, n, **kw: load_loss(a, n, 1, SIGMA, **kw),
    "load k=2": lambda a, n, **kw: load_loss(a, n, 2, SIGMA, **kw),
    "vloss k=1": lambda a, n, **kw: vloss(a, n, 1, SIGMA, **kw),
    "vloss k=2": lambda a, n, **kw: vloss(a, n, 2, SIGMA, **kw),
    "z": lambda a, n, **kw: z_loss(a, **kw),
    "gshard k=1": lambda a, n, **kw: gshard_loss(a, 1, **kw),
    "gshard k=2": lambda a, n, **kw: gshard_loss(a, 2, **kw),
}
GOLDEN = {
    "importance": 0.1493628234,
    "load k=1": 0.2891853986,
    "load k=2": 0.1942788155,
    "vloss k=1": 0.2192741110,
    "vloss k=2": 0.1718208195,
    "z": 6.9426143691,
    "gshard k=1": 1.3846585653,
    "gshard k=2": 1.1670604900,
}
# On tokens 0, 1, 3 and on tokens 2, 4, 5.
SUBSETS = {
    "importance": (0.6761608987, 0.0791882512),
    "load k=1": (2.0938087376, 0.4981095469),
    "load k=2": (0.6419212487, 0.3927779077),
    "vloss k=1": (1.3849848182, 0.2886488991),
    "vloss k=2": (0.6590410737, 0.2359830795),
    "z": (7.4684602079, 6.4167685303),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name: str) -> None:
    value = LOSSES[name](CLEAN, NOISY)
    assert value.shape == ()
    tolerance = 1e-6 if name.startswith("gshard") else 1e-8
    assert value.item() == pytest.approx(GOLDEN[name], abs=tolerance)


@pytest.mark.parametrize("name", SUBSETS)
def test_mask_selects_the_tokens_that_count(name: str) -> None:
    for mask, expected in zip((VISION, ~VISION), SUBSETS[name]):
        value = LOSSES[name](CLEAN, NOISY, mask=mask)
        assert value.item() == pytest.approx(expected, abs=1e-8)
        # What padding holds has no influence.
        huge = torch.where(mask[:, None], CLEAN, torch.full_like(CLEAN, 300.0))
        assert LOSSES[name](huge, huge + NOISE, mask=mask).item() == pytest.approx(
            expected, abs=1e-8
        )


@pytest.mark.parametrize("name", GOLDEN)
def test_mask_of_all_tokens_is_no_mask(name: str) -> None:
    every = torch.ones(6, dtype=torch.bool)
    torch.testing.assert_close(
        LOSSES[name](CLEAN, NOISY, mask=every), LOSSES[name](CLEAN, NOISY), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("name", GOLDEN)
def test_no_token_gives_zero_with_a_graph(name: str) -> None:
    logits = CLEAN.clone().requires_grad_()
    value = LOSSES[name](logits, logits + NOISE, mask=torch.zeros(6, dtype=torch.bool))
    assert value.item() == 0.0
    value.backward()
    assert logits.grad is not None and (logits.grad == 0).all()


@pytest.mark.parametrize("name", GOLDEN)
def test_gradient_by_finite_differences(name: str) -> None:
    assert torch.autograd.gradcheck(
        lambda a, n: LOSSES[name](a, n),
        (CLEAN.clone().requires_grad_(), NOISY.clone().requires_grad_()),
    )


@pytest.mark.parametrize("name", GOLDEN)
def test_masked_tokens_get_no_gradient(name: str) -> None:
    logits = CLEAN.clone().requires_grad_()
    LOSSES[name](logits, logits + NOISE, mask=VISION).backward()
    assert logits.grad is not None
    assert (logits.grad[~VISION] == 0).all()
    assert (logits.grad[VISION] != 0).any()


@pytest.mark.parametrize(
    "k, norm, row",
    [
        (1, 0.5590163201, [0.0346338921, -0.0144270002, -0.0138656675, -0.0063412243]),
        (2, 0.3124048067, [0.0346306307, 0.0543514868, -0.0820698389, -0.0069122786]),
    ],
)
def test_gradient_flows_through_the_threshold(k: int, norm: float, row: list[float]) -> None:
    logits = CLEAN.clone().requires_grad_()
    vloss(logits, logits + NOISE, k, SIGMA).backward()
    assert logits.grad is not None
    assert logits.grad.norm().item() == pytest.approx(norm, abs=1e-8)
    assert logits.grad[0].tolist() == pytest.approx(row, abs=1e-8)


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_float_dtype(name: str, dtype: torch.dtype) -> None:
    clean, noisy = CLEAN.to(dtype), NOISY.to(dtype)
    exact = LOSSES[name](clean.double(), noisy.double()).item()
    value = LOSSES[name](clean, noisy)
    assert value.shape == ()
    # The inputs are rounded alike; what is left is the arithmetic, which must not be done in 8 bits.
    assert value.item() == pytest.approx(exact, rel=5e-3, abs=1e-4)


def test_values_of_the_v_moe_unit_tests() -> None:
    gates = torch.tensor(
        [[0.5, 0.4, 0.1], [0.3, 0.3, 0.4], [0.1, 0.2, 0.7], [0.8, 0.2, 1e-30]], dtype=torch.float64
    )
    assert importance_loss(gates.log()).item() == pytest.approx(0.03875, abs=1e-8)
    logits = torch.tensor(
        [[0.9, 0.06, 0.04], [0.7, 0.18, 0.12], [0.85, 0.05, 0.1]], dtype=torch.float64
    )
    noise = torch.tensor(
        [[-0.037, 0.026, -0.018], [-0.074, 0.045, -0.015], [-0.067, -0.059, 0.073]],
        dtype=torch.float64,
    )
    value = load_loss(logits, logits + noise, 2, 0.1)
    assert value.item() == pytest.approx(0.4857384726, abs=1e-8)


@pytest.mark.parametrize("sigma", [1 / 32, 0.5])
def test_noise_std_is_the_standard_deviation_itself(sigma: float) -> None:
    """The load of an expert: probability that its logit with fresh noise is among the k largest."""
    k, load = 2, [0.0] * 4
    for clean, noisy in zip(CLEAN.tolist(), NOISY.tolist()):
        threshold = sorted(noisy)[-k]
        for expert, logit in enumerate(clean):
            load[expert] += 0.5 * (1 + math.erf((logit - threshold) / sigma / math.sqrt(2)))
    mean = sum(load) / 4
    expected = sum((v - mean) ** 2 for v in load) / 4 / mean**2
    assert load_loss(CLEAN, NOISY, k, sigma).item() == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("name", GOLDEN)
def test_perfect_balance_has_a_finite_gradient(name: str) -> None:
    logits = (2.0 * torch.eye(4, dtype=torch.float64)).requires_grad_()
    value = LOSSES[name](logits, logits)
    value.backward()
    assert logits.grad is not None and torch.isfinite(logits.grad).all()
    if name.startswith("gshard"):
        assert value.item() == pytest.approx(1.0)
    elif name != "z":
        assert value.item() == pytest.approx(0.0, abs=1e-12)


def test_gshard_is_one_when_all_gates_are_equal_and_large_when_collapsed() -> None:
    experts = 8
    collapsed: Any = torch.zeros(16, experts, dtype=torch.float64)
    collapsed[:, 3] = 50.0
    assert gshard_loss(collapsed, 1).item() == pytest.approx(experts)
