"""What a step costs: floating-point operations, the expert rows that they run on, and bytes of one rank.

Letters: D width, F inner width of an FFN, E experts of a pool, T token slots, b bytes of a number
in the compute precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from megatron_vlmoe.config.schema import Precision, RunConfig
from megatron_vlmoe.planning.parameters import (
    estimated_parameters,
    parameters_of_stage,
    stage_blocks,
    with_assumed_vocabularies,
)
from megatron_vlmoe.stream.block_plan import BlockPlan, Branch, block_plans
from megatron_vlmoe.stream.layout import PAIR_SEGMENTS, StreamLayout
from megatron_vlmoe.stream.sizes import (
    data_parallel_size,
    expert_capacity,
    num_micro_batches,
    padded_vocab_size,
    text_mask_slots,
)

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def flops_per_step(config: RunConfig) -> float:
    """Model FLOPs of one optimizer step over the global batch, as MFU counts them.

    Matrix multiplications only, 2 per multiply-add; the backward pass counts twice the forward
    pass; k experts per token slot; attention scores within each sample; heads on predicted slots;
    nothing for recomputation, unfilled expert slots, padding rows of the vocabulary or a frozen
    image tokenizer. Padding tokens of captions count as tokens.

    Raises:
        ConfigError: if the global batch is not made of whole micro-batches.
    """
    config = with_assumed_vocabularies(config)
    layout = StreamLayout.of(config)
    topk = config.moe.topk
    blocks = _block_flops(config, layout, lambda pool: topk * pool.num_tokens(layout))
    model = config.model
    ends = _end_flops(config, layout, model.vocab_size, model.visual_vocab_size)
    return 3.0 * num_micro_batches(config, 1) * (blocks + ends)


def hardware_flops_per_step(config: RunConfig) -> float:
    """FLOPs of one step that the devices carry out over the global batch.

    Like :func:`flops_per_step`, but with the experts' whole capacity, the padding rows of the
    vocabulary and, with `train.recompute=full`, a second forward pass of the blocks.

    Raises:
        ConfigError: if the batch does not fit micro-batches or TP ranks.
    """
    config = with_assumed_vocabularies(config)
    tensor = config.parallel.tensor_model_parallel_size
    layout = StreamLayout.of(config).shard(tensor)
    blocks = _block_flops(config, layout, lambda pool: expert_rows(config, pool, layout))
    model = config.model
    rows = padded_vocab_size(model.vocab_size), padded_vocab_size(model.visual_vocab_size)
    ends = _end_flops(config, layout, *rows)
    passes = 4.0 if config.train.recompute == "full" else 3.0
    return num_micro_batches(config, 1) * tensor * (passes * blocks + 3.0 * ends)


def expert_rows(config: RunConfig, pool: Branch, layout: StreamLayout) -> int:
    """Rows that the experts of a pool compute in training for one rank's tokens (at most)."""
    moe, tokens = config.moe, pool.num_tokens(layout)
    if moe.dispatcher == "dropless" or moe.capacity_factor <= 0.0:
        return moe.topk * tokens
    capacity = expert_capacity(
        tokens, pool.num_experts, moe.topk, moe.capacity_factor, moe.capacity_multiple_of
    )
    slots = pool.num_experts * capacity
    return slots if moe.dispatcher == "fixed_capacity" else min(slots, moe.topk * tokens)


def head_slots(config: RunConfig, layout: StreamLayout) -> tuple[int, int]:
    """Predicted token and patch slots of a micro-batch; none of contrastive pretraining.

    Before the data is read, captions count as long as `model.pair_text_length` allows.
    """
    model, objectives = config.model, config.objectives
    if objectives.kind == "contrastive":
        return 0, 0
    # Paper section 3.1: shares of the tokens between [T_CLS] and [T_SEP], and 40 % of the patches.
    longest = model.pair_text_length - 2
    caption = objectives.caption_mask_slots or math.ceil(objectives.caption_mask_fraction * longest)
    patches = objectives.num_masked_patches or model.num_patches * 2 // 5
    return (
        layout.texts * text_mask_slots(config) + layout.pairs * caption,
        (layout.images + layout.pairs) * patches,
    )


def _block_flops(config: RunConfig, layout: StreamLayout, rows: Callable[[Branch], int]) -> float:
    """Forward FLOPs of all blocks; `rows` are the rows that a pool's experts compute."""
    model = config.model
    width, inner = model.hidden_size, model.ffn_hidden_size
    attention = 8.0 * layout.num_tokens * width**2 + 4.0 * score_entries(layout) * width
    total = model.num_layers * attention
    for plan in block_plans(model, config.moe):
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


def _end_flops(config: RunConfig, layout: StreamLayout, text_rows: int, image_rows: int) -> float:
    """Forward FLOPs of the patch projection and of the heads; similarities of contrastive pretraining are left out."""
    model = config.model
    patches = (layout.images + layout.pairs) * model.num_patches
    text, image = head_slots(config, layout)
    products = patches * 3 * model.patch_size**2 + text * text_rows + image * image_rows
    if config.objectives.kind == "contrastive":
        products += (layout.texts + layout.images) * model.hidden_size
    return 2.0 * products * model.hidden_size


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank of a pipeline stage, without the CUDA context, NCCL and fragmentation.

    Args:
        stage: pipeline stage from 0.
        weights: parameters in the compute precision, routers in fp32.
        gradients: fp32 gradients of what trains.
        optimizer: fp32 moments, and fp32 master weights where the compute precision is half.
        activations: what the backward pass keeps, for all micro-batches in flight, and the logits.
    """

    stage: int
    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations


def memory_per_rank(
    config: RunConfig, world_size: int, precision: Precision
) -> list[MemoryEstimate]:
    """Bytes of a rank of every pipeline stage in training.

    Weights take b bytes, gradients 4, Adam's moments 8 and master weights 4 (none in fp32). The
    distributed optimizer shards the last two over d data-parallel ranks, for experts over the
    expert-data-parallel ones: 6 + 12 / d bytes in half precision and 8 + 8 / d in fp32, as in
    megatron-core's table. For activations see :func:`block_activation_bytes`.

    Raises:
        ConfigError: if the layout does not fit the number of processes or the batch.
    """
    config = with_assumed_vocabularies(config)
    parallel = config.parallel
    data_size = data_parallel_size(config.parallel, world_size)
    micro_batches = num_micro_batches(config, data_size)
    tensor, expert = parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size
    layout = StreamLayout.of(config)
    expert_data_size = world_size // (parallel.pipeline_model_parallel_size * expert)
    parameters = estimated_parameters(config)
    moments = 8
    if config.optim.optimizer == "sgd":
        moments = 4 if config.optim.sgd_momentum else 0
    estimates = []
    for stage in range(parallel.pipeline_model_parallel_size):
        weights = gradients = optimizer = 0
        for parameter in parameters_of_stage(parameters, config, stage):
            size = parameter.local_size(tensor, expert)
            weights += size * (4 if parameter.fp32 else BYTES[precision])
            frozen = parameter.part == "routers" or parameter.sharding == "expert"
            if (frozen and not config.moe.train_experts) or not layout.size(*parameter.segments):
                continue
            gradients += 4 * size
            replicas = expert_data_size if parameter.sharding == "expert" else data_size
            shards = replicas if parallel.use_distributed_optimizer else 1
            master = 0 if precision == "fp32" or parameter.fp32 else 4
            optimizer += math.ceil(size * (moments + master) / shards)
        activations = _stage_activation_bytes(config, stage, micro_batches, precision)
        estimates.append(MemoryEstimate(stage, weights, gradients, optimizer, activations))
    return estimates


def block_activation_bytes(
    config: RunConfig, plan: BlockPlan, layout: StreamLayout, precision: Precision
) -> int:
    """Bytes that one block keeps of one micro-batch for its backward pass on one TP rank.

    With T tokens of the rank's share (T_p of them in pairs) a dense block keeps
    ``b D (11 T + 3 T_p) + 2 b F T``: input and output of both LayerNorms (4 T D), query, key and
    value (3 T D; those of pairs once more, concatenated), the attention's output twice (2 T D), the
    inputs of LayerScale (2 T D), and input and output of the GELU. A pool with R expert rows keeps
    ``b R (2 D + 2 F)`` instead of ``b T 2 F``, an fp32 input of its router instead of the
    LayerNorm's output, and six fp32 ``[T, E]``. Scores are kept (in fp32) only with
    `model.attention_backend=math`. The layout is the rank's share of a micro-batch.
    """
    model = config.model
    width, inner, size = model.hidden_size, model.ffn_hidden_size, BYTES[precision]
    tokens, paired = layout.num_tokens, layout.size(*PAIR_SEGMENTS)
    vectors = 8 * tokens + 3 * paired
    if model.layer_scale_init > 0.0:
        vectors += 2 * tokens
    total = size * width * vectors
    if model.attention_backend == "math":
        total += 4 * model.num_attention_heads * score_entries(layout)
    for branch in plan.branches:
        own = branch.num_tokens(layout)
        if not branch.num_experts:
            total += size * own * (width + 2 * inner)
            continue
        rows = expert_rows(config, branch, layout)
        total += size * rows * (2 * width + 2 * inner)
        # The router computes in fp32, from a copy of its input where that is in half precision.
        total += 4 * own * (width + 6 * branch.num_experts)
    return total


def _stage_activation_bytes(
    config: RunConfig, stage: int, micro_batches: int, precision: Precision
) -> int:
    model, size = config.model, BYTES[precision]
    tensor = config.parallel.tensor_model_parallel_size
    pipeline = config.parallel.pipeline_model_parallel_size
    virtual = config.parallel.virtual_pipeline_model_parallel_size
    whole = StreamLayout.of(config)
    layout = whole.shard(tensor)
    stream = size * layout.num_tokens * model.hidden_size
    plans = block_plans(model, config.moe)
    blocks = [
        block_activation_bytes(config, plans[number - 1], layout, precision)
        for number in stage_blocks(config, stage)
    ]
    kept, peak = sum(blocks), 0
    if config.train.recompute == "full":
        # Only the inputs of blocks are kept; one block at a time lives in full.
        kept, peak = len(blocks) * stream, max(blocks)
    if stage == 0:
        patches = (layout.images + layout.pairs) * model.num_patches
        kept += size * patches * 3 * model.patch_size**2
    # Micro-batches whose activations a stage holds at once under 1F1B, interleaved or not.
    in_flight: float = min(micro_batches, pipeline - stage)
    if virtual > 1:
        chunks = 2 * (pipeline - stage - 1) + (virtual - 1) * pipeline + 1
        in_flight = min(micro_batches * virtual, chunks) / virtual
    total = math.ceil(kept * in_flight) + peak
    if stage == pipeline - 1:
        # Logits of both heads: in the compute precision, in fp32 and the loss's own fp32 copy.
        text, image = head_slots(config, whole)
        entries = text * padded_vocab_size(model.vocab_size)
        entries += image * padded_vocab_size(model.visual_vocab_size)
        total += stream + entries // tensor * (8 + size)
    return total
