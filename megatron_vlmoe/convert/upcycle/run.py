"""From a dense checkpoint to a sparse one that computes the same, or from E experts to a multiple; and a report."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Optional

import torch

from megatron_vlmoe.config.errors import ConvertError
from megatron_vlmoe.config.schema import MoEConfig, RunConfig
from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.convert.checkpoints import CheckpointReader, write_checkpoint
from megatron_vlmoe.convert.tensors import LazyTensor, counted
from megatron_vlmoe.convert.upcycle.plan import PoolPlan, UpcycleOptions, grown_pools
from megatron_vlmoe.convert.upcycle.tensors import (
    MOMENTS,
    SMALL_LOGIT_STD,
    GrownPool,
    grown_router,
    grown_tensors,
    mean_of,
    sampled_gates,
    small_router,
    sparse_optimizer,
    tensor_of,
)
from megatron_vlmoe.model.initial_values import full_initial_value
from megatron_vlmoe.planning.parameters import parameter_counts
from megatron_vlmoe.train.run_files import TOKENIZER_FILE, keep_file, run_file


@dataclass(frozen=True)
class Upcycled:
    """What was made.

    Args:
        path: the iteration folder.
        source: the checkpoint that it was made of.
        before: its configuration.
        after: the new one.
        pools: the new and grown pools.
        step: step of the new checkpoint.
    """

    path: Path
    source: Path
    before: RunConfig
    after: RunConfig
    pools: tuple[GrownPool, ...]
    step: int


def read_source(location: str | Path) -> CheckpointReader:
    """The checkpoint to start from.

    Raises:
        ConvertError: there is none, or it is of a downstream task.
    """
    reader = CheckpointReader(location)
    if isinstance(reader.config, FinetuneConfig):
        raise ConvertError(
            f"{reader.path}: is of the task {reader.config.task.name}; upcycle the pretrained model, then fine-tune"
        )
    return reader


def upcycle_checkpoint(
    reader: CheckpointReader,
    config: RunConfig,
    output: Path,
    options: Optional[UpcycleOptions] = None,
    overwrite: bool = False,
) -> Upcycled:
    """Writes the sparse checkpoint, tensor by tensor, whole or not at all; the run's tokenizer goes beside it.

    Args:
        reader: the source.
        config: configuration of the result; differs from the source's in `moe` alone.
        output: folder of the checkpoint.
        options: how experts, routers and optimizer start.
        overwrite: replaces a checkpoint that is there.

    Raises:
        ConvertError: the configurations do not fit each other, a tensor is missing or damaged, or there is a
            checkpoint already.
    """
    options = options or UpcycleOptions()
    pools, tensors = upcycled_tensors(reader, config, options)
    optimizer = None
    if options.carry_optimizer:
        optimizer = sparse_optimizer(reader.common, str(reader.path))
    state = reader.train_state if options.carry_optimizer else None
    with counted(tensors, "upcycle") as read:
        path = write_checkpoint(output, read, config, state, optimizer, overwrite)
    tokenizer = run_file(reader.path, TOKENIZER_FILE)
    if tokenizer is not None:
        keep_file(tokenizer, output, TOKENIZER_FILE)
    step = state.step if state else 0
    return Upcycled(path, reader.path, reader.config, config, pools, step)


def upcycled_tensors(
    reader: CheckpointReader, config: RunConfig, options: UpcycleOptions
) -> tuple[tuple[GrownPool, ...], dict[str, LazyTensor]]:
    """What the sparse checkpoint will hold, without writing it.

    Returns:
        The new and grown pools, and all tensors by checkpoint key.

    Raises:
        ConvertError: the configurations do not fit each other, or a tensor is missing.
    """
    plans = grown_pools(reader.config, config, options.shared_from)
    pools = tuple(_grown_pool(plan, reader, config, options) for plan in plans)
    tensors: dict[str, LazyTensor] = {}
    for moment in ("", *MOMENTS) if options.carry_optimizer else ("",):
        tensors |= grown_tensors(reader, config, pools, options, moment)
    return pools, tensors


def _grown_pool(
    plan: PoolPlan, reader: CheckpointReader, config: RunConfig, options: UpcycleOptions
) -> GrownPool:
    weight, bias = (
        mean_of(reader.tensors, plan.norm_keys(part), reader) for part in ("weight", "bias")
    )
    norm = (weight, bias)
    key, scale = plan.router_key, plan.scale(config.moe)
    if plan.source_experts:
        rows = tensor_of(reader.tensors, key, reader).read().float()
        router = grown_router(rows, plan.copies, norm, options.seed, key)
        return GrownPool(plan, router, norm, scale)
    shape = (plan.num_experts, config.model.hidden_size)
    start = router_start(options, config)
    if start == "zero":
        router = torch.zeros(shape)
    elif start == "small":
        router = small_router(plan.num_experts, norm, options.seed, key)
    else:
        router = full_initial_value(key, shape, config.model, options.seed)
        if not config.moe.normalize_gate:
            scale = 1.0 / sampled_gates(router, norm, config.moe.topk).mean
    return GrownPool(plan, router, norm, scale)


def router_start(options: UpcycleOptions, config: RunConfig) -> str:
    """How new routers start, `auto` resolved."""
    if options.router == "auto":
        return "fresh" if config.moe.normalize_gate else "small"
    return options.router


FFN_NAMES = {"vision": "V-FFN", "text": "T-FFN", "vl": "VL-FFN", "shared": "shared FFN"}
# What fp32 rounding and a small router leave.
EXACT = 1e-4
ROUTERS = {
    "small": f"small random rows, logits of standard deviation {SMALL_LOGIT_STD:g}: all gates equal within 1e-5",
    "fresh": "those of a new run",
    "zero": "zero: all tokens tie, and evaluation sends them to expert 0, whose capacity then drops most; "
    "training spreads them by its noise",
}


def report_lines(made: Upcycled, options: UpcycleOptions) -> list[str]:
    """The report: what was made, of what, and whether it computes the same."""
    moe, start = made.after.moe, router_start(options, made.after)
    new = [pool.plan for pool in made.pools if not pool.plan.source_experts]
    reasons = []
    if any(plan.name == "shared" for plan in new):
        reasons.append("text and vision had FFNs of their own")
    if new and start == "fresh" and not moe.normalize_gate:
        reasons.append("fresh gates differ from token to token")
    if options.noise:
        reasons.append(f"noise of {options.noise:g}")
    if options.drop_fraction:
        reasons.append(f"{100 * options.drop_fraction:g} % of the channels start anew")
    function = (
        "that of the source wherever no token is dropped (moe.eval_capacity_factor 0 drops none)"
    )
    lines = [
        *(
            f"{verb} {path} ({counts.total / 1e6:,.1f} M parameters, {counts.per_token / 1e6:,.1f} M per token)"
            for verb, path, counts in (
                ("upcycled", made.source, parameter_counts(made.before)),
                ("to", made.path, parameter_counts(made.after)),
            )
        ),
        *_pool_lines(made, start),
        f"  function: {'changed: ' + '; '.join(reasons) if reasons else function}",
    ]
    if moe.normalize_gate and moe.topk == 1:
        lines.append(
            "  note: with one expert per token a normalised gate is always 1: only auxiliary losses train the router"
        )
    optimizer = "none; training starts at step 0"
    if options.carry_optimizer:
        zero = "carried, with zero moments for new routers"
        optimizer = f"{zero}; training goes on after step {made.step}"
    return [*lines, f"  optimizer: {optimizer}"]


def _pool_lines(made: Upcycled, start: str) -> Iterator[str]:
    # Pools that differ in nothing but their block.
    groups: dict[PoolPlan, list[GrownPool]] = {}
    for pool in made.pools:
        groups.setdefault(replace(pool.plan, layer_number=0), []).append(pool)
    for plan, group in groups.items():
        blocks = ", ".join(str(pool.plan.layer_number) for pool in group)
        if plan.source_experts:
            origin = f"{plan.copies} copies of each of {plan.source_experts}"
        else:
            mean = "mean of " if len(plan.sources) > 1 else ""
            origin = f"copies of the {mean}{' and '.join(FFN_NAMES[name] for name in plan.sources)}"
        yield f"  block {blocks}: {plan.num_experts} {plan.name} experts, {origin}; {_gates(group, made.after.moe)}"
    if any(not pool.plan.source_experts for pool in made.pools):
        yield f"  new routers: {ROUTERS[start]}"
    if any(pool.plan.source_experts for pool in made.pools):
        yield f"  grown routers: the rows of copies are equal but for {SMALL_LOGIT_STD:g} of a logit"


def _gates(group: list[GrownPool], moe: MoEConfig) -> str:
    """What gates and scale of a kind of pool do to its output, in evaluation and in training."""
    scale = group[0].scale
    if moe.normalize_gate:
        return "gates sum to 1, output layer as it was"
    if group[0].plan.source_experts:
        return f"output layer times {scale:g}"
    scales = f"{min(p.scale for p in group):.3g}"
    if len({p.scale for p in group}) > 1:
        scales += f"..{max(p.scale for p in group):.3g}"
    sigma = 1.0 / group[0].plan.num_experts if moe.noise_std < 0.0 else moe.noise_std
    quiet, noisy = _output(group, moe.topk, 0.0), _output(group, moe.topk, sigma)
    words = f"output layer times {scales}; with the gates, output times {quiet}"
    return f"{words}, in training (noise {sigma:.3g}) {noisy}"


def _output(group: list[GrownPool], topk: int, noise: float) -> str:
    """Gates times scale for random tokens, over the blocks."""
    found = [(pool.scale, sampled_gates(pool.router, pool.norm, topk, noise)) for pool in group]
    mean = sum(scale * gates.mean for scale, gates in found) / len(found)
    low = min(scale * gates.low for scale, gates in found)
    high = max(scale * gates.high for scale, gates in found)
    if high - low < EXACT:
        return f"{mean:.4f}"
    return f"{mean:.2f} (5 to 95 % of random tokens: {low:.2f} to {high:.2f})"
