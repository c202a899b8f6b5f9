"""What the routers did: counters per block and pool, summed on the device and read only when logged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Mapping, Optional

import torch
from torch import Tensor

from megatron_vlmoe.moe.aux_losses import TERMS
from megatron_vlmoe.stream.block_plan import Branch
from megatron_vlmoe.stream.layout import SEGMENTS, StreamLayout

# Fixed entries of a pool's counter vector; the load of every expert follows them.
HEADER = (
    ("micro_batches", "tokens", "assignments", "kept", "slots", "entropy", "aux_total")
    + tuple(f"aux_{term}" for term in TERMS)
    + tuple(f"assignments_{segment}" for segment in SEGMENTS)
    + tuple(f"kept_{segment}" for segment in SEGMENTS)
)


def counter_size(num_experts: int) -> int:
    """Length of a pool's counter vector."""
    return len(HEADER) + num_experts


@dataclass(frozen=True)
class PoolRecord:
    """What one forward pass of a pool's router adds to its counters.

    Args:
        pool: the pool.
        gates: softmax over experts ``[T, E]``.
        kept: assignments that found a place ``[T, K]``.
        load: assignments per expert before dropping ``[E]``.
        mask: tokens that count ``[T]``; None means all.
        slots: rows that the experts of the whole pool compute for this rank.
        losses: auxiliary losses by name, already summed over tensor-parallel ranks.
        aux_total: their weighted sum, coefficient included.
    """

    pool: Branch
    gates: Tensor
    kept: Tensor
    load: Tensor
    mask: Optional[Tensor]
    slots: Tensor
    losses: Mapping[str, Tensor]
    aux_total: Tensor


@torch.no_grad()
def count(record: PoolRecord, layout: StreamLayout, tensor_size: int) -> Tensor:
    """The counter vector of one record, fp32.

    Values that every tensor-parallel rank holds in full are divided by their number, so that counters
    may be summed over all ranks.
    """
    gates, kept = record.gates, record.kept
    topk = kept.shape[1]
    valid = torch.ones_like(kept[:, 0]) if record.mask is None else record.mask
    entropy = torch.special.entr(gates).sum(dim=1)
    zero = gates.new_zeros(())
    share = 1.0 / tensor_size
    kept_by_token = kept.sum(dim=1).float()
    header = {
        "micro_batches": zero + share,
        "tokens": valid.sum(),
        "assignments": valid.sum() * topk,
        "kept": kept_by_token.sum(),
        "slots": record.slots,
        "entropy": (entropy * valid).sum(),
        "aux_total": record.aux_total * share,
    }
    for term in TERMS:
        header[f"aux_{term}"] = record.losses.get(term, zero) * share
    for segment in SEGMENTS:
        header[f"assignments_{segment}"] = zero
        header[f"kept_{segment}"] = zero
    start = 0
    for segment in record.pool.segments:
        part = slice(start, start + layout.size(segment))
        start = part.stop
        header[f"assignments_{segment}"] = valid[part].sum() * topk
        header[f"kept_{segment}"] = kept_by_token[part].sum()
    values = [
        torch.as_tensor(header[name], dtype=torch.float32, device=gates.device) for name in HEADER
    ]
    return torch.cat([torch.stack(values), record.load.float()])


class RoutingRecorder:
    """Counters of the pools of one block, summed until they are taken."""

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}

    def add(self, record: PoolRecord, layout: StreamLayout, tensor_size: int) -> None:
        """Adds one forward pass."""
        vector = count(record, layout, tensor_size)
        known = self.totals.get(record.pool.name)
        self.totals[record.pool.name] = vector if known is None else known + vector

    def take(self) -> dict[str, Tensor]:
        """Returns the sums by pool and starts again from zero."""
        totals, self.totals = self.totals, {}
        return totals
