"""The fixed-capacity dispatcher against a plain loop over tokens and experts, forward and backward."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_vlmoe.moe.dispatch import FixedCapacityDispatcher
from megatron_vlmoe.moe.experts import (
    ExpertPool,
    PooledExperts,
    batched,
    batched_linear,
    grouped,
    grouped_matmul,
    one_by_one,
)
from megatron_vlmoe.moe.router import PoolRouting
from megatron_vlmoe.moe.routing_ops import (
    expert_choice_slots,
    route_slots,
    sorted_slots,
    top_k_experts,
)
from megatron_vlmoe.moe.slots import combine_slots, row_dots, weigh_rows
from megatron_vlmoe.stream.block_plan import Branch

WIDTH, INNER = 6, 10
ALONE = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
GROUPS: Any = SimpleNamespace(ep=ALONE, expt_dp=ALONE)


def make_experts(*pools: Branch) -> PooledExperts:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=WIDTH,
        num_attention_heads=1,
        ffn_hidden_size=INNER,
        num_moe_experts=sum(pool.num_experts for pool in pools),
        moe_ffn_hidden_size=INNER,
        params_dtype=torch.float64,
    )
    experts = PooledExperts(sum(pool.num_experts for pool in pools), config, GROUPS, pools)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    return experts


def make_routing(
    pool: Branch, logits: Tensor, k: int, capacity: int, mask: Tensor | None
) -> PoolRouting:
    gate, expert = top_k_experts(logits.softmax(dim=1), k)
    slots = route_slots(gate.detach(), expert, pool.num_experts, capacity, mask)
    return PoolRouting(pool, gate, expert, slots.token_kept, capacity, slots)


def plain_loop(
    tokens: Tensor, logits: Tensor, k: int, capacity: int, mask: Tensor | None, pool: ExpertPool
) -> tuple[Tensor, int, int]:
    """Outputs, number of dropped choices and number of unfilled slots, one token after another."""
    probs = logits.softmax(dim=1)
    ranked = probs.argsort(dim=1, descending=True).tolist()
    order = sorted(range(len(tokens)), key=lambda t: -float(probs[t].max()))
    load = [0] * pool.num_experts
    outputs = [torch.zeros_like(tokens[0]) for _ in tokens]
    dropped = 0
    for choice in range(k):
        for token in order:
            if mask is not None and not mask[token]:
                continue
            e = ranked[token][choice]
            if load[e] == capacity:
                dropped += 1
                continue
            load[e] += 1
            hidden = pool.weight1[e] @ tokens[token] + pool.bias1[e]
            hidden = 0.5 * hidden * (1.0 + torch.erf(hidden / 2.0**0.5))
            value = pool.weight2[e] @ hidden + pool.bias2[e]
            outputs[token] = outputs[token] + probs[token, e] * value
    return torch.stack(outputs), dropped, capacity * pool.num_experts - sum(load)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("padding", [False, True])
def test_fixed_capacity_is_the_plain_loop(k: int, padding: bool) -> None:
    torch.manual_seed(k)
    pools = (Branch("text", ("texts",), 4), Branch("vision", ("images",), 3))
    sizes, capacities = (21, 13), (5 * k, 6 * k)
    experts = make_experts(*pools)
    # Uneven experts: some overflow while others have free slots.
    tilt = [torch.linspace(0.0, 2.0, pool.num_experts).double() for pool in pools]
    tokens = [torch.randn(n, WIDTH, dtype=torch.float64) for n in sizes]
    logits = [torch.randn(n, len(t), dtype=torch.float64) + t for n, t in zip(sizes, tilt)]
    masks = [torch.rand(n) < 0.8 if padding else None for n in sizes]
    upstream = [torch.randn(n, WIDTH, dtype=torch.float64) for n in sizes]
    results: dict[str, list[Tensor]] = {}
    for name in ("dispatched", "loop"):
        xs = [x.clone().requires_grad_() for x in tokens]
        ls = [x.clone().requires_grad_() for x in logits]
        if name == "dispatched":
            routings = [make_routing(*a) for a in zip(pools, ls, (k, k), capacities, masks)]
            outputs = FixedCapacityDispatcher(GROUPS)(xs, routings, experts)
        else:
            own = [experts.pool(pool.name) for pool in pools]
            looped = [plain_loop(*a) for a in zip(xs, ls, (k, k), capacities, masks, own)]
            outputs = [output for output, _, _ in looped]
            assert sum(dropped for _, dropped, _ in looped) > 0
            assert sum(unfilled for _, _, unfilled in looped) > 0
        leaves = [*xs, *ls, *experts.parameters()]
        results[name] = [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]
    for actual, expected in zip(results["dispatched"], results["loop"], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_dropped_and_padded_tokens_come_back_as_zero_and_get_no_gradient() -> None:
    torch.manual_seed(0)
    pool = Branch("text", ("texts",), 2)
    tokens = torch.randn(6, WIDTH, dtype=torch.float64, requires_grad=True)
    # All want expert 0, which takes the two surest of those that are not padding: tokens 4 and 3.
    logits = torch.stack([torch.arange(1.0, 7.0), torch.zeros(6)], dim=1).double()
    mask = torch.tensor([True, True, True, True, True, False])
    routing = make_routing(pool, logits, 1, 2, mask)
    (output,) = FixedCapacityDispatcher(GROUPS)([tokens], [routing], make_experts(pool))
    output.sum().backward()
    assert (output.abs().sum(dim=1) > 0).tolist() == [False, False, False, True, True, False]
    assert tokens.grad is not None
    assert (tokens.grad.abs().sum(dim=1) > 0).tolist() == [False, False, False, True, True, False]


def test_a_pool_without_tokens_is_left_out() -> None:
    pools = (Branch("text", ("texts",), 2), Branch("vision", ("images",), 2))
    sizes = (0, 4)
    routings = [
        make_routing(pool, torch.randn(n, 2, dtype=torch.float64), 1, 4, None)
        for pool, n in zip(pools, sizes)
    ]
    tokens = [torch.randn(n, WIDTH, dtype=torch.float64) for n in sizes]
    text, vision = FixedCapacityDispatcher(GROUPS)(tokens, routings, make_experts(*pools))
    assert text.shape == (0, WIDTH) and vision.shape == (4, WIDTH)


def test_batched_linear_gradients_by_finite_differences() -> None:
    torch.manual_seed(0)
    shapes = ((2, 3, 4), (2, 5, 4), (2, 5))
    rows, weight, bias = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes
    )
    expected = torch.stack([rows[e] @ weight[e].T + bias[e] for e in range(2)])
    torch.testing.assert_close(batched_linear(rows, weight, bias), expected)
    assert torch.autograd.gradcheck(batched_linear, (rows, weight, bias))


def test_batched_linear_gives_the_weight_gradient_in_the_weights_layout() -> None:
    rows, weight = torch.randn(2, 3, 4), torch.randn(2, 5, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(batched_linear(rows, weight, torch.zeros(2, 5)).sum(), weight)
    assert grad.is_contiguous()


def pool_parameters(experts: int) -> list[Tensor]:
    shapes = ((experts, INNER, WIDTH), (experts, INNER), (experts, WIDTH, INNER), (experts, WIDTH))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def test_experts_one_by_one_are_those_of_one_batch() -> None:
    torch.manual_seed(2)
    parameters = pool_parameters(3)
    rows = torch.randn(3, 5, WIDTH, dtype=torch.float64, requires_grad=True)
    used = torch.tensor([5, 0, 2])
    in_use = torch.arange(5) < used.unsqueeze(1)
    expected = batched(rows, *parameters) * in_use.unsqueeze(2)
    actual = one_by_one(rows, used, *parameters)
    torch.testing.assert_close(actual, expected)
    upstream = torch.randn_like(expected)
    leaves = [rows, *parameters]
    grads = [torch.autograd.grad(output, leaves, upstream) for output in (actual, expected)]
    for own, wanted in zip(*grads):
        torch.testing.assert_close(own, wanted)
    torch.testing.assert_close(one_by_one(rows, None, *parameters), batched(rows, *parameters))


@pytest.mark.parametrize("counts", [[2, 0, 3], [0, 0, 0], [1, 4, 0]])
def test_experts_one_by_one_are_those_of_one_group(counts: list[int]) -> None:
    torch.manual_seed(3)
    parameters = pool_parameters(3)
    # Two rows at the end belong to no expert; what they hold must not matter.
    rows = torch.randn(sum(counts) + 2, WIDTH, dtype=torch.float64)
    rows[sum(counts) :] = float("nan")
    rows.requires_grad_()
    number = torch.tensor(counts)
    outputs = [f(rows, number, *parameters) for f in (one_by_one, grouped)]
    assert outputs[0][sum(counts) :].eq(0).all()
    upstream = torch.randn(rows.shape, dtype=torch.float64)
    leaves = [rows, *parameters]
    found = [[output, *torch.autograd.grad(output, leaves, upstream)] for output in outputs]
    for own, wanted in zip(*found):
        torch.testing.assert_close(own, wanted)


@pytest.mark.parametrize("run", [one_by_one, grouped])
def test_gradients_of_biases_in_16_bits_are_sums_in_more(run: Any) -> None:
    """Added up one after the other in bfloat16, 4,000 gradients near 1 would stop growing at 256."""
    shapes = ((1, 16, 8), (1, 16), (1, 8, 16), (1, 8))
    found = {}
    for dtype in (torch.float64, torch.bfloat16):
        parameters = [torch.ones(shape, dtype=dtype, requires_grad=True) for shape in shapes]
        run(torch.zeros(4000, 8, dtype=dtype), torch.tensor([4000]), *parameters).sum().backward()
        found[dtype] = parameters[3].grad
    assert found[torch.float64].eq(4000).all()
    torch.testing.assert_close(
        found[torch.bfloat16].double(), found[torch.float64], rtol=0.01, atol=0
    )


@pytest.mark.parametrize("trained", [True, False])
def test_gradients_of_experts_one_by_one_by_finite_differences(trained: bool) -> None:
    torch.manual_seed(4)
    parameters = [parameter.detach().requires_grad_(trained) for parameter in pool_parameters(2)]
    rows = torch.randn(5, WIDTH, dtype=torch.float64, requires_grad=True)
    counts = torch.tensor([3, 1])
    assert torch.autograd.gradcheck(
        lambda x, *own: one_by_one(x, counts, *own), (rows, *parameters)
    )


@pytest.mark.parametrize("trained", range(4))
def test_one_trained_parameter_has_its_gradient(trained: int) -> None:
    torch.manual_seed(6)
    rows, counts = torch.randn(3, WIDTH, dtype=torch.float64), torch.tensor([2, 1])
    parameters = [parameter.detach() for parameter in pool_parameters(2)]
    leaf = parameters[trained].requires_grad_()
    found = [
        torch.autograd.grad(run(rows, counts, *parameters).square().sum(), leaf)[0]
        for run in (one_by_one, grouped)
    ]
    torch.testing.assert_close(*found)


def test_weight_gradients_are_added_to_the_gradient_buffer() -> None:
    """As megatron-core's own linear layer does it: the hook of its DDP finds a gradient, and must not add it again."""
    torch.manual_seed(5)
    counts = torch.tensor([2, 0, 3])
    rows = torch.randn(5, WIDTH, dtype=torch.float64)
    plain = pool_parameters(3)
    one_by_one(rows, counts, *plain).square().sum().backward()
    buffered = [parameter.detach().clone().requires_grad_() for parameter in plain]
    for parameter in buffered:
        parameter.main_grad = torch.ones_like(parameter)  # type: ignore[attr-defined]
        parameter.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    for _ in range(2):
        for parameter in buffered:
            parameter.grad = None
        one_by_one(rows, counts, *buffered).square().sum().backward()
    for index, (parameter, own) in enumerate(zip(buffered, plain)):
        assert parameter.grad is not None and own.grad is not None
        if index % 2:
            # Biases are small, and left to the hook.
            assert not parameter.grad_added_to_main_grad  # type: ignore[attr-defined]
            torch.testing.assert_close(parameter.grad, own.grad)
        else:
            assert parameter.grad_added_to_main_grad  # type: ignore[attr-defined]
            torch.testing.assert_close(parameter.main_grad, 1 + 2 * own.grad)  # type: ignore[attr-defined]


def test_sorted_slots_hold_every_assignment_once() -> None:
    expert = torch.tensor([[2, 0], [1, 2], [0, 1]])
    kept = torch.tensor([[True, True], [False, True], [True, True]])
    slots = sorted_slots(expert, kept, 4)
    assert slots.load.tolist() == [2, 1, 2, 0]
    # By expert, then first choices before second ones, then by token.
    filled = slots.slot_filled.tolist()
    assert filled == [True] * 5 + [False]
    pairs = list(zip(slots.slot_token.tolist(), slots.slot_choice.tolist()))
    assert pairs == [(2, 0), (0, 1), (2, 1), (0, 0), (1, 1), (1, 0)]
    for slot, (token, choice) in enumerate(pairs):
        assert slots.token_slot[token, choice] == slot


@pytest.mark.parametrize("by_experts", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gate_gradients_in_16_bits_are_products_and_sums_in_fp32(
    by_experts: bool, dtype: torch.dtype
) -> None:
    """300 x 300 is more than fp16 holds, and 255 x 255 more digits than bfloat16 has."""
    rows = torch.tensor([[300.0, 300.0, 255.0, 1.0], [1.0, 2.0, 0.0, 0.0]], dtype=dtype)
    upstream = torch.tensor([[300.0, -300.0, 255.0, 2.0], [5.0, 7.0, 0.0, 0.0]], dtype=dtype)
    expected = (rows.double() * upstream.double()).sum(dim=1)
    # The first token's slot is in the first expert, the second's in the second.
    gates, mask = torch.tensor([[0.75, 0.25], [0.25, 0.75]]), None
    if by_experts:
        slots, gate = expert_choice_slots(gates, 1, mask), gates.clone()
        wanted = torch.diag(expected)
    else:
        gate, expert = top_k_experts(gates, 1)
        slots, wanted = route_slots(gate, expert, 2, 1, mask), expected.unsqueeze(1)
    gate.requires_grad_()
    combine_slots(rows, gate, slots, by_experts).backward(upstream)
    weight = torch.ones(2, requires_grad=True)
    weigh_rows(rows, weight).backward(upstream)
    assert gate.grad is not None and gate.grad.tolist() == wanted.tolist()
    assert weight.grad is not None and weight.grad.tolist() == expected.tolist()


class WrittenBytes(TorchDispatchMode):
    """Counts the bytes of every tensor that an operation makes; views make none."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            self.count += sum(leaf.nbytes for leaf in made)
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_matmul_writes_no_gradient_of_the_pool_per_expert(dtype: torch.dtype) -> None:
    rows = torch.randn(64, 16, dtype=dtype, requires_grad=True)
    counts = torch.tensor([0, *[2] * 30, 4])
    weight = torch.randn(32, 24, 16, dtype=dtype, requires_grad=True)
    with WrittenBytes() as written:
        grouped_matmul(rows, weight, counts.cumsum(0), counts.tolist()).sum().backward()
    # Outputs, their gradients, and one gradient of the pool that is made and stacked: far from one per expert.
    assert weight.nbytes <= written.count < 5 * weight.nbytes
    owner = torch.repeat_interleave(torch.arange(32), counts)
    expected = torch.zeros_like(weight).index_add_(
        0, owner, rows.detach()[:, None, :].expand(-1, 24, -1).contiguous()
    )
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, expected, rtol=2e-2, atol=2e-2)


def test_expert_choice_is_the_plain_loop() -> None:
    torch.manual_seed(1)
    pool, capacity = Branch("text", ("texts",), 3), 2
    experts = make_experts(pool)
    mask = torch.tensor([True] * 6 + [False] * 3)
    tokens = torch.randn(9, WIDTH, dtype=torch.float64)
    logits = torch.randn(9, 3, dtype=torch.float64)
    upstream = torch.randn(9, WIDTH, dtype=torch.float64)
    results = []
    for dispatched in (True, False):
        xs, ls = tokens.clone().requires_grad_(), logits.clone().requires_grad_()
        gates = ls.softmax(dim=1)
        if dispatched:
            slots = expert_choice_slots(gates.detach(), capacity, mask)
            expert = torch.arange(3).expand(9, 3)
            routing = PoolRouting(pool, gates, expert, slots.token_kept, capacity, slots, True)
            (output,) = FixedCapacityDispatcher(GROUPS)([xs], [routing], experts)
        else:
            rows = [torch.zeros(WIDTH, dtype=torch.float64) for _ in tokens]
            own = experts.pool("text")
            for e in range(3):
                # Six of nine tokens count; the best two of them.
                for token in sorted(range(6), key=lambda t: -float(gates[t, e]))[:capacity]:
                    inner = own.weight1[e] @ xs[token] + own.bias1[e]
                    value = own.weight2[e] @ torch.nn.functional.gelu(inner) + own.bias2[e]
                    rows[token] = rows[token] + gates[token, e] * value
            output = torch.stack(rows)
        leaves = [xs, ls, *experts.parameters()]
        results.append([output, *torch.autograd.grad(output, leaves, upstream)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    # A token of several experts, one of none, padding.
    chosen = slots.token_kept.sum(dim=1)
    assert chosen.max() > 1 and (chosen[:6] == 0).any() and not chosen[6:].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [0, 1, 700, 1100])
def test_dots_of_rows_are_computed_some_rows_at_a_time(rows: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(rows, 512, generator=generator).to(dtype) for _ in range(2))
    wide = torch.promote_types(dtype, torch.float32)
    # 16-bit products are exact in fp32.
    expected = (left.to(wide) * right.to(wide)).sum(dim=1)
    assert torch.equal(row_dots(left, right, wide), expected)
