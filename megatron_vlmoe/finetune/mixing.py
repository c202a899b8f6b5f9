"""Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899): images blended with a partner's.

One draw holds for a whole micro-batch of n images ("batch mode"); image i is blended with image n - 1 - i, so the
partners of the batch are the batch in reverse. What is random is drawn apart from where it is applied: processes
that hold slices of the same micro-batch take the same draw, each with the partners of its own slice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Optional

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class MixBox:
    """The rectangle that CutMix takes from the partner: rows top to bottom - 1, columns left to right - 1."""

    top: int
    bottom: int
    left: int
    right: int


@dataclass(frozen=True)
class Mix:
    """How a micro-batch is blended.

    Args:
        lam: weight of the own image and target, 0 to 1; the partner has the rest. With a box it is the share of the
            pixels that are left of the own image.
        box: CutMix with this box; None: Mixup.
    """

    lam: float = 1.0
    box: Optional[MixBox] = None


NO_MIX = Mix()


def draw_mix(
    rng: np.random.Generator,
    size: int,
    mixup_alpha: float = 0.8,
    cutmix_alpha: float = 1.0,
    switch_prob: float = 0.5,
    prob: float = 1.0,
) -> Mix:
    """Draws how one micro-batch is blended.

    Args:
        rng: source of randomness.
        size: height and width of the images, S.
        mixup_alpha: the weight is drawn from Beta(alpha, alpha); 0 switches Mixup off.
        cutmix_alpha: the same for CutMix.
        switch_prob: how often it is CutMix, if both are on.
        prob: how often there is blending at all.

    Returns:
        ``NO_MIX`` if there is none. The box of CutMix is square, of area 1 - lambda, around a point anywhere in the
        image; it is cut off at the borders, and lambda corrected for what is left.
    """
    chance, switch = rng.random(2).tolist()
    if chance >= prob or (mixup_alpha <= 0.0 and cutmix_alpha <= 0.0):
        return NO_MIX
    cut = cutmix_alpha > 0.0 and (mixup_alpha <= 0.0 or switch < switch_prob)
    alpha = cutmix_alpha if cut else mixup_alpha
    lam = float(rng.beta(alpha, alpha))
    if not cut:
        return Mix(lam)
    row, column = rng.integers(0, size, 2).tolist()
    return mix_of_box(mix_box(size, lam, row, column), size)


def mix_box(size: int, lam: float, row: int, column: int) -> MixBox:
    """The square of area (1 - lambda) S^2 around a pixel, in whole pixels, cut off at the borders.

    Its half side is rounded down (so an odd side becomes even), as in the reference implementations.
    """
    half = int(size * math.sqrt(1.0 - lam)) // 2
    return MixBox(
        max(row - half, 0), min(row + half, size), max(column - half, 0), min(column + half, size)
    )


def mix_of_box(box: MixBox, size: int) -> Mix:
    """CutMix with a box: lambda is the share of the S x S pixels outside it."""
    area = (box.bottom - box.top) * (box.right - box.left)
    return Mix(1.0 - area / (size * size), box)


def mix_pixels(
    pixels: npt.NDArray[np.uint8], partners: npt.NDArray[np.uint8], mix: Mix
) -> npt.NDArray[np.uint8]:
    """Images blended with their partners': uint8 ``[n, 3, S, S]``; the inputs stay as they are.

    Mixup is rounded to the nearest value; CutMix takes the box from the partner.
    """
    if mix == NO_MIX:
        return pixels
    if mix.box is None:
        blend = mix.lam * pixels.astype(np.float32) + (1.0 - mix.lam) * partners.astype(np.float32)
        return np.rint(blend).astype(np.uint8)
    box = mix.box
    mixed = pixels.copy()
    inside = (..., slice(box.top, box.bottom), slice(box.left, box.right))
    mixed[inside] = partners[inside]
    return mixed
