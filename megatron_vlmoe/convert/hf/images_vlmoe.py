"""What callers hand over as an image, made into pixels: upright, in RGB, of 8 bits.

Training reads its files by the same rules: data/image_files.py of megatron_vlmoe calls what stands here.

Letters in shapes: H and W sides of an image, C its channels.
"""

from __future__ import annotations

import base64
import io
import os
from typing import Any, Optional
from urllib.request import Request, urlopen

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

ORIENTATION = 0x0112
BITS_PER_SAMPLE = 258
PHOTOMETRIC = 262
# By orientation, what sets an image upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageRefusedError(ValueError):
    """An image that Pillow reads but the model does not take."""


class GreyRangeError(ImageRefusedError):
    """Grey of more than 8 bits whose values, from `low` to `high`, are not all of the range that is `known`."""

    def __init__(self, low: float, high: float, known: str) -> None:
        super().__init__(f"has grey values of {low:g} to {high:g}, not of {known}")
        self.low, self.high, self.known = low, high, known


def read_image(
    image: Any,
    exif: str = "turn",
    alpha: str = "white",
    convert: bool = True,
    timeout: Optional[float] = None,
) -> Image.Image:
    """An image upright, on its ground, in RGB of 8 bits; of an animation the first frame.

    Grey of more bits counts from 0, black, to 65535, white, whatever its largest value (to 4095 in TIFF of 12 bits);
    floating-point grey from 0 to 1 if no value is above 1, else to 255. A file that is a JPEG of more than
    `PIL.Image.MAX_IMAGE_PIXELS` is decoded at half its size.

    Args:
        image: Pillow image, path, URL, bytes of a file, or these in base64 (also as ``data:image/...``).
        exif: "turn" by the orientation in EXIF or XMP, or "keep".
        alpha: ground of transparent pixels, "white" or "black"; "drop" takes the colours under them.
        convert: False refuses what is not RGB without transparency.
        timeout: seconds to wait for a URL; None waits for 60.

    Raises:
        ValueError: not an image, a damaged one, or one that is refused.
    """
    if isinstance(image, Image.Image):
        name = "a Pillow image"
    elif isinstance(image, (bytes, bytearray)):
        name = "an image of bytes"
    elif isinstance(image, (str, os.PathLike)):
        name = f"image {image}" if len(str(image)) < 200 else f"image {str(image)[:100]}..."
    else:
        raise ValueError(f"expected an image, got {type(image).__name__}")
    try:
        return _rgb(_opened(image, timeout), exif, alpha, convert)
    except FileNotFoundError:
        raise ValueError(f"{name} was not found") from None
    except ImageRefusedError as error:
        raise ValueError(f"{name} {error}") from None
    except Exception as error:
        # Pillow raises errors of many types for damaged files.
        raise ValueError(f"{name} is not readable: {error}") from error


def _opened(image: Any, timeout: Optional[float]) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    source, limit = _source(image, timeout), Image.MAX_IMAGE_PIXELS
    try:
        opened = Image.open(source)
    except Image.DecompressionBombError:
        # Pillow counts the pixels before draft() makes them few.
        found = _very_large_jpeg(source)
        if found is None:
            raise
        opened = found
    if limit and opened.width * opened.height > limit and opened.format in ("JPEG", "MPO"):
        opened.draft(None, (opened.width // 2, opened.height // 2))
    return opened


def _very_large_jpeg(source: Any) -> Optional[JpegImageFile]:
    """A JPEG of up to three times Pillow's limit; None for all else."""
    if isinstance(source, io.BytesIO):
        source.seek(0)
    try:
        opened = JpegImageFile(source)
    except SyntaxError:
        return None
    # libjpeg keeps 3 bytes a pixel and more of a progressive JPEG, at whatever size it decodes.
    return opened if opened.width * opened.height <= 3 * (Image.MAX_IMAGE_PIXELS or 0) else None


def _source(image: Any, timeout: Optional[float]) -> Any:
    """What Pillow opens: a path or a file in memory."""
    if isinstance(image, (bytes, bytearray)):
        return io.BytesIO(image)
    if not isinstance(image, str):
        return image
    if image.startswith(("http://", "https://")):
        request = Request(image, headers={"User-Agent": "vlmoe"})
        with urlopen(request, timeout=60 if timeout is None else timeout) as answer:
            return io.BytesIO(answer.read())
    if image.startswith("data:image/"):
        return io.BytesIO(base64.b64decode(image.partition(",")[2]))
    # No image has fewer letters in base64, and few systems have longer names of files.
    if len(image) > 64 and (len(image) > 4096 or not os.path.exists(image)):
        try:
            return io.BytesIO(base64.b64decode("".join(image.split()), validate=True))
        except ValueError:
            pass
    return image


def _rgb(image: Image.Image, exif: str, alpha: str, convert: bool) -> Image.Image:
    if not image.width or not image.height:
        raise ImageRefusedError(f"has {image.width} x {image.height} pixels")
    way = load_pixels(image, exif)
    if not convert and (image.mode != "RGB" or image.has_transparency_data):
        raise ImageRefusedError(f"has mode {image.mode}, not RGB; do_convert_rgb converts it")
    rgb = turned(on_ground(image, alpha), way)
    if rgb is image and orientation(image) > 1:
        rgb = image.copy()
    if rgb is not image:
        # Who gets the image shall not turn it again, or after all.
        rgb.info = {}
    return rgb


def load_pixels(image: Image.Image, exif: str) -> int:
    """Decodes the pixels of an opened image; returns the orientation out of which they must yet be turned, 1 if none.

    `exif` is "turn" or "keep".
    """
    _correct_key(image)
    # Pillow turns a TIFF while it decodes the pixels, and forgets the tag.
    before = orientation(image)
    image.load()
    after = orientation(image)
    if exif == "turn":
        return after
    return {6: 8, 8: 6}.get(before, before) if before != after else 1


def turned(image: Image.Image, way: int) -> Image.Image:
    """The image turned upright out of an EXIF orientation."""
    return image.transpose(TURNS[way]) if way in TURNS else image


def orientation(image: Image.Image) -> int:
    """Orientation by EXIF or XMP, 1 (upright) to 8; 1 if there is none or it is damaged."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:
        # Pillow raises errors of many types for damaged EXIF; the pixels beside it are whole.
        return 1
    return value if isinstance(value, int) and value in TURNS else 1


def _correct_key(image: Image.Image) -> None:
    """Brings the transparent colour of a PNG to 8 bits, as its pixels will be: a file has it in its own bits.

    In the caller's image too: once its pixels are loaded, nothing tells how many bits the file had.
    """
    key = image.info.get("transparency")
    tiles = getattr(image, "tile", None)
    if image.format != "PNG" or key is None or not tiles:
        return
    layout = tiles[0][3]
    if image.mode == "1":
        image.info["transparency"] = 255 if key else 0
    elif layout in ("L;2", "L;4"):
        image.info["transparency"] = int(key) * 255 // (2 ** int(layout[-1]) - 1)
    elif layout == "RGB;16B":
        # Pillow keeps the upper byte.
        image.info["transparency"] = tuple(value >> 8 for value in key)


def on_ground(image: Image.Image, alpha: str) -> Image.Image:
    """A loaded image in RGB of 8 bits, its transparent pixels on the ground that `alpha` names; maybe the same object.

    Raises:
        GreyRangeError: grey of more than 8 bits with a value that has no place in them.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bits(image)
    if image.mode == "La":
        # Premultiplied grey has one way out only.
        image = image.convert("LA")
    if alpha == "drop" or not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    seen = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", seen.size, alpha), seen).convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits, as L, or as LA if one of its values is transparent."""
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    tags = getattr(image, "tag_v2", {})
    white = 65535.0
    if image.mode == "F":
        white = 1.0 if high <= 1 else 255.0
    elif tags.get(BITS_PER_SAMPLE) == (12,):
        white = 4095.0
    # No comparison holds for what is no number.
    if not (low >= 0 and high <= white):
        known = "0 to 1 or 0 to 255" if image.mode == "F" else f"0 to {white:g}"
        raise GreyRangeError(low, high, known)
    grey = to_bytes(values, 255.0 / white)
    if tags.get(PHOTOMETRIC) == 0:
        # White is 0. Pillow minds it where there are 8 bits.
        grey = 255 - grey
    found = Image.fromarray(grey)
    key = image.info.get("transparency")
    if isinstance(key, int):
        found.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return found


def to_bytes(values: np.ndarray, scale: float = 1.0) -> np.ndarray:
    """Values that are of 0..255 after scaling, rounded."""
    return np.rint(values * scale).astype(np.uint8)


def channels_last(image: Any, layout: Optional[str]) -> tuple[np.ndarray, float]:
    """An array or tensor as an array ``[H, W, C]`` or ``[H, W]`` with values of 0..255, and what made them so.

    Bytes stay. Other whole numbers must be of 0..255, but those of 16 bits without sign are divided by 257.
    Floating-point numbers become fp64; where all are of 0..1 they are multiplied by 255; that factor is returned.

    Args:
        image: ``[C, H, W]``, ``[H, W, C]`` or ``[H, W]``, with C of 1, 3 or 4.
        layout: "channels_first" or "channels_last"; None finds it, first where it may be both.

    Raises:
        ValueError: another shape, or other values.
    """
    if hasattr(image, "detach"):
        image = image.detach().cpu()
        image = (image.double() if image.is_floating_point() else image).numpy()
    shape = list(image.shape)
    first, last = ((image.ndim == 3 and shape[axis] in (1, 3, 4)) for axis in (0, -1))
    moved = image.ndim == 3 and (first if layout is None else layout == "channels_first")
    if not image.size or not (first if moved else last or image.ndim == 2):
        forms = {"channels_first": "[1, 3 or 4, H, W]", "channels_last": "[H, W, 1, 3 or 4]"}
        wanted = forms[layout] if layout else " or ".join(forms.values())
        raise ValueError(f"an array {shape} is not an image {wanted} or [H, W]")
    array = image.transpose(1, 2, 0) if moved else image
    return _of_bytes(array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array)


def _of_bytes(array: np.ndarray) -> tuple[np.ndarray, float]:
    if array.dtype == np.uint8:
        return array, 1.0
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255, 1.0
    if array.dtype == np.uint16:
        return to_bytes(array, 255 / 65535), 1.0
    fractions = np.issubdtype(array.dtype, np.floating)
    if not fractions and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"an image of {array.dtype}, not of numbers")
    low, high = array.min(), array.max()
    # No comparison holds for what is no number.
    if not (low >= 0 and high <= 255):
        raise ValueError(
            f"an image of {array.dtype} with values of {low:g} to {high:g}; whole numbers must be of 0 to 255, "
            "floating-point numbers of 0 to 1 or 0 to 255"
        )
    if not fractions:
        return array.astype(np.uint8), 1.0
    scale = 255.0 if high <= 1 else 1.0
    return array.astype(np.float64) * scale, scale
