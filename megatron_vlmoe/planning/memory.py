"""Bytes that one rank needs for training.

Letters: D width, F inner width of an FFN, E experts of a pool, T token slots, b bytes of a number
in the compute precision.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_vlmoe.config.schema import Precision, RunConfig
from megatron_vlmoe.planning.flops import expert_rows, head_slots, score_entries
from megatron_vlmoe.planning.parameters import (
    estimated_parameters,
    parameters_of_stage,
    stage_blocks,
    with_assumed_vocabularies,
)
from megatron_vlmoe.stream.block_plan import BlockPlan, block_plans
from megatron_vlmoe.stream.layout import PAIR_SEGMENTS, StreamLayout
from megatron_vlmoe.stream.sizes import data_parallel_size, num_micro_batches, padded_vocab_size

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


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
    layout = StreamLayout.from_config(config.model, config.data)
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
    `model.attention_backend=math`.

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
    """Micro-batches whose activations a stage holds at once under 1F1B, interleaved or not."""
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
    entries = text * padded_vocab_size(model.vocab_size) + image * padded_vocab_size(
        model.visual_vocab_size
    )
    return entries // tensor * (8 + BYTES[precision])
