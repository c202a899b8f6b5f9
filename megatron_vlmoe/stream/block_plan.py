"""Which feed-forward branches a block has, which tokens each reads, and which of them are experts.

Paper section 3.2: the first L - F blocks split every token by modality; the last F blocks give the tokens
of pairs to a VL-FFN and keep V-FFN and T-FFN for image-only and text-only samples. Experts replace the
V-FFN and T-FFN of the listed blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.config.schema import ModelConfig, MoEConfig
from megatron_vlmoe.stream.layout import (
    PAIR_SEGMENTS,
    SEGMENTS,
    TEXT_SEGMENTS,
    VISION_SEGMENTS,
    SegmentName,
    StreamLayout,
)


@dataclass(frozen=True)
class Branch:
    """One feed-forward branch of a block.

    Args:
        name: `text`, `vision`, `vl` or `shared`.
        segments: stream segments that it reads, in stream order.
        num_experts: 0 for a dense FFN.
    """

    name: str
    segments: tuple[SegmentName, ...]
    num_experts: int = 0

    def slices(self, layout: StreamLayout) -> tuple[slice, ...]:
        """Consecutive stream slices that the branch reads (one but for a shared pool in a VL block)."""
        runs: list[list[str]] = []
        for segment in self.segments:
            follows = runs and SEGMENTS.index(segment) == SEGMENTS.index(runs[-1][-1]) + 1
            if follows:
                runs[-1].append(segment)
            else:
                runs.append([segment])
        return tuple(layout.slice(*run) for run in runs)

    def num_tokens(self, layout: StreamLayout) -> int:
        """Tokens that the branch reads, padding included."""
        return layout.size(*self.segments)


@dataclass(frozen=True)
class BlockPlan:
    """The branches of one block, in stream order of their first segment.

    Args:
        layer_number: block number counted from 1.
        branches: every stream segment belongs to exactly one of them.
    """

    layer_number: int
    branches: tuple[Branch, ...]

    @property
    def pools(self) -> tuple[Branch, ...]:
        """The branches that are experts."""
        return tuple(branch for branch in self.branches if branch.num_experts)

    @property
    def dense(self) -> tuple[Branch, ...]:
        """The branches that are one FFN."""
        return tuple(branch for branch in self.branches if not branch.num_experts)


_MOST_BLOCKS = 10_000
"""A configuration that others wrote may say any number, and every block is looked at."""


def moe_layer_numbers(model: ModelConfig, moe: MoEConfig) -> tuple[int, ...]:
    """Numbers (from 1) of the blocks with experts.

    Raises:
        ConfigError: if a listed number is not a block, or is listed twice, or the model has more blocks than any.
    """
    if model.num_layers > _MOST_BLOCKS:
        raise ConfigError(f"model.num_layers={model.num_layers} is more than {_MOST_BLOCKS}")
    if not has_experts(moe):
        return ()
    if moe.layers:
        if len(set(moe.layers)) != len(moe.layers):
            raise ConfigError(f"moe.layers={list(moe.layers)} lists a block twice")
        for number in moe.layers:
            if not 1 <= number <= model.num_layers:
                raise ConfigError(
                    f"moe.layers has block {number}, but the model's blocks are 1..{model.num_layers}"
                )
        return tuple(sorted(moe.layers))
    last = model.num_layers if moe.vl else model.num_layers - model.num_vl_layers
    return tuple(range(2, last + 1, 2))


def has_experts(moe: MoEConfig) -> bool:
    """Whether the configuration asks for any pool of experts."""
    if moe.modalities == "none":
        return False
    vision = moe.modalities in ("both", "vision") and moe.num_vision_experts > 0
    text = moe.modalities in ("both", "text") and moe.num_text_experts > 0
    return vision or text or (moe.vl and moe.num_vl_experts > 0)


def block_plan(model: ModelConfig, moe: MoEConfig, layer_number: int) -> BlockPlan:
    """The plan of block `layer_number` (from 1)."""
    sparse = layer_number in moe_layer_numbers(model, moe)
    vision = moe.num_vision_experts if sparse and moe.modalities in ("both", "vision") else 0
    text = moe.num_text_experts if sparse and moe.modalities in ("both", "text") else 0
    in_vl_layers = layer_number > model.num_layers - model.num_vl_layers
    if not in_vl_layers:
        if sparse and moe.shared_router:
            branches: tuple[Branch, ...] = (Branch("shared", SEGMENTS, moe.num_vision_experts),)
        else:
            branches = (
                Branch("text", TEXT_SEGMENTS, text),
                Branch("vision", VISION_SEGMENTS, vision),
            )
        return BlockPlan(layer_number, branches)
    vl = Branch("vl", PAIR_SEGMENTS, moe.num_vl_experts if sparse and moe.vl else 0)
    if sparse and moe.shared_router:
        branches = (Branch("shared", ("texts", "images"), moe.num_vision_experts), vl)
    else:
        branches = (Branch("text", ("texts",), text), vl, Branch("vision", ("images",), vision))
    return BlockPlan(layer_number, branches)


def block_plans(model: ModelConfig, moe: MoEConfig) -> tuple[BlockPlan, ...]:
    """The plans of all blocks, first to last."""
    return tuple(block_plan(model, moe, number) for number in range(1, model.num_layers + 1))
