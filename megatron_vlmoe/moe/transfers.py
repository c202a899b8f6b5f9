"""Slots of experts to the ranks that own these and back, in the background, forward and backward.

Four autograd functions follow each other: `_SendSlots`, `_ReceiveRows`, experts, `_ReturnRows`, `_CombineReturned`. The
backward pass of each starts or ends the transfer of the gradient that belongs to the transfer which its forward pass
ended or started. What is under way is not autograd's to touch: between these functions it sees an empty tensor, which
says only what must come after what.

Letters: EP ranks of the group, L experts of a pool on one rank, C slots of an expert for the tokens of one rank, D
width, S slots of all experts of all ranks for the tokens of one.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Callable, Optional, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vlmoe.moe.experts import ExpertPool, ExpertRange, SharedGradients
from megatron_vlmoe.moe.router import PoolRouting
from megatron_vlmoe.moe.routing_ops import SlotRouting
from megatron_vlmoe.moe.slots import row_dots, slot_weights, token_sums


def slots_of(routing: PoolRouting) -> SlotRouting:
    """The slots of a routing with capacity."""
    assert routing.slots is not None
    return routing.slots


@dataclass(frozen=True)
class Span:
    """Consecutive local experts of one pool within a chunk.

    Args:
        pool: number of the pool.
        first: first of the experts.
        count: how many.
        rows: where their slots lie within those of one rank.
    """

    pool: int
    first: int
    count: int
    rows: slice


class SlotOrder:
    """Where the slots of all pools lie in the buffers ``[S, D]`` that ranks exchange.

    A buffer is a row of chunks, each of consecutive local experts of all pools, which is exchanged by itself:
    ``[EP, rows, D]``, for every rank on the other side the slots of these experts. What arrives for a single expert is
    ``[EP, C, D]``, its rows from all ranks as they are needed. More experts in a chunk cost a copy each way.

    Args:
        ep_size: EP.
        pools: L and C of every pool.
        chunks: how many, but at most one per local expert.
        device: where slots are.
    """

    def __init__(
        self, ep_size: int, pools: Sequence[tuple[int, int]], chunks: int, device: torch.device
    ) -> None:
        self.ep_size, self.pools = ep_size, tuple(pools)
        experts = [(pool, e) for pool, (local, _) in enumerate(pools) for e in range(local)]
        chunks = min(chunks, len(experts))
        self.chunks: list[list[Span]] = []
        self.rows: list[slice] = []
        self.size = 0
        for number in range(chunks):
            part = experts[len(experts) * number // chunks : len(experts) * (number + 1) // chunks]
            spans, end = [], 0
            for pool, (_, capacity) in enumerate(pools):
                own = [e for of, e in part if of == pool]
                if own:
                    rows = slice(end, end + len(own) * capacity)
                    spans.append(Span(pool, own[0], len(own), rows))
                    end = rows.stop
            self.chunks.append(spans)
            self.rows.append(slice(self.size, self.size + ep_size * end))
            self.size = self.rows[-1].stop
        sizes = [ep_size * local * capacity for local, capacity in pools]
        numbers = torch.arange(self.size, device=device)
        order = self.arranged(numbers.split(sizes))
        self.place = torch.empty_like(order).scatter_(0, order, numbers).split(sizes)
        """The row of every slot of each pool."""

    def arranged(self, values: Sequence[Tensor]) -> Tensor:
        """A value of every slot of all pools as a buffer has them ``[S]``."""
        parts = [
            torch.cat([self._of(span, values[span.pool]) for span in spans], dim=1).flatten()
            for spans in self.chunks
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _of(self, span: Span, values: Tensor) -> Tensor:
        """Values of the slots of a span ``[EP, rows]``, of those of its pool, which are sorted by expert."""
        capacity = self.pools[span.pool][1]
        own = slice(span.first * capacity, (span.first + span.count) * capacity)
        return values.view(self.ep_size, -1)[:, own]

    def gather(
        self,
        chunk: int,
        buffer: Tensor,
        sources: Sequence[Tensor],
        routings: Sequence[PoolRouting],
    ) -> Tensor:
        """Copies to every slot of a chunk its token's row of the sources ``[T, D]``.

        Returns:
            The chunk's part of the buffer.
        """
        target = buffer[self.rows[chunk]]
        by_rank = target.view(self.ep_size, -1, buffer.shape[1])
        for span in self.chunks[chunk]:
            source, slots = sources[span.pool], slots_of(routings[span.pool])
            index, own = self._of(span, slots.slot_token), by_rank[:, span.rows]
            if own.is_contiguous():
                torch.index_select(source, 0, index.flatten(), out=own.flatten(0, 1))
            elif own.device.type == "cpu":
                for part, numbers in zip(own, index):
                    torch.index_select(source, 0, numbers, out=part)
            else:
                # One kernel, which writes where the rows belong.
                torch.ops.aten.index.Tensor_out(source, [index], out=own)
        return target

    def by_expert(self, chunk: int, rows: Tensor) -> tuple[Tensor, ...]:
        """A chunk that has arrived, as the rows of each of its spans' experts from all ranks ``[count, EP * C, D]``."""
        blocks = self._blocks(chunk, rows)
        return tuple(block.transpose(0, 1).flatten(1, 2) for block in blocks)

    def by_rank(self, chunk: int, parts: Sequence[Tensor]) -> Tensor:
        """The opposite of `by_expert`."""
        if len(parts) == 1 and len(parts[0]) == 1:
            return parts[0][0].contiguous()
        rows = self.rows[chunk]
        buffer = parts[0].new_empty(rows.stop - rows.start, parts[0].shape[2])
        for block, part in zip(self._blocks(chunk, buffer), parts):
            block.copy_(part.unflatten(1, (self.ep_size, -1)).transpose(0, 1))
        return buffer

    def _blocks(self, chunk: int, rows: Tensor) -> list[Tensor]:
        """The spans of a chunk ``[EP, count, C, D]``."""
        by_rank = rows.view(self.ep_size, -1, rows.shape[1])
        return [by_rank[:, span.rows].unflatten(1, (span.count, -1)) for span in self.chunks[chunk]]


class _Transfer:
    """The all-to-alls of one buffer, chunk by chunk, in the background.

    All ranks must start the chunks of all buffers in the same order.
    """

    def __init__(self, order: SlotOrder, group: dist.ProcessGroup) -> None:
        self.order, self.group = order, group
        self._under_way: dict[int, Any] = {}
        self._received: Optional[Tensor] = None
        self._left = 0

    def start(self, chunk: int, rows: Tensor) -> None:
        """Sends a chunk ``[EP * rows, D]``, and begins to receive one as large."""
        if self._received is None:
            self._received = rows.new_empty(self.order.size, rows.shape[1])
            self._left = len(self.order.chunks)
        target = self._received[self.order.rows[chunk]]
        self._under_way[chunk] = dist.all_to_all_single(
            target, rows, group=self.group, async_op=True
        )

    def receive(self, chunk: int) -> Tensor:
        """A chunk, when it has arrived."""
        self._under_way.pop(chunk).wait()
        assert self._received is not None
        rows = self._received[self.order.rows[chunk]]
        self._left -= 1
        if not self._left:
            self._received = None
        return rows

    def receive_all(self) -> Tensor:
        """The whole buffer, when all of it has arrived."""
        received = self._received
        assert received is not None
        for chunk in range(len(self.order.chunks)):
            self.receive(chunk)
        return received


class _Exchange:
    """The transfers of one forward pass of a layer and of its backward pass."""

    def __init__(self, order: SlotOrder, group: dist.ProcessGroup) -> None:
        self.order = order
        self.rows = _Transfer(order, group)
        self.results = _Transfer(order, group)
        self.result_gradients = _Transfer(order, group)
        self.row_gradients = _Transfer(order, group)


class _SendSlots(torch.autograd.Function):
    """Fills slots with the tokens of all pools, and starts to send every chunk as soon as it is filled.

    Args of `apply`: exchange; routings; tokens ``[T, D]`` of each pool. Returns an empty tensor for every chunk.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, exchange: _Exchange, routings: Sequence[PoolRouting], *tokens: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.exchange, order = exchange, exchange.order
        ctx.pools = [(slots_of(routing), routing.by_experts) for routing in routings]
        buffer = tokens[0].new_empty(order.size, tokens[0].shape[1])
        for chunk in range(len(order.chunks)):
            exchange.rows.start(chunk, order.gather(chunk, buffer, tokens, routings))
        return tuple(buffer.new_empty(0) for _ in order.chunks)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *arrived: Tensor) -> tuple[Optional[Tensor], ...]:  # type: ignore[override]
        rows = ctx.exchange.row_gradients.receive_all()
        places = ctx.exchange.order.place
        sums = (
            token_sums(rows, slots, by_experts, place=place)
            for (slots, by_experts), place in zip(ctx.pools, places)
        )
        return None, None, *sums


class _ReceiveRows(torch.autograd.Function):
    """A chunk of slots as rows of experts ``[count, EP * C, D]``, one tensor for every span.

    Args of `apply`: exchange; number of the chunk; what `_SendSlots` returned for it.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, exchange: _Exchange, chunk: int, sent: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.exchange, ctx.chunk = exchange, chunk
        return exchange.order.by_expert(chunk, exchange.rows.receive(chunk))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor]:  # type: ignore[override]
        rows = ctx.exchange.order.by_rank(ctx.chunk, grads)
        ctx.exchange.row_gradients.start(ctx.chunk, rows)
        return None, None, rows.new_empty(0)


class _ReturnRows(torch.autograd.Function):
    """Starts to send the results of a chunk back; returns an empty tensor.

    Args of `apply`: exchange; number of the chunk; results ``[count, EP * C, D]`` for every span.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, exchange: _Exchange, chunk: int, *results: Tensor
    ) -> Tensor:
        ctx.exchange, ctx.chunk = exchange, chunk
        rows = exchange.order.by_rank(chunk, results)
        exchange.results.start(chunk, rows)
        return rows.new_empty(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, returned: Tensor) -> tuple[Optional[Tensor], ...]:  # type: ignore[override]
        rows = ctx.exchange.result_gradients.receive(ctx.chunk)
        return None, None, *ctx.exchange.order.by_expert(ctx.chunk, rows)


class _CombineReturned(torch.autograd.Function):
    """Sums each token's slots weighted by its gates, when all have come back: ``[T, D]`` for every pool.

    Args of `apply`: exchange; routings; gates ``[T, K]`` of each pool; what `_ReturnRows` returned for each chunk.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, exchange: _Exchange, routings: Sequence[PoolRouting], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        rows, gates = exchange.results.receive_all(), inputs[: len(routings)]
        ctx.exchange, ctx.routings = exchange, routings
        ctx.save_for_backward(rows, *gates)
        outputs = []
        for routing, gate, place in zip(routings, gates, exchange.order.place):
            slots = slots_of(routing)
            weight = (gate * slots.token_kept).to(rows.dtype)
            outputs.append(token_sums(rows, slots, routing.by_experts, weight, place))
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Optional[Tensor], ...]:  # type: ignore[override]
        rows, *gates = ctx.saved_tensors
        order, pools = ctx.exchange.order, [slots_of(routing) for routing in ctx.routings]
        weights = [slot_weights(gate, slots) for gate, slots in zip(gates, pools)]
        weight = order.arranged(weights).to(rows.dtype).unsqueeze(1)
        buffer, dots = torch.empty_like(rows), []
        for chunk, own in enumerate(order.rows):
            part = order.gather(chunk, buffer, grads, ctx.routings)
            # The gate's gradient is a dot product per slot; only these scalars go back to the tokens.
            dots.append(row_dots(rows[own], part, gates[0].dtype))
            part.mul_(weight[own])
            if ctx.needs_input_grad[-1]:
                ctx.exchange.result_gradients.start(chunk, part)
        dot = torch.cat(dots)
        of_gates = (
            dot[place[slots.token_slot]] * slots.token_kept
            for slots, place in zip(pools, order.place)
        )
        return None, None, *of_gates, *(rows.new_empty(0) for _ in order.chunks)


def through_experts(
    order: SlotOrder,
    group: dist.ProcessGroup,
    inputs: Sequence[Tensor],
    routings: Sequence[PoolRouting],
    pools: Sequence[ExpertPool],
    meanwhile: Callable[[], None],
) -> Sequence[Tensor]:
    """Gated expert outputs ``[T, D]`` of every pool for its tokens ``[T, D]``, by the ranks of a group.

    Args:
        order: of the slots of these pools.
        meanwhile: called once, when tokens are under way.
    """
    exchange = _Exchange(order, group)
    sent = _SendSlots.apply(exchange, routings, *inputs)
    meanwhile()
    passes = Counter(span.pool for spans in order.chunks for span in spans)
    gradients = {pool: SharedGradients(count) for pool, count in passes.items()}
    returned = []
    for chunk, spans in enumerate(order.chunks):
        rows = _ReceiveRows.apply(exchange, chunk, sent[chunk])
        results = []
        for span, own in zip(spans, rows):
            part = None
            if passes[span.pool] > 1:
                part = ExpertRange(span.first, gradients[span.pool])
            results.append(pools[span.pool](own, part=part))
        returned.append(_ReturnRows.apply(exchange, chunk, *results))
    gates = [routing.gate for routing in routings]
    combined: tuple[Tensor, ...] = _CombineReturned.apply(exchange, routings, *gates, *returned)
    return combined
