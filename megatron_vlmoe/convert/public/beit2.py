"""BEiT and BEiT v2 (microsoft/unilm, beit and beit2): image weights for the vision side.

Attention, LayerScale, the final LayerNorm and the V-FFN are the source's; attention serves text too, as in VLMo, whose
training starts from such weights. Published models have a relative position bias and no absolute positions.
"""

from __future__ import annotations

import math

from megatron_vlmoe.config.errors import ConvertError
from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.convert.public.planner import (
    ImportOptions,
    Planner,
    count_blocks,
    image_size_of_positions,
    run_config,
)
from megatron_vlmoe.convert.public.torch_files import PublicState

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


def infer(source: PublicState, options: ImportOptions, vocab_size: int) -> RunConfig:
    """The configuration that the shapes tell.

    Raises:
        ConvertError: a tensor that it is read from is missing.
    """
    depth = count_blocks(source, BLOCKS)
    projection = "patch_embed.proj.weight"
    patch = source.shape(projection, 4)[-1]
    relative = next((name for name in RELATIVE if name in source.tensors), "")
    size = heads = 0
    if relative:
        rows, heads = source.shape(relative, 2)
        # A side of g patches has 2 g - 1 distances.
        size = (math.isqrt(max(rows - RELATIVE_EXTRA, 0)) + 1) // 2 * patch
    if ABSOLUTE in source.tensors:
        size = image_size_of_positions(source.shape(ABSOLUTE, 3)[1], patch)
    return run_config(
        *(source, options, vocab_size, projection, size, heads, IMAGE_HEAD),
        num_layers=depth,
        ffn_hidden_size=source.shape(f"{BLOCKS}0.mlp.fc1.weight", 2)[0],
        num_vl_layers=options.num_vl_layers,
        layer_scale_init=0.1 if f"{BLOCKS}0.gamma_1" in source.tensors else 0.0,
    )


def plan(planner: Planner) -> str:
    """Fills the plan; returns the source in a few words.

    Raises:
        ConvertError: a text FFN is asked for.
    """
    model, options = planner.model, planner.options
    if options.vl_ffn == "text":
        raise ConvertError(f"--vl-ffn text: {planner.source.path} has no text FFN")
    imagenet = options.source_pixels == "imagenet"
    planner.take_patches("patch_embed.proj", *((IMAGENET_MEAN, IMAGENET_STD) if imagenet else ()))
    planner.take_row("embedding.image.cls_token", "cls_token")
    if planner.has("mask_token"):
        planner.take_row("embedding.image.mask_token", "mask_token")
    planner.take_image_positions(ABSOLUTE)
    for number in range(model.num_layers):
        theirs = f"{BLOCKS}{number}"
        norm, mlp = f"{theirs}.norm2", f"{theirs}.mlp"
        planner.take_attention(number, theirs)
        planner.take_branch(number, "vision", norm, mlp)
        if options.text_ffn == "vision":
            planner.take_branch(number, "text", norm, mlp, "T-FFN from the vision FFN")
        has_vl = planner.wants(f"decoder.layers.{number}.mlp.vl_norm.weight")
        if has_vl and options.vl_ffn == "vision":
            planner.take_branch(number, "vl", norm, mlp, "VL-FFN from the vision FFN")
    if planner.has("norm.weight"):
        planner.take_pair("decoder.final_layernorm", "norm")
    elif planner.has("fc_norm.weight"):
        how = "normalised the mean of the patches there, normalises every token here"
        planner.take_pair("decoder.final_layernorm", "fc_norm", how)
    planner.take_image_head("lm_head")
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
    return (
        f"BEiT image model, {model.num_layers} blocks of width {model.hidden_size}, "
        f"{model.num_attention_heads} heads"
    )
