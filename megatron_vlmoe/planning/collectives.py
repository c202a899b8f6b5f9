"""What the ranks of a run send each other in a training step: every collective, its group, its calls and its bytes.

Letters: T tokens of a micro-batch on one TP rank, D width, S predicted positions of a head, R expert rows, b bytes of a
number in the compute precision.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from megatron_vlmoe.config.schema import Precision, RunConfig
from megatron_vlmoe.planning.estimate import BYTES, expert_rows, head_slots, trained_parameters
from megatron_vlmoe.planning.parameters import (
    Parameter,
    estimated_parameters,
    parameters_of_stage,
    stage_blocks,
    with_assumed_vocabularies,
)
from megatron_vlmoe.stream.block_plan import Branch, block_plans
from megatron_vlmoe.stream.layout import TEXT_SEGMENTS, VISION_SEGMENTS, StreamLayout
from megatron_vlmoe.stream.sizes import (
    data_parallel_size,
    num_micro_batches,
    router_losses,
    statistics_sections,
)

Operation = Literal["all-reduce", "reduce-scatter", "all-gather", "all-to-all", "send", "receive"]
Group = Literal["tensor", "pipeline", "expert", "data", "expert data", "stage", "world"]


class Add(Protocol):
    """Counts a collective."""

    def __call__(
        self,
        what: str,
        operation: Operation,
        group: Group,
        size: int,
        times: int,
        pieces: int = 1,
        /,
    ) -> None:
        """What, how, among whom, its bytes, how often, and in how many calls each time."""
        ...


BUCKET_VALUES = 40_000_000
"""megatron-core's least bucket of gradients, of which a million per data-parallel rank is the least, too."""


@dataclass(frozen=True)
class Collective:
    """A kind of collective that a rank takes part in.

    Args:
        what: what travels.
        operation: how.
        group: the ranks that take part.
        size: how many these are.
        stride: distance of two of them that are next to each other.
        calls: how often in a step.
        bytes: of the whole tensors of all calls: what all ranks together reduce, gather or exchange with this rank.
    """

    what: str
    operation: Operation
    group: Group
    size: int
    stride: int
    calls: int
    bytes: int

    @property
    def sent(self) -> float:
        """Bytes that one rank sends: a ring's for reductions and gathers, all but the own part for an all-to-all."""
        share = (self.size - 1) / self.size
        factors = {"all-reduce": 2.0 * share, "send": 1.0, "receive": 0.0}
        return self.bytes * factors.get(self.operation, share)


def collectives_per_step(
    config: RunConfig,
    world_size: int,
    precision: Precision,
    stage: int,
    found: Sequence[Parameter] | None = None,
) -> list[Collective]:
    """Every collective of a training step of a rank of a pipeline stage, in groups of more than one rank.

    Evaluation, logging and checkpoints are left out, and so are the few bytes of megatron-core's loss scale. For the
    dispatchers whose splits depend on routing, all token slots count as routed, to every rank as many.

    - Gradients are fp32, in buckets that the distributed optimizer pads: a parameter starts at a multiple of 64 values,
      a bucket ends at one of lcm(128, ranks). A reduce-scatter each, or an all-reduce without that optimizer.
    - Updated weights are gathered after the step. megatron-core 0.16.1 gathers all of them once for each of its
      optimizers, which are two in a model with experts, unless `parallel.overlap_param_gather` is set.
    - TP: a block gathers ``T D`` before a column-parallel layer and reduce-scatters it after a row-parallel one; the
      backward pass does the opposite, and gathers the input once more for the gradient of the weight.
    - EP: two all-to-alls of ``R D`` per block of pools in the forward pass, two in the backward pass; each in as many
      calls as `moe.all_to_all_chunks` says.
    - PP: ``T D`` per micro-batch to the next stage, and its gradient back.
    - Contrastive pretraining: fp32 features of captions and of images, gathered from TP and then from data-parallel
      ranks; of the latter the gradient is reduce-scattered.

    Args:
        found: `estimated_parameters` of the run, where they are known already.

    Raises:
        ConfigError: if the layout does not fit the number of processes or the batch.
    """
    config = with_assumed_vocabularies(config)
    parallel, width = config.parallel, config.model.hidden_size
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    expert = parallel.expert_model_parallel_size
    data_size = data_parallel_size(parallel, world_size)
    micro_batches = num_micro_batches(config, data_size)
    per_stage = world_size // pipeline
    groups: dict[Group, tuple[int, int]] = {
        "tensor": (tensor, 1),
        "pipeline": (pipeline, per_stage),
        "expert": (expert, 1),
        "data": (data_size, tensor),
        "expert data": (per_stage // expert, expert),
        "stage": (per_stage, 1),
        "world": (world_size, 1),
    }
    calls: Counter[tuple[str, Operation, Group]] = Counter()
    sums: Counter[tuple[str, Operation, Group]] = Counter()

    def add(
        what: str, operation: Operation, group: Group, size: int, times: int, pieces: int = 1
    ) -> None:
        if size and times and groups[group][0] > 1:
            calls[what, operation, group] += times * pieces
            sums[what, operation, group] += size * times

    found = estimated_parameters(config) if found is None else found
    of_all_stages = trained_parameters(config, found)
    # A stage without experts has the optimizer of experts too.
    optimizers = len({parameter.sharding == "expert" for parameter in of_all_stages})
    trained = parameters_of_stage(of_all_stages, config, stage)
    kinds: tuple[tuple[str, Group], ...] = (("dense", "data"), ("expert", "expert data"))
    for part, group in kinds:
        own = [p for p in trained if (p.sharding == "expert") == (part == "expert")]
        for buffer in _buffers(own, precision):
            number_bytes = 4 if buffer[0].fp32 else BYTES[precision]
            for values in _buckets(config, buffer, groups[group][0], data_size, stage):
                what = f"{part} gradients"
                if not parallel.use_distributed_optimizer:
                    add(what, "all-reduce", group, 4 * values, 1)
                    continue
                add(what, "reduce-scatter", group, 4 * values, 1)
                times = 1 if parallel.overlap_param_gather else optimizers
                add(f"{part} weights", "all-gather", group, number_bytes * values, times)
    # Parameters that every TP rank applies to its own samples; the temperature to the loss, which all compute.
    replicated = sum(
        parameter.size
        for parameter in trained
        if parameter.sharding == "replicated" and not parameter.key.endswith(".logit_scale")
    )
    add("gradients of replicated parameters", "all-reduce", "tensor", 4 * replicated, 1)
    add("gradient norm", "all-reduce", "world", 4, 1)
    add("signals to stop", "all-reduce", "world", 8, 1)
    if config.moe.balance_bias_rate > 0.0 and config.moe.train_experts:
        plans = block_plans(config.model, config.moe)
        own_pools = [pool for n in stage_blocks(config, stage) for pool in plans[n - 1].pools]
        experts = sum(pool.num_experts for pool in own_pools)
        add("choices of experts", "all-reduce", "stage", 8 * experts, 1)

    _add_blocks(config, precision, stage, micro_batches, add)
    _add_ends(config, precision, stage, micro_batches, data_size, add)
    virtual = parallel.virtual_pipeline_model_parallel_size
    hidden = BYTES[precision] * StreamLayout.of(config).num_tokens // tensor * width
    # Every model chunk has a neighbour on each side, but for the first and the last of all.
    forward, backward = virtual - (stage == pipeline - 1), virtual - (stage == 0)
    for what, sent, received in (
        ("hidden states", forward, backward),
        ("their gradients", backward, forward),
    ):
        add(what, "send", "pipeline", hidden, micro_batches * sent)
        add(what, "receive", "pipeline", hidden, micro_batches * received)
    return [
        Collective(what, operation, group, *groups[group], number, sums[what, operation, group])
        for (what, operation, group), number in calls.items()
    ]


def _add_ends(
    config: RunConfig,
    precision: Precision,
    stage: int,
    micro_batches: int,
    data_size: int,
    add: Add,
) -> None:
    """Counts what embeddings and heads send, where a stage has them."""
    size, width = BYTES[precision], config.model.hidden_size
    whole = StreamLayout.of(config)
    if stage == 0:
        for segment in TEXT_SEGMENTS:
            embedded = size * whole.size(segment) * width
            add("word embeddings", "reduce-scatter", "tensor", embedded, micro_batches)
            add("word embeddings", "all-gather", "tensor", embedded, micro_batches)
    if stage == config.parallel.pipeline_model_parallel_size - 1:
        present = (whole.size(*TEXT_SEGMENTS), whole.size(*VISION_SEGMENTS))
        chunk = config.train.head_chunk_rows * config.parallel.tensor_model_parallel_size
        forward = micro_batches * (2 if chunk else 1)
        for slots, tokens in zip(head_slots(config, whole), present):
            slots = slots if tokens else 0
            full, rest = divmod(slots, chunk) if chunk else (1, 0)
            for part, count in ((chunk or slots, full), (rest, 1)):
                rows = size * part * width
                # Again in the backward pass, for the weight's gradient.
                times = count * (forward + micro_batches)
                add("predicted positions", "all-gather", "tensor", rows, times)
                add("predicted positions", "reduce-scatter", "tensor", rows, count * micro_batches)
                # Largest logit, the label's logit and the sum of exponentials.
                add("cross entropy", "all-reduce", "tensor", 4 * part, 3 * count * forward)
        if config.objectives.kind == "contrastive":
            rows, pool = 4 * whole.texts * width, 4 * whole.texts * data_size * width
            add("features", "all-gather", "tensor", rows, 2 * micro_batches)
            add("features", "all-gather", "data", pool, 2 * micro_batches)
            add("features", "reduce-scatter", "data", pool, 2 * micro_batches)


def _add_blocks(
    config: RunConfig,
    precision: Precision,
    stage: int,
    micro_batches: int,
    add: Add,
) -> None:
    """Counts what the blocks of a stage send, in the forward pass, its recomputation and the backward pass."""
    model, moe = config.model, config.moe
    whole, expert = StreamLayout.of(config), config.parallel.expert_model_parallel_size
    layout = whole.shard(config.parallel.tensor_model_parallel_size)
    row = BYTES[precision] * model.hidden_size
    forward = micro_batches * (2 if config.train.recompute == "full" else 1)
    plans = block_plans(model, moe)
    for number in stage_blocks(config, stage):
        plan = plans[number - 1]
        gathered = [whole.num_tokens, *(branch.num_tokens(whole) for branch in plan.dense)]
        for tokens in gathered:
            # Column-parallel layer, then row-parallel layer; both again, backwards, and the weight's gradient.
            times = forward + 2 * micro_batches
            add("activations of blocks", "all-gather", "tensor", row * tokens, times)
            times = forward + micro_batches
            add("activations of blocks", "reduce-scatter", "tensor", row * tokens, times)
        if plan.pools:
            rows = sum(expert_rows(config, pool, layout) for pool in plan.pools)
            times = 2 * (forward + micro_batches)
            static = moe.dispatcher == "fixed_capacity" and moe.capacity_factor > 0.0
            # Groups of experts that are sent by themselves; pools without tokens are left out.
            reached = [pool for pool in plan.pools if pool.num_tokens(layout)]
            experts = sum(pool.num_experts for pool in reached) // expert
            chunks = min(moe.all_to_all_chunks, experts) if static else 1
            add("rows of experts", "all-to-all", "expert", row * rows, times, chunks)
            if not static:
                # megatron-core's dispatcher tells how many rows there are, and sends their gates with them.
                counts = 8 * sum(pool.num_experts for pool in plan.pools) * expert
                add("numbers of rows", "all-gather", "expert", counts, forward)
                add("gates of rows", "all-to-all", "expert", 4 * rows, forward + micro_batches)
            statistics = sum(_statistics(config, pool) for pool in plan.pools)
            add("statistics of routers", "all-reduce", "tensor", 4 * statistics, forward)


def _statistics(config: RunConfig, pool: Branch) -> int:
    """Sums over tokens that a router shares with the other TP ranks in training."""
    groups = router_losses(config.moe, pool.name, pool.num_experts, training=True)
    sections = (statistics_sections(group.terms, pool.num_experts) for group in groups)
    return sum(sum(sizes.values()) for sizes in sections)


def _buffers(trained: Iterable[Parameter], precision: Precision) -> list[list[Parameter]]:
    """Parameters that share a gradient buffer: those of one number format."""
    buffers: dict[bool, list[Parameter]] = {}
    for parameter in trained:
        buffers.setdefault(parameter.fp32 and precision != "fp32", []).append(parameter)
    return list(buffers.values())


def _buckets(
    config: RunConfig, buffer: Sequence[Parameter], ranks: int, data_size: int, stage: int
) -> list[int]:
    """Values of each bucket of a gradient buffer, padding included (megatron-core's param_and_grad_buffer).

    Only the first stage, and of its virtual ones only the first, has more than one bucket.
    """
    parallel, blocks = config.parallel, stage_blocks(config, stage)
    tensor, expert = parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size
    virtual = parallel.virtual_pipeline_model_parallel_size
    per_chunk = len(blocks) // virtual
    chunks: dict[int, list[Parameter]] = {}
    for parameter in buffer:
        if parameter.block in blocks:
            chunk = blocks.index(parameter.block) // per_chunk
        else:
            chunk = virtual - 1 if parameter.block else 0
        chunks.setdefault(chunk, []).append(parameter)
    sizes = []
    for chunk, own in chunks.items():
        limit = math.inf
        if parallel.overlap_grad_reduce and stage == 0 and chunk == 0:
            limit = max(BUCKET_VALUES, 1_000_000 * data_size)
        align, end = 1, 1
        if parallel.use_distributed_optimizer:
            align, end = 64, math.lcm(ranks, 128)
        filled = 0
        # Gradients are ready in about the reverse order.
        for parameter in reversed(own):
            filled = -(-filled // align) * align + parameter.local_size(tensor, expert)
            if filled >= limit:
                sizes.append(-(-filled // end) * end)
                filled = 0
        if filled:
            sizes.append(-(-filled // end) * end)
    return sizes
