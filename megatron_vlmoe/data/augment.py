"""Image augmentation as BEiT's: random resized crop, flip, colour jitter; drawn before decoding."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from megatron_vlmoe.config.errors import DataError

RATIO = (3.0 / 4.0, 4.0 / 3.0)
"""Range of the aspect ratio (width / height) of a random crop."""

_CROP_ATTEMPTS = 10


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
    ratio: tuple[float, float] = RATIO,
) -> CropBox:
    """Draws the box of a random resized crop (Inception, arXiv 1409.4842; as torchvision's).

    The area is uniform in ``scale`` times the image's, the aspect ratio log-uniform in ``ratio``.
    If ten draws do not fit, the largest central box with an allowed ratio is taken.
    """
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for draw in rng.random((_CROP_ATTEMPTS, 4)).tolist():
        area = width * height * (scale[0] + draw[0] * (scale[1] - scale[0]))
        aspect = math.exp(log_low + draw[1] * (log_high - log_low))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(draw[2] * (width - w + 1)), int(draw[3] * (height - h + 1))
            return CropBox(left, top, w, h)
    w, h = width, height
    if width < ratio[0] * height:
        h = max(1, round(width / ratio[0]))
    elif width > ratio[1] * height:
        w = max(1, round(height * ratio[1]))
    return CropBox((width - w) // 2, (height - h) // 2, w, h)


def apply_crop(
    image: Image.Image,
    box: CropBox,
    size: int,
    flip: bool = False,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> Image.Image:
    """The box of an image, resized to ``size`` x ``size`` and mirrored left to right if asked.

    Raises:
        ValueError: the box is not inside the image.
    """
    right, bottom = box.left + box.width, box.top + box.height
    if box.left < 0 or box.top < 0 or right > image.width or bottom > image.height:
        raise ValueError(f"{box} is not inside an image of {image.width}x{image.height}")
    crop = image
    if (box.width, box.height) != image.size:
        crop = image.crop((box.left, box.top, right, bottom))
    view = crop.resize((size, size), resample)
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

    Args:
        data: an encoded image.
        where: names the dataset and the document in errors.

    Raises:
        DataError: not an image, or one so large that it may be a decompression bomb.
    """
    try:
        image = Image.open(io.BytesIO(data if isinstance(data, bytes) else data.data))
    except Image.DecompressionBombError as error:
        raise DataError(f"{where}: {error}") from error
    except (OSError, ValueError, SyntaxError, TypeError) as error:
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
    except (OSError, ValueError, SyntaxError, TypeError, IndexError) as error:
        raise DataError(f"{where}: damaged image ({error})") from error


def decode_image(data: bytes | npt.NDArray[np.uint8], where: str) -> Image.Image:
    """Decodes an encoded image to RGB.

    Args:
        data: an encoded image.
        where: names the dataset and the document in errors.

    Raises:
        DataError: not an image, a damaged one, or a decompression bomb.
    """
    return decode_pixels(open_image(data, where), where)


def views(
    image: Image.Image,
    draw: ImageDraw,
    sizes: Sequence[int],
    resample: Image.Resampling = Image.Resampling.BICUBIC,
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
            view = apply_jitter(apply_crop(image, draw.box, size, draw.flip, resample), draw.jitter)
            view = then(view)
            # Pillow writes one plane at a time faster than numpy transposes.
            planes = bytearray().join(view.tobytes("raw", band) for band in "RGB")
            made[size] = np.frombuffer(planes, dtype=np.uint8).reshape(3, size, size)
    return [made[size] for size in sizes]
