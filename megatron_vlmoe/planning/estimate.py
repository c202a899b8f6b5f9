"""What a step costs: floating-point operations, the expert rows that they run on, and bytes of one rank.

Letters: D width, F inner width of an FFN, E experts of a pool, T token slots, b bytes of a number
in the compute precision.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron_vlmoe.config.schema import Precision, RunConfig
from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.planning.parameters import (
    Parameter,
    estimated_parameters,
    parameters_of_stage,
    stage_blocks,
    with_assumed_vocabularies,
)
from megatron_vlmoe.stream.block_plan import BlockPlan, Branch, block_plans
from megatron_vlmoe.stream.layout import PAIR_SEGMENTS, SEGMENTS, TEXT_SEGMENTS, StreamLayout
from megatron_vlmoe.stream.sizes import (
    VOCAB_MULTIPLE,
    attention_packs,
    data_parallel_size,
    expert_capacity,
    experts_per_token,
    num_micro_batches,
    padded_vocab_size,
    router_noise_std,
    text_mask_slots,
)

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
NORMS, DISPATCH = "norms and residuals", "dispatch buffers"


def flops_per_step(config: RunConfig) -> float:
    """Model FLOPs of one optimizer step over the global batch, as MFU counts them.

    Matrix multiplications only, 2 per multiply-add; the backward pass counts twice the forward
    pass; k experts per token slot, or as many as take it where experts choose; attention scores
    within each sample; heads on predicted slots; nothing for recomputation, unfilled expert slots,
    padding rows of the vocabulary or a frozen image tokenizer. Padding tokens of captions count as tokens.

    Raises:
        ConfigError: if the global batch is not made of whole micro-batches.
    """
    config = with_assumed_vocabularies(config)
    layout = StreamLayout.of(config)
    model, moe = config.model, config.moe

    def rows(pool: Branch) -> float:
        return experts_per_token(moe, pool.num_experts) * pool.num_tokens(layout)

    blocks = sum(block_flops(config, plan, layout, rows) for plan in block_plans(model, moe))
    text, image = head_slots(config, layout)
    heads = 2.0 * model.hidden_size * (text * model.vocab_size + image * model.visual_vocab_size)
    ends = patch_flops(config, layout) + heads + contrastive_flops(config, layout)
    return 3.0 * num_micro_batches(config, 1) * (blocks + ends)


def hardware_flops_per_step(config: RunConfig) -> float:
    """FLOPs of one step that the devices carry out over the global batch.

    Like :func:`flops_per_step`, whose attention scores include padding and, in packed texts, other documents (that
    `model.attention_backend=varlen` leaves out), but with the experts' whole capacity, the padding rows of the
    vocabulary and, with `train.recompute=full` and `train.head_chunk_rows`, a second forward pass of the blocks and
    of the heads.

    Raises:
        ConfigError: if the batch does not fit micro-batches or TP ranks.
    """
    config = with_assumed_vocabularies(config)
    parallel = config.parallel
    stages = (stage_flops(config, stage) for stage in range(parallel.pipeline_model_parallel_size))
    micro_batches = num_micro_batches(config, 1) * parallel.tensor_model_parallel_size
    return micro_batches * sum(sum(flops) for flops in stages)


def stage_flops(config: RunConfig, stage: int) -> tuple[float, float]:
    """FLOPs that one TP rank of a pipeline stage carries out for a micro-batch: in its blocks, and in the patch
    projection and the heads.

    The vocabularies must be known.
    """
    parallel, model = config.parallel, config.model
    whole = StreamLayout.of(config)
    layout = whole.shard(parallel.tensor_model_parallel_size)
    plans = block_plans(model, config.moe)
    blocks = sum(
        block_flops(config, plans[n - 1], layout, lambda pool: expert_rows(config, pool, layout))
        for n in stage_blocks(config, stage)
    )
    ends = 3.0 * patch_flops(config, layout) if stage == 0 else 0.0
    if stage == parallel.pipeline_model_parallel_size - 1:
        heads = 2.0 * model.hidden_size * sum(logit_entries(config))
        ends += (4.0 if config.train.head_chunk_rows else 3.0) * heads
        ends += 3.0 * contrastive_flops(config, layout)
    return (4.0 if config.train.recompute == "full" else 3.0) * blocks, ends


def has_compiled_cross_entropy(config: RunConfig, precision: Precision) -> bool:
    """Whether cross entropy is one compiled function, of logits in the compute precision."""
    alone = config.parallel.tensor_model_parallel_size == 1
    return config.train.compile and alone and precision != "fp32"


def logit_entries(config: RunConfig) -> tuple[int, int]:
    """Logits of the text head and of the image head on one TP rank, padding rows of the vocabularies included."""
    model, tensor = config.model, config.parallel.tensor_model_parallel_size
    text, image = head_slots(config, StreamLayout.of(config))
    return (
        text * padded_vocab_size(model.vocab_size) // tensor,
        image * padded_vocab_size(model.visual_vocab_size) // tensor,
    )


def expert_rows(config: RunConfig, pool: Branch, layout: StreamLayout) -> int:
    """Rows that the experts of a pool compute in training for one rank's tokens (at most)."""
    moe, tokens = config.moe, pool.num_tokens(layout)
    if not tokens:
        return 0
    if moe.dispatcher == "dropless" or moe.capacity_factor <= 0.0:
        return moe.topk * tokens
    capacity = expert_capacity(
        tokens, pool.num_experts, moe.topk, moe.capacity_factor, moe.capacity_multiple_of
    )
    slots = pool.num_experts * capacity
    # Experts that choose fill all their slots.
    every_slot = moe.dispatcher == "fixed_capacity" or moe.routing == "expert_choice"
    return slots if every_slot else min(slots, moe.topk * tokens)


def head_slots(config: RunConfig, layout: StreamLayout) -> tuple[int, int]:
    """Predicted token and patch slots of a micro-batch; none of contrastive pretraining and of fine-tuning.

    Before the data is read, captions count as long as `model.pair_text_length` allows.
    """
    model, objectives = config.model, config.objectives
    if objectives.kind == "contrastive" or isinstance(config, FinetuneConfig):
        return 0, 0
    # Paper section 3.1: shares of the tokens between [T_CLS] and [T_SEP], and 40 % of the patches.
    longest = model.pair_text_length - 2
    caption = objectives.caption_mask_slots or math.ceil(objectives.caption_mask_fraction * longest)
    patches = objectives.num_masked_patches or model.num_patches * 2 // 5
    return (
        layout.texts * text_mask_slots(config) + layout.pairs * caption,
        (layout.images + layout.pairs) * patches,
    )


def block_flops(
    config: RunConfig, plan: BlockPlan, layout: StreamLayout, rows: Callable[[Branch], float]
) -> float:
    """Forward FLOPs of a block on a stream of this layout; `rows` are the rows that a pool's experts compute."""
    model = config.model
    width, inner = model.hidden_size, model.ffn_hidden_size
    total = 8.0 * layout.num_tokens * width**2 + 4.0 * score_entries(layout) * width
    for branch in plan.branches:
        tokens = branch.num_tokens(layout)
        computed = rows(branch) if branch.num_experts else tokens
        total += 4.0 * computed * width * inner + 2.0 * tokens * width * branch.num_experts
    return total


def score_entries(layout: StreamLayout) -> int:
    """Query-key combinations of a micro-batch: length squared, a pair being one sample."""
    pair = layout.pair_text_length + layout.image_length
    return (
        layout.texts * layout.text_length**2
        + layout.pairs * pair**2
        + layout.images * layout.image_length**2
    )


def patch_flops(config: RunConfig, layout: StreamLayout) -> float:
    """Forward FLOPs of the patch projection."""
    model = config.model
    patches = (layout.images + layout.pairs) * model.num_patches
    return 2.0 * patches * 3 * model.patch_size**2 * model.hidden_size


def contrastive_flops(config: RunConfig, layout: StreamLayout) -> float:
    """Forward FLOPs of the projections of contrastive pretraining; its similarities are left out."""
    if config.objectives.kind != "contrastive":
        return 0.0
    return 2.0 * (layout.texts + layout.images) * config.model.hidden_size**2


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank of a pipeline stage at its peak, without the CUDA context, NCCL and fragmentation.

    Args:
        stage: pipeline stage from 0.
        weights: parameters in the compute precision, routers in fp32.
        gradients: fp32 gradients of what trains.
        optimizer: fp32 moments, and fp32 master weights where the compute precision is half.
        kept: what the backward pass needs of all micro-batches in flight, by part; see `block_activation_parts`.
        temporary: what lives for a moment beside it; see `_temporary_bytes`.
    """

    stage: int
    weights: int
    gradients: int
    optimizer: int
    kept: Mapping[str, int]
    temporary: int

    @property
    def activations(self) -> int:
        """What the backward pass needs, all parts together."""
        return sum(self.kept.values())

    @property
    def total(self) -> int:
        """All of it."""
        state = self.weights + self.gradients + self.optimizer
        return state + self.activations + self.temporary


def memory_per_rank(
    config: RunConfig,
    world_size: int,
    precision: Precision,
    found: Sequence[Parameter] | None = None,
) -> list[MemoryEstimate]:
    """Bytes of a rank of every pipeline stage in training.

    Weights take b bytes, gradients 4, Adam's moments 8 and master weights 4 (none in fp32). The
    distributed optimizer shards the last two over d data-parallel ranks, for experts over the
    expert-data-parallel ones: 6 + 12 / d bytes in half precision and 8 + 8 / d in fp32, as in
    megatron-core's table.

    Args:
        found: `estimated_parameters` of the run, where they are known already.

    Raises:
        ConfigError: if the layout does not fit the number of processes or the batch.
    """
    config = with_assumed_vocabularies(config)
    parallel = config.parallel
    data_size = data_parallel_size(config.parallel, world_size)
    micro_batches = num_micro_batches(config, data_size)
    tensor, expert = parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size
    expert_data_size = world_size // (parallel.pipeline_model_parallel_size * expert)
    found = estimated_parameters(config) if found is None else found
    moments = 8
    if config.optim.optimizer == "sgd":
        moments = 4 if config.optim.sgd_momentum else 0
    estimates = []
    for stage in range(parallel.pipeline_model_parallel_size):
        weights = gradients = optimizer = 0
        held = parameters_of_stage(found, config, stage)
        for parameter in held:
            size = parameter.local_size(tensor, expert)
            weights += size * (4 if parameter.fp32 else BYTES[precision])
        for parameter in trained_parameters(config, held):
            size = parameter.local_size(tensor, expert)
            gradients += 4 * size
            replicas = expert_data_size if parameter.sharding == "expert" else data_size
            shards = replicas if parallel.use_distributed_optimizer else 1
            master = 0 if precision == "fp32" or parameter.fp32 else 4
            optimizer += math.ceil(size * (moments + master) / shards)
        kept = _kept_activations(config, stage, micro_batches, precision)
        temporary = _temporary_bytes(config, stage, precision)
        estimates.append(MemoryEstimate(stage, weights, gradients, optimizer, kept, temporary))
    return estimates


@dataclass(frozen=True)
class CheckpointBytes:
    """What a checkpoint that training can go on from takes.

    Args:
        stored: in its files, all ranks together, without what is not a tensor.
        gathered: optimizer state that a rank holds in host memory while it writes or reads it, beside all else: the
            most of any rank, 0 where every rank keeps to its own share (`dp_reshardable`, or no distributed optimizer).
    """

    stored: int
    gathered: int


def checkpoint_bytes(config: RunConfig, precision: Precision) -> CheckpointBytes:
    """Bytes of the last checkpoint of a run; see `CheckpointBytes`.

    Optimizer state is 12 bytes a trained parameter: an fp32 copy and Adam's moments. For `fully_reshardable`
    megatron-core puts together on every rank the state of all parameters that the rank holds, not of its share alone.
    """
    config = with_assumed_vocabularies(config)
    parallel, found = config.parallel, estimated_parameters(config)
    moments = 8
    if config.optim.optimizer == "sgd":
        moments = 4 if config.optim.sgd_momentum else 0
    distributed = parallel.use_distributed_optimizer
    state = moments + (4 if distributed or precision != "fp32" else 0)
    trained = trained_parameters(config, found)
    stored = sum(p.local_size(1, 1) * (4 if p.fp32 else BYTES[precision]) for p in found)
    stored += state * sum(p.local_size(1, 1) for p in trained)
    sizes = (parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size)
    held = [
        sum(p.local_size(*sizes) for p in parameters_of_stage(trained, config, stage))
        for stage in range(parallel.pipeline_model_parallel_size)
    ]
    gathers = distributed and config.checkpoint.optimizer_format != "dp_reshardable"
    return CheckpointBytes(stored, state * max(held) if gathers else 0)


def trained_parameters(config: RunConfig, found: Iterable[Parameter]) -> list[Parameter]:
    """Those parameters that a run trains: tokens reach them, and they are not frozen."""
    layout = StreamLayout.of(config)
    reached = {segment for segment in SEGMENTS if layout.size(segment)}
    masked = not isinstance(config, FinetuneConfig) and config.objectives.kind == "masked"

    def is_frozen(parameter: Parameter) -> bool:
        if parameter.part == "routers" or parameter.sharding == "expert":
            return not config.moe.train_experts
        # Nothing else reaches the mask embedding.
        return parameter.key.endswith(".mask_token") and not masked

    return [
        parameter
        for parameter in found
        if reached.intersection(parameter.segments) and not is_frozen(parameter)
    ]


def block_activation_parts(
    config: RunConfig, plan: BlockPlan, layout: StreamLayout, precision: Precision
) -> Counter[str]:
    """Bytes that one block keeps of one micro-batch for its backward pass on one TP rank, by part.

    The layout is the rank's share of a micro-batch, of T tokens, T_p of them in pairs.

    - `attention`: ``b D (5 T + 3 T_p)``: query, key and value (those of pairs once more, concatenated) and the output
      twice; fp32 scores only with `model.attention_backend=math`. With `varlen` and TransformerEngine's attention,
      ``5 b D T``: query, key and value in the order of the sequences alone, and the output in both orders; ``4 b D T``
      where there is one order.
    - `norms and residuals`: ``4 b T D``, inputs and outputs of two LayerNorms, and two inputs of LayerScale.
    - `ffn`: ``2 b T F``, input and output of the GELU.
    - `experts`: the same of R expert rows, ``2 b R F``.
    - `dispatch buffers`: ``2 b R D``, the rows that arrive at experts and those that come back.
    - `routers`: an fp32 copy of their input instead of the LayerNorm's output, and six fp32 ``[T, E]``.
    """
    model = config.model
    width, inner, size = model.hidden_size, model.ffn_hidden_size, BYTES[precision]
    tokens, paired = layout.num_tokens, layout.size(*PAIR_SEGMENTS)
    wide = 5 * tokens + 3 * paired
    by_transformer_engine = model.transformer_impl == "transformer_engine"
    if attention_packs(config, by_transformer_engine, precision == "fp32"):
        same_order = not paired and config.parallel.tensor_model_parallel_size == 1
        wide = (4 if same_order else 5) * tokens
    parts = Counter(attention=size * width * wide)
    if model.attention_backend == "math":
        parts["attention"] += 4 * model.num_attention_heads * score_entries(layout)
    scales = 2 if model.layer_scale_init > 0.0 else 0
    parts[NORMS] = size * width * tokens * (3 + scales)
    for branch in plan.branches:
        own = branch.num_tokens(layout)
        if not branch.num_experts:
            parts[NORMS] += size * width * own
            parts["ffn"] += size * own * 2 * inner
            continue
        rows = expert_rows(config, branch, layout)
        parts["experts"] += size * rows * 2 * inner
        parts[DISPATCH] += size * rows * 2 * width
        # The router computes in fp32, from a copy of its input where that is in half precision.
        parts["routers"] += 4 * own * (width + 6 * branch.num_experts)
    return parts


def _kept_activations(
    config: RunConfig, stage: int, micro_batches: int, precision: Precision
) -> Counter[str]:
    """What a stage keeps of all micro-batches that it holds at once; with recomputation the inputs of blocks alone."""
    model, size = config.model, BYTES[precision]
    pipeline = config.parallel.pipeline_model_parallel_size
    virtual = config.parallel.virtual_pipeline_model_parallel_size
    layout = StreamLayout.of(config).shard(config.parallel.tensor_model_parallel_size)
    stream = size * layout.num_tokens * model.hidden_size
    plans = block_plans(model, config.moe)
    numbers = stage_blocks(config, stage)
    parts: Counter[str] = Counter()
    for number in numbers:
        if config.train.recompute == "full":
            parts["inputs of blocks"] += stream
        else:
            parts += block_activation_parts(config, plans[number - 1], layout, precision)
    if stage == 0:
        patches = (layout.images + layout.pairs) * model.num_patches
        parts["patches"] = size * patches * 3 * model.patch_size**2
    if config.train.recompute == "full":
        # The backward pass needs it again; otherwise it is only there while the blocks go forward.
        parts["router noise"] = drawn_noise_bytes(config, stage)
    # Outputs for the next stage are held until their gradients come back.
    sent = virtual - int(stage == pipeline - 1)
    if pipeline > 1 and sent:
        parts["pipeline outputs"] = stream * sent
    # Micro-batches whose activations a stage holds at once under 1F1B, interleaved or not.
    in_flight: float = min(micro_batches, pipeline - stage)
    if virtual > 1:
        chunks = 2 * (pipeline - stage - 1) + (virtual - 1) * pipeline + 1
        in_flight = min(micro_batches * virtual, chunks) / virtual
    held = Counter({part: math.ceil(number * in_flight) for part, number in parts.items()})
    if config.train.cuda_graph:
        # A graph reads every micro-batch of the step from tensors of its own; pixels and tokens are counted.
        pixels = (layout.images + layout.pairs) * 3 * model.image_size**2
        tokens = 8 * StreamLayout.of(config).size(*TEXT_SEGMENTS)
        held["batches"] = micro_batches * (pixels + tokens)
    return held


def drawn_noise_bytes(config: RunConfig, stage: int) -> int:
    """Bytes of the router noise of a micro-batch on one rank, which `train.counter_draws` draws for all blocks of a
    stage at once: fp32 ``[T, E]`` for every pool."""
    moe = config.moe
    if not config.train.counter_draws or not moe.train_experts:
        return 0
    layout = StreamLayout.of(config).shard(config.parallel.tensor_model_parallel_size)
    plans = block_plans(config.model, moe)
    return sum(
        4 * pool.num_tokens(layout) * pool.num_experts
        for number in stage_blocks(config, stage)
        for pool in plans[number - 1].pools
        if router_noise_std(moe, pool.num_experts) > 0.0
    )


def _temporary_bytes(config: RunConfig, stage: int, precision: Precision) -> int:
    """What lives for a moment beside the kept activations: the larger of what the heads and what one block need.

    - Heads: input and output of the last LayerNorm, fp32 logits of both heads (cross entropy is computed in place), and
      beside those of one head a copy, masked where the vocabulary is padded, else in the compute precision. With
      `train.head_chunk_rows` those of one chunk, and the gradient of the head's weight twice: the sum so far, and the
      chunk's. Compiled cross entropy keeps logits in the compute precision, and has beside them the gradient of one
      head's. With `train.counter_draws` also the router noise of the blocks, if these are not computed again.
    - The backward pass of a block: gradients of the stream and of the branch (2 T D), of the GELU's input in one branch
      (F per row, while the gradient of its output takes the place of that output), and of the branch's larger weights.
      With recomputation also all that the block keeps.

    With TP, megatron-core also keeps one buffer for gathered tokens.
    """
    model, parallel, size = config.model, config.parallel, BYTES[precision]
    width, inner = model.hidden_size, model.ffn_hidden_size
    tensor, expert = parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size
    layout = StreamLayout.of(config).shard(tensor)
    stream = size * layout.num_tokens * width
    plans = block_plans(model, config.moe)
    needs = []
    for number in stage_blocks(config, stage):
        plan = plans[number - 1]
        gradients = 0
        for branch in plan.branches:
            rows, weight = branch.num_tokens(layout), width * inner // tensor
            if branch.num_experts:
                rows = expert_rows(config, branch, layout)
                weight = branch.num_experts // expert * width * inner
            gradients = max(gradients, rows * inner + weight)
        need = 2 * stream + size * gradients
        if config.train.recompute == "full":
            # Its input is among what is kept.
            parts = block_activation_parts(config, plan, layout, precision)
            need += sum(parts.values()) - stream
        needs.append(need)
    if stage == parallel.pipeline_model_parallel_size - 1:
        chunk = config.train.head_chunk_rows
        kept = logits = 0
        for number, vocabulary in zip(
            logit_entries(config), (model.vocab_size, model.visual_vocab_size)
        ):
            weight = 0
            if chunk:
                number = min(number, chunk * padded_vocab_size(vocabulary))
                weight = 2 * size * padded_vocab_size(vocabulary) // tensor * width
            held, beside = 4, 4 if vocabulary % VOCAB_MULTIPLE else size % 4
            if has_compiled_cross_entropy(config, precision):
                held = beside = size
            logits = max(logits, kept + (held + beside) * number + weight)
            kept += 0 if chunk else held * number
        noise = 0 if config.train.recompute == "full" else drawn_noise_bytes(config, stage)
        needs.append(2 * stream + logits + noise)
    gathered = stream * tensor if tensor > 1 else 0
    return max(needs) + gathered
