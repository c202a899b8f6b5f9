"""Token-to-expert assignment: top-k choice, expert capacity, Batch Priority Routing, and the choice by experts.

Everything here is integer bookkeeping without host synchronisation: output shapes depend on the
input shapes only, so the functions can run inside a CUDA graph.

Letters in shapes: T tokens, E experts, K choices per token, C capacity (slots per expert).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vlmoe.stream.sizes import check_top_k


@dataclass(frozen=True, eq=False)
class SlotRouting:
    """Which token fills which expert slot, seen from both sides.

    Slots are numbered `expert * C + position`; an expert's slots are filled from position 0 on. Where experts have as
    many slots as assignments, those of one follow those of the other.
    """

    slot_token: Tensor
    """[S] int64, S = E*C slots: the token in each slot; any where unfilled."""
    slot_choice: Tensor
    """[S] int64: which of the token's K choices this slot serves; any where unfilled."""
    slot_filled: Tensor
    """[S] bool."""
    token_slot: Tensor
    """[T, K] int64: the slot of each choice; any where dropped or masked."""
    token_kept: Tensor
    """[T, K] bool: False where dropped or masked."""
    load: Tensor
    """[E] int64: choices of unmasked tokens per expert, before dropping."""


def top_k_experts(gates: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest gates of each token in falling order; ties go to the lower expert.

    Args:
        gates: [T, E] gates or logits.

    Returns:
        gate [T, K], differentiable with respect to `gates`, and expert [T, K] int64, distinct
        within a token.

    Raises:
        ValueError: if k is not in 1..E.
    """
    check_matrix("gates", gates)
    check_top_k(k, gates.shape[1])
    # torch.max documents that it returns the first maximum; torch.topk promises no order of ties.
    # For the few choices in use, repeated maxima are also much cheaper than a stable row sort.
    remaining = gates.detach()
    if k > 1:
        # A chosen expert is marked with -inf, which must lie below everything still to choose.
        remaining = remaining.clamp(min=torch.finfo(gates.dtype).min)
    choices = []
    for choice in range(k):
        chosen = remaining.max(dim=1, keepdim=True).indices
        choices.append(chosen)
        if choice + 1 < k:
            remaining = remaining.scatter(1, chosen, -math.inf)
    expert = choices[0] if k == 1 else torch.cat(choices, dim=1)
    return gates.gather(1, expert), expert


@torch.no_grad()
def route_slots(
    gate: Tensor,
    expert: Tensor,
    num_experts: int,
    capacity: int,
    mask: Tensor | None = None,
    batch_priority: bool = True,
) -> SlotRouting:
    """Give the choices of all tokens to expert slots until each expert has C tokens.

    Batch Priority Routing (V-MoE, arXiv 2106.05974, section 4): tokens are served in falling
    order of their largest gate, ties by token index; all first choices come before all second
    choices, which follow in the same token order. A choice that finds its expert full is dropped
    and not routed elsewhere. A NaN gate counts as the lowest priority.

    Args:
        gate: [T, K] gates of the choices, the best first (as `top_k_experts` returns them); priority goes by the first.
        expert: [T, K] int64, distinct within a token.
        mask: [T] bool; tokens with False take no slot and are not counted.
        batch_priority: False serves the tokens in index order instead.

    Raises:
        ValueError: on shapes that do not fit or a negative capacity.
    """
    check_matrix("gate", gate)
    if expert.shape != gate.shape:
        raise ValueError(
            f"expert {list(expert.shape)} and gate {list(gate.shape)} must have one shape"
        )
    check_mask(mask, gate.shape[0])
    if capacity < 0:
        raise ValueError(f"capacity must be at least 0, got {capacity}")
    num_tokens, k = expert.shape
    num_assignments = num_tokens * k
    device = expert.device

    served_token = torch.arange(num_tokens, device=device)
    if batch_priority:
        priority = torch.nan_to_num(gate[:, 0], nan=-math.inf, posinf=math.inf, neginf=-math.inf)
        served_token = torch.sort(priority, descending=True, stable=True).indices
    # Assignments are numbered choice * T + token; `queue` lists them in the order of service.
    choice_start = torch.arange(k, device=device)[:, None] * num_tokens
    queue = (choice_start + served_token).flatten()

    # Masked tokens go to a virtual expert E behind the real ones. A 32-bit key halves the radix
    # sort's passes on CUDA.
    key = expert.to(torch.int32)
    if mask is not None:
        key = key.masked_fill(~mask[:, None], num_experts)
    sorted_key, order = torch.sort(key.t().flatten()[queue], stable=True)
    assignment = queue[order]

    # bounds[e] = where expert e starts in the sorted list; bounds[E] = end of the last real one.
    experts = torch.arange(num_experts + 1, dtype=torch.int32, device=device)
    bounds = torch.searchsorted(sorted_key, experts)
    load = bounds.diff()

    position = torch.arange(num_assignments, device=device) - bounds[sorted_key]
    kept = (position < capacity) & (sorted_key < num_experts)
    slot = torch.where(kept, sorted_key * capacity + position, -1)
    token_slot = torch.empty_like(slot).scatter_(0, assignment, slot)
    token_slot = token_slot.view(k, num_tokens).t().contiguous()

    place = torch.arange(capacity, device=device)
    slot_filled = place < load[:, None]
    # Unfilled slots read the zero appended here, which also serves a batch without tokens.
    source = torch.where(slot_filled, bounds[:-1, None] + place, num_assignments).flatten()
    slot_assignment = torch.nn.functional.pad(assignment, (0, 1))[source]
    return SlotRouting(
        slot_token=slot_assignment % max(num_tokens, 1),
        slot_choice=slot_assignment // max(num_tokens, 1),
        slot_filled=slot_filled.flatten(),
        token_slot=token_slot.clamp(min=0),
        token_kept=token_slot >= 0,
        load=load,
    )


@torch.no_grad()
def sorted_slots(expert: Tensor, kept: Tensor, num_experts: int) -> SlotRouting:
    """A slot for every assignment, sorted by expert: as many as there are, T * K, those that are not kept at the end.

    Args:
        expert: [T, K] int64.
        kept: [T, K] bool, True = the assignment is carried out.
    """
    num_tokens, k = expert.shape
    key = expert.to(torch.int32).masked_fill(~kept, num_experts).t().flatten()
    sorted_key, order = torch.sort(key, stable=True)
    bounds = torch.searchsorted(
        sorted_key, torch.arange(num_experts + 1, dtype=torch.int32, device=expert.device)
    )
    token_slot = torch.empty_like(order)
    token_slot.scatter_(0, order, torch.arange(len(order), device=expert.device))
    return SlotRouting(
        slot_token=order % max(num_tokens, 1),
        slot_choice=order // max(num_tokens, 1),
        slot_filled=sorted_key < num_experts,
        token_slot=token_slot.view(k, num_tokens).t().contiguous(),
        token_kept=kept,
        load=bounds.diff(),
    )


@torch.no_grad()
def expert_choice_slots(gates: Tensor, capacity: int, mask: Tensor | None = None) -> SlotRouting:
    """Gives every expert the C tokens that have the largest gates for it (Zhou et al., arXiv 2202.09368, section 3.2).

    A token may be taken by none, some or all experts: its K = E choices are the experts in order. Ties go to the
    earlier token. An expert takes fewer than C tokens only where there are fewer; a NaN gate is taken last.

    Args:
        gates: [T, E] softmax over experts.
        mask: [T] bool; tokens with False are never taken.

    Raises:
        ValueError: on shapes that do not fit, or a capacity that is not in 0..T.
    """
    check_matrix("gates", gates)
    num_tokens, num_experts = gates.shape
    check_mask(mask, num_tokens)
    if not 0 <= capacity <= num_tokens:
        raise ValueError(
            f"capacity must be in 0..{num_tokens} (the number of tokens), got {capacity}"
        )
    score = torch.nan_to_num(gates, nan=-1.0)
    valid = gates.new_ones(num_tokens, dtype=torch.bool) if mask is None else mask
    score = score.masked_fill(~valid[:, None], -math.inf)
    order = torch.sort(score, dim=0, descending=True, stable=True).indices
    taken = order[:capacity].t()
    slot_filled = valid[taken]
    expert = torch.arange(num_experts, device=gates.device)
    slot = expert[:, None] * capacity + torch.arange(capacity, device=gates.device)
    # An unfilled slot holds a masked token, which keeps the -1.
    token_slot = torch.full((num_experts, num_tokens), -1, device=gates.device)
    token_slot.scatter_(1, taken, torch.where(slot_filled, slot, -1))
    token_slot = token_slot.t().contiguous()
    return SlotRouting(
        slot_token=torch.where(slot_filled, taken, 0).flatten(),
        slot_choice=torch.where(slot_filled, expert[:, None], 0).flatten(),
        slot_filled=slot_filled.flatten(),
        token_slot=token_slot.clamp(min=0),
        token_kept=token_slot >= 0,
        load=slot_filled.sum(dim=1),
    )


def balancing_step(counts: Tensor, rate: float) -> Tensor:
    """How loss-free balancing moves the bias of every expert: ``rate * sign(mean load - load)``.

    The sign is exact, since it is taken of integers (DeepSeek, arXiv 2408.15664, algorithm 1).

    Args:
        counts: [E] int64, assignments of a step, over all ranks and micro-batches.
    """
    return rate * torch.sign(counts.sum() - len(counts) * counts)


def check_matrix(name: str, tensor: Tensor) -> None:
    """Raises ValueError unless the tensor is a 2-D floating-point one."""
    if tensor.dim() != 2 or not tensor.is_floating_point():
        raise ValueError(
            f"{name} must be a 2-D floating-point tensor, got {tensor.dtype} {list(tensor.shape)}"
        )


def check_mask(mask: Tensor | None, num_tokens: int) -> None:
    """Raises ValueError unless the mask is None or bool [T]."""
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (num_tokens,)):
        raise ValueError(f"mask must be bool [{num_tokens}], got {mask.dtype} {list(mask.shape)}")
