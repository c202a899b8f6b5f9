"""Token dispatch: three ways to bring tokens to experts and back, with equal results.

Letters: T tokens of a pool on this rank, D width, E experts of a pool, C slots per expert, K experts per
token, L experts of a pool on one rank (E / EP), S = E * C slots.

Each dispatcher maps the tokens of all pools to the gated sum of their experts' outputs; tokens that are
dropped come back as zero. Expert numbers inside a transfer are rank-major (all pools of rank 0, of rank 1,
...) and exist only here.
"""

from __future__ import annotations

from typing import Any, Optional, Protocol, Sequence

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import all_to_all
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from torch import Tensor

from megatron_vlmoe.moe.experts import ExpertPool, PooledExperts
from megatron_vlmoe.moe.router import PoolRouting
from megatron_vlmoe.moe.routing_ops import SlotRouting, sorted_slots
from megatron_vlmoe.stream.block_plan import Branch


class Dispatcher(Protocol):
    """Sends tokens to experts and combines what comes back."""

    def __call__(
        self, inputs: Sequence[Tensor], routings: Sequence[PoolRouting], experts: PooledExperts
    ) -> list[Tensor]:
        """Gated expert outputs ``[T, D]`` of every pool for its tokens ``[T, D]``."""
        ...


class FixedCapacityDispatcher:
    """Static shapes: every expert computes C rows per source rank, filled or not; no host synchronization.

    One send buffer ``[EP, R, D]`` holds, for each destination rank, the slots of its experts of every pool;
    one equal-split all-to-all carries it there and one brings the results back.
    """

    def __init__(self, pg_collection: ProcessGroupCollection) -> None:
        self.ep_group = pg_collection.ep
        self.ep_size = pg_collection.ep.size()

    def __call__(
        self, inputs: Sequence[Tensor], routings: Sequence[PoolRouting], experts: PooledExperts
    ) -> list[Tensor]:
        """See :class:`Dispatcher`."""
        # A run's layout is the same on all ranks, so they all leave out the same pools.
        reached = [index for index, tokens in enumerate(inputs) if len(tokens)]
        outputs = list(inputs)
        if reached:
            parts = [inputs[index] for index in reached]
            results = self._transfer(parts, [routings[index] for index in reached], experts)
            for index, result in zip(reached, results):
                outputs[index] = result
        return outputs

    def _transfer(
        self, inputs: Sequence[Tensor], routings: Sequence[PoolRouting], experts: PooledExperts
    ) -> list[Tensor]:
        rows = [
            fill_chosen(tokens, routing)
            if routing.by_experts
            else _FillSlots.apply(tokens, routing.slots)
            for tokens, routing in zip(inputs, routings)
        ]
        received = self._exchange(rows)
        outputs = []
        for part, routing in zip(received, routings):
            pool = experts.pool(routing.pool.name)
            local, capacity = pool.num_local_experts, routing.capacity
            used = slots_in_use(routing, self.ep_size)
            # [EP, L, C, D] -> [L, EP * C, D]: an expert's rows from all source ranks together.
            by_expert = part.view(self.ep_size, local, capacity, -1).transpose(0, 1)
            result = pool(by_expert.reshape(local, self.ep_size * capacity, -1), used)
            back = result.view(local, self.ep_size, capacity, -1).transpose(0, 1)
            outputs.append(back.reshape(self.ep_size, local * capacity, -1))
        returned = self._exchange(outputs)
        outputs = []
        for part, routing in zip(returned, routings):
            slots = part.reshape(-1, part.shape[-1])
            if routing.by_experts:
                outputs.append(combine_chosen(slots, routing))
            else:
                assert routing.slots is not None
                outputs.append(_CombineSlots.apply(slots, routing.gate, routing.slots))
        return outputs

    def _exchange(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """One all-to-all of every pool's slots, grouped by the rank on the other side."""
        by_rank = [part.reshape(self.ep_size, -1, part.shape[-1]) for part in parts]
        if self.ep_size == 1:
            return by_rank
        sizes = [part.shape[1] for part in by_rank]
        buffer = torch.cat(by_rank, dim=1)
        received = all_to_all(self.ep_group, buffer.flatten(0, 1)).view_as(buffer)
        return list(received.split(sizes, dim=1))


def slots_in_use(routing: PoolRouting, ep_size: int) -> Optional[Tensor]:
    """How many of every expert's slots are filled ``[E]``; None where slots come from other ranks, which do not say."""
    if ep_size > 1 or routing.slots is None:
        return None
    return routing.slots.load.clamp(max=routing.capacity)


class TokenAllToAllDispatcher:
    """megatron-core's all-to-all of as many rows as there are; serves `alltoall` and `dropless`.

    Where one rank has all experts there is nothing to exchange, and rows are only sorted by expert.
    """

    def __init__(
        self, token_dispatcher: MoETokenDispatcher, pools: Sequence[Branch], ep_size: int
    ) -> None:
        # Untyped: megatron-core's base class does not declare the methods of its subclasses.
        self.transport: Any = token_dispatcher
        self.ep_size = ep_size
        self.pools = tuple(pools)
        self.local = [pool.num_experts // ep_size for pool in pools]

    def __call__(
        self, inputs: Sequence[Tensor], routings: Sequence[PoolRouting], experts: PooledExperts
    ) -> list[Tensor]:
        """See :class:`Dispatcher`."""
        if self.ep_size == 1 and not any(routing.by_experts for routing in routings):
            return [
                self._alone(tokens, routing, experts.pool(routing.pool.name))
                for tokens, routing in zip(inputs, routings)
            ]
        tokens = torch.cat(list(inputs)).unsqueeze(1)
        routing_map, probs = self._union(routings)
        rows, probs = self.transport.dispatch_preprocess(tokens, routing_map, probs)
        rows, probs = self.transport.token_dispatch(rows, probs)
        rows, counts, probs = self.transport.dispatch_postprocess(rows, probs)
        outputs = []
        counts_by_pool = counts.split(self.local)
        row_counts = [int(part.sum()) for part in counts_by_pool]
        for pool, part, pool_counts in zip(self.pools, rows.split(row_counts), counts_by_pool):
            outputs.append(experts.pool(pool.name)(part, pool_counts))
        result = torch.cat(outputs) * probs.unsqueeze(-1).to(rows.dtype)
        result = self.transport.combine_preprocess(result)
        result = self.transport.token_combine(result)
        combined = self.transport.combine_postprocess(result).squeeze(1)
        return list(combined.split([len(part) for part in inputs]))

    def _alone(self, tokens: Tensor, routing: PoolRouting, pool: ExpertPool) -> Tensor:
        slots = sorted_slots(routing.expert, routing.kept, pool.num_experts)
        rows = pool(_FillSlots.apply(tokens, slots), slots.load)
        combined: Tensor = _CombineSlots.apply(rows, routing.gate, slots)
        return combined

    def _union(self, routings: Sequence[PoolRouting]) -> tuple[Tensor, Tensor]:
        """Routing map and gates of all tokens over all experts in rank-major order ``[sum T, sum E]``."""
        width = sum(self.local) * self.ep_size
        maps, probs, offset = [], [], 0
        for routing, local in zip(routings, self.local):
            rank = torch.div(routing.expert, local, rounding_mode="floor")
            column = rank * sum(self.local) + offset + routing.expert % local
            offset += local
            kept = routing.kept
            gate = torch.where(kept, routing.gate, torch.zeros_like(routing.gate))
            empty = gate.new_zeros(gate.shape[0], width)
            probs.append(empty.scatter(1, column, gate))
            maps.append(torch.zeros_like(empty, dtype=torch.bool).scatter(1, column, kept))
        return torch.cat(maps), torch.cat(probs)


def fill_chosen(tokens: Tensor, routing: PoolRouting) -> Tensor:
    """Tokens ``[T, D]`` that experts have chosen into their slots ``[S, D]``; unfilled slots are zero.

    Like `combine_chosen` by single slots, of which a token has any number: one gather per choice, as below, would be
    one per expert. The sums are in a fixed order on CPU, and on GPU with deterministic algorithms.
    """
    assert routing.slots is not None
    return tokens.index_select(0, routing.slots.slot_token) * routing.slots.slot_filled.unsqueeze(1)


def combine_chosen(rows: Tensor, routing: PoolRouting) -> Tensor:
    """Sums for every token the slots that it fills, weighted by its gates: ``[S, D]`` to ``[T, D]``."""
    slots = routing.slots
    assert slots is not None
    weight = routing.gate[slots.slot_token, slots.slot_choice] * slots.slot_filled
    weighted = rows * weight.to(rows.dtype).unsqueeze(1)
    return rows.new_zeros(len(routing.gate), rows.shape[1]).index_add(0, slots.slot_token, weighted)


class _FillSlots(torch.autograd.Function):
    """Copies kept tokens ``[T, D]`` into slots ``[S, D]``; an unfilled slot holds a copy of some token, which nobody
    asks for.

    A gather in both directions: no atomics, so the gradient is deterministic.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, slots: SlotRouting) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(slots.token_slot, slots.token_kept)
        return tokens.index_select(0, slots.slot_token)

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        token_slot, kept = ctx.saved_tensors
        grad = torch.zeros((), device=grad_rows.device)
        for choice in range(token_slot.shape[1]):
            part = grad_rows.index_select(0, token_slot[:, choice])
            _clear_rows(part, kept[:, choice])
            grad = part if choice == 0 else grad.add_(part)
        return grad, None


def _clear_rows(rows: Tensor, kept: Tensor) -> None:
    """Sets rows ``[T, D]`` to zero where `kept` ``[T]`` is False."""
    if rows.device.type == "cpu":
        # Few are dropped: a pass over all of them costs more than to look for these.
        rows.index_fill_(0, torch.nonzero(~kept).squeeze(1), 0.0)
    else:
        rows.mul_(kept.unsqueeze(1))


class _CombineSlots(torch.autograd.Function):
    """Sums each token's kept slots weighted by its gates: ``[S, D]`` to ``[T, D]``; both gradients are gathers."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, gate: Tensor, slots: SlotRouting) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(
            *(rows, gate, slots.slot_token, slots.slot_choice, slots.slot_filled),
            *(slots.token_slot, slots.token_kept),
        )
        weight = (gate * slots.token_kept).to(rows.dtype)
        total = torch.zeros((), device=rows.device)
        for choice in range(slots.token_slot.shape[1]):
            part = rows.index_select(0, slots.token_slot[:, choice])
            part.mul_(weight[:, choice].unsqueeze(1))
            total = part if choice == 0 else total.add_(part)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        rows, gate, slot_token, slot_choice, filled, token_slot, kept = ctx.saved_tensors
        grad_rows = grad.index_select(0, slot_token)
        # The gate's gradient is a dot product per slot; only these scalars go back to the tokens.
        dot = (rows * grad_rows).sum(dim=1, dtype=gate.dtype)
        grad_gate = dot[token_slot] * kept
        weight = gate[slot_token, slot_choice] * filled
        grad_rows.mul_(weight.unsqueeze(1).to(grad_rows.dtype))
        return grad_rows, grad_gate, None
