"""Image augmentation, drawn apart from where it is applied: what is random is known before an image is decoded.

Every view has BEiT's random resized crop, flip and colour jitter. Fine-tuning adds RandAugment (arXiv 1909.13719) in
one of two recipes, and random erasing (arXiv 1708.04896). Both recipes draw two operations with replacement and apply
each with probability 1/2; strengths are on a scale of 0 to 10, directions are a coin's.

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

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Optional

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance, ImageOps

from megatron_vlmoe.config.errors import DataError


@dataclass(frozen=True)
class CropBox:
    """A rectangle in pixels of the stored image."""

    left: int
    top: int
    width: int
    height: int

    @classmethod
    def whole(cls, width: int, height: int) -> CropBox:
        """The box of a whole image."""
        return cls(0, 0, width, height)


Jitter = tuple[tuple[str, float], ...]
"""Colour changes in the order in which they are applied: (``brightness`` | ``contrast`` | ``saturation``, factor)."""
NO_JITTER: Jitter = ()


@dataclass(frozen=True)
class ImageDraw:
    """Everything that is random about one view of an image."""

    box: CropBox
    flip: bool = False
    jitter: Jitter = NO_JITTER


def draw_crop(
    width: int,
    height: int,
    rng: np.random.Generator,
    scale: tuple[float, float] = (0.2, 1.0),
) -> CropBox:
    """Draws the box of a random resized crop (Inception, arXiv 1409.4842; as torchvision's).

    The area is uniform in ``scale`` times the image's, the aspect ratio (width / height) log-uniform in 3/4 to 4/3.
    If ten draws do not fit, the largest central box with an allowed ratio is taken.
    """
    narrowest, widest = 3.0 / 4.0, 4.0 / 3.0
    log_low, log_high = math.log(narrowest), math.log(widest)
    for draw in rng.random((10, 4)).tolist():
        area = width * height * (scale[0] + draw[0] * (scale[1] - scale[0]))
        aspect = math.exp(log_low + draw[1] * (log_high - log_low))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(draw[2] * (width - w + 1)), int(draw[3] * (height - h + 1))
            return CropBox(left, top, w, h)
    w, h = width, height
    if width < narrowest * height:
        h = max(1, round(width / narrowest))
    elif width > widest * height:
        w = max(1, round(height * widest))
    return CropBox((width - w) // 2, (height - h) // 2, w, h)


def apply_crop(image: Image.Image, box: CropBox, size: int, flip: bool = False) -> Image.Image:
    """The box of an image, resized (bicubic) to ``size`` x ``size`` and mirrored left to right if asked.

    Raises:
        ValueError: the box is not inside the image.
    """
    right, bottom = box.left + box.width, box.top + box.height
    if box.left < 0 or box.top < 0 or right > image.width or bottom > image.height:
        raise ValueError(f"{box} is not inside an image of {image.width}x{image.height}")
    crop = image
    if (box.width, box.height) != image.size:
        crop = image.crop((box.left, box.top, right, bottom))
    view = crop.resize((size, size), Image.Resampling.BICUBIC)
    return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else view


def draw_jitter(rng: np.random.Generator, strength: float) -> Jitter:
    """Brightness, contrast and saturation, each by a factor in 1 +- strength, in random order."""
    if strength <= 0.0:
        return NO_JITTER
    names = ("brightness", "contrast", "saturation")
    low, high = max(0.0, 1.0 - strength), 1.0 + strength
    factors = (low + (high - low) * rng.random(3)).tolist()
    return tuple((names[i], factors[i]) for i in rng.permutation(3).tolist())


def apply_jitter(image: Image.Image, jitter: Jitter) -> Image.Image:
    """Changes the colours of an RGB image exactly as Pillow's ``ImageEnhance`` would.

    Brightness and contrast act on each value alone, so they are looked up in a table.
    """
    for name, factor in jitter:
        if name == "saturation":
            image = Image.blend(image.convert("L").convert("RGB"), image, factor)
        elif name == "contrast":
            histogram = np.asarray(image.convert("L").histogram(), dtype=np.int64)
            mean = int(histogram @ np.arange(256) / histogram.sum() + 0.5)
            image = image.point(_blend_table(mean, factor) * 3)
        else:
            image = image.point(_blend_table(0, factor) * 3)
    return image


def _blend_table(grey: int, factor: float) -> list[int]:
    """``Image.blend`` of a grey level and each value 0..255, in its float32 arithmetic."""
    values = np.arange(256, dtype=np.float32)
    mixed = np.float32(grey) + np.float32(factor) * (values - np.float32(grey))
    return np.clip(mixed, 0, 255).astype(np.uint8).tolist()


def open_image(data: bytes | npt.NDArray[np.uint8], where: str) -> Image.Image:
    """Reads an image's header: size and mode are known, pixels are not decoded yet.

    ``where`` names the dataset and the document in errors.

    Raises:
        DataError: not an image, or one so large that it may be a decompression bomb.
    """
    try:
        image = Image.open(io.BytesIO(data if isinstance(data, bytes) else data.data))
    except Image.DecompressionBombError as error:
        raise DataError(f"{where}: {error}") from error
    except Exception as error:  # Pillow's plug-ins raise many types: image_files.decoding_errors
        raise DataError(f"{where}: not a readable image") from error
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise DataError(f"{where}: {image.width}x{image.height} pixels, more than {limit}")
    return image


def decode_pixels(image: Image.Image, where: str) -> Image.Image:
    """Decodes an opened image to RGB. Raises DataError, naming ``where``, if it is damaged."""
    try:
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:
        raise DataError(f"{where}: damaged image ({error})") from error


def decode_image(data: bytes | npt.NDArray[np.uint8], where: str) -> Image.Image:
    """Decodes an encoded image to RGB. Raises DataError: see `open_image` and `decode_pixels`."""
    return decode_pixels(open_image(data, where), where)


def views(
    image: Image.Image,
    draw: ImageDraw,
    sizes: Sequence[int],
    then: Callable[[Image.Image], Image.Image] = lambda image: image,
) -> list[npt.NDArray[np.uint8]]:
    """Aligned views of one decoded image: the same box, flip and jitter at several sizes, `then` further changes.

    Jitter is applied to the resized crop, not, as in BEiT, to the whole image before it: the result
    differs mainly in the grey level around which contrast changes, and costs a third.

    Returns:
        One uint8 array ``[3, size, size]`` for each of ``sizes``.
    """
    made: dict[int, npt.NDArray[np.uint8]] = {}
    for size in sizes:
        if size not in made:
            crop = apply_crop(image, draw.box, size, draw.flip)
            view = then(apply_jitter(crop, draw.jitter))
            # Pillow writes one plane at a time faster than numpy transposes.
            planes = bytearray().join(view.tobytes("raw", band) for band in "RGB")
            made[size] = np.frombuffer(planes, dtype=np.uint8).reshape(3, size, size)
    return [made[size] for size in sizes]


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


def draw_rand_augment(rng: np.random.Generator, recipe: str, size: int) -> tuple[Operation, ...]:
    """Draws the operations of one of ``RECIPES`` for an image of this height and width.

    Returns:
        None, one or two operations, in the order of their application.

    Raises:
        ValueError: unknown recipe.
    """
    if recipe not in RECIPES:
        raise ValueError(f"RandAugment recipe {recipe!r} is none of {', '.join(RECIPES)}")
    names = _VL_OPERATIONS if recipe == "vl" else _IMAGENET_OPERATIONS
    chosen = rng.integers(0, len(names), 2).tolist()
    chances = rng.random((2, 2)).tolist()
    noise = rng.standard_normal(2).tolist()
    drawn: list[Operation] = []
    for index, (chance, coin), deviation in zip(chosen, chances, noise, strict=True):
        if chance >= 0.5:
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
        image = _apply_operation(image, name, magnitude)
    return image


def _apply_operation(image: Image.Image, name: str, magnitude: float) -> Image.Image:
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
        case "rotate":
            return image.rotate(magnitude, Image.Resampling.BILINEAR, fillcolor=FILL)
    # Pixel (x, y) is taken from (a x + b y + c, d x + e y + f) of the image.
    matrices = {
        "shear_x": (1, magnitude, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, magnitude, 1, 0),
        "translate_x": (1, 0, magnitude, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, magnitude),
    }
    if name not in matrices:
        raise ValueError(f"unknown RandAugment operation {name!r}")
    matrix, bilinear = matrices[name], Image.Resampling.BILINEAR
    return image.transform(image.size, Image.Transform.AFFINE, matrix, bilinear, fillcolor=FILL)


@dataclass(frozen=True)
class Erase:
    """A rectangle that is overwritten with noise of this seed, which is thereby fixed before the image is decoded."""

    box: CropBox
    seed: int


def draw_erase(rng: np.random.Generator, size: int, probability: float = 0.25) -> Optional[Erase]:
    """Draws the rectangle to erase from a square image; None with a probability of 1 - ``probability``.

    The area is uniform in 2 % to 33 % of the image's, the aspect ratio log-uniform in 0.3 to 1 / 0.3. If ten draws do
    not fit, nothing is erased either.
    """
    chance = rng.random()
    seed = int(rng.integers(0, 1 << 63))
    draws = rng.random((10, 4)).tolist()
    if chance >= probability:
        return None
    smallest, largest = 0.02, 1.0 / 3.0
    low, high = math.log(0.3), math.log(1.0 / 0.3)
    for share, aspect, x, y in draws:
        area = size * size * (smallest + share * (largest - smallest))
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
