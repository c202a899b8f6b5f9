"""Freezes what a run's token stream never reaches.

An unused parameter would break overlapped gradient reduction (megatron-core waits for its gradient) and be
eroded by weight decay. One function of (model, layout, objectives) decides, before the model is wrapped.
"""

from __future__ import annotations

from typing import Sequence

from torch import nn

from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.model.block import MoMEBlock, MoMELayer
from megatron_vlmoe.model.feed_forward import MoMEFeedForward
from megatron_vlmoe.model.vlmoe import VLMoEModel
from megatron_vlmoe.stream.block_plan import block_plan
from megatron_vlmoe.stream.layout import StreamLayout


def freeze_unreachable(
    chunks: Sequence[VLMoEModel], config: RunConfig, masked: bool = True
) -> list[str]:
    """Sets `requires_grad=False` on every module that no token of the run's layout reaches.

    Also freezes routers and experts when `moe.train_experts` is false.

    Args:
        chunks: stages of this rank.
        config: the run.
        masked: whether patches are masked; without that nothing reaches the mask embedding.

    Returns:
        Names of the frozen modules, for the log.
    """
    layout = StreamLayout.from_config(config.model, config.data)
    frozen: list[str] = []
    for chunk in chunks:
        if chunk.pre_process:
            frozen += _freeze_embeddings(chunk, layout, masked)
        frozen += _freeze_branches(chunk.decoder, config, layout)
        if chunk.post_process:
            for name, module in chunk.heads.unreached(layout).items():
                frozen += _freeze(module, name)
    return frozen


def _freeze(module: nn.Module, name: str) -> list[str]:
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return [name]


def _freeze_embeddings(chunk: VLMoEModel, layout: StreamLayout, masked: bool) -> list[str]:
    frozen = []
    if chunk.embedding.text is not None and not layout.texts and not layout.pairs:
        frozen += _freeze(chunk.embedding.text, "embedding.text")
    if not layout.images and not layout.pairs:
        frozen += _freeze(chunk.embedding.image, "embedding.image")
    elif not masked:
        chunk.embedding.image.mask_token.requires_grad_(False)
        frozen.append("embedding.image.mask_token")
    return frozen


def _freeze_branches(decoder: MoMEBlock, config: RunConfig, layout: StreamLayout) -> list[str]:
    frozen = []
    for layer in decoder.layers:
        assert isinstance(layer, MoMELayer)
        feed_forward = layer.mlp
        assert isinstance(feed_forward, MoMEFeedForward)
        number = layer.layer_number
        for branch in block_plan(config.model, config.moe, number).branches:
            prefix = f"block {number} {branch.name}"
            reached = branch.num_tokens(layout) > 0
            if not reached:
                frozen += _freeze(feed_forward.norm(branch.name), f"{prefix} norm")
            if not branch.num_experts:
                if not reached:
                    frozen += _freeze(feed_forward.ffn(branch.name), f"{prefix} ffn")
            elif not reached or not config.moe.train_experts:
                assert feed_forward.moe is not None
                frozen += _freeze(feed_forward.moe.experts.pool(branch.name), f"{prefix} experts")
                gate = feed_forward.moe.router.get_submodule(branch.name)  # type: ignore[attr-defined]
                frozen += _freeze(gate, f"{prefix} router")
    return frozen
