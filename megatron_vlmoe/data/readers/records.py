"""What readers yield: text blocks, images, image-caption pairs, and rejects."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_vlmoe.data.errors import DataError

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
)
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


@dataclass(frozen=True, slots=True)
class Reject:
    """A record that cannot be used."""

    source: str
    """File (or folder of images) that holds the record."""
    record: str
    """The record in it, as ``line 12`` or the name of a tar member."""
    reason: str

    def __str__(self) -> str:
        place = f"{self.source}: {self.record}" if self.record else self.source
        return f"{place}: {self.reason}"


@dataclass(frozen=True, slots=True)
class TextBlock:
    """Some consecutive documents of one file, or parts of such, not yet decoded."""

    source: str
    unit: str
    """What ``numbers`` count: ``line``, ``row`` or ``entry``."""
    json_key: str | None
    """Each payload is a JSON object with the text under this key; None: it is the text."""
    numbers: list[int]
    payloads: list[bytes]
    join: int = 1
    """So many consecutive payloads are one document; at the end of a block there may be fewer."""


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An encoded image: ``data``, or the file ``path``, or ``size`` bytes of it at ``offset``."""

    source: str
    record: str
    path: str = ""
    offset: int = 0
    size: int | None = None
    data: bytes | None = None

    def read(self) -> bytes:
        """The encoded bytes. Raises DataError (a reason, without the record) if unreadable."""
        if self.data is not None:
            return self.data
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                data = file.read(-1 if self.size is None else self.size)
        except FileNotFoundError as error:
            raise DataError(f"no such image file: {self.path}") from error
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error.strerror}") from error
        if self.size is not None and len(data) != self.size:
            raise DataError(f"{self.path} ends inside it")
        return data


@dataclass(frozen=True, slots=True)
class CaptionedImage:
    """An image and its captions (objects as parsed; checked later, one by one)."""

    source: str
    record: str
    image: ImageFile
    captions: tuple[object, ...]


def is_image(name: str) -> bool:
    """Whether a file name has the suffix of an image; hidden files (``._a.jpg``) are none."""
    base = os.path.basename(name)
    return os.path.splitext(base)[1].lower() in IMAGE_SUFFIXES and not base.startswith(".")


def is_tar(name: str) -> bool:
    """Whether a file name has the suffix of a tar archive."""
    return name.lower().endswith(TAR_SUFFIXES)


def check_inputs(paths: tuple[str, ...]) -> None:
    """Raises DataError for the first path that does not exist."""
    for path in paths:
        if not Path(path).exists():
            raise DataError(f"{path}: not found")


def walk_files(folder: str, ancestors: tuple[str, ...] = ()) -> Iterator[str]:
    """Paths of all files under a folder, in sorted order, through symbolic links.

    Raises:
        DataError: a folder cannot be listed.
    """
    real = os.path.realpath(folder)
    if real in ancestors:  # a link back to a folder that we are in
        return
    try:
        with os.scandir(folder) as entries:
            names = sorted((entry.name, entry.is_dir()) for entry in entries)
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror}") from error
    for name, is_folder in names:
        path = os.path.join(folder, name)
        if is_folder:
            yield from walk_files(path, (*ancestors, real))
        else:
            yield path
