"""What callers give a model, images and texts, made into what evaluation reads of prepared data."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Union

import numpy as np
import numpy.typing as npt
from PIL import Image

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.data.augment import CropBox, ImageDraw, views
from megatron_vlmoe.data.image_files import (
    DEFAULT_RULES,
    ImageRules,
    quiet_pillow,
    read_image_file,
    rgb_pixels,
)
from megatron_vlmoe.prepare.tool import checked_text
from megatron_vlmoe.tokenizers.text import TextTokenizer

Array = npt.NDArray[Any]

UNKNOWN_SHARE = 0.01
"""Texts with a larger share of unknown tokens are warned of."""

# Longer texts would only be cut; vlmoe index-task refuses them too.
MAX_CHARACTERS = 1 << 16


ImageLike = Union[Image.Image, str, Path, bytes, bytearray, memoryview, npt.NDArray[np.uint8]]
"""A Pillow image, a path, the bytes of a file, or pixels ``[H, W, 3]``."""

Images = Union[ImageLike, Sequence[ImageLike]]
Texts = Union[str, Sequence[str]]


class UnknownTextWarning(UserWarning):
    """A text in characters that the tokenizer was trained without."""


class Item(NamedTuple):
    """One image or text with its name in errors."""

    where: str
    value: object


def aligned(**arguments: object) -> tuple[bool, list[list[Item]]]:
    """Arguments of a method as lists of one length: what is no list goes with every item of the others.

    Returns:
        Whether none is a list, and the items of every argument.

    Raises:
        DataError: lists of different lengths.
    """
    lists = {k: v for k, v in arguments.items() if isinstance(v, (list, tuple))}
    lengths = {name: len(values) for name, values in lists.items()}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise DataError(f"lists of different lengths: {counts}")
    count = next(iter(lengths.values()), 1)
    columns = []
    for name, value in arguments.items():
        values = lists.get(name, [value] * count)
        numbered = name in lengths and count > 1
        columns.append(
            [Item(f"{name} {n}" if numbered else name, item) for n, item in enumerate(values)]
        )
    return not lengths, columns


def pixels(images: Sequence[Item], size: int, rules: ImageRules = DEFAULT_RULES) -> Array:
    """Whole images, resized to a square as in evaluation: uint8 ``[n, 3, size, size]``.

    Raises:
        DataError: naming the first image that is missing, damaged, or none at all.
    """
    out = np.empty((len(images), 3, size, size), dtype=np.uint8)
    for number, item in enumerate(images):
        image = read_image(item, rules)
        whole = ImageDraw(CropBox.whole(image.width, image.height))
        out[number] = views(image, whole, [size])[0]
    return out


def read_image(item: Item, rules: ImageRules = DEFAULT_RULES) -> Image.Image:
    """An image in RGB, as vlmoe index-task would store it, but that nothing goes through a JPEG or is shrunk.

    Args:
        item: Pillow image, path, encoded bytes, or uint8 array ``[H, W, 3]``.
        rules: about orientation and transparency; an array has neither.

    Raises:
        DataError: missing, damaged, or of another type.
    """
    where, value = item
    if isinstance(value, np.ndarray):
        if value.dtype != np.uint8 or value.ndim != 3 or value.shape[2] != 3 or not value.size:
            raise DataError(
                f"{where}: an array of {value.dtype} {list(value.shape)} is not uint8 [H, W, 3]"
            )
        return Image.fromarray(np.ascontiguousarray(value))
    if isinstance(value, (str, Path)):
        where = str(value)
        try:
            value = Path(value).read_bytes()
        except FileNotFoundError as error:
            raise DataError(f"{where}: not found") from error
        except (OSError, ValueError) as error:
            raise DataError(f"{where}: {getattr(error, 'strerror', None) or error}") from error
    try:
        if isinstance(value, Image.Image):
            if not value.width or not value.height:
                raise DataError(f"an image of {value.width}x{value.height} pixels")
            with quiet_pillow():
                return rgb_pixels(value, rules)
        if isinstance(value, (bytes, bytearray, memoryview)):
            return read_image_file(bytes(value), rules)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    except Exception as error:
        # Of a file that the caller opened Pillow reads the pixels only now. Types: image_files.decoding_errors.
        raise DataError(f"{where}: damaged image ({error})") from error
    raise DataError(
        f"{where}: expected a Pillow image, path, bytes or array, got {type(value).__name__}"
    )


def tokens(texts: Sequence[Item], tokenizer: TextTokenizer) -> list[Array]:
    """Token ids of texts, tokenized as vlmoe index-task does: without space around them.

    Texts of which the tokenizer does not know more than 1% give one `UnknownTextWarning`.

    Raises:
        DataError: naming the first text that is empty, too long, or no text.
    """
    checked = []
    for where, value in texts:
        try:
            text = checked_text(value, "text", MAX_CHARACTERS)
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f"{where}: invalid Unicode") from error
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        checked.append(text)
    found = [np.asarray(ids, dtype=np.int64) for ids in tokenizer.encode_batch(checked)]
    for item, ids in zip(texts, found, strict=True):
        if not len(ids):
            raise DataError(f"{item.where}: no token in it")
    shares = [unknown_share(ids, tokenizer) for ids in found]
    if poor := [place for place, share in enumerate(shares) if share > UNKNOWN_SHARE]:
        warnings.warn(
            f"{texts[poor[0]].where}: {shares[poor[0]]:.0%} of its tokens are unknown to the text "
            f"tokenizer, so the model does not see what they say ({len(poor)} of {len(texts)} texts)",
            UnknownTextWarning,
            stacklevel=2,
        )
    return found


def unknown_share(ids: Array, tokenizer: TextTokenizer) -> float:
    """Share of ids ``[n]``, n above 0, that are the unknown token."""
    return float(np.mean(ids == tokenizer.unk_id))
