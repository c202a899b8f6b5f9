"""Image files to pixels: which are read. What orientation, transparency and more than 8 bits mean is decided once.

Those rules travel with an export, which must read images as training does: convert/hf/images_vlmoe.py has them.
Tools that read image files, `predict` and `VLMoE` all go through this module. Images of an indexed dataset, about
which all this was decided when they were stored, are read by `augment.open_image`.
"""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from megatron_vlmoe.config.errors import ConfigError, DataError
from megatron_vlmoe.convert.hf.images_vlmoe import GreyRangeError, load_pixels, on_ground, turned

EXIF = ("turn", "keep")
"""What to do with the orientation that a file gives: turn the picture upright, or leave it."""
ALPHA = ("white", "black", "drop")
"""Ground of transparent pixels; ``drop`` takes the colours that files have under them."""

# Not every format that Pillow knows: its EPS reader, for one, starts Ghostscript. TGA is the last
# to be tried because it has no signature.
_READ_FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "HEIF", "JPEG2000", "ICO", "PCX"),
    *("PSD", "QOI", "SGI", "TGA"),
)
HEADER_BYTES = 32
"""So much of a file tells most formats apart."""
_HEIF_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})

# libjpeg keeps the coefficients of a progressive JPEG, 3 bytes a pixel and more, whatever the size
# at which it decodes.
_LARGE_JPEG = 3


@dataclass(frozen=True)
class ImageRules:
    """What becomes of an image's orientation and transparency.

    Args:
        exif: one of `EXIF`.
        alpha: one of `ALPHA`.

    Raises:
        ValueError: another value.
    """

    exif: str = "turn"
    alpha: str = "white"

    def __post_init__(self) -> None:
        for name, value, known in (("exif", self.exif, EXIF), ("alpha", self.alpha, ALPHA)):
            if value not in known:
                raise ConfigError(
                    f"{name}={value!r} must be {', '.join(known[:-1])} or {known[-1]}"
                )


DEFAULT_RULES = ImageRules()


@contextlib.contextmanager
def quiet_pillow() -> Iterator[None]:
    """Inside, Pillow's decompression bomb warning is an error and its others are silent."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


@contextlib.contextmanager
def decoding_errors() -> Iterator[None]:
    """Makes whatever Pillow raises inside a DataError with the reason alone."""
    try:
        yield
    except DataError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DataError(f"decompression bomb: {error}") from error
    except MemoryError as error:
        raise DataError("corrupt image: does not fit into memory") from error
    except Exception as error:
        # Pillow's decoders raise many types on damaged files: OSError, SyntaxError, struct.error,
        # ValueError, IndexError, ...; no code of ours but the conversions runs in this block.
        raise DataError(f"corrupt image: {error}") from error


def read_image_file(data: bytes, rules: ImageRules = DEFAULT_RULES) -> Image.Image:
    """The pixels of an encoded image in RGB: its first frame, upright, 8 bits, on its ground.

    A JPEG of more than `PIL.Image.MAX_IMAGE_PIXELS` is decoded at half its size.

    Raises:
        DataError: not an image, truncated or corrupt, or a decompression bomb (the reason alone).
    """
    with quiet_pillow(), decoding_errors():
        image = open_image_file(data)
        if is_large(image):
            image.draft(None, (image.width // 2, image.height // 2))
        return rgb_pixels(image, rules)


def open_image_file(data: bytes) -> Image.Image:
    """Reads the header of an encoded image; call it, and what follows, inside `quiet_pillow` and `decoding_errors`.

    Only a JPEG may be large (`is_large`): it is to be decoded at a part of its size, by ``draft``.
    """
    if data.startswith(b"\xff\xd8\xff"):
        # Not by Image.open: it counts the pixels before draft() can make them few. Of an MPO,
        # a JPEG with further pictures behind it, this is the first.
        jpeg = JpegImageFile(io.BytesIO(data))
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and jpeg.width * jpeg.height > _LARGE_JPEG * limit:
            size = f"{jpeg.width}x{jpeg.height} pixels, more than {_LARGE_JPEG * limit}"
            raise DataError(f"decompression bomb: a JPEG of {size}")
        return jpeg
    brand = data[8:12] if data[4:8] == b"ftyp" else b""
    if brand in _HEIF_BRANDS:
        with contextlib.suppress(ImportError):
            from pillow_heif import register_heif_opener

            register_heif_opener()
    Image.init()
    formats = [name for name in _READ_FORMATS if name in Image.OPEN]
    try:
        return Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError as error:
        if brand in _HEIF_BRANDS and "HEIF" not in formats:
            raise DataError(
                "HEIC, which is read where pillow-heif is installed (pip install pillow-heif)"
            ) from error
        if brand in (b"avif", b"avis"):
            raise DataError("a damaged AVIF, or one that this Pillow does not read") from error
        raise DataError("not an image of a known format" if data else "empty file") from error


def begins_like_image(head: bytes) -> bool:
    """Whether a file of which these are the first `HEADER_BYTES` may be an image of a format that is read here."""
    Image.init()
    accepts = (Image.OPEN[name][1] for name in _READ_FORMATS if name in Image.OPEN)
    # A format of the ISO family says which one it is too late for this; TGA has no signature.
    return head[4:8] == b"ftyp" or any(accept(head) for accept in accepts if accept is not None)


def is_image_data(data: bytes) -> bool:
    """Whether the header of a file is that of an image of a format that is read here."""
    try:
        with quiet_pillow(), decoding_errors(), open_image_file(data):
            return True
    except DataError:
        return False


def is_large(image: Image.Image) -> bool:
    """Whether an image has more pixels than Pillow, and training, take for one of good faith."""
    limit = Image.MAX_IMAGE_PIXELS
    return limit is not None and image.width * image.height > limit


def rgb_pixels(image: Image.Image, rules: ImageRules = DEFAULT_RULES) -> Image.Image:
    """The pixels of an opened image, of a file or not, in RGB."""
    way = load_pixels(image, rules.exif)
    return turned(to_rgb(image, rules.alpha), way)


def is_transparent(image: Image.Image) -> bool:
    """Whether any pixel of a loaded image is not fully opaque."""
    if not image.has_transparency_data:
        return False
    if image.mode == "La":
        image = image.convert("LA")
    lowest, _ = image.convert("RGBA").getchannel("A").getextrema()
    return bool(lowest != 255)


def to_rgb(image: Image.Image, alpha: str = DEFAULT_RULES.alpha) -> Image.Image:
    """A new image of a loaded one in RGB, 8 bits, its transparent pixels on the ground that ``alpha`` names.

    Integers of more than 8 bits count from black, 0, to white, 65535, whatever the largest of them is. Floats within
    0 to 1 count from 0 to 1, others from 0 to 255.

    Raises:
        DataError: integers or floats that are outside this range, or not finite.
    """
    try:
        rgb = on_ground(image, alpha)
    except GreyRangeError as error:
        if not (math.isfinite(error.low) and math.isfinite(error.high)):
            raise DataError("corrupt image: floats that are not finite") from error
        found = f"grey values from {error.low:g} to {error.high:g}"
        raise DataError(f"{found}, not within {error.known}") from error
    return rgb.copy() if rgb is image else rgb
