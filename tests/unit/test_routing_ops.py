"""Batch Priority Routing against golden masks and against a plain reading of its definition."""

import math
import random

import pytest
import torch
from router_functions import batch_priority_route
from torch import Tensor

from megatron_vlmoe.moe.routing_ops import (
    SlotRouting,
    balancing_step,
    expert_choice_slots,
    route_slots,
    top_k_experts,
)
from megatron_vlmoe.stream.sizes import expert_capacity

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
CLEAN = LOGITS.softmax(dim=1)
NOISY = (LOGITS + NOISE).softmax(dim=1)
EIGHT = torch.cat([LOGITS, torch.tensor([[1.0, 0.9, -1.0, 0.2], [-0.2, 0.3, 1.7, 0.5]])]).softmax(1)
TIES = torch.tensor(
    [
        [0.4, 0.3, 0.2, 0.1],
        [0.4, 0.3, 0.2, 0.1],
        [0.4, 0.2, 0.3, 0.1],
        [0.6, 0.2, 0.1, 0.1],
        [0.25, 0.25, 0.25, 0.25],
        [0.1, 0.1, 0.4, 0.4],
    ]
)


def bits(keep: Tensor) -> str:
    return " ".join("".join(str(int(bit)) for bit in row) for row in keep.tolist())


def route(gates: Tensor, k: int, capacity: int, batch_priority: bool = True) -> SlotRouting:
    gate, expert = top_k_experts(gates, k)
    return route_slots(gate, expert, gates.shape[1], capacity, batch_priority=batch_priority)


def vanilla_keep(gates: Tensor, k: int, capacity: int) -> Tensor:
    _, expert = top_k_experts(gates, k)
    kept = route(gates, k, capacity, batch_priority=False).token_kept
    return torch.zeros_like(gates, dtype=torch.bool).scatter_(1, expert, kept)


def loop_routing(
    gates: list[list[float]],
    k: int,
    capacity: int,
    mask: list[bool],
    batch_priority: bool = True,
) -> dict[tuple[int, int], int]:
    """(token, expert) -> position, in plain loops over the definition."""
    num_experts = len(gates[0])
    choices = []
    for row in gates:
        ranked = sorted((-value, expert) for expert, value in enumerate(row))
        choices.append([expert for _, expert in ranked[:k]])
    tokens = [token for token in range(len(gates)) if mask[token]]
    if batch_priority:
        tokens.sort(key=lambda token: (-max(gates[token]), token))
    filled = [0] * num_experts
    positions = {}
    for choice in range(k):
        for token in tokens:
            expert = choices[token][choice]
            if filled[expert] < capacity:
                positions[token, expert] = filled[expert]
                filled[expert] += 1
    return positions


@pytest.mark.parametrize(
    ("gates", "k", "capacity", "expected", "vanilla"),
    [
        (CLEAN, 1, 1, "0000 0000 0100 1000 0000 0001", "1000 0000 0100 0000 0000 0001"),
        (CLEAN, 1, 2, "1000 0000 0100 1000 0000 0001", "1000 1000 0100 0000 0000 0001"),
        (CLEAN, 2, 2, "1100 0010 0100 1001 0000 0001", "1100 1010 0101 0000 0000 0001"),
        (CLEAN, 2, 3, "1100 1010 0101 1001 0100 0001", "1100 1010 0101 1001 0100 0001"),
        (CLEAN, 2, 4, "1100 1010 0101 1001 1100 0001", "1100 1010 0101 1001 1100 0001"),
        (NOISY, 1, 1, "0000 0010 0100 1000 0000 0000", "1000 0010 0100 0000 0000 0000"),
        (NOISY, 1, 2, "1000 0010 0100 1000 0010 0000", "1000 0010 0100 1000 0010 0000"),
        (NOISY, 2, 2, "1100 0010 0101 1001 0010 0000", "1100 0010 0101 1001 0010 0000"),
        (NOISY, 2, 3, "1100 0010 0101 1001 0110 1001", "1100 0010 0101 1001 0110 1001"),
        (NOISY, 2, 4, "1100 1010 0101 1001 0110 1001", "1100 1010 0101 1001 0110 1001"),
    ],
)
def test_golden_keep_masks(
    gates: Tensor, k: int, capacity: int, expected: str, vanilla: str
) -> None:
    assert bits(batch_priority_route(gates, k, capacity)[0]) == expected
    assert bits(vanilla_keep(gates, k, capacity)) == vanilla


@pytest.mark.parametrize(
    ("gates", "k", "capacity", "expected"),
    [
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
def test_golden_keep_masks_with_more_tokens_and_ties(
    gates: Tensor, k: int, capacity: int, expected: str
) -> None:
    keep, position = batch_priority_route(gates, k, capacity)
    assert bits(keep) == expected
    assert keep.dtype is torch.bool and keep.shape == position.shape == gates.shape
    assert not position.is_floating_point()
    assert ((position >= 0) == keep).all() and (position[~keep] == -1).all()


def test_golden_positions() -> None:
    _, expert = top_k_experts(CLEAN, 2)
    assert expert.tolist() == [[0, 1], [0, 2], [1, 3], [0, 3], [0, 1], [3, 0]]
    # With room for all, a kept choice's slot minus the start of its expert is its position.
    routing = route(CLEAN, 2, 6)
    position = routing.token_slot - expert * 6
    assert position.tolist() == [[1, 1], [2, 0], [0, 2], [0, 1], [3, 2], [0, 4]]
    keep, dense = batch_priority_route(CLEAN, 2, 6)
    assert torch.equal(dense.gather(1, expert), position)
    assert (dense[~keep] == -1).all()


@pytest.mark.parametrize(
    ("k", "capacity", "expected"),
    [
        (1, 1, [0, 0, 3.8846093861, 3.1970180265, 0, 12.8790757255]),
        (1, 2, [0.5792585299, 0, 3.8846093861, 3.1970180265, 0, 12.8790757255]),
        (2, 2, [1.0054531385, 2.3174535522, 3.8846093861, 5.1097123139, 0, 12.8790757255]),
        (
            2,
            3,
            [1.0054531385, 3.1711809754, 6.0019685086, 5.1097123139, 2.5592872069, 12.8790757255],
        ),
        (
            2,
            4,
            [1.0054531385, 3.1711809754, 6.0019685086, 5.1097123139, 3.9045395408, 12.8790757255],
        ),
    ],
)
def test_golden_combine(k: int, capacity: int, expected: list[float]) -> None:
    """Expert e returns (e + 1) * x with x = 1..6, through the slots there and back."""
    gate, _ = top_k_experts(CLEAN, k)
    routing = route(CLEAN, k, capacity)
    tokens = torch.arange(1, 7, dtype=torch.float64)
    sent = tokens[routing.slot_token] * routing.slot_filled
    factor = torch.arange(1, 5, dtype=torch.float64).repeat_interleave(capacity)
    returned = (sent * factor)[routing.token_slot]
    combined = (gate * returned * routing.token_kept).sum(dim=1)
    torch.testing.assert_close(
        combined, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=2e-10
    )


def test_dropped_rates_of_the_golden_case() -> None:
    rates = [
        1 - route(CLEAN, k, capacity).token_kept.double().mean().item()
        for k, capacity in ((1, 1), (1, 2), (2, 2), (2, 3), (2, 4))
    ]
    assert rates == pytest.approx([1 / 2, 1 / 3, 5 / 12, 1 / 6, 1 / 12])


def random_case(rng: random.Random) -> tuple[list[list[float]], int, int, list[bool]]:
    num_tokens, num_experts = rng.randint(1, 40), rng.randint(1, 8)
    k = rng.randint(1, num_experts)
    # A few levels only, so that ties within and between tokens are common. Multiples of 1/8 are
    # exact in every dtype; negative ones show that gates need not come from a softmax.
    levels = rng.choice([2, 4, 40])
    gates = [
        [rng.randrange(-levels // 2, levels) / 8 for _ in range(num_experts)]
        for _ in range(num_tokens)
    ]
    masked_share = rng.choice([0.0, 0.3, 1.0])
    mask = [rng.random() >= masked_share for _ in range(num_tokens)]
    return gates, k, rng.randint(0, num_tokens + 1), mask


@pytest.mark.parametrize("seed", range(10))
def test_routing_equals_its_definition(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(60):
        gates, k, capacity, mask = random_case(rng)
        dtype = rng.choice([torch.float16, torch.bfloat16, torch.float32, torch.float64])
        tensor, mask_tensor = torch.tensor(gates, dtype=dtype), torch.tensor(mask)
        expected = torch.full(tensor.shape, -1)
        for pair, place in loop_routing(gates, k, capacity, mask).items():
            expected[pair] = place
        keep, position = batch_priority_route(tensor, k, capacity, mask_tensor)
        assert keep.dtype == torch.bool
        assert torch.equal(position, expected)
        assert torch.equal(keep, expected >= 0)
        if all(mask):
            assert torch.equal(batch_priority_route(tensor, k, capacity)[1], expected)


@pytest.mark.parametrize("batch_priority", [True, False])
def test_slots_agree_from_both_sides(batch_priority: bool) -> None:
    rng = random.Random(7)
    for _ in range(200):
        gates, k, capacity, mask = random_case(rng)
        num_tokens, num_experts = len(gates), len(gates[0])
        gate, expert = top_k_experts(torch.tensor(gates), k)
        routing = route_slots(
            gate, expert, num_experts, capacity, torch.tensor(mask), batch_priority
        )
        assert routing.slot_token.shape == (num_experts * capacity,)
        assert routing.slot_choice.shape == routing.slot_filled.shape == routing.slot_token.shape
        assert routing.token_slot.shape == routing.token_kept.shape == (num_tokens, k)

        expected = {
            e * capacity + position: (token, expert[token].tolist().index(e))
            for (token, e), position in loop_routing(
                gates, k, capacity, mask, batch_priority
            ).items()
        }
        from_slots = {
            slot: (routing.slot_token[slot].item(), routing.slot_choice[slot].item())
            for slot in routing.slot_filled.nonzero().flatten().tolist()
        }
        from_tokens = {
            routing.token_slot[token, choice].item(): (token, choice)
            for token, choice in routing.token_kept.nonzero().tolist()
        }
        assert from_slots == expected
        assert from_tokens == expected
        assert not routing.slot_token[~routing.slot_filled].any()
        assert not routing.slot_choice[~routing.slot_filled].any()
        assert not routing.token_slot[~routing.token_kept].any()
        load = [
            sum(mask[t] and e in expert[t].tolist() for t in range(num_tokens))
            for e in range(num_experts)
        ]
        assert routing.load.tolist() == load


def test_large_batch_keeps_the_largest_gates() -> None:
    # Sorting switches algorithms with size; gates on a grid of 64 levels tie all the time.
    generator = torch.Generator().manual_seed(3)
    gates = torch.randint(0, 64, (20000, 8), generator=generator) / 64
    keep, position = batch_priority_route(gates, 1, 1000)
    gate, expert = gates.max(dim=1)
    for index in range(8):
        tokens = (expert == index).nonzero().flatten().tolist()
        ranked = sorted(tokens, key=lambda token: (-gate[token].item(), token))[:1000]
        assert keep[:, index].nonzero().flatten().tolist() == sorted(ranked)
        assert position[ranked, index].tolist() == list(range(len(ranked)))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_top_k_breaks_ties_toward_the_lower_expert(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    gates = torch.randint(-2, 2, (3000, 33), generator=generator).float()
    gate, expert = top_k_experts(gates, k)
    stable = torch.sort(gates, dim=1, descending=True, stable=True)
    assert torch.equal(expert, stable.indices[:, :k])
    assert torch.equal(gate, stable.values[:, :k])
    assert expert.dtype == torch.int64


def test_top_k_of_rows_with_infinities_stays_distinct() -> None:
    gates = torch.tensor([[-math.inf, 1.0, -math.inf], [math.nan] * 3, [-math.inf] * 3])
    _, expert = top_k_experts(gates, 3)
    assert expert.tolist() == [[1, 0, 2], [0, 1, 2], [0, 1, 2]]


def test_top_k_gates_are_differentiable() -> None:
    gates = CLEAN.clone().requires_grad_()
    for k in (1, 2, 3):
        assert torch.autograd.gradcheck(lambda x, k=k: top_k_experts(x, k)[0], (gates,))


def test_nan_gates_do_not_crash_and_are_served_last() -> None:
    gates = torch.tensor([[math.nan, math.nan], [0.6, 0.4], [0.5, 0.5]])
    keep, position = batch_priority_route(gates, 1, 2)
    assert bits(keep) == "00 10 10"
    assert position.tolist() == [[-1, -1], [0, -1], [1, -1]]
    keep, _ = batch_priority_route(torch.full((3, 2), math.nan), 2, 2)
    assert bits(keep) == "11 11 00"


@pytest.mark.parametrize("k", [1, 2])
def test_no_tokens(k: int) -> None:
    routing = route(torch.zeros(0, 4), k, 3)
    assert routing.slot_token.tolist() == [0] * 12
    assert not routing.slot_filled.any()
    assert routing.token_slot.shape == (0, k)
    assert routing.load.tolist() == [0] * 4
    keep, position = batch_priority_route(torch.zeros(0, 4), k, 3)
    assert keep.shape == position.shape == (0, 4)


def test_nothing_is_read_back_to_the_host() -> None:
    # Meta tensors have no values: reading one, or a shape that depends on one, raises.
    gates = torch.empty(10, 4, device="meta")
    mask = torch.empty(10, dtype=torch.bool, device="meta")
    for k in (1, 2):
        gate, expert = top_k_experts(gates, k)
        routing = route_slots(gate, expert, 4, 3, mask)
        assert routing.slot_token.shape == (12,)
        assert routing.slot_token.device == routing.load.device == gates.device
        assert batch_priority_route(gates, k, 3, mask)[0].shape == (10, 4)


def test_masked_tokens_take_no_place() -> None:
    mask = torch.tensor([False, True, True])
    gates = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.7, 0.3]])
    keep, position = batch_priority_route(gates, 1, 1, mask)
    assert bits(keep) == "00 00 10"
    assert position.tolist() == [[-1, -1], [-1, -1], [0, -1]]
    keep, position = batch_priority_route(gates.sort(dim=0, descending=True).values, 1, 1, mask)
    assert bits(keep) == "00 10 00"
    assert position.tolist() == [[-1, -1], [0, -1], [-1, -1]]
    for k in (1, 2):
        assert not batch_priority_route(gates, k, 3, torch.zeros(3, dtype=torch.bool))[0].any()


@pytest.mark.parametrize(
    ("num_tokens", "factor", "multiple_of", "expected"),
    [
        (12608, 1.05, 1, 414),
        (12608, 1.05, 4, 416),
        (12608, 1.0, 1, 394),
        (12608, 1.0, 4, 396),
        (8192, 1.05, 1, 269),
        (8192, 1.05, 4, 272),
        (8192, 1.0, 1, 256),
        (8192, 1.0, 4, 256),
        (197, 1.05, 1, 7),
        (197, 1.05, 4, 8),
        (128, 1.05, 1, 5),
        (128, 1.05, 4, 8),
        (1, 1.05, 1, 1),
        (3, 0.1, 1, 1),
        (20, 64.0, 1, 20),
        (20, 0.0, 1, 20),
        (20, -1.0, 1, 20),
    ],
)
def test_capacity_table_for_32_experts(
    num_tokens: int, factor: float, multiple_of: int, expected: int
) -> None:
    assert expert_capacity(num_tokens, 32, 1, factor, multiple_of) == expected


def test_capacity_limits() -> None:
    assert expert_capacity(40, 6, 1, 1.05) == 7
    assert [expert_capacity(6, 4, k, cf) for k in (1, 2) for cf in (0.5, 1.0, 1.05)] == [
        *(1, 2, 2),
        *(2, 3, 4),
    ]
    assert expert_capacity(3, 32, 1, 1.05) == 1
    assert expert_capacity(0, 32, 1, 1.05) == 1
    assert expert_capacity(10, 2, 2, 4.0) == 10
    assert expert_capacity(10, 4, 1, 1.0, multiple_of=16) == 10
    assert expert_capacity(10, 4, 1, 0.0) == 10
    assert expert_capacity(10, 4, 1, -1.0, multiple_of=4) == 10


def test_capacity_is_the_float_formula() -> None:
    for tokens in (1, 5, 96, 197, 400, 1000):
        for experts in (1, 4, 6, 8):
            for k in range(1, min(2, experts) + 1):
                for factor in (0.5, 1.0, 1.05, 1.1, 2.0):
                    expected = max(1, min(tokens, math.ceil(tokens * k * factor / experts)))
                    value = expert_capacity(tokens, experts, k, factor)
                    assert value == expected and isinstance(value, int)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"k must be in 1\.\.4"):
        batch_priority_route(CLEAN, 5, 1)
    with pytest.raises(ValueError, match=r"k must be in 1\.\.4"):
        top_k_experts(CLEAN, 0)
    with pytest.raises(ValueError, match="capacity must be at least 0"):
        batch_priority_route(CLEAN, 1, -1)
    with pytest.raises(ValueError, match=r"mask must be bool \[6\]"):
        batch_priority_route(CLEAN, 1, 1, torch.ones(6, dtype=torch.int64))
    with pytest.raises(ValueError, match="gates must be a 2-D"):
        batch_priority_route(CLEAN[0], 1, 1)
    with pytest.raises(ValueError, match="must have one shape"):
        route_slots(CLEAN[:, :1], torch.zeros(6, 2, dtype=torch.int64), 4, 1)
    with pytest.raises(ValueError, match="capacity_factor must be finite"):
        expert_capacity(10, 4, 1, math.nan)
    with pytest.raises(ValueError, match="multiple_of must be at least 1"):
        expert_capacity(10, 4, 1, 1.0, multiple_of=0)
    with pytest.raises(ValueError, match="num_tokens must be at least 0"):
        expert_capacity(-1, 4, 1, 1.0)


# Four tokens, three experts.
FOUR = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2], [0.2, 0.2, 0.6], [0.1, 0.8, 0.1]])


def taken(gates: Tensor, capacity: int, mask: list[bool] | None = None) -> list[list[int]]:
    """Tokens of every expert in the order of its slots, after a check of the other side of the routing."""
    valid = None if mask is None else torch.tensor(mask)
    slots = expert_choice_slots(gates, capacity, valid)
    found = []
    for expert in range(gates.shape[1]):
        own = slice(expert * capacity, (expert + 1) * capacity)
        filled = slots.slot_filled[own]
        assert (slots.slot_choice[own][filled] == expert).all()
        tokens = slots.slot_token[own][filled].tolist()
        assert slots.token_kept[:, expert].nonzero().flatten().tolist() == sorted(tokens)
        assert [int(slots.token_slot[token, expert]) for token in tokens] == list(
            range(own.start, own.start + len(tokens))
        )
        assert slots.load[expert] == len(tokens)
        found.append(tokens)
    assert slots.token_slot.shape == slots.token_kept.shape == gates.shape
    return found


@pytest.mark.parametrize(
    ("capacity", "mask", "expected"),
    [
        # Token 1 is nobody's first; with two places it is everybody's second.
        (1, None, [[0], [3], [2]]),
        (2, None, [[0, 1], [3, 1], [2, 1]]),
        # Without it equal gates go to the earlier token: 0.2 of tokens 0 and 2, 0.1 of tokens 0 and 3.
        (2, [True, False, True, True], [[0, 2], [3, 0], [2, 0]]),
        # Places stay empty where fewer tokens are left.
        (3, [True, False, False, True], [[0, 3], [3, 0], [0, 3]]),
        (4, None, [[0, 1, 2, 3], [3, 1, 0, 2], [2, 1, 0, 3]]),
        (0, None, [[], [], []]),
    ],
)
def test_expert_choice_by_hand(
    capacity: int, mask: list[bool] | None, expected: list[list[int]]
) -> None:
    assert taken(FOUR, capacity, mask) == expected
    # A token whose gates are no numbers comes after all others.
    broken = FOUR.clone()
    broken[0] = math.nan
    assert all(0 not in tokens for tokens in taken(broken, min(capacity, 3), mask)[:1]) or mask
    with pytest.raises(ValueError, match="capacity must be in 0..4"):
        expert_choice_slots(FOUR, 5)


def test_bias_of_experts_by_hand() -> None:
    # 0.4 0.2 0.35, 0.2 0.3 0.45, -0.1 0.2 0.85, -0.2 0.8 0.35: token 1 leaves its largest gate.
    _, expert = top_k_experts(FOUR + torch.tensor([-0.3, 0.0, 0.25]), 1)
    assert expert.flatten().tolist() == [0, 2, 2, 1]
    for counts, signs in (
        # Means 4/3, 2, 2 and 0: equal load moves nothing, and so does none.
        ([1, 1, 2], [1, 1, -1]),
        ([4, 0, 2], [-1, 1, 0]),
        ([2, 2, 2], [0, 0, 0]),
        ([0, 0, 0], [0, 0, 0]),
        # Exact where a mean in single precision would not be.
        ([2**40 + 1, 2**40, 2**40], [-1, 1, 1]),
    ):
        step = balancing_step(torch.tensor(counts), 0.25)
        assert step.tolist() == [0.25 * sign for sign in signs], counts
