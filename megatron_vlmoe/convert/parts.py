"""Which part of the model a tensor belongs to; the parts are those of planning/parameters.py."""

from __future__ import annotations

import re
from collections import Counter

from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.planning.dry_run import block_ranges
from megatron_vlmoe.planning.parameters import parameter_groups
from megatron_vlmoe.stream.block_plan import block_plans, moe_layer_numbers
from megatron_vlmoe.stream.layout import TEXT_SEGMENTS

OTHER = "unknown"
TASK_HEADS = "task heads"
# The first that matches decides.
_PARTS = (
    (re.compile(r"embedding\.text\.word\."), "text embedding"),
    (re.compile(r"embedding\.image\.(weight|bias)$"), "image embedding"),
    (re.compile(r"embedding\.(text|image)\."), "positions"),
    (re.compile(r"heads\.text\."), "text head"),
    (re.compile(r"heads\.image\."), "image head"),
    (re.compile(r"heads\."), TASK_HEADS),
    (re.compile(r"decoder\.layers\.\d+\.self_attention\."), "attention"),
    (re.compile(r"decoder\.layers\.\d+\.mlp\.([a-z]+)_ffn\."), r"\1 ffn"),
    (re.compile(r"decoder\.layers\.\d+\.mlp\.moe\.experts\.([a-z]+)\."), r"\1 experts"),
    (re.compile(r"decoder\.layers\.\d+\.mlp\.moe\.router\."), "routers"),
    (re.compile(r"decoder\..*(norm\.|gamma_)"), "norms"),
)
_ORDER = (
    *("text embedding", "image embedding", "positions", "attention", "norms"),
    *(f"{branch} ffn" for branch in ("text", "vision", "vl")),
    *(f"{branch} experts" for branch in ("text", "vision", "vl", "shared")),
    *("routers", "text head", "image head", TASK_HEADS, OTHER),
)


def part_of(key: str) -> str:
    """The part of a checkpoint key, such as `attention` or `text experts`; `unknown` for a name of no part."""
    for pattern, part in _PARTS:
        if match := pattern.match(key):
            return match.expand(part)
    return OTHER


def part_order(part: str) -> int:
    """Place of a part in a listing, in the order of the model."""
    return _ORDER.index(part) if part in _ORDER else len(_ORDER)


def activated_by_part(config: RunConfig) -> dict[str, int]:
    """How many parameters of every part one image-text pair applies (see `ParameterCounts.per_token`).

    A model without a text vocabulary has no text embedding and no text positions; the estimate, which runs before
    the tokenizer is known, counts the paper's.
    """
    sizes: Counter[str] = Counter()
    for group in parameter_groups(config):
        absent = (
            group.block == 0 and group.segments == TEXT_SEGMENTS and not config.model.vocab_size
        )
        if not absent:
            sizes[group.part] += group.activated
    return dict(sizes)


def architecture_lines(config: RunConfig) -> list[str]:
    """The model of a configuration in a few lines."""
    model, moe = config.model, config.moe
    vl = block_ranges(range(model.num_layers - model.num_vl_layers + 1, model.num_layers + 1))
    lines = [
        f"{model.num_layers} blocks, hidden size {model.hidden_size}, {model.num_attention_heads} heads, "
        f"FFN {model.ffn_hidden_size}, VL-FFN in blocks {vl}",
        f"tokens: text {model.text_length}, caption {model.pair_text_length}, image {model.image_length} "
        f"({model.image_size} px, patches of {model.patch_size} px)",
        f"vocabulary {model.vocab_size or 'none'}, visual vocabulary {model.visual_vocab_size or 'none'}",
    ]
    numbers = moe_layer_numbers(model, moe)
    if not numbers:
        lines.append("no experts")
    else:
        pools = {p.name: p.num_experts for plan in block_plans(model, moe) for p in plan.pools}
        counts = ", ".join(f"{count} {name}" for name, count in pools.items())
        lines.append(f"experts: {counts} in blocks {block_ranges(numbers)}; top {moe.topk}")
    if isinstance(config, FinetuneConfig):
        classes = f", {config.task.num_classes} classes" if config.task.num_classes else ""
        lines.append(f"task: {config.task.name}{classes}")
    return lines
