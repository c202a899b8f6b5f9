"""Raw image-caption pairs: one reader per layout, chosen by name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_vlmoe.data.errors import DataError
from megatron_vlmoe.data.readers.file_kinds import DAMAGE, check_characters, open_binary
from megatron_vlmoe.data.readers.records import (
    CaptionedImage,
    ImageFile,
    Reject,
    check_inputs,
    is_image,
    walk_files,
)


@dataclass(frozen=True)
class PairInput:
    """Which files, and how to read them.

    Attributes:
        format: a key of `PAIR_READERS`.
        annotations: annotation files (for ``webdataset`` tars, or folders of them).
        images: folder of the images; not needed where the annotation files hold them.
        splits: for ``karpathy`` the values of ``split`` to take.
        image_key: for ``jsonl`` and ``parquet`` the key of the image; None: the usual ones.
        caption_key: for these and ``webdataset`` JSON the key of the caption or captions.
    """

    format: str
    annotations: tuple[str, ...]
    images: str | None = None
    splits: tuple[str, ...] = ("train", "restval")
    image_key: str | None = None
    caption_key: str | None = None

    def image_folder(self) -> str:
        """The folder of the images. Raises DataError if there is none."""
        if self.images is None:
            raise DataError(f"--format {self.format} needs --images")
        if not os.path.isdir(self.images):
            raise DataError(f"{self.images}: not a folder of images")
        return self.images

    def image(self, annotations: str, record: str, name: str) -> ImageFile:
        """The image ``name``, relative to the folder of the images."""
        return ImageFile(annotations, record, os.path.join(self.images or "", name))


PairReader = Callable[[PairInput], Iterator[CaptionedImage | Reject]]

CAPTION_KEYS = ("caption", "captions", "text")


def load_json(path: str) -> Any:
    """Parses a whole JSON file, compressed or not; memory is several times its size.

    Raises:
        DataError: unreadable, binary, invalid UTF-8 or invalid JSON; names the line.
    """
    try:
        check_characters(path)
        with open_binary(path) as file:
            return json.loads(file.read().decode("utf-8-sig"))
    except DAMAGE as error:
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: invalid JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: invalid UTF-8 at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: invalid JSON: {error}") from error


def json_list(path: str, value: Any, what: str) -> list[Any]:
    """``value`` if it is a list. Raises DataError naming the file and what it should be."""
    if not isinstance(value, list):
        raise DataError(f"{path}: {what} is missing or not a list")
    return value


def json_object(path: str) -> dict[str, Any]:
    """`load_json` of a file that holds an object. Raises DataError."""
    value = load_json(path)
    if not isinstance(value, dict):
        raise DataError(f"{path}: not a JSON object")
    return value


def as_captions(value: object) -> tuple[object, ...]:
    """One caption or a list of them, as a tuple."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def find_key(record: Mapping[str, Any], wanted: str | None, usual: tuple[str, ...]) -> str | None:
    """``wanted``, or else the first of the usual keys, if the record has it."""
    return next((key for key in ((wanted,) if wanted else usual) if key in record), None)


def images_by_name(folder: str, key: Callable[[str], str]) -> dict[str, list[str]]:
    """Paths of all images under a folder by ``key(file name)``; holds every path in memory."""
    found: dict[str, list[str]] = {}
    for path in walk_files(folder):
        if is_image(path):
            found.setdefault(key(os.path.basename(path)), []).append(path)
    return found


def read_pairs(source: PairInput) -> Iterator[CaptionedImage | Reject]:
    """Yields the images of a corpus with their captions, in the order of the annotations.

    Raises:
        DataError: an unknown format, a missing file, or annotations of another layout.
    """
    from megatron_vlmoe.data.readers.pair_formats import PAIR_READERS

    if source.format not in PAIR_READERS:
        raise DataError(f"unknown format {source.format!r}: one of {', '.join(PAIR_READERS)}")
    check_inputs(source.annotations)
    return PAIR_READERS[source.format](source)
