"""RandAugment (arXiv 1909.13719) and random erasing (arXiv 1708.04896); drawn apart from where they are applied.

Two recipes. Both draw two operations with replacement and apply each with probability 1/2; strengths are on a scale
of 0 to 10, directions are a coin's.

``vl`` (VLMo and BEiT-3 for image-text tasks), level 7. Identity; autocontrast; equalize; brightness and sharpness by
    0.1 + 1.8 level / 10 (1.36); shear by 0.3 level / 10 (0.21); translation by level pixels (7) whatever the size of
    the image; rotation by 3 level degrees (21). Nothing that changes hues: captions
    name colours.

``imagenet`` (timm's ``rand-m9-mstd0.5-inc1``, as BEiT-3 for ImageNet), level normal with mean 9 and deviation 0.5,
    cut off at 0 and 10. Autocontrast; equalize; invert; posterize to 4 - floor(0.4 level) bits; solarize from
    256 - floor(25.6 level) on; solarize-add of floor(11 level) to values below 128; colour, contrast, brightness and
    sharpness by 1 +- 0.09 level, at least 0.1; shear and rotation as above; translation by 0.045 level of the image's
    width or height. Differences from timm: at level 10 one bit is kept, where the image would be black; moved images
    are resampled bilinearly, and their edges are filled with mid-grey instead of the mean of ImageNet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance, ImageOps

from megatron_vlmoe.data.augment import CropBox, apply_jitter

Operation = tuple[str, float]
"""Name and magnitude: degrees, pixels, slope, factor, bits, threshold or sum; 0 where there is none."""

RECIPES = ("vl", "imagenet")

FILL = (128, 128, 128)
"""Colour of what moves in from outside the image."""

_VL_OPERATIONS = (
    *("identity", "auto_contrast", "equalize", "brightness", "sharpness"),
    *("shear_x", "shear_y", "translate_x", "translate_y", "rotate"),
)
_IMAGENET_OPERATIONS = (
    *("auto_contrast", "equalize", "invert", "posterize", "solarize", "solarize_add"),
    *("color", "contrast", "brightness", "sharpness"),
    *("shear_x", "shear_y", "translate_x", "translate_y", "rotate"),
)
_NUM_OPERATIONS = 2
_PROBABILITY = 0.5


def draw_rand_augment(rng: np.random.Generator, recipe: str, size: int) -> tuple[Operation, ...]:
    """Draws the operations for one image.

    Args:
        rng: source of randomness.
        recipe: one of ``RECIPES``.
        size: height and width of the image that they will be applied to.

    Returns:
        None, one or two operations, in the order of their application.

    Raises:
        ValueError: unknown recipe.
    """
    if recipe not in RECIPES:
        raise ValueError(f"RandAugment recipe {recipe!r} is none of {', '.join(RECIPES)}")
    names = _VL_OPERATIONS if recipe == "vl" else _IMAGENET_OPERATIONS
    chosen = rng.integers(0, len(names), _NUM_OPERATIONS).tolist()
    chances = rng.random((_NUM_OPERATIONS, 2)).tolist()
    noise = rng.standard_normal(_NUM_OPERATIONS).tolist()
    drawn: list[Operation] = []
    for index, (chance, coin), deviation in zip(chosen, chances, noise, strict=True):
        if chance >= _PROBABILITY:
            continue
        sign = 1.0 if coin < 0.5 else -1.0
        if recipe == "vl":
            magnitude = _vl_magnitude(names[index], 7.0, sign)
        else:
            level = min(10.0, max(0.0, 9.0 + 0.5 * deviation))
            magnitude = _imagenet_magnitude(names[index], level, sign, size)
        drawn.append((names[index], magnitude))
    return tuple(drawn)


def _vl_magnitude(name: str, level: float, sign: float) -> float:
    match name:
        case "brightness" | "sharpness":
            return 0.1 + 0.18 * level
        case "shear_x" | "shear_y":
            return sign * 0.03 * level
        case "translate_x" | "translate_y":
            return sign * level
        case "rotate":
            return sign * 3.0 * level
    return 0.0


def _imagenet_magnitude(name: str, level: float, sign: float, size: int) -> float:
    match name:
        case "posterize":
            return max(1, 4 - math.floor(0.4 * level))
        case "solarize":
            return 256 - math.floor(25.6 * level)
        case "solarize_add":
            return math.floor(11.0 * level)
        case "color" | "contrast" | "brightness" | "sharpness":
            return max(0.1, 1.0 + sign * 0.09 * level)
        case "translate_x" | "translate_y":
            return sign * 0.045 * level * size
    return _vl_magnitude(name, level, sign)


def apply_rand_augment(image: Image.Image, ops: Sequence[Operation]) -> Image.Image:
    """Applies drawn operations to an RGB image; the size stays.

    Raises:
        ValueError: unknown operation.
    """
    for name, magnitude in ops:
        moves = name in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
        image = (_move if moves else _recolour)(image, name, magnitude)
    return image


def _recolour(image: Image.Image, name: str, magnitude: float) -> Image.Image:
    match name:
        case "identity":
            return image
        case "auto_contrast":
            return ImageOps.autocontrast(image)
        case "equalize":
            return ImageOps.equalize(image)
        case "invert":
            return ImageOps.invert(image)
        case "posterize":
            return ImageOps.posterize(image, int(magnitude))
        case "solarize":
            return ImageOps.solarize(image, int(magnitude))
        case "solarize_add":
            table = [min(255, v + int(magnitude)) if v < 128 else v for v in range(256)]
            return image.point(table * 3)
        case "brightness" | "contrast":
            return apply_jitter(image, ((name, magnitude),))
        case "color":
            return apply_jitter(image, (("saturation", magnitude),))
        case "sharpness":
            return ImageEnhance.Sharpness(image).enhance(magnitude)
    raise ValueError(f"unknown RandAugment operation {name!r}")


def _move(image: Image.Image, name: str, magnitude: float) -> Image.Image:
    match name:
        case "rotate":
            return image.rotate(magnitude, Image.Resampling.BILINEAR, fillcolor=FILL)
        case "shear_x":
            return _affine(image, (1, magnitude, 0, 0, 1, 0))
        case "shear_y":
            return _affine(image, (1, 0, 0, magnitude, 1, 0))
        case "translate_x":
            return _affine(image, (1, 0, magnitude, 0, 1, 0))
        case _:
            return _affine(image, (1, 0, 0, 0, 1, magnitude))


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    """Pixel (x, y) is taken from (a x + b y + c, d x + e y + f) of the image."""
    kind = Image.Transform.AFFINE
    return image.transform(image.size, kind, matrix, Image.Resampling.BILINEAR, fillcolor=FILL)


@dataclass(frozen=True)
class Erase:
    """A rectangle that is overwritten with noise.

    Args:
        box: the rectangle.
        seed: of the noise, which is thereby fixed before the image is decoded.
    """

    box: CropBox
    seed: int


_ERASE_ATTEMPTS = 10
_ERASE_AREA = (0.02, 1.0 / 3.0)
_ERASE_LOG_ASPECT = (math.log(0.3), math.log(1.0 / 0.3))


def draw_erase(rng: np.random.Generator, size: int, probability: float = 0.25) -> Optional[Erase]:
    """Draws the rectangle to erase from a square image, or None.

    The area is uniform in 2 % to 33 % of the image's, the aspect ratio log-uniform in 0.3 to 1 / 0.3. If ten draws do
    not fit, nothing is erased.

    Args:
        rng: source of randomness.
        size: height and width of the image.
        probability: how often an image is erased at all.
    """
    chance = rng.random()
    seed = int(rng.integers(0, 1 << 63))
    draws = rng.random((_ERASE_ATTEMPTS, 4)).tolist()
    if chance >= probability:
        return None
    low, high = _ERASE_LOG_ASPECT
    for share, aspect, x, y in draws:
        area = size * size * (_ERASE_AREA[0] + share * (_ERASE_AREA[1] - _ERASE_AREA[0]))
        ratio = math.exp(low + aspect * (high - low))
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < height < size and 0 < width < size:
            left, top = int(x * (size - width + 1)), int(y * (size - height + 1))
            return Erase(CropBox(left, top, width, height), seed)
    return None


def apply_erase(
    pixels: npt.NDArray[np.uint8],
    erase: Optional[Erase],
    mean: Sequence[float],
    std: Sequence[float],
) -> npt.NDArray[np.uint8]:
    """Overwrites the rectangle, pixel by pixel, with noise that is standard normal after normalisation.

    Args:
        pixels: uint8 ``[3, S, S]``; stays as it is.
        erase: what was drawn; None: nothing to do.
        mean: of the normalisation, per channel, of values 0 to 1.
        std: the same.

    Returns:
        uint8 ``[3, S, S]``; noise outside 0 to 255 is clipped.

    Raises:
        ValueError: the rectangle is not inside the image.
    """
    if erase is None:
        return pixels
    box = erase.box
    right, bottom = box.left + box.width, box.top + box.height
    if box.left < 0 or box.top < 0 or right > pixels.shape[2] or bottom > pixels.shape[1]:
        raise ValueError(f"{box} is not inside an image of {pixels.shape[2]}x{pixels.shape[1]}")
    noise = np.random.default_rng(erase.seed).standard_normal((3, box.height, box.width))
    scale, offset = (np.reshape(np.asarray(x, dtype=np.float64), (3, 1, 1)) for x in (std, mean))
    values = np.clip(np.rint(255.0 * (offset + scale * noise)), 0, 255)
    erased = pixels.copy()
    erased[:, box.top : bottom, box.left : right] = values.astype(np.uint8)
    return erased
