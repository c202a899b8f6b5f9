"""The modality routers of one MoE block.

Letters: T tokens of a pool on this rank, D width, E experts of a pool, K experts per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Optional, Sequence

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_vlmoe.config.schema import AuxLossConfig, MoEConfig
from megatron_vlmoe.moe.aux_losses import (
    compute_router_statistics,
    losses_from_statistics,
    statistics_size,
)
from megatron_vlmoe.moe.routing_ops import SlotRouting, route_slots, top_k_experts
from megatron_vlmoe.moe.stats import PoolRecord, RoutingRecorder
from megatron_vlmoe.stream.batch import StreamBatch
from megatron_vlmoe.stream.block_plan import BlockPlan, Branch
from megatron_vlmoe.stream.sizes import expert_capacity


@dataclass(frozen=True)
class PoolRouting:
    """Where the tokens of one pool go.

    Args:
        pool: the pool.
        gate: combine weights ``[T, K]`` in fp32, with the auxiliary loss attached.
        expert: chosen experts ``[T, K]``.
        kept: assignments that are carried out ``[T, K]``.
        capacity: slots per expert on this rank; 0 where nothing is dropped.
        slots: the slot of every assignment; None where nothing is dropped.
    """

    pool: Branch
    gate: Tensor
    expert: Tensor
    kept: Tensor
    capacity: int
    slots: Optional[SlotRouting]


@dataclass(frozen=True)
class _Scores:
    """Logits of one pool: clean ``[T, E]``, with noise, and which tokens are routed."""

    clean: Tensor
    noisy: Tensor
    mask: Optional[Tensor]


class PoolGate(nn.Module):
    """The linear layer of one router, fp32 and without bias (paper section 3.2): weight ``[E, D]``."""

    def __init__(self, num_experts: int, config: TransformerConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(num_experts, config.hidden_size, dtype=torch.float32)
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[T, E]`` in fp32 (fp64 for fp64 weights)."""
        return F.linear(tokens.to(self.weight.dtype), self.weight)


class ModalityRouter(MegatronModule):
    """One router per pool of the block (the `router` spec of the MoE layer).

    Args:
        config: megatron-core configuration.
        pg_collection: the group `tp`.
        plan: the block's branches.
        moe: routing options.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        plan: BlockPlan,
        moe: MoEConfig,
    ) -> None:
        super().__init__(config=config)
        self.moe = moe
        self.pools = plan.pools
        self.tp_group = pg_collection.tp
        self.layer_number = plan.layer_number
        self.recorder = RoutingRecorder()
        for pool in self.pools:
            self.add_module(pool.name, PoolGate(pool.num_experts, config))

    def set_layer_number(self, layer_number: int) -> None:
        """Part of megatron-core's router interface; the plan already has the number."""
        assert layer_number == self.layer_number

    def forward(
        self, inputs: Sequence[Tensor], stream: StreamBatch, capacity_factor: float
    ) -> list[PoolRouting]:
        """Routes the tokens of every pool.

        Args:
            inputs: tokens ``[T, D]`` of each pool.
            stream: the micro-batch.
            capacity_factor: 0 or less drops nothing.
        """
        scores = [self._scores(pool, tokens, stream) for pool, tokens in zip(self.pools, inputs)]
        gates = [torch.softmax(score.noisy, dim=1) for score in scores]
        losses = self._auxiliary_losses(scores)
        routings = []
        for index, (pool, score, full) in enumerate(zip(self.pools, scores, gates)):
            gate, expert = top_k_experts(full, self.moe.topk)
            total = self._weighted(pool, losses[index])
            # Priority is the gate as it is, also where the combine weights are normalised.
            routing = self._assign(pool, gate, expert, score.mask, capacity_factor)
            if self.moe.normalize_gate:
                routing = replace(routing, gate=gate / gate.sum(dim=1, keepdim=True))
            self._record(routing, score, full, losses[index], total, stream)
            if self._trains() and total.requires_grad:
                attached = MoEAuxLossAutoScaler.apply(routing.gate, total)
                routing = replace(routing, gate=attached)
            routings.append(routing)
        return routings

    def _trains(self) -> bool:
        return self.training and self.moe.train_experts

    def _scores(self, pool: Branch, tokens: Tensor, stream: StreamBatch) -> _Scores:
        clean = self.get_submodule(pool.name)(tokens)
        mask = None
        if not self.moe.route_padding:
            mask = stream.token_mask(pool.segments, tokens.device)
        sigma = self._noise_std(pool)
        noisy = clean
        if self._trains() and sigma > 0.0:
            noise = stream.normal(
                self.layer_number,
                f"{pool.name}_noise",
                pool.segments,
                pool.num_experts,
                tokens.device,
            )
            if noise is not None:
                noisy = clean + sigma * noise
        return _Scores(clean, noisy, mask)

    def _noise_std(self, pool: Branch) -> float:
        return 1.0 / pool.num_experts if self.moe.noise_std < 0.0 else self.moe.noise_std

    def _aux(self, pool: Branch) -> AuxLossConfig:
        return self.moe.text_aux if pool.name == "text" else self.moe.vision_aux

    def _terms(self, pool: Branch) -> tuple[str, ...]:
        if not self.moe.train_experts:
            return ()
        terms = self._aux(pool).active_terms()
        if not self.training or self._noise_std(pool) <= 0.0:
            # Without noise the load loss has no meaning (V-MoE): evaluation reports the others.
            terms = tuple(term for term in terms if term != "load")
        return terms

    def _auxiliary_losses(self, scores: Sequence[_Scores]) -> list[dict[str, Tensor]]:
        """Losses of every pool over the tokens of all tensor-parallel ranks; one all-reduce per block."""
        parts = []
        for pool, score in zip(self.pools, scores):
            terms = self._terms(pool)
            if terms:
                sigma = self._noise_std(pool)
                parts.append(
                    compute_router_statistics(
                        score.clean, score.noisy, self.moe.topk, sigma, terms, score.mask
                    )
                )
        if not parts:
            return [{} for _ in scores]
        statistics = torch.cat(parts)
        if self.tp_group.size() > 1:
            statistics = reduce_from_tensor_model_parallel_region(statistics, group=self.tp_group)
        losses, start = [], 0
        for pool in self.pools:
            terms = self._terms(pool)
            size = statistics_size(terms, pool.num_experts) if terms else 0
            part = statistics[start : start + size]
            start += size
            experts = self._aux(pool).global_entropy_experts
            threshold = math.log(experts) if experts > 0.0 else None
            losses.append(
                losses_from_statistics(part, terms, pool.num_experts, self.moe.topk, threshold)
                if terms
                else {}
            )
        return losses

    def _weighted(self, pool: Branch, losses: dict[str, Tensor]) -> Tensor:
        weights = self._aux(pool)
        total = self.get_submodule(pool.name).weight.new_zeros(())
        for term, loss in losses.items():
            total = total + getattr(weights, term) * loss
        return self.moe.aux_loss_coefficient * total

    def _assign(
        self,
        pool: Branch,
        gate: Tensor,
        expert: Tensor,
        mask: Optional[Tensor],
        capacity_factor: float,
    ) -> PoolRouting:
        if capacity_factor <= 0.0:
            kept = torch.ones_like(expert, dtype=torch.bool)
            if mask is not None:
                kept = kept & mask.unsqueeze(1)
            return PoolRouting(pool, gate, expert, kept, 0, None)
        capacity = expert_capacity(
            gate.shape[0],
            pool.num_experts,
            self.moe.topk,
            capacity_factor,
            self.moe.capacity_multiple_of,
        )
        slots = route_slots(
            gate.detach(), expert, pool.num_experts, capacity, mask, self.moe.batch_priority
        )
        return PoolRouting(pool, gate, expert, slots.token_kept, capacity, slots)

    def _record(
        self,
        routing: PoolRouting,
        score: _Scores,
        gates: Tensor,
        losses: dict[str, Tensor],
        total: Tensor,
        stream: StreamBatch,
    ) -> None:
        # A recomputed block runs twice in training; only the pass that builds the graph counts.
        if self.training and not torch.is_grad_enabled():
            return
        if not len(gates):
            return
        pool = routing.pool
        if routing.slots is not None:
            load = routing.slots.load
            slots = gates.new_full((), routing.capacity * pool.num_experts)
        else:
            load = torch.zeros(pool.num_experts, device=gates.device)
            load.scatter_add_(0, routing.expert.reshape(-1), routing.kept.reshape(-1).float())
            slots = load.sum()
        record = PoolRecord(
            pool, gates, routing.kept, load, score.mask, slots, losses, total.detach()
        )
        self.recorder.add(record, stream.layout, stream.tensor_size)
