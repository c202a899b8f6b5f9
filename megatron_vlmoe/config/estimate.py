"""Parameters, FLOPs and memory of a run by arithmetic alone: no torch, no process group.

Letters: L blocks, D width, F inner width of an FFN, V vocabulary rows, E experts of a pool, k experts per
token, T token slots, b bytes of a number in the compute precision.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Callable, Iterable, Literal, Mapping

from megatron_vlmoe.config.block_plan import BlockPlan, Branch, block_plans
from megatron_vlmoe.config.schema import ConfigError, Precision, RunConfig
from megatron_vlmoe.config.stream import (
    PAIR_SEGMENTS,
    SEGMENTS,
    TEXT_SEGMENTS,
    VISION_SEGMENTS,
    StreamLayout,
)
from megatron_vlmoe.config.validate import data_parallel_size, num_micro_batches

ASSUMED_VOCAB_SIZE = 64_000
ASSUMED_VISUAL_VOCAB_SIZE = 8_192
VOCAB_MULTIPLE = 128
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}

Sharding = Literal["replicated", "tensor", "expert"]


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that live, shard and train together.

    Args:
        part: what they are, such as `attention` or `text experts`.
        block: block number from 1; 0 is the embedding, L + 1 the last LayerNorm and the heads.
        size: how many there are in the whole model.
        sharding: `tensor` splits them over TP ranks, `expert` over EP ranks.
        segments: stream segments whose tokens reach them.
        activated: how many of them one image-text pair applies.
        fp32: kept in fp32 whatever the compute precision (routers).
    """

    part: str
    block: int
    size: int
    sharding: Sharding
    segments: tuple[str, ...]
    activated: int
    fp32: bool = False

    def local_size(self, tensor_size: int, expert_size: int) -> int:
        """How many of them one rank holds."""
        shards = {"replicated": 1, "tensor": tensor_size, "expert": expert_size}[self.sharding]
        return self.size // shards


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of the whole model by part.

    Args:
        text_embedding: word embeddings, padding rows of the vocabulary included.
        image_embedding: patch projection.
        positions: T_pos, V_pos, [I_CLS], the mask embedding and token types.
        attention: shared self-attention (the key's bias, held at zero, is counted: it is stored).
        norms: LayerNorms and LayerScale.
        dense_ffn: dense FFNs by branch.
        experts: expert FFNs by pool.
        routers: all routers.
        text_head: MLM head with its padding rows.
        image_head: MIM head.
        per_token: what one image-text pair of tokens applies (the paper's "parameters per token", after
            LIMoE): embeddings, attention, norms, and of every block the FFNs that the two tokens of a pair
            read, k experts per token and the router where there is a pool; no heads. A pool that both
            tokens read counts at most 2 k experts.
    """

    text_embedding: int
    image_embedding: int
    positions: int
    attention: int
    norms: int
    dense_ffn: Mapping[str, int]
    experts: Mapping[str, int]
    routers: int
    text_head: int
    image_head: int
    per_token: int

    @property
    def without_heads(self) -> int:
        """Everything but the two pretraining heads."""
        embeddings = self.text_embedding + self.image_embedding + self.positions
        feed_forward = sum(self.dense_ffn.values()) + sum(self.experts.values()) + self.routers
        return embeddings + self.attention + self.norms + feed_forward

    @property
    def total(self) -> int:
        """Every parameter of the model."""
        return self.without_heads + self.text_head + self.image_head


@dataclass(frozen=True)
class StageParameters:
    """Parameters of one rank of a pipeline stage; every rank of the stage has as many.

    Args:
        stage: pipeline stage from 0.
        blocks: its block numbers, over all its virtual stages.
        replicated: the same on every TP rank.
        tensor: this rank's TP shards.
        experts: this rank's experts.
    """

    stage: int
    blocks: tuple[int, ...]
    replicated: int
    tensor: int
    experts: int

    @property
    def total(self) -> int:
        """Parameters of the rank."""
        return self.replicated + self.tensor + self.experts


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


def with_assumed_vocabularies(config: RunConfig) -> RunConfig:
    """The configuration with 64,000 tokens and 8,192 codes (the paper's) where a tokenizer would say."""
    model = config.model
    return replace(
        config,
        model=replace(
            model,
            vocab_size=model.vocab_size or ASSUMED_VOCAB_SIZE,
            visual_vocab_size=model.visual_vocab_size or ASSUMED_VISUAL_VOCAB_SIZE,
        ),
    )


def padded_rows(vocab_size: int) -> int:
    """Rows of word embeddings and heads: a multiple of 128 at every layout."""
    return math.ceil(vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def expert_capacity(
    num_tokens: int, num_experts: int, topk: int, capacity_factor: float, multiple_of: int = 1
) -> int:
    """Slots of one expert for one rank's tokens: ``max(1, min(T, ceil(T k cf / E)))``; cf <= 0 is T."""
    if capacity_factor <= 0.0:
        return num_tokens
    capacity = math.ceil(num_tokens * topk * capacity_factor / num_experts)
    return max(1, min(num_tokens, math.ceil(capacity / multiple_of) * multiple_of))


# ---- parameters ----


def parameter_counts(config: RunConfig) -> ParameterCounts:
    """Parameters of the whole model; unknown vocabularies count as the paper's."""
    groups = parameter_groups(config)
    sizes: Counter[str] = Counter()
    for group in groups:
        sizes[group.part] += group.size

    def by_name(kind: str) -> dict[str, int]:
        return {part.split()[0]: n for part, n in sizes.items() if part.endswith(f" {kind}")}

    return ParameterCounts(
        text_embedding=sizes["text embedding"],
        image_embedding=sizes["image embedding"],
        positions=sizes["positions"],
        attention=sizes["attention"],
        norms=sizes["norms"],
        dense_ffn=by_name("ffn"),
        experts=by_name("experts"),
        routers=sizes["routers"],
        text_head=sizes["text head"],
        image_head=sizes["image head"],
        per_token=sum(group.activated for group in groups),
    )


def parameters_per_rank(config: RunConfig, world_size: int) -> list[StageParameters]:
    """Parameters of a rank of every pipeline stage.

    Raises:
        ConfigError: if the layout does not fit the number of processes.
    """
    data_parallel_size(config, world_size)
    parallel = config.parallel
    tensor, expert = parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size
    groups = parameter_groups(config)
    stages = []
    for stage in range(parallel.pipeline_model_parallel_size):
        sizes: Counter[str] = Counter()
        for group in _of_stage(groups, config, stage):
            sizes[group.sharding] += group.local_size(tensor, expert)
        stages.append(
            StageParameters(
                stage,
                stage_blocks(config, stage),
                replicated=sizes["replicated"],
                tensor=sizes["tensor"],
                experts=sizes["expert"],
            )
        )
    return stages


def stage_blocks(config: RunConfig, stage: int) -> tuple[int, ...]:
    """Block numbers of a pipeline stage; virtual stages are dealt out in turn (megatron-core)."""
    layers, parallel = config.model.num_layers, config.parallel
    pipeline = parallel.pipeline_model_parallel_size
    chunk = layers // (pipeline * parallel.virtual_pipeline_model_parallel_size)
    return tuple(n for n in range(1, layers + 1) if (n - 1) // chunk % pipeline == stage)


def parameter_groups(config: RunConfig) -> list[ParameterGroup]:
    """Every parameter of the model, in groups."""
    config = with_assumed_vocabularies(config)
    groups = _embedding_groups(config)
    for plan in block_plans(config.model, config.moe):
        groups += _block_groups(config, plan)
    return groups + _head_groups(config)


def _of_stage(
    groups: Iterable[ParameterGroup], config: RunConfig, stage: int
) -> list[ParameterGroup]:
    blocks = set(stage_blocks(config, stage))
    if stage == 0:
        blocks.add(0)
    if stage == config.parallel.pipeline_model_parallel_size - 1:
        blocks.add(config.model.num_layers + 1)
    return [group for group in groups if group.block in blocks]


def _embedding_groups(config: RunConfig) -> list[ParameterGroup]:
    model = config.model
    width, types = model.hidden_size, int(model.token_type_embeddings)
    words = padded_rows(model.vocab_size) * width
    patches = (3 * model.patch_size**2 + 1) * width
    text_rows = max(model.text_length, model.pair_text_length) + types
    # [I_CLS] and the mask embedding besides V_pos.
    image_rows = model.image_length + 2 + types
    sizes: tuple[tuple[str, int, Sharding, tuple[str, ...]], ...] = (
        ("text embedding", words, "tensor", TEXT_SEGMENTS),
        ("positions", text_rows * width, "replicated", TEXT_SEGMENTS),
        ("image embedding", patches, "replicated", VISION_SEGMENTS),
        ("positions", image_rows * width, "replicated", VISION_SEGMENTS),
    )
    return [ParameterGroup(part, 0, n, how, where, n) for part, n, how, where in sizes]


def _block_groups(config: RunConfig, plan: BlockPlan) -> list[ParameterGroup]:
    model, block = config.model, plan.layer_number
    width, inner = model.hidden_size, model.ffn_hidden_size
    sharded = 4 * width**2 + 3 * width
    vectors = 2 * width * (2 if model.layer_scale_init > 0.0 else 1)
    groups = [
        ParameterGroup("attention", block, sharded, "tensor", SEGMENTS, sharded),
        ParameterGroup("attention", block, width, "replicated", SEGMENTS, width),
        ParameterGroup("norms", block, vectors, "replicated", SEGMENTS, vectors),
    ]
    # Weights of both matrices and the inner bias are sharded; the outer bias is added once.
    ffn, outer_bias = 2 * width * inner + inner, width
    for branch in plan.branches:
        name, where, experts = branch.name, branch.segments, branch.num_experts
        modalities = sum(segment in where for segment in PAIR_SEGMENTS)
        used = 1 if modalities else 0
        groups.append(
            ParameterGroup("norms", block, 2 * width, "replicated", where, 2 * width * used)
        )
        if not experts:
            for size, how in ((ffn, "tensor"), (outer_bias, "replicated")):
                groups.append(
                    ParameterGroup(f"{name} ffn", block, size, how, where, size * used)  # type: ignore[arg-type]
                )
            continue
        size, router = ffn + outer_bias, experts * width
        active = min(experts, config.moe.topk * modalities) * size
        groups += [
            ParameterGroup(f"{name} experts", block, experts * size, "expert", where, active),
            ParameterGroup("routers", block, router, "replicated", where, router * used, fp32=True),
        ]
    return groups


def _head_groups(config: RunConfig) -> list[ParameterGroup]:
    model, objectives = config.model, config.objectives
    width, block = model.hidden_size, model.num_layers + 1
    weights = {
        "texts": objectives.mlm_weight,
        "pair_texts": objectives.vlm_text_weight,
        "pair_images": objectives.vlm_image_weight,
        "images": objectives.mim_weight,
    }
    groups = [ParameterGroup("norms", block, 2 * width, "replicated", SEGMENTS, 2 * width)]
    for part, rows, where in (
        ("text head", padded_rows(model.vocab_size), TEXT_SEGMENTS),
        ("image head", padded_rows(model.visual_vocab_size), VISION_SEGMENTS),
    ):
        read = tuple(segment for segment in where if weights[segment])
        groups.append(ParameterGroup(part, block, rows * (width + 1), "tensor", read, 0))
    return groups


# ---- FLOPs ----


def flops_per_step(config: RunConfig) -> float:
    """Model FLOPs of one optimizer step over the global batch, as MFU counts them.

    Matrix multiplications only, 2 per multiply-add; the backward pass counts twice the forward pass; k
    experts per token slot; attention scores within each sample; heads on predicted slots; nothing for
    recomputation, unfilled expert slots, padding rows of the vocabulary or a frozen image tokenizer.
    Padding tokens of captions count as tokens.

    Raises:
        ConfigError: if the global batch is not made of whole micro-batches.
    """
    config = with_assumed_vocabularies(config)
    layout = StreamLayout.from_config(config.model, config.data)
    topk = config.moe.topk
    blocks = _block_flops(config, layout, lambda pool: topk * pool.num_tokens(layout))
    model = config.model
    ends = _end_flops(config, layout, model.vocab_size, model.visual_vocab_size)
    return 3.0 * num_micro_batches(config, 1) * (blocks + ends)


def hardware_flops_per_step(config: RunConfig) -> float:
    """FLOPs of one step that the devices carry out over the global batch.

    Like :func:`flops_per_step`, but with the experts' whole capacity, the padding rows of the vocabulary
    and, with `train.recompute=full`, a second forward pass of the blocks.

    Raises:
        ConfigError: if the batch does not fit micro-batches or TP ranks.
    """
    config = with_assumed_vocabularies(config)
    tensor = config.parallel.tensor_model_parallel_size
    layout = StreamLayout.from_config(config.model, config.data).shard(tensor)
    blocks = _block_flops(config, layout, lambda pool: expert_rows(config, pool, layout))
    model = config.model
    rows = padded_rows(model.vocab_size), padded_rows(model.visual_vocab_size)
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
    """Predicted token and patch slots of a micro-batch.

    Before the data is read the caption slots are those of captions as long as `model.pair_text_length`.
    """
    model, objectives = config.model, config.objectives
    # Paper section 3.1: shares of the tokens between [T_CLS] and [T_SEP], and 40 % of the patches.
    text = int(objectives.text_mask_fraction * (model.text_length - 2) + 0.5)
    longest = model.pair_text_length - 2
    caption = objectives.caption_mask_slots or math.ceil(objectives.caption_mask_fraction * longest)
    patches = objectives.num_masked_patches or model.num_patches * 2 // 5
    return (
        layout.texts * text + layout.pairs * caption,
        (layout.images + layout.pairs) * patches,
    )


def _block_flops(
    config: RunConfig, layout: StreamLayout, rows: Callable[[Branch], int]
) -> float:
    """Forward FLOPs of all blocks; `rows` are the rows that a pool's experts compute."""
    model = config.model
    width, inner = model.hidden_size, model.ffn_hidden_size
    attention = 8.0 * layout.num_tokens * width**2 + 4.0 * _score_entries(layout) * width
    total = model.num_layers * attention
    for plan in block_plans(model, config.moe):
        for branch in plan.branches:
            tokens = branch.num_tokens(layout)
            computed = rows(branch) if branch.num_experts else tokens
            total += 4.0 * computed * width * inner + 2.0 * tokens * width * branch.num_experts
    return total


def _score_entries(layout: StreamLayout) -> int:
    """Query-key combinations of a micro-batch: L squared of every sample, a pair being one sample."""
    pair = layout.pair_text_length + layout.image_length
    return (
        layout.texts * layout.text_length**2
        + layout.pairs * pair**2
        + layout.images * layout.image_length**2
    )


def _end_flops(
    config: RunConfig, layout: StreamLayout, text_rows: int, image_rows: int
) -> float:
    """Forward FLOPs of the patch projection and of the heads."""
    model = config.model
    patches = (layout.images + layout.pairs) * model.num_patches
    text, image = head_slots(config, layout)
    products = patches * 3 * model.patch_size**2 + text * text_rows + image * image_rows
    return 2.0 * products * model.hidden_size


# ---- memory ----


def memory_per_rank(
    config: RunConfig, world_size: int, precision: Precision
) -> list[MemoryEstimate]:
    """Bytes of a rank of every pipeline stage in training.

    Weights take b bytes, gradients 4, Adam's moments 8 and master weights 4 (none in fp32); the
    distributed optimizer shards the last two over data-parallel ranks, of experts over expert-data-parallel
    ranks (megatron-core's table: 6 + 12 / d bytes in half precision, 8 + 8 / d in fp32). For activations
    see :func:`block_activation_bytes`.

    Raises:
        ConfigError: if the layout does not fit the number of processes or the batch.
    """
    config = with_assumed_vocabularies(config)
    parallel = config.parallel
    data_size = data_parallel_size(config, world_size)
    micro_batches = num_micro_batches(config, data_size)
    tensor, expert = parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size
    layout = StreamLayout.from_config(config.model, config.data)
    expert_data_size = world_size // (parallel.pipeline_model_parallel_size * expert)
    groups = parameter_groups(config)
    estimates = []
    for stage in range(parallel.pipeline_model_parallel_size):
        weights = gradients = optimizer = 0
        for group in _of_stage(groups, config, stage):
            size = group.local_size(tensor, expert)
            weights += size * (4 if group.fp32 else BYTES[precision])
            if not _trains(group, config, layout):
                continue
            gradients += 4 * size
            replicas = expert_data_size if group.sharding == "expert" else data_size
            shards = replicas if parallel.use_distributed_optimizer else 1
            optimizer += math.ceil(size * _state_bytes(config, group, precision) / shards)
        activations = _stage_activation_bytes(config, stage, micro_batches, precision)
        estimates.append(MemoryEstimate(stage, weights, gradients, optimizer, activations))
    return estimates


def _trains(group: ParameterGroup, config: RunConfig, layout: StreamLayout) -> bool:
    frozen = group.part == "routers" or group.sharding == "expert"
    if frozen and not config.moe.train_experts:
        return False
    return layout.size(*group.segments) > 0


def _state_bytes(config: RunConfig, group: ParameterGroup, precision: Precision) -> int:
    if config.optim.optimizer == "adam":
        moments = 8
    else:
        moments = 4 if config.optim.sgd_momentum else 0
    return moments + (0 if precision == "fp32" or group.fp32 else 4)


def block_activation_bytes(
    config: RunConfig, plan: BlockPlan, layout: StreamLayout, precision: Precision
) -> int:
    """Bytes that one block keeps of one micro-batch for its backward pass on one TP rank.

    With T tokens of the rank's share (T_p of them in pairs), every dense block keeps ``b D (11 T + 3 T_p)``
    (input and output of both LayerNorms 4, query, key and value 3 and those of pairs once more,
    concatenated, attention output 2, LayerScale inputs 2) and ``2 b F T`` around the GELU. A pool keeps instead,
    for R expert rows, ``b R (2 D + 2 F)``, and of its router six ``[T, E]`` and, in half precision, the fp32
    input. Scores are kept only with `model.attention_backend=math`.

    Args:
        config: the run.
        plan: the block.
        layout: the rank's share of a micro-batch.
        precision: compute precision.
    """
    model = config.model
    width, inner, size = model.hidden_size, model.ffn_hidden_size, BYTES[precision]
    tokens, paired = layout.num_tokens, layout.size(*PAIR_SEGMENTS)
    vectors = 8 * tokens + 3 * paired
    if model.layer_scale_init > 0.0:
        vectors += 2 * tokens
    total = size * width * vectors
    if model.attention_backend == "math":
        total += size * model.num_attention_heads * _score_entries(layout)
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
    model, parallel = config.model, config.parallel
    layout = StreamLayout.from_config(model, config.data).shard(parallel.tensor_model_parallel_size)
    stream = BYTES[precision] * layout.num_tokens * model.hidden_size
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
        kept += BYTES[precision] * patches * 3 * model.patch_size**2
    total = math.ceil(kept * _micro_batches_in_flight(config, stage, micro_batches)) + peak
    if stage == parallel.pipeline_model_parallel_size - 1:
        total += stream + _logit_bytes(config, precision)
    return total


def _micro_batches_in_flight(config: RunConfig, stage: int, micro_batches: int) -> float:
    """Micro-batches whose activations a stage holds at once: 1F1B, or interleaved 1F1B in model chunks."""
    pipeline = config.parallel.pipeline_model_parallel_size
    virtual = config.parallel.virtual_pipeline_model_parallel_size
    if virtual == 1:
        return min(micro_batches, pipeline - stage)
    chunks = 2 * (pipeline - stage - 1) + (virtual - 1) * pipeline + 1
    return min(micro_batches * virtual, chunks) / virtual


def _logit_bytes(config: RunConfig, precision: Precision) -> int:
    """Logits of both heads: in the compute precision, in fp32 and the loss's own fp32 copy."""
    tensor = config.parallel.tensor_model_parallel_size
    layout = StreamLayout.from_config(config.model, config.data)
    text, image = head_slots(config, layout)
    model = config.model
    entries = text * padded_rows(model.vocab_size) + image * padded_rows(model.visual_vocab_size)
    return entries // tensor * (8 + BYTES[precision])


def nodes_crossed(group_size: int, world_size: int, stages: int, gpus_per_node: int) -> bool:
    """Whether any group of consecutive ranks of a pipeline stage has ranks on two nodes.

    Ranks are in megatron-core's order tp-cp-ep-dp-pp. Expert tensor parallel size is 1, so EP groups, like
    TP groups, are consecutive ranks of a stage: an EP group contains TP groups rather than skipping over
    them, or lies within one.

    Raises:
        ConfigError: if a node has no GPU.
    """
    if gpus_per_node < 1:
        raise ConfigError(f"{gpus_per_node} GPUs per node: must be at least 1")
    per_stage = world_size // stages
    for first_of_stage in range(0, world_size, per_stage):
        for first in range(first_of_stage, first_of_stage + per_stage, group_size):
            if first // gpus_per_node != (first + group_size - 1) // gpus_per_node:
                return True
    return False
