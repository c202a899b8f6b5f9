"""An image tokenizer that needs no training."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vlmoe.tokenizers.vqkd.config import build_preset
from megatron_vlmoe.tokenizers.vqkd.model import VQKD, build_model


def pictures(number: int, side: int, grid: int) -> Tensor:
    """Images ``[n, 3, S, S]`` of smooth colours with grain."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(number, 3, grid, grid, generator=generator)
    smooth = F.interpolate(coarse, size=(side, side), mode="bilinear")
    return 0.7 * smooth + 0.3 * torch.rand(smooth.shape, generator=generator)


@torch.no_grad()
def placed_tokenizer(preset: str, pixels: Tensor, **sizes: Any) -> VQKD:
    """Random weights, and codes that lie where patches of these images do, as k-means would start.

    What all patches have in common is taken out of the last bias: the codes would lie side by side otherwise.
    """
    model = build_model(build_preset(preset, **sizes), seed=1).to(pixels.device).eval()
    vectors = model.project(pixels).flatten(0, 1)
    last = model.code_head[-1]
    assert isinstance(last, torch.nn.Linear)
    last.bias -= vectors.mean(dim=0)
    unit = F.normalize(vectors - vectors.mean(dim=0), dim=1)
    generator = torch.Generator().manual_seed(2)
    chosen = torch.randint(len(unit), (model.quantizer.num_codes,), generator=generator)
    model.quantizer.codebook.copy_(unit[chosen.to(unit.device)])
    model.quantizer.updates.fill_(1)
    return model
