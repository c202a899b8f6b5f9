"""BEiT and BEiT v2 (microsoft/unilm, beit and beit2): image weights for the vision side.

Attention, LayerScale, the final LayerNorm and the V-FFN are the source's; attention serves text too, as in VLMo, whose
training starts from such weights. Published models have a relative position bias and no absolute positions.
"""

from __future__ import annotations

import math
from dataclasses import replace

from megatron_vlmoe.config.errors import ConvertError
from megatron_vlmoe.config.schema import MoEConfig, RunConfig
from megatron_vlmoe.convert.public.options import (
    ImportOptions,
    Vocabulary,
    common_sizes,
    count_blocks,
    image_size_of_positions,
    run_config,
)
from megatron_vlmoe.convert.public.recipes import Planner
from megatron_vlmoe.convert.public.torch_files import PublicState
from megatron_vlmoe.convert.public.vit import (
    IMAGE_POSITION,
    NO_ABSOLUTE,
    fold_pixels,
    take_attention,
    take_branch,
    take_image_head,
    take_image_positions,
    take_pair,
    take_patches,
    take_row,
)

BLOCKS = "blocks."
ABSOLUTE = "pos_embed"
IMAGE_HEAD = "lm_head.weight"
RELATIVE = (
    "rel_pos_bias.relative_position_bias_table",
    "blocks.0.attn.relative_position_bias_table",
)
# Rows of a relative table besides the distances: [I_CLS] to patch, patch to [I_CLS], [I_CLS] to itself.
RELATIVE_EXTRA = 3
# ImageNet's statistics, with which BEiT v2 was trained and fine-tuned; BEiT's models on ImageNet-22k have ours.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def infer(source: PublicState, options: ImportOptions, vocabulary: Vocabulary) -> RunConfig:
    """The configuration that the shapes tell.

    Raises:
        ConvertError: a tensor that it is read from is missing.
    """
    depth = count_blocks(source, BLOCKS)
    patches = source.shape("patch_embed.proj.weight", 4)
    relative = next((name for name in RELATIVE if name in source.tensors), "")
    size = _image_size(source, relative, patches[-1])
    heads = source.shape(relative, 2)[1] if relative else 0
    model = common_sizes(options, vocabulary, source, patches, size, heads, IMAGE_HEAD)
    model = replace(
        model,
        num_layers=depth,
        ffn_hidden_size=source.shape(f"{BLOCKS}0.mlp.fc1.weight", 2)[0],
        num_vl_layers=options.num_vl_layers,
        layer_scale_init=0.1 if f"{BLOCKS}0.gamma_1" in source.tensors else 0.0,
    )
    return run_config(options, model, MoEConfig())


def describe(config: RunConfig) -> str:
    """The source in a few words."""
    model = config.model
    return (
        f"BEiT image model, {model.num_layers} blocks of width {model.hidden_size}, "
        f"{model.num_attention_heads} heads"
    )


def plan(planner: Planner, options: ImportOptions, vocabulary: Vocabulary) -> None:
    """Fills the plan.

    Raises:
        ConvertError: a text FFN is asked for.
    """
    if options.vl_ffn == "text":
        raise ConvertError(f"--vl-ffn text: {planner.source.path} has no text FFN")
    if options.source_pixels == "imagenet":
        fold_pixels(planner, "patch_embed.proj", IMAGENET_MEAN, IMAGENET_STD)
    else:
        take_patches(planner, "patch_embed.proj")
    take_row(planner, "embedding.image.cls_token", "cls_token")
    if planner.has("mask_token"):
        take_row(planner, "embedding.image.mask_token", "mask_token")
    if planner.has(ABSOLUTE):
        take_image_positions(planner, ABSOLUTE)
    else:
        planner.zero(IMAGE_POSITION, NO_ABSOLUTE)
    for number in range(planner.model.num_layers):
        _take_block(planner, number, options)
    if planner.has("norm.weight"):
        take_pair(planner, "decoder.final_layernorm", "norm")
    elif planner.has("fc_norm.weight"):
        how = "normalised the mean of the patches there, normalises every token here"
        take_pair(planner, "decoder.final_layernorm", "fc_norm", how)
    if planner.has(IMAGE_HEAD):
        take_image_head(planner, "lm_head")
    _leave(planner)


def _image_size(source: PublicState, relative: str, patch: int) -> int:
    """Image size that absolute or relative positions tell; 0 if none do."""
    if ABSOLUTE in source.tensors:
        return image_size_of_positions(source.shape(ABSOLUTE, 3)[1], patch)
    if not relative:
        return 0
    # A side of g patches has 2 g - 1 distances.
    distances = math.isqrt(max(source.shape(relative, 2)[0] - RELATIVE_EXTRA, 0))
    return (distances + 1) // 2 * patch


def _take_block(planner: Planner, number: int, options: ImportOptions) -> None:
    theirs = f"{BLOCKS}{number}"
    norm, mlp = f"{theirs}.norm2", f"{theirs}.mlp"
    take_attention(planner, number, theirs)
    take_branch(planner, number, "vision", norm, mlp)
    if options.text_ffn == "vision":
        take_branch(planner, number, "text", norm, mlp, "T-FFN from the vision FFN")
    has_vl = planner.wants(f"decoder.layers.{number}.mlp.vl_norm.weight")
    if has_vl and options.vl_ffn == "vision":
        take_branch(planner, number, "vl", norm, mlp, "VL-FFN from the vision FFN")


def _leave(planner: Planner) -> None:
    planner.leave(
        "relative position bias has no counterpart: positions are absolute here, and until they are trained the model "
        "does not know where a patch is",
        r"(.*\.)?relative_position_(bias_table|index)",
    )
    planner.leave(
        "extra blocks and head of BEiT v2's [CLS] pretraining, which ends with it",
        r"cls_pt_layers\..*|cls_pt_norm\..*|cls_pt_lm_head\..*",
    )
    planner.leave("head of image classification: fine-tuning starts its own", r"head\..*")
