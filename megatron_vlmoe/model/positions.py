"""Position tables for another image size or text length.

Letters: N patches, g patches along a side, D width, R rows of a table.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


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
    old = _side(table.shape[0] - 1)
    new = _side(num_patches)
    if old == new:
        return table
    grid = table[1:].float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    patches = resized.permute(0, 2, 3, 1).reshape(num_patches, -1)
    return torch.cat([table[:1], patches.to(table.dtype)])


def _side(num_patches: int) -> int:
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise ValueError(f"{num_patches} patches are not a square")
    return side


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
