"""Whole initial tensors as a pure function of (seed, parameter name, expert number).

Values follow BEiT (paper section 4.1): truncated normal cut at one standard deviation, zero biases, and block l's
attention and FFN output matrices divided by sqrt(2 l). Needs no megatron-core, so that converters start at once.
"""

from __future__ import annotations

import math
import re
from typing import Sequence

import torch
from torch import Tensor, nn

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


def full_initial_value(key: str, shape: Sequence[int], model: ModelConfig, seed: int) -> Tensor:
    """The whole tensor of a checkpoint key (fp32, CPU), of all experts of a pool where it is one of experts.

    Args:
        key: checkpoint key.
        shape: its whole shape.
        model: initial standard deviation, LayerScale and vocabularies.
        seed: seed of the run.
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
    generator = keyed_generator(torch.device("cpu"), seed, key, expert)
    value = torch.empty(tuple(shape))
    std = model.init_std
    vocabulary = VOCABULARIES.get(key)
    nn.init.trunc_normal_(value, std=std, a=-std, b=std, generator=generator)
    layer = LAYER_KEY.search(key)
    if layer and OUTPUT_KEY.search(key):
        value /= math.sqrt(2.0 * (int(layer.group(1)) + 1))
    if vocabulary is not None:
        # Rows that only pad the vocabulary take no part in training; zeros stay zeros, also through an export.
        value[getattr(model, vocabulary) :] = 0.0
    return value
