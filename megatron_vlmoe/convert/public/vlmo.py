"""VLMo (microsoft/unilm, vlmo): the architecture of this project but for positions, text embedding and heads.

Shared attention with q and v biases, LayerScale, a LayerNorm and an FFN per modality, VL-FFN in the last blocks; text
before image. Base and large have a relative position bias and add no text positions; base_plus has absolute positions
and no LayerScale. A branch of which a block has a DeepSpeed MoE layer becomes a pool of experts.

VLMo embeds texts as BERT does, token v at position i as ``f(v, i) = LayerNorm(word[v] + type[0] + position[i])``; our
text embedding adds two tables. Without positions f depends on the token alone, and its values are a word table exactly.
With positions no two tables add up to f. The best ones in the mean square over all tokens and positions are f's means
over positions and the deviations of its means over tokens (two-way analysis of variance); what they miss is measured.

Letters: E experts, D width, L blocks or positions, H heads, V tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vlmoe.config.errors import ConvertError
from megatron_vlmoe.config.schema import MoEConfig, RunConfig
from megatron_vlmoe.convert.public.planner import (
    NO_ABSOLUTE,
    ImportOptions,
    Planner,
    count_blocks,
    image_size_of_positions,
    run_config,
)
from megatron_vlmoe.convert.public.torch_files import EXPERTS, GATE, PublicState
from megatron_vlmoe.convert.public.vocabulary import RowMap
from megatron_vlmoe.model.initial_values import TEXT_POSITIONS, resize_text_positions
from megatron_vlmoe.stream.block_plan import block_plans

# Of BERT's embedding; the blocks have another.
EPSILON = 1e-12
CHUNK = 256


@dataclass(frozen=True)
class TextTables:
    """Tables whose sum stands for BERT's embedding.

    Args:
        words: ``[V, D]``.
        positions: ``[L, D]``; None where the model adds none.
        residual: what the sum misses, as the root mean square relative to that of the embedding.
    """

    words: Tensor
    positions: Optional[Tensor]
    residual: float


def additive_tables(
    words: Tensor, token_type: Tensor, positions: Optional[Tensor], weight: Tensor, bias: Tensor
) -> TextTables:
    """The tables of an embedding of words ``[V, D]``, the row ``[D]`` of every token's type, positions ``[L, D]`` where
    they are added, and a LayerNorm of weight and bias ``[D]``.
    """

    def normalized(values: Tensor) -> Tensor:
        return F.layer_norm(values, weight.shape, weight, bias, EPSILON)

    if positions is None:
        return TextTables(normalized(words + token_type), None, 0.0)
    count, length = len(words), len(positions)
    means = torch.empty_like(words)
    sums = torch.zeros(positions.shape, dtype=torch.float64)
    square = 0.0
    for first in range(0, count, CHUNK):
        chunk = words[first : first + CHUNK] + token_type
        values = normalized(chunk.unsqueeze(1) + positions)
        means[first : first + CHUNK] = values.mean(dim=1)
        sums += values.sum(dim=0, dtype=torch.float64)
        square += float(values.square().sum(dtype=torch.float64))
    deviations = sums / count - means.mean(dim=0, dtype=torch.float64)
    # The two parts are orthogonal, so their squares add up.
    kept = length * float(means.square().sum(dtype=torch.float64))
    kept += count * float(deviations.square().sum())
    residual = math.sqrt(max(square - kept, 0.0) / square)
    return TextTables(means, deviations.to(words.dtype), residual)


BLOCKS = "transformer.blocks."
# Ours to theirs.
BRANCHES = (("text", "text"), ("vision", "imag"), ("vl", "vl"))
RELATIVE = "relative_position_bias_table"
ABSOLUTE = "transformer.pos_embed"
TOKEN_TYPE = "token_type_embeddings.weight"
WORD = "embedding.text.word.weight"
TEXT = "text_embeddings"
FOLDED = (
    f"{TEXT}.word_embeddings.weight",
    f"{TEXT}.token_type_embeddings.weight",
    f"{TEXT}.LayerNorm.weight",
    f"{TEXT}.LayerNorm.bias",
)
TEXT_TABLE = f"{TEXT}.position_embeddings.weight"


def infer(source: PublicState, options: ImportOptions, vocab_size: int) -> RunConfig:
    """The configuration that the shapes tell.

    Raises:
        ConvertError: a tensor that it is read from is missing, or experts lie where ours cannot.
    """
    depth = count_blocks(source, BLOCKS)
    projection = "transformer.patch_embed.proj.weight"
    size = heads = 0
    if ABSOLUTE in source.tensors:
        patch = source.shape(projection, 4)[-1]
        size = image_size_of_positions(source.shape(ABSOLUTE, 3)[1], patch)
    if RELATIVE in source.tensors:
        heads = source.shape(RELATIVE, 2)[1] // depth
    dense, expert = (f"{BLOCKS}0.mlp_imag{e}.fc1.weight" for e in ("", f"{EXPERTS}0"))
    pools = _pools(source, depth)
    if not pools and options.topk > 1:
        raise ConvertError(f"--topk {options.topk}: {source.path} has no experts")
    vl = [
        number for number in range(depth) if f"{BLOCKS}{number}.norm2_vl.weight" in source.tensors
    ]
    if vl and vl != list(range(depth - len(vl), depth)):
        raise ConvertError(f"{source.path}: VL-FFN in blocks {vl} (from 0), not in the last ones")
    config = run_config(
        *(source, options, vocab_size, projection, size, heads),
        moe=_moe(pools, options.topk),
        num_layers=depth,
        ffn_hidden_size=source.shape(expert if expert in source.tensors else dense, 2)[0],
        # The stage of texts alone has none yet.
        num_vl_layers=len(vl) or options.num_vl_layers,
        layer_scale_init=0.1 if f"{BLOCKS}0.gamma_1" in source.tensors else 0.0,
        token_type_embeddings=TOKEN_TYPE in source.tensors,
    )
    for block in block_plans(config.model, config.moe):
        ours = {pool.name: pool.num_experts for pool in block.pools}
        theirs = pools.get(block.layer_number, {})
        if ours != theirs:
            raise ConvertError(
                f"{source.path}: block {block.layer_number} has experts {theirs}, here it would have {ours}: all "
                "blocks with experts need the same pools"
            )
    return config


def plan(planner: Planner) -> str:
    """Fills the plan; returns the source in a few words."""
    model, moe = planner.model, planner.config.moe
    planner.take_patches("transformer.patch_embed.proj")
    planner.take_row("embedding.image.cls_token", "transformer.cls_token")
    planner.take_image_positions(ABSOLUTE)
    if planner.has(TOKEN_TYPE):
        more = planner.source.shape(TOKEN_TYPE, 2)[0] > 2
        how = "the type of the second image of NLVR2 is dropped" if more else ""
        planner.take_row("embedding.image.token_type", TOKEN_TYPE, row=1, how=how)
        if planner.wants("embedding.text.token_type"):
            planner.take_row("embedding.text.token_type", TOKEN_TYPE, row=0)
    if planner.rows is not None:
        _take_text(planner, planner.rows)
    elif planner.wants(TEXT_POSITIONS) and not planner.has(ABSOLUTE):
        planner.zero(TEXT_POSITIONS, NO_ABSOLUTE)
    for number in range(model.num_layers):
        _take_block(planner, number)
    planner.take_pair("decoder.final_layernorm", "transformer.norm")
    _leave(planner)
    experts = "" if not moe.layers else f", experts in blocks {list(moe.layers)}"
    return (
        f"VLMo, {model.num_layers} blocks of width {model.hidden_size}, {model.num_attention_heads} heads, "
        f"VL-FFN in the last {model.num_vl_layers}{experts}"
    )


def _pools(source: PublicState, depth: int) -> dict[int, dict[str, int]]:
    """Experts of every branch that is an MoE layer, by block number from 1."""
    pools: dict[int, dict[str, int]] = {}
    for number in range(depth):
        for ours, theirs in BRANCHES:
            gate = f"{BLOCKS}{number}.mlp_{theirs}{GATE}"
            if gate in source.tensors:
                pools.setdefault(number + 1, {})[ours] = source.shape(gate, 2)[0]
    return pools


def _moe(pools: dict[int, dict[str, int]], topk: int) -> MoEConfig:
    """The routing that fits the pools best; whether it does shows when the blocks are compared."""
    if not pools:
        return MoEConfig()
    counts = {name: max(pool.get(name, 0) for pool in pools.values()) for name, _ in BRANCHES}
    vision, text = counts["vision"], counts["text"]
    return MoEConfig(
        num_vision_experts=vision,
        num_text_experts=text,
        num_vl_experts=counts["vl"],
        vl=counts["vl"] > 0,
        layers=tuple(sorted(pools)),
        modalities="vision" if vision and not text else "text" if text and not vision else "both",
        topk=topk,
        # DeepSpeed divides the gates of two experts by their sum, a single gate not.
        normalize_gate=topk > 1,
    )


def _take_block(planner: Planner, number: int) -> None:
    theirs, vl_ffn = f"{BLOCKS}{number}", planner.options.vl_ffn
    planner.take_attention(number, theirs)
    block = block_plans(planner.model, planner.config.moe)[number]
    names = dict(BRANCHES)
    for branch in block.branches:
        name, how = names[branch.name], ""
        if branch.name == "vl" and not planner.has(f"{theirs}.norm2_{name}.weight"):
            if vl_ffn == "fresh":
                continue
            name, how = names[vl_ffn], f"VL-FFN from the {vl_ffn} FFN"
        norm, mlp = f"{theirs}.norm2_{name}", f"{theirs}.mlp_{name}"
        if not branch.num_experts:
            planner.take_branch(number, branch.name, norm, mlp, how)
            continue
        # DeepSpeed's experts E x [...] are stacked to [E, ...]; its gate [E, D] is the router.
        ours = f"decoder.layers.{number}.mlp"
        planner.take_pair(f"{ours}.{branch.name}_norm", norm)
        planner.take(f"{ours}.moe.router.{branch.name}.weight", f"{mlp}{GATE}")
        for kind in ("weight", "bias"):
            for layer in (1, 2):
                experts = range(branch.num_experts)
                planner.take(
                    f"{ours}.moe.experts.{branch.name}.{kind}{layer}",
                    *(f"{mlp}{EXPERTS}{expert}.fc{layer}.{kind}" for expert in experts),
                    make=lambda tensors: torch.stack(list(tensors)),
                )


def _take_text(planner: Planner, rows: RowMap) -> None:
    source, absolute = planner.source, planner.has(ABSOLUTE)
    names = (*FOLDED, TEXT_TABLE) if absolute else FOLDED

    @cache
    def tables() -> TextTables:
        """The source's text embedding as two tables, for the rows that are used; made when first asked for."""
        words, types, weight, bias, *added = (source.tensors[n].read().float() for n in names)
        used = torch.tensor(sorted({row for row in rows.rows if row >= 0}))
        positions = added[0] if added else None
        found = additive_tables(words[used], types[0], positions, weight, bias)
        whole = torch.zeros_like(words)
        whole[used] = found.words
        return replace(found, words=whole)

    def make_words(_: Sequence[Tensor]) -> Tensor:
        return rows.place(tables().words, planner.initial(WORD))

    def make_positions(_: Sequence[Tensor]) -> Tensor:
        positions = tables().positions
        assert positions is not None
        return resize_text_positions(positions, planner.initial(TEXT_POSITIONS))

    count, width = source.shape(FOLDED[0], 2)
    rows.check(count, f"{source.path}: {FOLDED[0]}")
    found = f"{rows.num_found} of {len(rows.rows)} rows"
    how = (
        f"{found}; LayerNorm(word + type 0 + position) as a sum of two tables: an approximation"
        if absolute
        else f"{found}; LayerNorm(word + type 0) taken up row by row (exact: no positions are added before it)"
    )
    planned = (planner.shapes[WORD][0], width)
    planner.take(WORD, *names, make=make_words, how=how, planned=planned)
    if not absolute:
        planner.zero(TEXT_POSITIONS, NO_ABSOLUTE)
        return
    if change := planner.text_position_change(source.shape(TEXT_TABLE, 2)[0]):
        how += f"; {change}"
    planned = (planner.shapes[TEXT_POSITIONS][0], width)
    planner.take(TEXT_POSITIONS, *names, make=make_positions, how=how, planned=planned)
    planner.measures.append(
        lambda: (
            f"text embedding: the sum of the two tables misses {tables().residual:.2%} of the original (rms)"
        )
    )


def _leave(planner: Planner) -> None:
    planner.leave(
        "relative position bias has no counterpart: positions are absolute here, and until they are trained the model "
        "does not know where a patch or a word is",
        rf"{RELATIVE}|.*relative_position_index|.*\.relative_position_bias_table",
    )
    planner.leave("an index, not a weight", rf"{TEXT}\.(position|token_type)_ids")
    if not planner.has(ABSOLUTE):
        planner.leave(
            "a model with relative positions never adds it", rf"{TEXT}\.position_embeddings\.weight"
        )
    if planner.rows is None:
        planner.leave(
            "nothing says which row belongs to which of our text pieces (--text-tokenizer and --source-vocab do)",
            rf"{TEXT}\..*",
        )
    planner.leave(
        "predicts the source's word pieces through a layer of its own; ours is one linear layer and starts anew",
        r"mlm_score\..*",
    )
    planner.leave(
        "head of contrastive and matching pretraining: fine-tuning on retrieval starts its own",
        r"itm_score\..*|itc_.*|logit_scale|logit_vl_scale",
    )
    planner.leave("pooler: fine-tuning starts its own", r"pooler\..*")
    planner.leave("head of a downstream task", r"(vqa|nlvr2)_classifier\..*")
