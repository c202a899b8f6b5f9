"""From a dense checkpoint to a sparse one that computes the same, or from E experts to a multiple; and a report.

Each tensor is made of the source's when it is written. Values of new experts and routers depend on the source's
tensors, a seed and a key alone.

Adam's moments of copies: the gradient of ``c W`` is that of W divided by c, so an output layer that was multiplied by c
has its first moment divided by c and its second by c^2. A copy sees a share of the tokens that its source saw; its
second moment is too large at first (its steps too small) and settles within 1 / (1 - beta2) steps.

Letters: S experts of the source, E of the result, F inner width, D width, N sampled tokens, K experts per token.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from megatron_vlmoe.config.errors import ConvertError
from megatron_vlmoe.config.schema import MoEConfig, RunConfig
from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.convert.checkpoints import CheckpointReader, write_checkpoint
from megatron_vlmoe.convert.tensors import LazyTensor, counted
from megatron_vlmoe.convert.upcycle.plan import (
    DENSE_PARTS,
    OUTPUT_PARTS,
    PoolPlan,
    UpcycleOptions,
    grown_pools,
)
from megatron_vlmoe.model.initial_values import full_initial_value
from megatron_vlmoe.planning.parameters import checkpoint_shapes, parameter_counts
from megatron_vlmoe.stream.draws import keyed_generator
from megatron_vlmoe.train.checkpoint_files import FULLY_RESHARDABLE, stored_format
from megatron_vlmoe.train.run_files import TOKENIZER_FILE, keep_file, run_file

PARAM, FIRST, SECOND = "param", "exp_avg", "exp_avg_sq"
MOMENTS = (PARAM, FIRST, SECOND)
# Standard deviation of the logits of a small router: its gates are 1 / E within 1e-5 of themselves, and still some
# thirty steps of fp32 apart, so that tokens spread over the experts where a zero router would send all to expert 0.
SMALL_LOGIT_STD = 2e-6
# Axis of an expert's inner channels, by parameter; `bias2` has none.
CHANNEL_AXIS = {"weight1": 0, "bias1": 0, "weight2": 1}
SAMPLED_TOKENS = 4096


class GrownPool(NamedTuple):
    """A pool with everything that is decided about it before tensors are written.

    The router has rows ``[E, D]`` in fp32, `norm` is weight and bias of the LayerNorm before it, `scale` the factor of
    the output layer.
    """

    plan: PoolPlan
    router: Tensor
    norm: tuple[Tensor, Tensor]
    scale: float


@dataclass(frozen=True)
class Upcycled:
    """A checkpoint that was made: its iteration folder, what it was made of, configurations before and after, the new
    and grown pools, and its step."""

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

    Its configuration differs from the source's in `moe` alone.

    Raises:
        ConvertError: the configurations do not fit each other, a tensor is missing or damaged, or there is a
            checkpoint already.
    """
    options = options or UpcycleOptions()
    optimizer_format = stored_format(reader.common)
    if options.carry_optimizer and optimizer_format != FULLY_RESHARDABLE:
        raise ConvertError(
            f"{reader.path}: its optimizer state is {optimizer_format}, in buckets of many parameters, and cannot "
            f"be carried; go on with it for one step, --checkpoint.optimizer_format {FULLY_RESHARDABLE} "
            "--exit-interval 1, and upcycle that checkpoint"
        )
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
    """The new and grown pools, and all tensors of the sparse checkpoint by key, without writing it.

    Raises:
        ConvertError: the configurations do not fit each other, or a tensor is missing.
    """
    pools = []
    for plan in grown_pools(reader.config, config, options.shared_from):
        key, scale = plan.router_key, plan.scale(config.moe)
        norm = (
            mean_of(reader.tensors, plan.norm_keys("weight"), reader),
            mean_of(reader.tensors, plan.norm_keys("bias"), reader),
        )
        shape, start = (plan.num_experts, config.model.hidden_size), router_start(options, config)
        if plan.source_experts:
            rows = tensor_of(reader.tensors, key, reader).read().float()
            router = grown_router(rows, plan.copies, norm, options.seed, key)
        elif start == "zero":
            router = torch.zeros(shape)
        elif start == "small":
            router = small_router(plan.num_experts, norm, options.seed, key)
        else:
            router = full_initial_value(key, shape, config.model, options.seed)
            if not config.moe.normalize_gate:
                scale = 1.0 / sampled_gates(router, norm, config.moe.topk).mean
        pools.append(GrownPool(plan, router, norm, scale))
    tensors: dict[str, LazyTensor] = {}
    for moment in ("", *MOMENTS) if options.carry_optimizer else ("",):
        tensors |= grown_tensors(reader, config, pools, options, moment)
    return tuple(pools), tensors


def router_start(options: UpcycleOptions, config: RunConfig) -> str:
    """How new routers start, `auto` resolved."""
    if options.router == "auto":
        return "fresh" if config.moe.normalize_gate else "small"
    return options.router


def state_key(moment: str, key: str) -> str:
    """Checkpoint key of one of a parameter's moments; of the parameter itself without one."""
    return f"optimizer.state.{moment}.{key}" if moment else key


def grown_tensors(
    reader: CheckpointReader,
    config: RunConfig,
    pools: Iterable[GrownPool],
    options: UpcycleOptions,
    moment: str = "",
) -> dict[str, LazyTensor]:
    """The model's tensors, or with `moment` that part of the optimizer's state, by checkpoint key.

    What the source never trained has no moments, and its copies have none either.

    Raises:
        ConvertError: a tensor is missing or of another shape.
    """
    stored = reader.optimizer_tensors if moment else reader.tensors
    made: dict[str, LazyTensor] = {}
    # Keys of the LayerNorm of a new shared pool, which is the mean of those of its sources.
    norms = {}
    for pool in pools:
        made |= _pool_tensors(reader, pool, options, moment)
        if (pool.plan.name,) != pool.plan.sources:
            for end in ("weight", "bias"):
                key = f"{pool.plan.block}{pool.plan.name}_norm.{end}"
                norms[key] = pool.plan.norm_keys(end)
    tensors = {}
    for key, shape in checkpoint_shapes(config).items():
        whole = state_key(moment, key)
        sources = tuple(state_key(moment, source) for source in norms.get(key, (key,)))
        if key in made:
            tensors[whole] = made[key]
        elif not moment and key.endswith(".balance_bias") and key not in stored:
            # Loss-free balancing that the source does not have.
            tensors[whole] = LazyTensor(shape, torch.float32, partial(torch.zeros, shape))
        elif not moment or all(source in stored for source in sources):
            first = tensor_of(stored, sources[0], reader)
            if len(sources) > 1:
                first = replace(first, read=partial(mean_of, stored, sources, reader))
            tensors[whole] = first
        else:
            continue
        if (found := tensors[whole].shape) != shape:
            raise ConvertError(f"{reader.path}: {whole} has shape {list(found)}, not {list(shape)}")
    return tensors


def _pool_tensors(
    reader: CheckpointReader, pool: GrownPool, options: UpcycleOptions, moment: str
) -> dict[str, LazyTensor]:
    """Tensors of a grown pool by parameter key: weights, or with `moment` that part of the optimizer's state."""
    plan, made = pool.plan, {}
    for part in DENSE_PARTS:
        keys = plan.source_keys(part)
        if moment and any(state_key(moment, key) not in reader.optimizer_tensors for key in keys):
            continue
        shape = tensor_of(reader.tensors, keys[0], reader).shape
        each = shape[1:] if plan.source_experts else shape
        dtype = torch.float32 if moment else reader.tensors[keys[0]].dtype
        read = partial(_experts, reader, pool, part, options, moment)
        made[plan.expert_key(part)] = LazyTensor((plan.num_experts, *each), dtype, read)
    bias = plan.router_key.replace(".weight", ".balance_bias")
    if not moment and bias in reader.tensors:
        # Copies of an expert are chosen where it was.
        read = partial(_repeated, reader, bias, plan.copies)
        made[bias] = LazyTensor((plan.num_experts,), torch.float32, read)
    if not moment or plan.expert_key("weight1") in made:
        read = partial(_router, reader, pool, moment)
        made[plan.router_key] = LazyTensor(tuple(pool.router.shape), torch.float32, read)
    return made


def _experts(
    reader: CheckpointReader, pool: GrownPool, part: str, how: UpcycleOptions, moment: str
) -> Tensor:
    """One parameter of all experts of a pool, or one of its moments."""
    plan = pool.plan
    keys = plan.source_keys(part)
    # The fp32 copy of a 16-bit parameter, where there is one: weights and their copy stay equal.
    masters = tuple(state_key(moment or PARAM, key) for key in keys)
    if all(key in reader.optimizer_tensors for key in masters):
        source = mean_of(reader.optimizer_tensors, masters, reader)
    else:
        source = mean_of(reader.tensors, keys, reader)
    if not plan.source_experts:
        source = source.unsqueeze(0)
    experts = source.repeat_interleave(plan.copies, dim=0)
    name = f"{plan.block}{plan.name}"
    factor = pool.scale if part in OUTPUT_PARTS else 1.0
    if moment == FIRST:
        # What `diversify` draws anew has no past.
        axis = CHANNEL_AXIS.get(part)
        for index, expert in enumerate(experts):
            if how.drop_fraction and axis is not None:
                channels = dropped_channels(name, index, expert.shape[axis], how)
                expert.index_fill_(axis, channels, 0.0)
        return experts / factor
    if moment == SECOND:
        return experts / factor**2
    if how.noise or how.drop_fraction:
        experts = diversify(experts, part, name, how)
    return experts * factor


def _router(reader: CheckpointReader, pool: GrownPool, moment: str) -> Tensor:
    """The rows of a pool's router, or their moments: zero for a new router."""
    plan = pool.plan
    if moment in ("", PARAM):
        return pool.router
    if not plan.source_experts:
        return torch.zeros_like(pool.router)
    stored = tensor_of(reader.optimizer_tensors, state_key(moment, plan.router_key), reader)
    return stored.read().float().repeat_interleave(plan.copies, dim=0)


def _repeated(reader: CheckpointReader, key: str, copies: int) -> Tensor:
    """A vector with a number for each expert, for as many copies of each."""
    return tensor_of(reader.tensors, key, reader).read().float().repeat_interleave(copies)


def mean_of(
    stored: Mapping[str, LazyTensor], keys: tuple[str, ...], reader: CheckpointReader
) -> Tensor:
    """The mean of tensors in fp32, or the one tensor."""
    values = [tensor_of(stored, key, reader).read().float() for key in keys]
    return values[0] if len(values) == 1 else torch.stack(values).mean(dim=0)


def tensor_of(stored: Mapping[str, LazyTensor], key: str, reader: CheckpointReader) -> LazyTensor:
    """A tensor of the source.

    Raises:
        ConvertError: naming the checkpoint that lacks it.
    """
    if key not in stored:
        raise ConvertError(f"{reader.path}: has no {key}")
    return stored[key]


def dropped_channels(pool: str, expert: int, inner: int, how: UpcycleOptions) -> Tensor:
    """Inner channels, of F = `inner`, of an expert that start anew, in rising order; the same for all its parameters.

    `pool` is the name of the pool in the model.
    """
    generator = keyed_generator(torch.device("cpu"), how.seed, "dropped", pool, expert)
    chosen = torch.randperm(inner, generator=generator)[: round(how.drop_fraction * inner)]
    return chosen.sort().values


@torch.no_grad()
def diversify(experts: Tensor, part: str, pool: str, how: UpcycleOptions) -> Tensor:
    """Adds noise to the experts' matrices and draws dropped channels anew.

    The new values of dropped channels are normal with mean and standard deviation of the values that they replace, of
    each parameter on its own (Drop-Upcycling, arXiv 2502.19261). The output bias has no channels and no noise.

    Args:
        experts: ``[E, F, D]`` weight1, ``[E, F]`` bias1, ``[E, D, F]`` weight2 or ``[E, D]`` bias2 in fp32.
        part: which of them.
        pool: name of the pool in the model; part of the seed.
        how: strength and seed.
    """
    made = experts.clone()
    for index, expert in enumerate(made):
        generator = keyed_generator(torch.device("cpu"), how.seed, "upcycle", pool, part, index)
        if how.noise and part.startswith("weight"):
            size = how.noise * float(expert.std(correction=0))
            expert.add_(torch.randn(expert.shape, generator=generator), alpha=size)
        axis = CHANNEL_AXIS.get(part)
        if how.drop_fraction and axis is not None:
            channels = dropped_channels(pool, index, expert.shape[axis], how)
            if len(channels):
                old = expert.index_select(axis, channels)
                new = torch.randn(old.shape, generator=generator)
                new = new * old.std(correction=0) + old.mean()
                expert.index_copy_(axis, channels, new)
    return made


def small_router(
    num_experts: int,
    norm: tuple[Tensor, Tensor],
    seed: int,
    key: str,
    logit_std: float = SMALL_LOGIT_STD,
) -> Tensor:
    """Rows ``[E, D]`` whose logits have a small standard deviation; seed and the router's key draw them.

    Weight and bias of the LayerNorm before the router fix the length of its inputs.
    """
    weight, bias = norm
    generator = keyed_generator(torch.device("cpu"), seed, "small router", key)
    rows = torch.randn((num_experts, len(weight)), generator=generator)
    square = weight.double().square().sum() + bias.double().square().sum()
    length = max(float(square.sqrt()), 1e-12)
    return rows * (logit_std / length)


def grown_router(
    rows: Tensor, copies: int, norm: tuple[Tensor, Tensor], seed: int, key: str
) -> Tensor:
    """Rows ``[S, D]`` to ``[S copies, D]``: copies share their expert's row but for what breaks their tie."""
    made = rows.repeat_interleave(copies, dim=0)
    return made + small_router(len(made), norm, seed, key)


class GateRange(NamedTuple):
    """The sum of a token's K gates: its mean over tokens, and its 5th and 95th percentile."""

    mean: float
    low: float
    high: float


@torch.no_grad()
def sampled_gates(
    router: Tensor,
    norm: tuple[Tensor, Tensor],
    topk: int,
    noise_std: float = 0.0,
    seed: int = 0,
) -> GateRange:
    """The gates of a router ``[E, D]`` for random tokens, there being no data: normal ones after the LayerNorm `norm`.

    Router noise is 0 in evaluation; tokens and noise are drawn by the seed.
    """
    weight, bias = norm
    generator = keyed_generator(torch.device("cpu"), seed, "sampled gates")
    tokens = torch.randn((SAMPLED_TOKENS, len(weight)), generator=generator)
    tokens = torch.nn.functional.layer_norm(tokens, weight.shape, weight.float(), bias.float())
    logits = tokens @ router.float().T
    logits = logits + noise_std * torch.randn(logits.shape, generator=generator)
    total = torch.softmax(logits, dim=1).topk(topk, dim=1).values.sum(dim=1)
    low, high = torch.quantile(total, torch.tensor([0.05, 0.95])).tolist()
    return GateRange(float(total.mean()), low, high)


def sparse_optimizer(common: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a sparse run's checkpoint holds of optimizer and schedule besides tensors.

    A dense run has one optimizer with two parameter groups (with weight decay and without); a sparse run chains two,
    `0` with a further group of routers and `1` with the experts. Groups are recognised by their factors and by
    `is_expert_parallel` and `is_decoupled_lr` (which marks routers). Given is what the source stored, and its name for
    messages.

    Raises:
        ConvertError: it holds no optimizer, or one of another kind.
    """
    if "optimizer" not in common or "scheduler" not in common:
        raise ConvertError(f"{where}: holds weights only, no optimizer to carry")
    stored = common["optimizer"]
    chained = set(stored) == {0, 1}
    first = stored[0] if chained else stored
    if not isinstance(first, dict) or "param_state_sharding_type" not in first:
        raise ConvertError(
            f"{where}: its optimizer is not megatron-core's distributed one, whose state alone can be carried"
        )
    groups = first["optimizer"]["param_groups"]
    if any("betas" not in group for group in groups):
        raise ConvertError(f"{where}: its optimizer is not Adam, whose state alone can be carried")
    if not chained:
        # The temperature of retrieval shares the routers' group.
        plain = [group for group in groups if not group["is_decoupled_lr"]]
        decays = [group for group in plain if group["wd_mult"]]
        routers = [{**group, "is_decoupled_lr": True, "default_config": False} for group in decays]
        experts = [{**group, "is_expert_parallel": True} for group in plain]
        dense = [*decays, *routers, *(group for group in plain if not group["wd_mult"])]
        stored = {
            number: {**first, "optimizer": {**first["optimizer"], "param_groups": chosen}}
            for number, chosen in enumerate((dense, experts))
        }
    # Nothing shared: neither with the source nor among the groups.
    made = {number: copy.deepcopy(optimizer) for number, optimizer in stored.items()}
    return {"optimizer": made, "scheduler": copy.deepcopy(common["scheduler"])}


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
