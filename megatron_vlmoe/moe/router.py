"""The modality routers of one MoE block, and the counters of what they did.

Letters: T tokens of a pool on this rank, D width, E experts of a pool, K experts per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Iterable, Mapping, NamedTuple, Optional, Sequence

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_vlmoe.config.schema import AuxLossConfig, MoEConfig
from megatron_vlmoe.moe.aux_losses import compute_router_statistics, losses_from_statistics
from megatron_vlmoe.moe.routing_ops import (
    SlotRouting,
    balancing_step,
    expert_choice_slots,
    route_slots,
    top_k_experts,
)
from megatron_vlmoe.runtime.compiled import compiled
from megatron_vlmoe.stream.batch import StreamBatch
from megatron_vlmoe.stream.block_plan import BlockPlan, Branch
from megatron_vlmoe.stream.layout import SEGMENTS, TEXT_SEGMENTS
from megatron_vlmoe.stream.sizes import (
    TERMS,
    RouterLosses,
    expert_capacity,
    router_losses,
    router_noise_std,
)

# Fixed entries of a pool's counter vector; the load of every expert follows them.
HEADER = (
    ("micro_batches", "tokens", "assignments", "kept", "slots", "entropy", "aux_total")
    + tuple(f"aux_{term}" for term in TERMS)
    + tuple(f"assignments_{segment}" for segment in SEGMENTS)
    + tuple(f"kept_{segment}" for segment in SEGMENTS)
)


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
        by_experts: experts have chosen tokens: K is E, and `expert` counts them up for every token.
    """

    pool: Branch
    gate: Tensor
    expert: Tensor
    kept: Tensor
    capacity: int
    slots: Optional[SlotRouting]
    by_experts: bool = False


class _Scores(NamedTuple):
    """Logits of one pool: clean ``[T, E]``, with noise, and which tokens are routed."""

    clean: Tensor
    noisy: Tensor
    mask: Optional[Tensor]


class RoutingRecorder:
    """Counters of the pools of one block, summed on the device until they are taken for a log line.

    In tensors that stay where they are: a CUDA graph adds to them, too.
    """

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(
        self,
        routing: PoolRouting,
        gates: Tensor,
        mask: Optional[Tensor],
        losses: Mapping[str, Tensor],
        aux_total: Tensor,
        stream: StreamBatch,
    ) -> None:
        """Adds one forward pass of a pool's router, in fp32.

        Values that every tensor-parallel rank holds in full are divided by their number, so that counters
        may be summed over all ranks.

        Args:
            gates: softmax over experts ``[T, E]``.
            mask: tokens that count ``[T]``; None means all.
            losses: auxiliary losses by name, already summed over tensor-parallel ranks.
            aux_total: their weighted sum, coefficient included.
        """
        pool, kept = routing.pool, routing.kept
        if routing.by_experts:
            # What may be lost is a token that no expert takes.
            kept = kept.any(dim=1, keepdim=True)
        topk = kept.shape[1]
        if routing.slots is not None:
            load = routing.slots.load.float()
            # Rows that the experts of the whole pool compute for this rank.
            slots = gates.new_full((), routing.capacity * pool.num_experts)
        else:
            load = torch.zeros(pool.num_experts, device=gates.device)
            load.scatter_add_(0, routing.expert.reshape(-1), kept.reshape(-1).float())
            slots = load.sum()
        valid = torch.ones_like(kept[:, 0]) if mask is None else mask
        entropy = torch.special.entr(gates).sum(dim=1)
        zero = gates.new_zeros(())
        share = 1.0 / stream.tensor_size
        kept_by_token = kept.sum(dim=1).float()
        header = dict.fromkeys(HEADER, zero) | {
            "micro_batches": zero + share,
            "tokens": valid.sum(),
            "assignments": valid.sum() * topk,
            "kept": kept_by_token.sum(),
            "slots": slots,
            "entropy": (entropy * valid).sum(),
            "aux_total": aux_total * share,
        }
        for term, loss in losses.items():
            header[f"aux_{term}"] = loss * share
        start = 0
        for segment in pool.segments:
            part = slice(start, start + stream.layout.size(segment))
            start = part.stop
            header[f"assignments_{segment}"] = valid[part].sum() * topk
            header[f"kept_{segment}"] = kept_by_token[part].sum()
        vector = torch.cat([torch.stack([header[name].float() for name in HEADER]), load])
        if pool.name not in self.totals:
            self.totals[pool.name] = torch.zeros_like(vector)
        self.totals[pool.name] += vector

    def take(self) -> dict[str, Tensor]:
        """Returns the sums by pool and starts again from zero."""
        taken = {name: total.clone() for name, total in self.totals.items()}
        for total in self.totals.values():
            total.zero_()
        return taken


class PoolGate(nn.Module):
    """The linear layer of one router, fp32 and without bias (paper section 3.2): weight ``[E, D]``.

    With loss-free balancing it also holds `balance_bias` ``[E]``, part of a checkpoint, which is added to the gates for
    the choice of experts alone, and `assigned` ``[E]``, how many tokens of this rank chose each in the step so far.
    """

    balance_bias: Optional[Tensor]
    assigned: Tensor

    def __init__(self, num_experts: int, config: TransformerConfig, balanced: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(num_experts, config.hidden_size, dtype=torch.float32)
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.register_buffer("balance_bias", torch.zeros(num_experts) if balanced else None)
        if balanced:
            counts = torch.zeros(num_experts, dtype=torch.int64)
            self.register_buffer("assigned", counts, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[T, E]`` in fp32 (fp64 for fp64 weights)."""
        return F.linear(tokens.to(self.weight.dtype), self.weight)


class ModalityRouter(MegatronModule):
    """One router per pool of the block (the `router` spec of the MoE layer)."""

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        plan: BlockPlan,
        moe: MoEConfig,
        compile: bool = False,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        self.moe = moe
        self.statistics = compiled(compute_router_statistics, compile)
        self.losses = compiled(losses_from_statistics, compile)
        self.route = compiled(route_slots, compile)
        self.pools = plan.pools
        self.tp_group = pg_collection.tp
        self.layer_number = plan.layer_number
        self.recorder = RoutingRecorder()
        for pool in self.pools:
            gate = PoolGate(pool.num_experts, config, balanced=moe.balance_bias_rate > 0.0)
            self.add_module(pool.name, gate)

    def forward(
        self, inputs: Sequence[Tensor], stream: StreamBatch, capacity_factor: float
    ) -> list[PoolRouting]:
        """Routes the tokens of every pool.

        Args:
            inputs: tokens ``[T, D]`` of each pool.
            capacity_factor: 0 or less drops nothing.
        """
        scores = [self._scores(pool, tokens, stream) for pool, tokens in zip(self.pools, inputs)]
        gates = [torch.softmax(score.noisy, dim=1) for score in scores]
        routings = []
        auxiliary = self._auxiliary_losses(scores, stream)
        for pool, (_, _, mask), full, found in zip(self.pools, scores, gates, auxiliary):
            total = self.get_submodule(pool.name).weight.new_zeros(())
            losses: dict[str, Tensor] = {}
            for weights, own in found:
                for term, loss in own.items():
                    total = total + getattr(weights, term) * loss
                    losses[term] = losses[term] + loss if term in losses else loss
            total = self.moe.aux_loss_coefficient * total
            # Priority is the gate as it is, also where the combine weights are normalised.
            routing = self._assign(pool, full, mask, capacity_factor)
            if self.moe.normalize_gate:
                gate = routing.gate
                routing = replace(routing, gate=gate / gate.sum(dim=1, keepdim=True))
            # A recomputed block runs twice in training; only the pass that builds the graph counts.
            if len(full) and (torch.is_grad_enabled() or not self.training):
                self.recorder.add(routing, full, mask, losses, total.detach(), stream)
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
        sigma = router_noise_std(self.moe, pool.num_experts)
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

    def _auxiliary_losses(
        self, scores: Sequence[_Scores], stream: StreamBatch
    ) -> list[list[tuple[AuxLossConfig, dict[str, Tensor]]]]:
        """Losses and their weights of every pool over the tokens of all tensor-parallel ranks; one all-reduce per
        block."""
        losses: list[list[tuple[AuxLossConfig, dict[str, Tensor]]]] = [[] for _ in scores]
        groups: list[tuple[int, RouterLosses]] = []
        parts = []
        for index, (pool, score) in enumerate(zip(self.pools, scores)):
            # Texts stand before images.
            texts = stream.layout.size(*(name for name in pool.segments if name in TEXT_SEGMENTS))
            places = {"all": slice(None), "text": slice(texts), "vision": slice(texts, None)}
            for group in router_losses(self.moe, pool.name, pool.num_experts, self.training):
                rows, mask = places[group.tokens], score.mask
                parts.append(
                    self.statistics(
                        score.clean[rows],
                        score.noisy[rows],
                        self.moe.topk,
                        router_noise_std(self.moe, pool.num_experts),
                        group.terms,
                        None if mask is None else mask[rows],
                    )
                )
                groups.append((index, group))
        if not parts:
            return losses
        statistics = torch.cat(parts)
        if self.tp_group.size() > 1:
            statistics = reduce_from_tensor_model_parallel_region(statistics, group=self.tp_group)
        sums = statistics.split([len(part) for part in parts])
        for (index, (terms, weights, _)), part in zip(groups, sums):
            experts = weights.global_entropy_experts
            threshold = math.log(experts) if experts > 0.0 else None
            found = self.losses(
                part, terms, self.pools[index].num_experts, self.moe.topk, threshold
            )
            losses[index].append((weights, found))
        return losses

    def _assign(
        self, pool: Branch, gates: Tensor, mask: Optional[Tensor], capacity_factor: float
    ) -> PoolRouting:
        """Which tokens go to which experts, by gates ``[T, E]``."""
        moe, num_tokens = self.moe, gates.shape[0]
        capacity = 0
        if capacity_factor > 0.0:
            capacity = expert_capacity(
                num_tokens, pool.num_experts, moe.topk, capacity_factor, moe.capacity_multiple_of
            )
        if moe.routing == "expert_choice":
            if capacity_factor <= 0.0:
                raise ValueError(
                    f"experts cannot choose tokens with capacity factor {capacity_factor}"
                )
            capacity = min(capacity, num_tokens)
            slots = expert_choice_slots(gates.detach(), capacity, mask)
            expert = torch.arange(pool.num_experts, device=gates.device).expand_as(gates)
            return PoolRouting(pool, gates, expert, slots.token_kept, capacity, slots, True)
        layer = self.get_submodule(pool.name)
        assert isinstance(layer, PoolGate)
        if layer.balance_bias is None:
            gate, expert = top_k_experts(gates, moe.topk)
        else:
            _, expert = top_k_experts(gates.detach() + layer.balance_bias, moe.topk)
            gate = gates.gather(1, expert)
        if capacity:
            slots = self.route(
                gate.detach(), expert, pool.num_experts, capacity, mask, moe.batch_priority
            )
            routing = PoolRouting(pool, gate, expert, slots.token_kept, capacity, slots)
        else:
            kept = torch.ones_like(expert, dtype=torch.bool)
            if mask is not None:
                kept = kept & mask.unsqueeze(1)
            routing = PoolRouting(pool, gate, expert, kept, 0, None)
        # A recomputed block routes twice; only the pass that builds the graph counts.
        if layer.balance_bias is not None and self._trains() and torch.is_grad_enabled():
            if routing.slots is not None:
                layer.assigned += routing.slots.load
            else:
                layer.assigned.scatter_add_(0, expert.flatten(), routing.kept.flatten().long())
        return routing


@torch.no_grad()
def balance_experts(
    modules: Iterable[nn.Module], rate: float, group: torch.distributed.ProcessGroup
) -> None:
    """Moves the bias of every expert by one step of loss-free balancing, and starts counting anew.

    Args:
        modules: of this rank's pipeline stage; every rank of the group has the same.
        group: the ranks among which the tokens of a step are spread, tensor- and data-parallel ones.
    """
    gates = [module for module in modules if isinstance(module, PoolGate)]
    if not gates:
        return
    counts = torch.cat([gate.assigned for gate in gates])
    torch.distributed.all_reduce(counts, group=group)
    for gate, own in zip(gates, counts.split([len(gate.assigned) for gate in gates])):
        assert gate.balance_bias is not None
        gate.balance_bias += balancing_step(own, rate)
        gate.assigned.zero_()


def balance_biases(modules: Iterable[nn.Module]) -> list[Tensor]:
    """The biases ``[E]`` that loss-free balancing moves, of all gates among the modules."""
    gates = [module for module in modules if isinstance(module, PoolGate)]
    return [gate.balance_bias for gate in gates if gate.balance_bias is not None]
