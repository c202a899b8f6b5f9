"""Per-layer MoE statistics over all ranks: load, drops, entropy and auxiliary losses by modality."""

from __future__ import annotations

from typing import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.losses.masked import LOSS_OF
from megatron_vlmoe.model.block import MoMEFeedForward, MoMELayer
from megatron_vlmoe.model.vlmoe import VLMoEModel
from megatron_vlmoe.moe.aux_losses import TERMS
from megatron_vlmoe.moe.router import HEADER
from megatron_vlmoe.runtime.distributed import device
from megatron_vlmoe.stream.block_plan import block_plans
from megatron_vlmoe.stream.layout import SEGMENTS


def collect(chunks: Sequence[VLMoEModel], config: RunConfig) -> dict[tuple[int, str], Tensor]:
    """Counters of every pool of every block, summed over all ranks since the last call.

    Every rank must call it: a pipeline stage without experts takes part with zeros.
    """
    slots = [
        (plan.layer_number, pool)
        for plan in block_plans(config.model, config.moe)
        for pool in plan.pools
    ]
    if not slots:
        return {}
    mine: dict[tuple[int, str], Tensor] = {}
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            assert isinstance(layer, MoMELayer) and isinstance(layer.mlp, MoMEFeedForward)
            if layer.mlp.moe is not None:
                recorder = layer.mlp.moe.router.recorder  # type: ignore[attr-defined]
                for name, vector in recorder.take().items():
                    mine[layer.layer_number, name] = vector
    vectors = []
    for number, pool in slots:
        empty = torch.zeros(len(HEADER) + pool.num_experts, device=device())
        vectors.append(mine.get((number, pool.name), empty))
    flat = torch.cat(vectors).double()
    dist.all_reduce(flat)
    parts = flat.cpu().split([len(vector) for vector in vectors])
    return {(number, pool.name): part for (number, pool), part in zip(slots, parts)}


def metrics_from_counters(
    counters: dict[tuple[int, str], Tensor], per_layer: bool
) -> dict[str, float]:
    """Metrics `moe/{pool}/...` and `loss/aux/{pool}` of an interval.

    `dropped_fraction` is the share of assignments without a place; `effective_capacity_factor` is expert
    slots over assignments of real tokens; load is relative to the mean; auxiliary losses are sums over
    layers, coefficient included in `loss/aux/*`.
    """
    metrics: dict[str, float] = {}
    pools = sorted({name for _, name in counters})
    for pool in pools:
        layers = {number: c for (number, name), c in counters.items() if name == pool}
        active = {number: c for number, c in layers.items() if _entry(c, "micro_batches") > 0}
        if not active:
            continue
        total = torch.stack([c[: len(HEADER)] for c in active.values()]).sum(0)
        metrics.update(_ratios(f"moe/{pool}", total))
        metrics[f"loss/aux/{pool}"] = sum(
            _entry(c, "aux_total") / _entry(c, "micro_batches") for c in active.values()
        )
        loads = [_load(c) for c in active.values()]
        metrics[f"moe/{pool}/load_max"] = max(float(load.max()) for load in loads)
        metrics[f"moe/{pool}/load_min"] = min(float(load.min()) for load in loads)
        metrics[f"moe/{pool}/dead_experts"] = float(sum(int((load == 0).sum()) for load in loads))
        if per_layer:
            for number, vector in active.items():
                metrics.update(_layer(f"moe/{pool}/layer_{number}", vector))
    return metrics


def _entry(vector: Tensor, name: str) -> float:
    return float(vector[HEADER.index(name)])


def _load(vector: Tensor) -> Tensor:
    """Assignments of every expert relative to the mean."""
    load = vector[len(HEADER) :]
    return load / load.mean().clamp(min=1.0)


def _ratios(prefix: str, vector: Tensor) -> dict[str, float]:
    assignments = max(_entry(vector, "assignments"), 1.0)
    metrics = {
        f"{prefix}/dropped_fraction": 1.0 - _entry(vector, "kept") / assignments,
        f"{prefix}/effective_capacity_factor": _entry(vector, "slots") / assignments,
        f"{prefix}/router_entropy": _entry(vector, "entropy") / max(_entry(vector, "tokens"), 1.0),
    }
    for segment in SEGMENTS:
        count = _entry(vector, f"assignments_{segment}")
        if count > 0:
            kept = _entry(vector, f"kept_{segment}")
            metrics[f"{prefix}/dropped_fraction/{LOSS_OF[segment]}"] = 1.0 - kept / count
    return metrics


def _layer(prefix: str, vector: Tensor) -> dict[str, float]:
    load = _load(vector)
    metrics = _ratios(prefix, vector)
    metrics[f"{prefix}/load_min"] = float(load.min())
    metrics[f"{prefix}/load_max"] = float(load.max())
    metrics[f"{prefix}/load_p95"] = float(load.quantile(0.95))
    metrics[f"{prefix}/dead_experts"] = float((load == 0).sum())
    micro_batches = _entry(vector, "micro_batches")
    for term in TERMS:
        value = _entry(vector, f"aux_{term}") / micro_batches
        if value != 0.0:
            metrics[f"{prefix}/aux/{term}"] = value
    return metrics
