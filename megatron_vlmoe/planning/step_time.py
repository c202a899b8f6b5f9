"""How long a training step takes: each part of it from an amount of work and a rate.

A part is a number of floating-point operations, of bytes through memory, of started operators or of bytes to other
ranks. Every rate has a fast and a slow value, the slow one half as large. How the parts combine (sums, maxima, and what
is hidden behind other work) makes a step exactly twice as long where every part is, so that the bounds are at most a
factor of two apart.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_vlmoe.config.schema import Precision, RunConfig
from megatron_vlmoe.planning.collectives import Collective, collectives_per_step
from megatron_vlmoe.planning.devices import Device, Rates, rates
from megatron_vlmoe.planning.estimate import (
    BYTES,
    expert_rows,
    has_compiled_cross_entropy,
    logit_entries,
    stage_flops,
    trained_parameters,
)
from megatron_vlmoe.planning.parameters import (
    Parameter,
    estimated_parameters,
    parameters_of_stage,
    stage_blocks,
    with_assumed_vocabularies,
)
from megatron_vlmoe.stream.block_plan import block_plans
from megatron_vlmoe.stream.layout import StreamLayout
from megatron_vlmoe.stream.sizes import data_parallel_size, num_micro_batches

# Counted over the operators of one block, forward and backward, that are no matrix products: reads and writes of
# activations, in values per token and width (LayerNorms, biases, LayerScale, residuals, splits and joins of segments),
# per row and inner width (bias, GELU), and per row of experts and width (slots filled and combined).
VALUES_PER_TOKEN, VALUES_PER_INNER_ROW, VALUES_PER_EXPERT_ROW = 79, 8, 17
# Passes over fp32 logits: conversion, maximum, subtraction, exponential, sum and division; then their gradients.
VALUES_PER_LOGIT, VALUES_PER_LOGIT_GRADIENT = 10, 6
# The same where functions are compiled: bias and GELU, and the ends of both branches, once forward and once backward;
# logits in the compute precision, of which the maximum and the sum are two passes.
COMPILED_PER_TOKEN, COMPILED_PER_INNER_ROW = 64, 5
COMPILED_PER_LOGIT, COMPILED_PER_LOGIT_GRADIENT = 2, 2
# Operators that are started, forward and backward.
OPERATORS_PER_BLOCK, OPERATORS_PER_POOL = 270, 250
# Shares of the work of a micro-batch.
FORWARD, BACKWARD = 1 / 3, 2 / 3
HIDDEN = 0.5
"""Share of a pass behind which a collective can hide that runs beside it."""


@dataclass(frozen=True)
class Cluster:
    """Where a run is planned for.

    Args:
        device: every rank has one.
        per_node: devices of a node; consecutive ranks share it, and those of the last node are what is left.
        network: bytes per second of one device's share of its node's network.
    """

    device: Device
    per_node: int
    network: float


@dataclass(frozen=True)
class StepTime:
    """Seconds of a training step.

    Args:
        lower: with the fast rates.
        upper: with the slow ones, at most twice as long.
        parts: the fast case by part, which add up to `lower`.
    """

    lower: float
    upper: float
    parts: Mapping[str, float]

    @property
    def middle(self) -> float:
        """The geometric mean of the bounds, by which layouts are compared."""
        return math.sqrt(self.lower * self.upper)


def step_time(
    config: RunConfig,
    world_size: int,
    precision: Precision,
    cluster: Cluster,
    found: Sequence[Parameter] | None = None,
) -> StepTime:
    """The time of a step, without data loading, evaluation and checkpoints.

    Args:
        found: `estimated_parameters` of the run, where they are known already.

    Raises:
        ConfigError: if the layout does not fit, or the device does not compute in this precision.
    """
    config = with_assumed_vocabularies(config)
    found = estimated_parameters(config) if found is None else found
    work = [
        _StageWork.of(config, world_size, precision, stage, found)
        for stage in range(config.parallel.pipeline_model_parallel_size)
    ]
    data_size = data_parallel_size(config.parallel, world_size)
    micro_batches = num_micro_batches(config, data_size)
    fast, slow = (
        _step_parts(
            config,
            work,
            micro_batches,
            world_size,
            cluster,
            rates(cluster.device, precision, cluster.network, slow),
        )
        for slow in (False, True)
    )
    return StepTime(sum(fast.values()), sum(slow.values()), fast)


@dataclass(frozen=True)
class _StageWork:
    """What one rank of a stage does: per micro-batch, and (gradients, weights, update) per step."""

    flops: float
    memory_bytes: float
    operators: float
    update_bytes: float
    collectives: Sequence[Collective]

    @classmethod
    def of(
        cls,
        config: RunConfig,
        world_size: int,
        precision: Precision,
        stage: int,
        found: Sequence[Parameter],
    ) -> _StageWork:
        parallel, model = config.parallel, config.model
        tensor, expert = parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size
        layout = StreamLayout.of(config).shard(tensor)
        plans = block_plans(model, config.moe)
        width, inner = model.hidden_size, model.ffn_hidden_size
        per_token, per_inner_row = VALUES_PER_TOKEN, VALUES_PER_INNER_ROW
        if config.train.compile:
            per_token, per_inner_row = COMPILED_PER_TOKEN, COMPILED_PER_INNER_ROW
        values = operators = 0.0
        for number in stage_blocks(config, stage):
            values += per_token * layout.num_tokens * width
            operators += OPERATORS_PER_BLOCK
            for branch in plans[number - 1].branches:
                rows = branch.num_tokens(layout)
                if branch.num_experts:
                    rows = expert_rows(config, branch, layout)
                    values += VALUES_PER_EXPERT_ROW * rows * width
                    operators += OPERATORS_PER_POOL
                values += per_inner_row * rows * inner
        if config.train.cuda_graph:
            # The host starts the whole step at once.
            operators = 0.0
        if config.train.recompute == "full":
            values, operators = (number * (1 + FORWARD) for number in (values, operators))
        memory = values * BYTES[precision]
        if stage == parallel.pipeline_model_parallel_size - 1:
            forward = 2 if config.train.head_chunk_rows else 1
            passes, size = forward * VALUES_PER_LOGIT + VALUES_PER_LOGIT_GRADIENT, 4
            if has_compiled_cross_entropy(config, precision):
                passes = forward * COMPILED_PER_LOGIT + COMPILED_PER_LOGIT_GRADIENT
                size = BYTES[precision]
            memory += size * passes * sum(logit_entries(config))
        data_size = data_parallel_size(parallel, world_size)
        expert_data_size = world_size // (parallel.pipeline_model_parallel_size * expert)
        update = 0.0
        held = parameters_of_stage(found, config, stage)
        for parameter in trained_parameters(config, held):
            size = parameter.local_size(tensor, expert)
            replicas = expert_data_size if parameter.sharding == "expert" else data_size
            shards = replicas if parallel.use_distributed_optimizer else 1
            # Gradients are set to zero; norm, clipping, gradient, moments and weights are read, and these written.
            update += size * (4 + (4 + 8 + 4 + 12 + 12 + BYTES[precision]) / shards)
        return cls(
            sum(stage_flops(config, stage)),
            memory,
            operators,
            update,
            collectives_per_step(config, world_size, precision, stage, found),
        )


def _step_parts(
    config: RunConfig,
    work: Sequence[_StageWork],
    micro_batches: int,
    world_size: int,
    cluster: Cluster,
    speed: Rates,
) -> dict[str, float]:
    """Seconds of a step by part, at one set of rates: those of the slowest stage, and what the pipeline waits."""
    parallel, device = config.parallel, cluster.device
    passes = [_pass_parts(stage, micro_batches, world_size, cluster, speed) for stage in work]
    slowest = max(passes, key=lambda parts: sum(parts.values()))
    step = defaultdict(float, {name: micro_batches * value for name, value in slowest.items()})
    # The pipeline fills and empties once; with virtual stages in smaller pieces (Narayanan et al., arXiv 2104.04473).
    others = sum(sum(parts.values()) for parts in passes) - sum(slowest.values())
    step[WAITING] = others / parallel.virtual_pipeline_model_parallel_size
    ends = []
    for parts, stage in zip(passes, work):
        end: dict[str, float] = defaultdict(float)
        for collective in stage.collectives:
            if collective.what in PER_STEP:
                seconds = collective_seconds(collective, world_size, cluster, speed)
                end[PER_STEP[collective.what]] += seconds
        computing = parts["matrix products"] + parts["other arithmetic"]
        for name, overlaps, share in (
            (GRADIENTS, parallel.overlap_grad_reduce, BACKWARD),
            (WEIGHTS, parallel.overlap_param_gather, FORWARD),
        ):
            if overlaps and device.is_gpu:
                end[name] = max(0.0, end[name] - HIDDEN * share * computing)
        end["optimizer"] += stage.update_bytes / speed.memory
        ends.append(end)
    for name, value in max(ends, key=lambda end: sum(end.values())).items():
        step[name] += value
    return {name: value for name, value in step.items() if value}


def _pass_parts(
    stage: _StageWork, micro_batches: int, world_size: int, cluster: Cluster, speed: Rates
) -> dict[str, float]:
    """Seconds of a micro-batch on a stage by part."""
    parts: dict[str, float] = defaultdict(float)
    parts["matrix products"] = stage.flops / speed.compute
    parts["other arithmetic"] = stage.memory_bytes / speed.memory
    starting = stage.operators * speed.operator_seconds
    if cluster.device.is_gpu:
        # The host starts operators ahead of the device, if it can.
        starting = max(0.0, starting - sum(parts.values()))
    parts["starting operators"] = starting
    for collective in stage.collectives:
        if collective.what not in PER_STEP:
            seconds = collective_seconds(collective, world_size, cluster, speed)
            parts[PER_MICRO_BATCH[collective.group]] += seconds / micro_batches
    return parts


WAITING = "pipeline fills and empties"
GRADIENTS, WEIGHTS = "gradients to data-parallel ranks", "weights from data-parallel ranks"
PER_STEP = {
    "dense gradients": GRADIENTS,
    "expert gradients": GRADIENTS,
    "dense weights": WEIGHTS,
    "expert weights": WEIGHTS,
    "gradients of replicated parameters": "tensor-parallel collectives",
    "gradient norm": "optimizer",
    "signals to stop": "optimizer",
    "choices of experts": "optimizer",
}
"""What is sent once a step, and the part of the time that it belongs to."""
PER_MICRO_BATCH: Mapping[str, str] = {
    "tensor": "tensor-parallel collectives",
    "expert": "all-to-all of experts",
    "pipeline": "pipeline transfers",
    "data": "features of data-parallel ranks",
}
"""The part of the time of what a group sends in every micro-batch."""


def collective_seconds(
    collective: Collective, world_size: int, cluster: Cluster, speed: Rates
) -> float:
    """Seconds of a collective of a step, all its calls, in the slowest of its groups.

    Ranks of a group that share a node reach each other by its links. A ring leaves a node once, by the network of all
    the group's devices there, however many these are; of an all-to-all every rank sends the rows of other nodes by its
    own. Whoever has the fewest others of its group beside it is the last.
    """
    size = collective.size
    waiting = collective.calls * speed.latency * math.log2(size)
    if collective.operation == "receive":
        return 0.0  # the sender's time
    together = ranks_on_a_node(size, collective.stride, world_size, cluster.per_node)
    if collective.operation == "send":
        inside = together == {size}
        return waiting + collective.sent / (speed.link if inside else speed.network)

    def seconds(here: int) -> float:
        """Of a rank with so many of its group on its node, itself included."""
        if here == size:
            return collective.sent / speed.link
        if collective.operation == "all-to-all":
            far, near = (size - here) / size, (here - 1) / size
            return collective.bytes * max(far / speed.network, near / speed.link)
        leaving = here * speed.network
        # A rank that is alone on its node has no other there to reach.
        return collective.sent / (min(speed.link, leaving) if here > 1 else leaving)

    return waiting + max(map(seconds, together))


def ranks_on_a_node(size: int, stride: int, world_size: int, per_node: int) -> set[int]:
    """How many ranks of a group share a node: every number that occurs, in any group and on any node.

    Groups of `size` ranks at a distance of `stride` fill spans of ``size * stride`` ranks, one beside the other from
    rank 0 on; nodes hold `per_node` consecutive ranks, also from rank 0 on.
    """
    span = size * stride
    found: set[int] = set()
    # Spans begin at the same places of nodes again after this many ranks.
    for start in range(0, min(world_size, math.lcm(span, per_node)), span):
        first = min(span, per_node - start % per_node)
        full, last = divmod(span - first, per_node)
        for ranks in (first, per_node if full else 0, last):
            # Consecutive ranks, of which groups have as many each, or some one more than others.
            found |= {ranks // stride, -(-ranks // stride)}
    return found - {0}
