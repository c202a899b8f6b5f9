"""What whole parameters start from, as a pure function of (seed, name, expert number) or of another model's positions.

Values follow BEiT (paper section 4.1): truncated normal cut at one standard deviation, zero biases, and block l's
attention and FFN output matrices divided by sqrt(2 l). Two options, off by default, start attention near a token's own
place, which short runs on little data need. Needs no megatron-core, so that converters start at once.

Letters: N patches, g patches along a side, D width, R rows of a table.
"""

from __future__ import annotations

import math
import re
from typing import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vlmoe.config.schema import ModelConfig
from megatron_vlmoe.stream.draws import keyed_generator

EXPERT_KEY = re.compile(r"\.experts\.(\w+)\.(weight1|weight2|bias1|bias2)$")
OUTPUT_KEY = re.compile(r"(linear_proj|linear_fc2)\.weight$|\.weight2$")
VOCABULARIES = {
    "embedding.text.word.weight": "vocab_size",
    "heads.text.linear.weight": "vocab_size",
    "heads.image.linear.weight": "visual_vocab_size",
}
LAYER_KEY = re.compile(r"decoder\.layers\.(\d+)\.")
IMAGE_POSITIONS = "embedding.image.position"
TEXT_POSITIONS = "embedding.text.position"


def full_initial_value(key: str, shape: Sequence[int], model: ModelConfig, seed: int) -> Tensor:
    """The whole tensor of a checkpoint key (fp32, CPU), of all experts of a pool where it is one of experts.

    Args:
        key: checkpoint key.
        shape: its whole shape.
        model: initial standard deviation, LayerScale and vocabularies.
    """
    if EXPERT_KEY.search(key):
        return initial_experts(key, shape[1:], model, seed, range(shape[0]))
    return _draw(key, shape, model, seed)


def initial_experts(
    key: str, shape: Sequence[int], model: ModelConfig, seed: int, experts: range
) -> Tensor:
    """The tensors of some experts of a pool, stacked; `shape` is that of one."""
    return torch.stack([_draw(key, shape, model, seed, expert) for expert in experts])


def _draw(
    key: str, shape: Sequence[int], model: ModelConfig, seed: int, expert: int = -1
) -> Tensor:
    """The whole parameter, or the whole parameter of one expert."""
    if key.endswith(("gamma_1", "gamma_2")):
        return torch.full(tuple(shape), model.layer_scale_init)
    if re.search(r"(bias|bias1|bias2)$", key):
        return torch.zeros(tuple(shape))
    if re.search(r"norm\.weight$", key):
        return torch.ones(tuple(shape))
    if model.init_sincos_std > 0.0 and key in (IMAGE_POSITIONS, TEXT_POSITIONS):
        return sincos_positions(key, shape, model.init_sincos_std)
    generator = keyed_generator(torch.device("cpu"), seed, key, expert)
    vocabulary = VOCABULARIES.get(key)
    value = _cut_normal(shape, model.init_std, generator)
    layer = LAYER_KEY.search(key)
    if layer and OUTPUT_KEY.search(key):
        value /= math.sqrt(2.0 * (int(layer.group(1)) + 1))
    if model.init_qk_correlation > 0.0 and key.endswith("linear_qkv.weight"):
        # megatron-core keeps query, key and value of a head together.
        heads = value.view(model.num_attention_heads, 3, -1, shape[1])
        correlation = model.init_qk_correlation
        heads[:, 1] *= math.sqrt(1.0 - correlation**2)
        heads[:, 1] += correlation * heads[:, 0]
    if vocabulary is not None:
        # Rows that only pad the vocabulary take no part in training; zeros stay zeros, also through an export.
        value[getattr(model, vocabulary) :] = 0.0
    return value


def _cut_normal(shape: Sequence[int], std: float, generator: torch.Generator) -> Tensor:
    """A normal distribution of this standard deviation, cut at it: the quantiles of uniform numbers.

    torch's own ``trunc_normal_`` draws whole tensors anew until all values lie inside, or takes quantiles too: which of
    them depends on its version. The former took 20 times as long here, minutes for a model with a billion parameters.
    """
    # Of a normal distribution, within one standard deviation.
    share = math.erf(1.0 / math.sqrt(2.0))
    value = torch.empty(tuple(shape)).uniform_(-share, share, generator=generator)
    return value.erfinv_().mul_(math.sqrt(2.0) * std).clamp_(-std, std)


def sincos_positions(key: str, shape: Sequence[int], std: float) -> Tensor:
    """Sines and cosines of places, in waves of four tokens and more, evenly on a log scale.

    The longest is of 256 tokens for texts, whatever their length, and of 4 g patches for images, where half of the
    width is of rows and half of columns (MAE, MoCo v3), and [I_CLS] has zeros.

    Args:
        key: `IMAGE_POSITIONS` or `TEXT_POSITIONS`.
        shape: ``(1 + g * g, D)`` or ``(R, D)``.
        std: root mean square of the values.

    Returns:
        fp32, of the shape.
    """
    rows, width = shape
    if key == TEXT_POSITIONS:
        return std * _waves(rows, width, 256.0)
    side = math.isqrt(rows - 1)
    row = _waves(side, width // 2, 4.0 * side).repeat_interleave(side, dim=0)
    column = _waves(side, width - width // 2, 4.0 * side).repeat(side, 1)
    return std * torch.cat([torch.zeros(1, width), torch.cat([row, column], dim=1)])


def _waves(length: int, width: int, longest: float) -> Tensor:
    """Sines, then cosines, of the places of an axis, ``[length, width]``, with a root mean square of one."""
    sines, cosines = (width + 1) // 2, width // 2
    # Shorter waves than of four tokens would make neighbours unlike.
    frequency = (4.0 / longest) ** (torch.arange(sines) / max(sines - 1, 1)) / 4.0
    angles = 2 * math.pi * torch.arange(length)[:, None] * frequency
    return math.sqrt(2.0) * torch.cat([angles.sin(), angles.cos()[:, :cosines]], dim=1)


def resize_image_positions(table: Tensor, num_patches: int) -> Tensor:
    """Positions of [I_CLS] and N patches for another number of patches.

    The row of [I_CLS] stays; the square of patch positions is interpolated bicubically, with corners not aligned
    (BEiT v2, BEiT-3).

    Args:
        table: ``[1 + g * g, D]``.
        num_patches: wanted ``N = g' * g'``.

    Returns:
        ``[1 + N, D]`` in the table's dtype.

    Raises:
        ValueError: if either number of patches is not a square.
    """
    old, new = math.isqrt(table.shape[0] - 1), math.isqrt(num_patches)
    for side, patches in ((old, table.shape[0] - 1), (new, num_patches)):
        if side * side != patches:
            raise ValueError(f"{patches} patches are not a square")
    if old == new:
        return table
    grid = table[1:].float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    rows = resized.permute(0, 2, 3, 1).reshape(num_patches, -1)
    return torch.cat([table[:1], rows.to(table.dtype)])


def resize_text_positions(table: Tensor, fresh: Tensor) -> Tensor:
    """Positions for another text length: the known ones, then, where the text is longer, fresh ones.

    Args:
        table: ``[R, D]``, trained.
        fresh: ``[R', D]``, initial values of the wanted table.

    Returns:
        ``[R', D]``.
    """
    result = fresh.clone()
    rows = min(table.shape[0], fresh.shape[0])
    result[:rows] = table[:rows]
    return result
