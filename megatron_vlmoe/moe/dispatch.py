"""Token dispatch: three ways to bring tokens to experts and back, with equal results.

Letters: T tokens of a pool on this rank, D width, E experts of a pool, C slots per expert, K experts per
token, L experts of a pool on one rank (E / EP), S = E * C slots.

Each dispatcher maps the tokens of all pools to the gated sum of their experts' outputs; tokens that are
dropped come back as zero. Expert numbers inside a transfer are rank-major (all pools of rank 0, of rank 1,
...) and exist only here.
"""

from __future__ import annotations

from typing import Any, Callable, Optional, Protocol, Sequence

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from torch import Tensor

from megatron_vlmoe.moe.experts import ExpertPool, PooledExperts
from megatron_vlmoe.moe.router import PoolRouting
from megatron_vlmoe.moe.routing_ops import sorted_slots
from megatron_vlmoe.moe.slots import combine_slots, fill_slots, weigh_rows
from megatron_vlmoe.moe.transfers import SlotOrder, slots_of, through_experts
from megatron_vlmoe.stream.block_plan import Branch


def nothing() -> None:
    """What else there is to compute where there is nothing."""


class Dispatcher(Protocol):
    """Sends tokens to experts and combines what comes back."""

    def __call__(
        self,
        inputs: Sequence[Tensor],
        routings: Sequence[PoolRouting],
        experts: PooledExperts,
        meanwhile: Callable[[], None] = nothing,
    ) -> list[Tensor]:
        """Gated expert outputs ``[T, D]`` of every pool for its tokens ``[T, D]``.

        Calls `meanwhile` once, when tokens are under way if it can send them in the background.
        """
        ...


class FixedCapacityDispatcher:
    """Static shapes: every expert computes C rows per source rank, filled or not; no host synchronization.

    The slots of all pools go to the ranks of their experts and back by equal-split all-to-alls, one each way for every
    group of local experts (`SlotOrder`). While those of a group are under way, other groups compute.

    Args:
        pg_collection: the ranks among which experts are spread.
        chunks: groups of local experts; at most one per expert.
    """

    def __init__(self, pg_collection: ProcessGroupCollection, chunks: int = 1) -> None:
        self.ep_group = pg_collection.ep
        self.ep_size = pg_collection.ep.size()
        self.chunks = chunks
        # Sizes in training and in evaluation; the same in every micro-batch.
        self._orders: dict[tuple[tuple[tuple[int, int], ...], torch.device], SlotOrder] = {}

    def __call__(
        self,
        inputs: Sequence[Tensor],
        routings: Sequence[PoolRouting],
        experts: PooledExperts,
        meanwhile: Callable[[], None] = nothing,
    ) -> list[Tensor]:
        """See :class:`Dispatcher`."""
        # A run's layout is the same on all ranks, so they all leave out the same pools.
        reached = [index for index, tokens in enumerate(inputs) if len(tokens)]
        outputs = list(inputs)
        parts, own = [inputs[index] for index in reached], [routings[index] for index in reached]
        if self.ep_size > 1 and reached:
            results = self._exchanged(parts, own, experts, meanwhile)
        else:
            meanwhile()
            results = [
                self._alone(tokens, routing, experts.pool(routing.pool.name))
                for tokens, routing in zip(parts, own)
            ]
        for index, result in zip(reached, results):
            outputs[index] = result
        return outputs

    def _alone(self, tokens: Tensor, routing: PoolRouting, pool: ExpertPool) -> Tensor:
        """Where one rank has all experts."""
        slots, capacity = slots_of(routing), routing.capacity
        rows = fill_slots(tokens, slots, routing.by_experts)
        results = pool(rows.view(pool.num_experts, capacity, -1), slots_in_use(routing))
        combined: Tensor = combine_slots(
            results.view_as(rows), routing.gate, slots, routing.by_experts
        )
        return combined

    def _exchanged(
        self,
        inputs: Sequence[Tensor],
        routings: Sequence[PoolRouting],
        experts: PooledExperts,
        meanwhile: Callable[[], None],
    ) -> Sequence[Tensor]:
        pools = [experts.pool(routing.pool.name) for routing in routings]
        sizes = tuple(
            (pool.num_local_experts, routing.capacity) for pool, routing in zip(pools, routings)
        )
        key = sizes, inputs[0].device
        if key not in self._orders:
            self._orders[key] = SlotOrder(self.ep_size, sizes, self.chunks, inputs[0].device)
        return through_experts(self._orders[key], self.ep_group, inputs, routings, pools, meanwhile)


def slots_in_use(routing: PoolRouting) -> Optional[Tensor]:
    """How many of every expert's slots are filled ``[E]``, where one rank has all experts."""
    return slots_of(routing).load.clamp(max=routing.capacity)


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
        self,
        inputs: Sequence[Tensor],
        routings: Sequence[PoolRouting],
        experts: PooledExperts,
        meanwhile: Callable[[], None] = nothing,
    ) -> list[Tensor]:
        """See :class:`Dispatcher`."""
        meanwhile()
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
        numbers = iter(counts.tolist())
        sizes = [[next(numbers) for _ in range(local)] for local in self.local]
        # megatron-core has the counts on the host; they go back once, for all pools.
        if counts.device != rows.device:
            if rows.is_cuda:
                counts = counts.pin_memory()
            counts = counts.to(rows.device, non_blocking=True)
        parts = rows.split([sum(own) for own in sizes])
        outputs = [
            experts.pool(pool.name)(part, *own)
            for pool, part, *own in zip(self.pools, parts, counts.split(self.local), sizes)
        ]
        result = weigh_rows(torch.cat(outputs), probs)
        result = self.transport.combine_preprocess(result)
        result = self.transport.token_combine(result)
        combined = self.transport.combine_postprocess(result).squeeze(1)
        return list(combined.split([len(part) for part in inputs]))

    def _alone(self, tokens: Tensor, routing: PoolRouting, pool: ExpertPool) -> Tensor:
        slots = sorted_slots(routing.expert, routing.kept, pool.num_experts)
        rows = pool(fill_slots(tokens, slots, False), slots.load)
        combined: Tensor = combine_slots(rows, routing.gate, slots, False)
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
