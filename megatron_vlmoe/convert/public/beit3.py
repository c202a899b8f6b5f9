"""BEiT-3 (microsoft/unilm, beit3), as far as this architecture can hold it.

The published BEiT-3 has an attention per modality (A vision, B text), no VL-FFN, and two more LayerNorms in every block
(sub-LN: on the attention's output before its projection, on the FFN's hidden values before the second layer). Here
attention is shared and there is no sub-LN. What is linear in sub-LN (the mean, weight and bias) is taken up by the
layer behind it; the division of every token by its own deviation is lost.

Letters: D width, F inner width of an FFN, K inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from megatron_vlmoe.config.errors import ConvertError
from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.convert.name_table import FusedQkv
from megatron_vlmoe.convert.public.planner import (
    LINEAR,
    ImportOptions,
    Planner,
    count_blocks,
    image_size_of_positions,
    run_config,
)
from megatron_vlmoe.convert.public.torch_files import PublicState
from megatron_vlmoe.model.initial_values import TEXT_POSITIONS

LAYERS = "beit3.encoder.layers."
POSITIONS = "beit3.encoder.embed_positions"
IMAGE_HEAD = "mim_head.weight"
# fairseq's positions start at 2.
FIRST_POSITION = 2
LETTERS = {"vision": ("A",), "text": ("B",), "mean": ("A", "B")}
EPSILON = 1e-5
SUB_LN = (
    "sub-LN: its mean, weight and bias are taken up, the division by each token's deviation is lost"
)


def infer(source: PublicState, options: ImportOptions, vocab_size: int) -> RunConfig:
    """The configuration that the shapes tell.

    Raises:
        ConvertError: a tensor that it is read from is missing.
    """
    depth = count_blocks(source, LAYERS)
    projection = "beit3.vision_embed.proj.weight"
    patch = source.shape(projection, 4)[-1]
    rows = source.shape(f"{POSITIONS}.A.weight", 2)[0] - FIRST_POSITION
    size = image_size_of_positions(rows, patch)
    return run_config(
        *(source, options, vocab_size, projection, size),
        image_head=IMAGE_HEAD,
        num_layers=depth,
        ffn_hidden_size=source.shape(f"{LAYERS}0.ffn.A.fc1.weight", 2)[0],
        num_vl_layers=options.num_vl_layers,
        layer_scale_init=0.0,
        layernorm_epsilon=EPSILON,
    )


def plan(planner: Planner) -> str:
    """Fills the plan; returns the source in a few words.

    Raises:
        ConvertError: the text side is asked for and the source (a model of image classification) has none.
    """
    model, options = planner.model, planner.options
    has_text = planner.has(f"{LAYERS}0.self_attn.q_proj.B.weight")
    if not has_text and (options.attention != "vision" or options.vl_ffn == "text"):
        raise ConvertError(
            f"{planner.source.path}: has no text side: --attention vision, --vl-ffn vision or fresh"
        )
    _take_embeddings(planner)
    for number in range(model.num_layers):
        _take_attention(planner, number)
        _take_ffn(planner, number, "vision", "A")
        if has_text:
            _take_ffn(planner, number, "text", "B")
        has_vl = planner.wants(f"decoder.layers.{number}.mlp.vl_norm.weight")
        if has_vl and options.vl_ffn != "fresh":
            (letter,) = LETTERS[options.vl_ffn]
            _take_ffn(planner, number, "vl", letter, f"VL-FFN from the {options.vl_ffn} FFN; ")
    norm = "beit3.encoder.layer_norm"
    if planner.has(*(f"{norm}.{letter}.weight" for letter in LETTERS[options.attention])):
        _take_norm(planner, "decoder.final_layernorm", norm)
    planner.take_image_head("mim_head")
    if planner.rows is not None and planner.has("mlm_head.weight"):
        for end in LINEAR:
            planner.take_vocabulary(f"heads.text.linear.{end}", f"mlm_head.{end}", planner.rows)
        if options.attention != "text":
            planner.remarks.append(
                f"the text head reads the final LayerNorm of --attention {options.attention}, not the one that it was "
                "trained with"
            )
    _leave(planner)
    return (
        f"BEiT-3, {model.num_layers} blocks of width {model.hidden_size}, {model.num_attention_heads} heads; its "
        "attention per modality and its sub-LN do not fit this architecture"
    )


def folded_layer(
    weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """A linear layer that takes up the linear part of the LayerNorm before it.

    ``W LN(x) + b = (W' x) / s(x) + b'`` with s the deviation of x, which the result leaves out:
    ``W' = W diag(g) (1 - mean)``, ``b' = b + W h`` for a LayerNorm of weight g and bias h.
    The layer has ``[D, K]`` and ``[D]``, the LayerNorm ``[K]`` each.
    """
    scaled = weight * norm_weight
    return scaled - scaled.mean(dim=1, keepdim=True), bias + weight @ norm_bias


def _take_embeddings(planner: Planner) -> None:
    planner.take_patches("beit3.vision_embed.proj")
    planner.take_row("embedding.image.cls_token", "beit3.vision_embed.cls_token")
    if planner.has("beit3.vision_embed.mask_token"):
        planner.take_row("embedding.image.mask_token", "beit3.vision_embed.mask_token")
    planner.take_image_positions(f"{POSITIONS}.A.weight", FIRST_POSITION)
    text = f"{POSITIONS}.B.weight"
    if planner.wants(TEXT_POSITIONS) and planner.has(text):
        planner.take_text_positions(text, FIRST_POSITION)
    words = "beit3.text_embed.weight"
    if planner.rows is not None and planner.has(words):
        planner.take_vocabulary("embedding.text.word.weight", words, planner.rows)


def _averaged(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(tensors)).mean(dim=0)


def _of(planner: Planner) -> str:
    """What is done to attention besides choosing a modality."""
    return "mean of the two modalities" if planner.options.attention == "mean" else ""


def _take_norm(planner: Planner, ours: str, theirs: str) -> None:
    for end in LINEAR:
        names = [f"{theirs}.{letter}.{end}" for letter in LETTERS[planner.options.attention]]
        planner.take(f"{ours}.{end}", *names, make=_averaged, how=_of(planner))


def _take_attention(planner: Planner, number: int) -> None:
    ours, theirs = f"decoder.layers.{number}", f"{LAYERS}{number}"
    letters = LETTERS[planner.options.attention]
    _take_norm(planner, f"{ours}.input_layernorm", f"{theirs}.self_attn_layer_norm")
    for end, parts in (("weight", ("q", "k", "v")), ("bias", ("q", "v"))):

        def fused(tensors: Sequence[Tensor], parts: tuple[str, ...] = parts) -> Tensor:
            groups = [tensors[i :: len(parts)] for i in range(len(parts))]
            return FusedQkv(parts).join([_averaged(group) for group in groups], planner.model)

        names = [f"{theirs}.self_attn.{p}_proj.{letter}.{end}" for letter in letters for p in parts]
        key = f"{ours}.self_attention.linear_qkv.{end}"
        planner.take(key, *names, make=fused, how=_of(planner))
    layers = [
        (f"{theirs}.self_attn.out_proj.{letter}", f"{theirs}.self_attn.inner_attn_ln.{letter}")
        for letter in letters
    ]
    how = "; ".join(part for part in (_of(planner), SUB_LN) if part)
    _take_folded(planner, f"{ours}.self_attention.linear_proj", layers, how)


def _take_ffn(planner: Planner, number: int, branch: str, letter: str, how: str = "") -> None:
    ours, theirs = f"decoder.layers.{number}.mlp.{branch}", f"{LAYERS}{number}"
    ffn = f"{theirs}.ffn.{letter}"
    copied = how.removesuffix("; ")
    planner.take_pair(f"{ours}_norm", f"{theirs}.final_layer_norm.{letter}", copied)
    planner.take_pair(f"{ours}_ffn.linear_fc1", f"{ffn}.fc1", copied)
    layers = [(f"{ffn}.fc2", f"{ffn}.ffn_layernorm")]
    _take_folded(planner, f"{ours}_ffn.linear_fc2", layers, how + SUB_LN)


def _take_folded(planner: Planner, ours: str, layers: Sequence[tuple[str, str]], how: str) -> None:
    """A linear layer with the LayerNorm before it, the mean of several such."""
    names = [
        f"{module}.{end}" for layer, norm in layers for module in (layer, norm) for end in LINEAR
    ]

    def folded(part: int, tensors: Sequence[Tensor]) -> Tensor:
        quartets = (tensors[i : i + 4] for i in range(0, len(tensors), 4))
        return _averaged([folded_layer(*quartet)[part] for quartet in quartets])

    for part, end in enumerate(LINEAR):
        planner.take(f"{ours}.{end}", *names, make=partial(folded, part), how=how)


def _leave(planner: Planner) -> None:
    attention = planner.options.attention
    planner.leave(
        "adds the same number to all logits of a query, which softmax does not see: nothing is lost",
        *(
            rf"beit3\.encoder\.layers\.\d+\.self_attn\.k_proj\.{letter}\.bias"
            for letter in LETTERS[attention]
        ),
    )
    planner.leave(
        f"attention is shared here and --attention {attention} takes the other modality's: this modality loses "
        "the attention that it was trained with",
        r"beit3\.encoder\.layers\.\d+\.(self_attn|self_attn_layer_norm)\..*",
        r"beit3\.encoder\.layer_norm\..*",
    )
    if not planner.wants(TEXT_POSITIONS):
        planner.leave(
            "the new model has no text (--text-tokenizer)",
            r"beit3\.text_embed\..*|mlm_head\..*",
            r"beit3\.encoder\.embed_positions\.B\..*",
        )
    if planner.rows is None:
        planner.leave(
            "nothing says which row belongs to which of our text pieces (--source-spm does, or --same-vocabulary)",
            r"beit3\.text_embed\..*|mlm_head\..*",
        )
    planner.leave(
        "head of a downstream task: fine-tuning starts its own",
        r"(vision_head|language_head|pooler|head|fc_norm)\..*|logit_scale|.*\.logit_scale",
    )
