"""Auxiliary losses against golden values, finite differences and the rules for empty batches.

The golden values were computed in float64 with the functions of google-research/vmoe and by an
independent derivation; the LIMoE ones from the definition of entropy.
"""

import math
from collections.abc import Callable

import pytest
import torch
from router_functions import (
    global_entropy_loss,
    gshard_loss,
    importance_loss,
    load_loss,
    local_entropy_loss,
    vloss,
    z_loss,
)
from torch import Tensor

from megatron_vlmoe.moe.aux_losses import (
    compute_router_statistics,
    losses_from_statistics,
    statistics_size,
)
from megatron_vlmoe.stream.sizes import TERMS

LOGITS = torch.tensor(
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
NOISY = LOGITS + NOISE
SIGMA = 0.25
VISION = torch.tensor([True, True, False, True, False, False])
TEXT = ~VISION


def close(actual: Tensor, expected: float, tolerance: float = 2e-10) -> bool:
    assert actual.shape == ()
    return abs(actual.item() - expected) <= tolerance


def every_loss(logits: Tensor, noise: Tensor, k: int, mask: Tensor | None = None) -> list[Tensor]:
    noisy = logits + noise
    return [
        importance_loss(logits, mask=mask),
        load_loss(logits, noisy, k, SIGMA, mask=mask),
        vloss(logits, noisy, k, SIGMA, mask=mask),
        z_loss(logits, mask=mask),
        gshard_loss(logits, k, mask=mask),
        local_entropy_loss(logits, mask=mask),
        global_entropy_loss(logits, mask=mask),
        global_entropy_loss(logits, threshold=math.log(4), mask=mask),
    ]


def test_golden_values() -> None:
    assert close(importance_loss(LOGITS), 0.1493628234)
    assert close(load_loss(LOGITS, NOISY, 1, SIGMA), 0.2891853986)
    assert close(load_loss(LOGITS, NOISY, 2, SIGMA), 0.1942788155)
    assert close(vloss(LOGITS, NOISY, 1, SIGMA), 0.2192741110)
    assert close(vloss(LOGITS, NOISY, 2, SIGMA), 0.1718208195)
    assert close(z_loss(LOGITS), 6.9426143691)
    assert close(z_loss(NOISY), 6.9268399848)
    assert close(gshard_loss(LOGITS, 1), 1.3846585653, 1e-6)
    assert close(gshard_loss(NOISY, 1), 1.2244605689, 1e-6)
    assert close(gshard_loss(LOGITS, 2), 1.1670604900, 1e-6)
    assert close(gshard_loss(NOISY, 2), 1.0739708189, 1e-6)


def test_gshard_by_hand() -> None:
    # k = 1 chooses the experts 0, 0, 1, 0, 0, 3; k = 2 adds 1, 2, 3, 3, 1, 0. With the summed
    # gates: E sum_e (counts_e / 6k) (gates_e / 6).
    gates = [2.4791912091, 1.3320156407, 0.9756469114, 1.2131462387]
    once = 4 * (4 * gates[0] + gates[1] + gates[3]) / 36
    twice = 4 * (5 * gates[0] + 3 * gates[1] + gates[2] + 3 * gates[3]) / 72
    assert close(gshard_loss(LOGITS, 1), once)
    assert close(gshard_loss(LOGITS, 2), twice)


def test_golden_statistics() -> None:
    terms = ("importance", "load")
    for k, load in (
        (1, [1.6626891167, 1.0435910070, 0.3269250690, 0.6600480399]),
        (2, [3.2306800865, 2.0006871379, 0.9998087367, 1.4071349222]),
    ):
        stats = compute_router_statistics(LOGITS, NOISY, k, SIGMA, terms)
        importance = [2.4791912091, 1.3320156407, 0.9756469114, 1.2131462387]
        expected = torch.tensor([6.0, *importance, *load], dtype=torch.float64)
        torch.testing.assert_close(stats, expected, rtol=0, atol=2e-10)


@pytest.mark.parametrize(
    ("mask", "importance", "load_1", "load_2", "vloss_1", "vloss_2", "z"),
    [
        (
            VISION,
            0.6761608987,
            2.0938087376,
            0.6419212487,
            1.3849848182,
            0.6590410737,
            7.4684602079,
        ),
        (TEXT, 0.0791882512, 0.4981095469, 0.3927779077, 0.2886488991, 0.2359830795, 6.4167685303),
    ],
)
def test_golden_values_of_a_modality(
    mask: Tensor,
    importance: float,
    load_1: float,
    load_2: float,
    vloss_1: float,
    vloss_2: float,
    z: float,
) -> None:
    for logits, noisy, kept in ((LOGITS, NOISY, mask), (LOGITS[mask], NOISY[mask], None)):
        assert close(importance_loss(logits, mask=kept), importance)
        assert close(load_loss(logits, noisy, 1, SIGMA, mask=kept), load_1)
        assert close(load_loss(logits, noisy, 2, SIGMA, mask=kept), load_2)
        assert close(vloss(logits, noisy, 1, SIGMA, mask=kept), vloss_1)
        assert close(vloss(logits, noisy, 2, SIGMA, mask=kept), vloss_2)
        assert close(z_loss(logits, mask=kept), z)
    # What padding holds has no influence.
    huge = torch.where(mask[:, None], LOGITS, torch.full_like(LOGITS, 300.0))
    for k in (1, 2):
        for loss, expected in zip(
            every_loss(huge, NOISE, k, mask), every_loss(LOGITS, NOISE, k, mask)
        ):
            assert close(loss, expected.item(), 1e-8)


def test_golden_entropy_losses() -> None:
    assert close(local_entropy_loss(LOGITS), 1.0694841732)
    assert close(global_entropy_loss(LOGITS), -1.3178987125)
    assert close(global_entropy_loss(LOGITS, threshold=math.log(4)), 0.0683956486)
    assert close(local_entropy_loss(LOGITS, mask=VISION), 0.9873654587)
    assert close(global_entropy_loss(LOGITS, mask=VISION), -1.0944603232)
    assert close(global_entropy_loss(LOGITS, math.log(3), mask=VISION), 0.0041519655)
    assert close(global_entropy_loss(LOGITS, math.log(4), mask=VISION), 0.2918340379)
    assert close(local_entropy_loss(LOGITS, mask=TEXT), 1.1516028878)
    assert close(global_entropy_loss(LOGITS, mask=TEXT), -1.3441049960)
    assert global_entropy_loss(LOGITS, math.log(3), mask=TEXT).item() == 0.0
    assert close(global_entropy_loss(LOGITS, math.log(4), mask=TEXT), 0.0421893651)


def test_z_loss_with_a_masked_token() -> None:
    mask = torch.tensor([True] * 5 + [False])
    assert close(z_loss(LOGITS, mask=mask), 6.8487905811)


def test_upstream_unit_test_values() -> None:
    gates = torch.tensor(
        [[0.5, 0.4, 0.1], [0.3, 0.3, 0.4], [0.1, 0.2, 0.7], [0.8, 0.2, 0.0]], dtype=torch.float64
    )
    # log turns the gates into logits; exp(-80) stands for the gate that is zero.
    logits = gates.log().clamp(min=-80)
    assert close(importance_loss(logits), 0.03875)
    assert close(gshard_loss(logits, 1), 1.0875)

    logits = torch.tensor(
        [[0.9, 0.06, 0.04], [0.7, 0.18, 0.12], [0.85, 0.05, 0.1]], dtype=torch.float64
    )
    noise = torch.tensor(
        [[-0.037, 0.026, -0.018], [-0.074, 0.045, -0.015], [-0.067, -0.059, 0.073]],
        dtype=torch.float64,
    )
    assert close(load_loss(logits, logits + noise, 2, 0.1), 0.4857384726)


@pytest.mark.parametrize(
    ("k", "norm", "row"),
    [
        (1, 0.5590163201, [0.0346338921, -0.0144270002, -0.0138656675, -0.0063412243]),
        (2, 0.3124048067, [0.0346306307, 0.0543514868, -0.0820698389, -0.0069122786]),
    ],
)
def test_golden_gradient_flows_through_the_threshold(k: int, norm: float, row: list[float]) -> None:
    logits = LOGITS.clone().requires_grad_()
    vloss(logits, logits + NOISE, k, SIGMA).backward()
    assert logits.grad is not None
    assert close(logits.grad.norm(), norm)
    expected = torch.tensor(row, dtype=torch.float64)
    torch.testing.assert_close(logits.grad[0], expected, rtol=0, atol=2e-10)
    # Adding a constant to a token's logits changes nothing.
    assert logits.grad.sum(dim=1).abs().max() < 1e-14


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("mask", [None, VISION])
def test_gradients_by_finite_differences(k: int, mask: Tensor | None) -> None:
    logits = LOGITS.clone().requires_grad_()
    for index in range(len(every_loss(LOGITS, NOISE, k))):
        assert torch.autograd.gradcheck(
            lambda x, i=index: every_loss(x, NOISE, k, mask)[i], (logits,)
        )


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("loss", [load_loss, vloss])
def test_load_gradient_reaches_noisy_logits(loss: Callable[..., Tensor], k: int) -> None:
    clean, noisy = LOGITS.clone().requires_grad_(), NOISY.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, n: loss(a, n, k, SIGMA), (clean, noisy))


@pytest.mark.parametrize("k", [1, 2])
def test_mask_of_all_tokens_is_no_mask(k: int) -> None:
    every = torch.ones(6, dtype=torch.bool)
    for masked, plain in zip(every_loss(LOGITS, NOISE, k, every), every_loss(LOGITS, NOISE, k)):
        torch.testing.assert_close(masked, plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize("k", [1, 2])
def test_only_tokens_that_count_get_a_gradient(k: int) -> None:
    for index in range(len(every_loss(LOGITS, NOISE, k))):
        logits = LOGITS.clone().requires_grad_()
        every_loss(logits, NOISE, k, VISION)[index].backward()
        assert logits.grad is not None
        assert (logits.grad[TEXT] == 0).all()
        assert (logits.grad[VISION] != 0).any()


@pytest.mark.parametrize("sigma", [1 / 32, 0.5])
def test_noise_std_is_the_standard_deviation_itself(sigma: float) -> None:
    """The load of an expert: probability that its logit with fresh noise is among the k largest."""
    k, load = 2, [0.0] * 4
    for clean, noisy in zip(LOGITS.tolist(), NOISY.tolist()):
        threshold = sorted(noisy)[-k]
        for expert, logit in enumerate(clean):
            load[expert] += 0.5 * (1 + math.erf((logit - threshold) / sigma / math.sqrt(2)))
    mean = sum(load) / 4
    expected = sum((v - mean) ** 2 for v in load) / 4 / mean**2
    assert load_loss(LOGITS, NOISY, k, sigma).item() == pytest.approx(expected, rel=1e-8)


def test_gshard_of_a_collapsed_router_is_the_number_of_experts() -> None:
    experts = 8
    collapsed = torch.zeros(16, experts, dtype=torch.float64)
    collapsed[:, 3] = 50.0
    assert gshard_loss(collapsed, 1).item() == pytest.approx(experts)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("num_tokens", [0, 3])
def test_no_tokens_give_zero_that_stays_in_the_graph(k: int, num_tokens: int) -> None:
    mask = torch.zeros(num_tokens, dtype=torch.bool) if num_tokens else None
    for index in range(len(every_loss(LOGITS, NOISE, k))):
        logits = LOGITS[:num_tokens].float().requires_grad_()
        loss = every_loss(logits, NOISE[:num_tokens].float(), k, mask)[index]
        assert loss.item() == 0.0
        loss.backward()
        assert logits.grad is not None
        assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_masked_rows_do_not_spread_nan() -> None:
    logits = torch.cat([LOGITS, torch.full((2, 4), math.nan, dtype=torch.float64)])
    logits[-1] = math.inf
    logits.requires_grad_()
    mask = torch.tensor([True] * 6 + [False] * 2)
    noise = torch.cat([NOISE, torch.zeros(2, 4, dtype=torch.float64)])
    losses = every_loss(logits, noise, 1, mask)
    for loss, expected in zip(losses, every_loss(LOGITS, NOISE, 1), strict=True):
        assert close(loss, expected.item(), 1e-14)
    torch.stack(losses).sum().backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert not logits.grad[6:].any()


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("row", [[1.0, 0.5, -0.25, 0.0], [2.0, 0.0, 0.0, 0.0]])
def test_perfect_balance_has_a_finite_gradient(k: int, row: list[float]) -> None:
    # Each row is a rotation of the first: all experts get equal gates, loads and choices.
    first = torch.tensor(row)
    logits = torch.stack([first.roll(shift) for shift in range(4)]).requires_grad_()
    losses = every_loss(logits, torch.zeros(4, 4), k)
    importance, load, both, _, gshard, *_ = losses
    assert max(importance.item(), load.item(), both.item()) < 1e-13
    assert abs(gshard.item() - 1) < 1e-6
    torch.stack(losses).sum().backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_extreme_logits_have_finite_losses_and_gradients() -> None:
    # Gates underflow to 0 and, with noise far larger than sigma, so do all load probabilities.
    logits = torch.tensor([[300.0, 0.0, -300.0], [400.0, 1.0, -5.0]]).requires_grad_()
    for noise in (torch.zeros(2, 3), torch.full((2, 3), 50.0)):
        losses = every_loss(logits, noise, 1)
        assert all(torch.isfinite(loss) for loss in losses)
        (gradient,) = torch.autograd.grad(torch.stack(losses).sum(), logits)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_input_computes_in_float32(dtype: torch.dtype) -> None:
    logits, noise = LOGITS.to(dtype), NOISE.to(dtype)
    exact = every_loss(logits.float(), (logits + noise).float() - logits.float(), 2)
    for loss, expected in zip(every_loss(logits, noise, 2), exact, strict=True):
        assert loss.dtype == torch.float32
        assert close(loss, expected.item(), 1e-6)
    # The inputs are rounded alike; what is left is the arithmetic, which must not be done in 8 bits.
    noisy = (logits + noise).double()
    doubles = every_loss(logits.double(), noisy - logits.double(), 2)
    for loss, expected in zip(every_loss(logits, noise, 2), doubles, strict=True):
        assert loss.item() == pytest.approx(expected.item(), rel=5e-3, abs=1e-4)
    assert importance_loss(LOGITS).dtype == torch.float64


def test_gshard_in_a_router_with_noise_is_that_of_the_logits_that_dispatch() -> None:
    """V-MoE and Tutel take share and mean gate from the noisy logits; importance stays on the clean ones."""
    terms = ("importance", "gshard")
    stats = compute_router_statistics(LOGITS, NOISY, 1, SIGMA, terms)
    losses = losses_from_statistics(stats, terms, 4, 1)
    assert close(losses["gshard"], 1.2244605689, 1e-6)
    assert close(losses["importance"], importance_loss(LOGITS).item())
    stats = compute_router_statistics(LOGITS, None, 1, SIGMA, terms)
    assert close(losses_from_statistics(stats, terms, 4, 1)["gshard"], 1.3846585653, 1e-6)


def test_gshard_counts_ties_for_the_lower_expert() -> None:
    # All gates are 1/2; both tokens choose expert 0: 2 * (1 * 0.5 + 0 * 0.5) = 1 with the
    # gradient 2 * p_0 (1 - p_0) / 2 = 0.25 on the logits of expert 0.
    logits = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    loss = gshard_loss(logits, 1)
    loss.backward()
    assert close(loss, 1.0, 0)
    assert logits.grad is not None
    assert logits.grad.tolist() == [[0.25, -0.25], [0.25, -0.25]]


@pytest.mark.parametrize("cut", [0, 2, 6])
@pytest.mark.parametrize("k", [1, 2])
def test_statistics_of_parts_add_up(cut: int, k: int) -> None:
    whole = compute_router_statistics(LOGITS, NOISY, k, SIGMA, TERMS, VISION)
    parts = [
        compute_router_statistics(LOGITS[part], NOISY[part], k, SIGMA, TERMS, VISION[part])
        for part in (slice(0, cut), slice(cut, None))
    ]
    assert whole.shape == (statistics_size(TERMS, 4),)
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=0, atol=1e-14)

    losses = losses_from_statistics(parts[0] + parts[1], TERMS, 4, k, math.log(4))
    assert list(losses) == list(TERMS)
    expected = every_loss(LOGITS, NOISE, k, VISION)
    expected[4] = gshard_loss(NOISY, k, mask=VISION)
    for term, index in zip(TERMS, (0, 1, 3, 4, 5, 7), strict=True):
        assert close(losses[term], expected[index].item(), 1e-13)


def test_gradient_of_a_part_is_the_whole_gradient_of_its_tokens() -> None:
    whole = LOGITS.clone().requires_grad_()
    vloss(whole, whole + NOISE, 1, SIGMA).backward()
    part = LOGITS[:2].clone().requires_grad_()
    terms = ("importance", "load")
    own = compute_router_statistics(part, part + NOISE[:2], 1, SIGMA, terms)
    other = compute_router_statistics(LOGITS[2:], NOISY[2:], 1, SIGMA, terms)
    losses = losses_from_statistics(own + other, terms, 4, 1)
    (0.5 * losses["importance"] + 0.5 * losses["load"]).backward()
    assert whole.grad is not None
    torch.testing.assert_close(part.grad, whole.grad[:2], rtol=0, atol=1e-14)


def test_nothing_is_read_back_to_the_host() -> None:
    # Meta tensors have no values: reading one raises.
    logits = torch.empty(6, 4, device="meta", requires_grad=True)
    mask = torch.empty(6, dtype=torch.bool, device="meta")
    stats = compute_router_statistics(logits, logits + 1, 2, SIGMA, TERMS, mask)
    losses = losses_from_statistics(stats, TERMS, 4, 2, 1.0)
    torch.stack(list(losses.values())).sum().backward()
    assert logits.grad is not None
    assert all(loss.device == logits.device for loss in losses.values())


def test_layout_does_not_depend_on_the_order_of_terms() -> None:
    forward = compute_router_statistics(LOGITS, NOISY, 2, SIGMA, TERMS)
    backward = compute_router_statistics(LOGITS, NOISY, 2, SIGMA, TERMS[::-1])
    assert torch.equal(forward, backward)
    assert statistics_size(("importance", "global_entropy"), 32) == 1 + 32
    assert statistics_size((), 32) == 1


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="needs noisy logits"):
        compute_router_statistics(LOGITS, None, 1, SIGMA, ("load",))
    with pytest.raises(ValueError, match="noise_std must be positive"):
        load_loss(LOGITS, NOISY, 1, 0.0)
    with pytest.raises(ValueError, match=r"k must be in 1\.\.4"):
        gshard_loss(LOGITS, 5)
    with pytest.raises(ValueError, match="unknown auxiliary loss 'vloss'"):
        compute_router_statistics(LOGITS, NOISY, 1, SIGMA, ("vloss",))
    with pytest.raises(ValueError, match=r"mask must be bool \[6\]"):
        z_loss(LOGITS, mask=torch.ones(6))
    with pytest.raises(ValueError, match="must have one shape"):
        load_loss(LOGITS, NOISY[:3], 1, SIGMA)
    with pytest.raises(ValueError, match="have size 5"):
        losses_from_statistics(torch.zeros(6), ("importance",), 4, 1)
