"""What an upcycling did, in lines for the terminal: sizes, where experts come from, and what became of the function."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_vlmoe.config.schema import MoEConfig, RunConfig
from megatron_vlmoe.convert.upcycle.options import UpcycleOptions
from megatron_vlmoe.convert.upcycle.run import Upcycled, router_start
from megatron_vlmoe.convert.upcycle.tensors import GrownPool
from megatron_vlmoe.convert.upcycle.values import SMALL_LOGIT_STD, GateRange, sampled_gates
from megatron_vlmoe.planning.parameters import parameter_counts

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
    """The report."""
    return [
        f"upcycled {made.source} ({_size(made.before)})",
        f"to {made.path} ({_size(made.after)})",
        *_pool_lines(made, options),
        *_function_lines(made, options),
        *_optimizer_lines(made, options),
    ]


def _size(config: RunConfig) -> str:
    counts = parameter_counts(config)
    return f"{counts.total / 1e6:,.1f} M parameters, {counts.per_token / 1e6:,.1f} M per token"


def _groups(pools: Sequence[GrownPool]) -> Iterator[list[GrownPool]]:
    """Pools that differ in nothing but their block."""
    found: dict[tuple[object, ...], list[GrownPool]] = {}
    for pool in pools:
        plan = pool.plan
        key = (plan.name, plan.num_experts, plan.sources, plan.source_experts)
        found.setdefault(key, []).append(pool)
    yield from found.values()


def _pool_lines(made: Upcycled, options: UpcycleOptions) -> Iterator[str]:
    for group in _groups(made.pools):
        plan = group[0].plan
        blocks = ", ".join(str(pool.plan.layer_number) for pool in group)
        if plan.source_experts:
            origin = f"{plan.copies} copies of each of {plan.source_experts}"
        else:
            mean = "mean of " if len(plan.sources) > 1 else ""
            origin = f"copies of the {mean}{' and '.join(FFN_NAMES[name] for name in plan.sources)}"
        yield f"  block {blocks}: {plan.num_experts} {plan.name} experts, {origin}; {_gates(group, made.after.moe)}"
    if any(not pool.plan.source_experts for pool in made.pools):
        yield f"  new routers: {ROUTERS[router_start(options, made.after)]}"
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
    words = f"output layer times {scales}; with the gates, output times {_range(quiet)}"
    return f"{words}, in training (noise {sigma:.3g}) {_range(noisy)}"


def _output(group: list[GrownPool], topk: int, noise: float) -> GateRange:
    """Gates times scale for random tokens, over the blocks."""
    found = [(pool.scale, sampled_gates(pool.router, pool.norm, topk, noise)) for pool in group]
    return GateRange(
        sum(scale * gates.mean for scale, gates in found) / len(found),
        min(scale * gates.low for scale, gates in found),
        max(scale * gates.high for scale, gates in found),
    )


def _range(gates: GateRange) -> str:
    if gates.high - gates.low < EXACT:
        return f"{gates.mean:.4f}"
    return f"{gates.mean:.2f} (5 to 95 % of random tokens: {gates.low:.2f} to {gates.high:.2f})"


def _function_lines(made: Upcycled, options: UpcycleOptions) -> Iterator[str]:
    """Whether the result computes what the source computed."""
    moe, reasons = made.after.moe, []
    if any("shared" == p.plan.name and not p.plan.source_experts for p in made.pools):
        reasons.append("text and vision had FFNs of their own")
    fresh = router_start(options, made.after) == "fresh" and not moe.normalize_gate
    if fresh and any(not pool.plan.source_experts for pool in made.pools):
        reasons.append("fresh gates differ from token to token")
    if options.noise:
        reasons.append(f"noise of {options.noise:g}")
    if options.drop_fraction:
        reasons.append(f"{100 * options.drop_fraction:g} % of the channels start anew")
    if reasons:
        yield f"  function: changed: {'; '.join(reasons)}"
    else:
        yield "  function: that of the source wherever no token is dropped (moe.eval_capacity_factor 0 drops none)"
    if moe.normalize_gate and moe.topk == 1:
        yield "  note: with one expert per token a normalised gate is always 1: only auxiliary losses train the router"


def _optimizer_lines(made: Upcycled, options: UpcycleOptions) -> Iterator[str]:
    if options.carry_optimizer:
        yield f"  optimizer: carried, with zero moments for new routers; training goes on after step {made.step}"
    else:
        yield "  optimizer: none; training starts at step 0"
