"""Floating-point operations of one optimizer step, and the expert rows that they run on."""

from __future__ import annotations

import math
from collections.abc import Callable

from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.planning.parameters import with_assumed_vocabularies
from megatron_vlmoe.stream.block_plan import Branch, block_plans
from megatron_vlmoe.stream.layout import StreamLayout
from megatron_vlmoe.stream.sizes import (
    expert_capacity,
    num_micro_batches,
    padded_vocab_size,
    text_mask_slots,
)


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
    layout = StreamLayout.from_config(config.model, config.data)
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
    layout = StreamLayout.from_config(config.model, config.data).shard(tensor)
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
    """Predicted token and patch slots of a micro-batch.

    Before the data is read, captions count as long as `model.pair_text_length` allows.
    """
    model, objectives = config.model, config.objectives
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
    """Forward FLOPs of the patch projection and of the heads."""
    model = config.model
    patches = (layout.images + layout.pairs) * model.num_patches
    text, image = head_slots(config, layout)
    products = patches * 3 * model.patch_size**2 + text * text_rows + image * image_rows
    return 2.0 * products * model.hidden_size
