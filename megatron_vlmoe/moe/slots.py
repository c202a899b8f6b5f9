"""Tokens into the slots of experts, and results out of them, with gradients.

Letters: T tokens of a pool on this rank, D width, K experts per token, S slots of the pool.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from megatron_vlmoe.moe.routing_ops import SlotRouting

# Values that are multiplied at once: of 16 bits, in fp32; on a CPU, where the products are to stay in its cache.
_PRODUCTS = 2**23
_CACHED_PRODUCTS = 2**19


def token_sums(
    rows: Tensor,
    slots: SlotRouting,
    by_experts: bool,
    weight: Optional[Tensor] = None,
    place: Optional[Tensor] = None,
) -> Tensor:
    """For every token the sum of what its slots hold ``[T, D]``; 0 for a token that has none.

    One gather per choice of a token, where tokens choose. Where experts choose, a token has any number of slots, and
    these are added one by one, in a fixed order on CPU, and on GPU with deterministic algorithms.

    Args:
        rows: what slots hold ``[S, D]``, or a larger buffer.
        by_experts: experts have chosen tokens.
        weight: of every choice ``[T, K]``, 0 where it is not kept, in the dtype of the rows; None: 1 where it is kept.
        place: the row of every slot ``[S]``; None: its number.
    """
    if by_experts:
        held = rows if place is None else rows.index_select(0, place)
        factor = slots.slot_filled.to(rows.dtype)
        if weight is not None:
            factor = factor * weight[slots.slot_token, slots.slot_choice]
        total = rows.new_zeros(len(slots.token_slot), rows.shape[1])
        return total.index_add_(0, slots.slot_token, held * factor.unsqueeze(1))
    token_row = slots.token_slot if place is None else place[slots.token_slot]
    total = torch.zeros((), device=rows.device)
    for choice in range(token_row.shape[1]):
        part = rows.index_select(0, token_row[:, choice])
        if weight is None:
            _clear_rows(part, slots.token_kept[:, choice])
        else:
            part.mul_(weight[:, choice].unsqueeze(1))
        total = part if choice == 0 else total.add_(part)
    return total


def _clear_rows(rows: Tensor, kept: Tensor) -> None:
    """Sets rows ``[T, D]`` to zero where `kept` ``[T]`` is False."""
    if rows.device.type == "cpu":
        # Few are dropped: a pass over all of them costs more than to look for these.
        rows.index_fill_(0, torch.nonzero(~kept).squeeze(1), 0.0)
    else:
        rows.mul_(kept.unsqueeze(1))


def row_dots(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """``sum_d left[s, d] * right[s, d]`` ``[S]`` for two ``[S, D]``.

    A product of two numbers of 16 bits is exact in fp32, where in 16 bits it is rounded, and in fp16 may overflow. Some
    rows at a time, so that there is no copy of all of them in fp32, and on a CPU, where new memory costs more than the
    arithmetic, no product of many rows at all.
    """
    is_narrow, on_cpu = left.dtype in (torch.float16, torch.bfloat16), left.device.type == "cpu"
    size = max(1, (_CACHED_PRODUCTS if on_cpu else _PRODUCTS) // left.shape[1])
    if not is_narrow and (not on_cpu or len(left) <= size):
        return (left * right).sum(dim=1, dtype=dtype)
    wide = torch.float32 if is_narrow else left.dtype
    products = left.new_empty(min(size, len(left)), left.shape[1], dtype=wide)
    dots = left.new_empty(len(left), dtype=dtype)
    for one, other, own in zip(left.split(size), right.split(size), dots.split(size)):
        part = products[: len(one)].copy_(one).mul_(other)
        torch.sum(part, dim=1, dtype=dtype, out=own)
    return dots


class _FillSlots(torch.autograd.Function):
    """Copies kept tokens ``[T, D]`` into slots ``[S, D]``; an unfilled slot holds a copy of some token, which nobody
    asks for.

    Where tokens choose, a gather in both directions: no atomics, so the gradient is deterministic.

    Args of `apply`: tokens; slots; whether experts have chosen.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, slots: SlotRouting, by_experts: bool) -> Tensor:  # type: ignore[override]
        ctx.slots, ctx.by_experts = slots, by_experts
        return tokens.index_select(0, slots.slot_token)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return token_sums(grad_rows, ctx.slots, ctx.by_experts), None, None


fill_slots = _FillSlots.apply


class _CombineSlots(torch.autograd.Function):
    """Sums each token's kept slots weighted by its gates: ``[S, D]`` to ``[T, D]``; the gradient of the slots is a
    gather.

    Args of `apply`: rows of the slots; gates ``[T, K]``; slots; whether experts have chosen.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, rows: Tensor, gate: Tensor, slots: SlotRouting, by_experts: bool
    ) -> Tensor:
        ctx.save_for_backward(rows, gate)
        ctx.slots = slots
        weight = (gate * slots.token_kept).to(rows.dtype)
        return token_sums(rows, slots, by_experts, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        rows, gate = ctx.saved_tensors
        slots: SlotRouting = ctx.slots
        grad_rows = grad.index_select(0, slots.slot_token)
        # The gate's gradient is a dot product per slot; only these scalars go back to the tokens.
        grad_gate = row_dots(rows, grad_rows, gate.dtype)[slots.token_slot] * slots.token_kept
        grad_rows.mul_(slot_weights(gate, slots).unsqueeze(1).to(grad_rows.dtype))
        return grad_rows, grad_gate, None, None


combine_slots = _CombineSlots.apply


def slot_weights(gate: Tensor, slots: SlotRouting) -> Tensor:
    """The gate ``[T, K]`` of the choice that every slot serves ``[S]``; 0 where unfilled."""
    return gate[slots.slot_token, slots.slot_choice] * slots.slot_filled


class _WeighRows(torch.autograd.Function):
    """Rows ``[N, D]`` times their weights ``[N]``, which may be in a wider format."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(rows, weight)
        return rows * weight.unsqueeze(1).to(rows.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        rows, weight = ctx.saved_tensors
        return grad * weight.unsqueeze(1).to(grad.dtype), row_dots(rows, grad, weight.dtype)


weigh_rows = _WeighRows.apply
