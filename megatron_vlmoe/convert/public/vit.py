"""What the families share: patches, positions and blocks in the layout of BEiT, and heads by rows.

Letters: D width, P patch side, N patches, F inner width of an FFN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_vlmoe.convert.name_table import FusedQkv, VocabularyRows
from megatron_vlmoe.convert.public.recipes import Planner
from megatron_vlmoe.convert.public.vocabulary import RowMap
from megatron_vlmoe.model.initial_values import resize_image_positions, resize_text_positions

LINEAR = ("weight", "bias")
NO_ABSOLUTE = "the source has no absolute positions"
IMAGE_POSITION, TEXT_POSITION = "embedding.image.position", "embedding.text.position"


def take_pair(plan: Planner, ours: str, theirs: str, how: str = "") -> None:
    """Weight and bias of a linear layer or a LayerNorm."""
    for end in LINEAR:
        plan.take(f"{ours}.{end}", f"{theirs}.{end}", how=how)


def take_patches(plan: Planner, theirs: str) -> None:
    """The patch projection of a convolution ``[D, 3, P, P]``."""
    plan.take("embedding.image.weight", f"{theirs}.weight", make=_folded_patches)
    plan.take("embedding.image.bias", f"{theirs}.bias")


def take_row(plan: Planner, ours: str, theirs: str, row: int = 0, how: str = "") -> None:
    """One row ``[1, D]`` of a table ``[..., R, D]``."""

    def make(tensors: Sequence[Tensor]) -> Tensor:
        table = tensors[0].flatten(0, -2)
        return table[row : row + 1]

    plan.take(ours, theirs, make=make, how=how)


def take_image_positions(plan: Planner, theirs: str, first: int = 0) -> None:
    """Positions ``[..., first + 1 + N, D]`` of [I_CLS] and patches, fitted to the image size."""
    wanted = plan.model.num_patches
    rows = plan.source.shape(theirs)[-2] - first

    def make(tensors: Sequence[Tensor]) -> Tensor:
        return resize_image_positions(tensors[0].flatten(0, -2)[first:], wanted)

    how = "" if rows == wanted + 1 else f"{rows} positions resized bicubically to {wanted + 1}"
    plan.take(IMAGE_POSITION, theirs, make=make, how=how)


def take_text_positions(plan: Planner, theirs: str, first: int = 0) -> None:
    """Positions ``[first + R, D]`` of text, cut off or continued with initial values."""
    wanted = plan.shapes[TEXT_POSITION][0]
    count, width = plan.source.shape(theirs, 2)
    rows = count - first

    def make(tensors: Sequence[Tensor]) -> Tensor:
        return resize_text_positions(tensors[0][first:], plan.initial(TEXT_POSITION))

    how = "" if rows == wanted else text_position_change(rows, wanted)
    plan.take(TEXT_POSITION, theirs, make=make, how=how, planned=(wanted, width))


def text_position_change(rows: int, wanted: int) -> str:
    """What fitting a table of text positions does."""
    if rows > wanted:
        return f"the first {wanted} of {rows} positions"
    return f"{rows} positions, the others up to {wanted} at initial values"


def take_attention(plan: Planner, number: int, theirs: str) -> None:
    """LayerNorm, attention and LayerScale of block `number` (from 0) in BEiT's layout."""
    ours = f"decoder.layers.{number}"
    attention = f"{theirs}.attn"

    def weights(tensors: Sequence[Tensor]) -> Tensor:
        return FusedQkv().join(tensors[0].chunk(3), plan.model)

    def biases(tensors: Sequence[Tensor]) -> Tensor:
        return FusedQkv(("q", "v")).join(tensors, plan.model)

    take_pair(plan, f"{ours}.input_layernorm", f"{theirs}.norm1")
    qkv = f"{ours}.self_attention.linear_qkv"
    plan.take(f"{qkv}.weight", f"{attention}.qkv.weight", make=weights)
    plan.take(f"{qkv}.bias", f"{attention}.q_bias", f"{attention}.v_bias", make=biases)
    take_pair(plan, f"{ours}.self_attention.linear_proj", f"{attention}.proj")
    for name in ("gamma_1", "gamma_2"):
        if plan.wants(f"{ours}.{name}"):
            plan.take(f"{ours}.{name}", f"{theirs}.{name}")


def take_branch(
    plan: Planner, number: int, branch: str, norm: str, mlp: str, how: str = ""
) -> None:
    """LayerNorm and dense FFN of a branch of block `number` (from 0)."""
    ours = f"decoder.layers.{number}.mlp.{branch}"
    take_pair(plan, f"{ours}_norm", norm, how)
    for name in ("fc1", "fc2"):
        take_pair(plan, f"{ours}_ffn.linear_{name}", f"{mlp}.{name}", how)


def take_vocabulary(plan: Planner, ours: str, theirs: str, rows: RowMap) -> None:
    """A table ``[R, ...]`` of the source as ours, piece by piece; pieces without a row have initial values."""
    shape = plan.source.shape(theirs, len(plan.shapes[ours]))
    rows.check(shape[0], f"{plan.source.path}: {theirs}")

    def make(tensors: Sequence[Tensor]) -> Tensor:
        return rows.place(tensors[0], plan.initial(ours))

    how = "" if not rows.without else f"{rows.num_found} of {len(rows.rows)} rows, the others new"
    plan.take(ours, theirs, make=make, how=how, planned=(plan.shapes[ours][0], *shape[1:]))


def take_image_head(plan: Planner, theirs: str) -> None:
    """The image head ``[V, D]``, filled up to whole multiples of 128 rows; left where ours has other codes."""
    codes = plan.source.shape(f"{theirs}.weight")[0]
    if codes != plan.model.visual_vocab_size:
        why = f"predicts {codes} image tokens, the new model has {plan.model.visual_vocab_size}"
        plan.leave(why, rf"{theirs}\.(weight|bias)")
        return

    def make(tensors: Sequence[Tensor]) -> Tensor:
        return VocabularyRows("visual_vocab_size").join(tensors, plan.model)

    for end in LINEAR:
        plan.take(f"heads.image.linear.{end}", f"{theirs}.{end}", make=make)


def fold_pixels(plan: Planner, theirs: str, mean: Sequence[float], std: Sequence[float]) -> None:
    """The patch projection of a model whose pixels had another mean and deviation than ours.

    ``(p - m) / s`` is a linear function of ``(p - 0.5) / 0.5``, so weight and bias take it up exactly.
    """
    ours_mean, ours_std = plan.config.data.pixel_mean, plan.config.data.pixel_std
    scale = torch.tensor([o / s for o, s in zip(ours_std, std)])
    shift = torch.tensor([(o - m) / s for o, m, s in zip(ours_mean, mean, std)])

    def weight(tensors: Sequence[Tensor]) -> Tensor:
        return _folded_patches([tensors[0] * scale.to(tensors[0].device)[:, None, None]])

    def bias(tensors: Sequence[Tensor]) -> Tensor:
        kernel, start = tensors
        return start + kernel.sum(dim=(2, 3)) @ shift.to(kernel.device)

    how = f"takes up the pixel mean {list(mean)} and deviation {list(std)} of its training (exact)"
    names = (f"{theirs}.weight", f"{theirs}.bias")
    plan.take("embedding.image.weight", names[0], make=weight, how=how)
    plan.take("embedding.image.bias", *names, make=bias, how=how)


def _folded_patches(tensors: Sequence[Tensor]) -> Tensor:
    kernel = tensors[0]
    if kernel.dim() != 4 or kernel.shape[1] != 3:
        raise ValueError("not a convolution of three channels")
    return kernel.flatten(1)
