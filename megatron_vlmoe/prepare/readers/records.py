"""What readers yield: text blocks, images, image-caption pairs, and rejects."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_vlmoe.config.errors import DataError

IMAGE_SUFFIXES = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
        *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".tga"),
    }
)
"""Files with these are images or broken ones; others are if their contents say so."""
TAR_SUFFIXES = (
    *(".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4"),
)
"""The last two are refused by name."""


@dataclass(frozen=True, slots=True)
class Reject:
    """A record that cannot be used."""

    source: str
    """File (or folder of images) that holds the record."""
    record: str
    """The record in it, as ``line 12`` or the name of a tar member."""
    reason: str
    unit: Literal["record", "image", "caption"] = "record"
    """What is left out: a record that cannot be read; or, of captioned images, an image with its
    captions, or one caption alone."""
    records: int = 1
    """Records of the input that say it; 0 for a caption of an image that is counted elsewhere."""
    captions: int = 0
    """Captions that are left out with an image or record."""
    sample: str = ""
    """Id of the task's sample that is lost with it; empty if none is, or it has no id."""

    def __str__(self) -> str:
        place = f"{self.source}: {self.record}" if self.record else self.source
        return f"{place}: {self.reason}"


LARGEST_FILE = 1 << 30
"""Bytes of an image or caption; what is longer is none, and would fill the memory."""

Row = Mapping[str, Any]
"""What a record says, by name."""
Rows = Iterator[tuple[str, Row] | Reject]
"""The records of a file, each with its name."""


def decoded(data: bytes, encoding: str = "utf-8") -> str:
    """The text of some bytes. Raises DataError with the reason alone."""
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(f"invalid UTF-8 at byte {error.start}") from error


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A good record or sample that nobody asked for."""

    reason: str
    """As ``split test``."""


@dataclass(frozen=True, slots=True)
class PassedOver:
    """A file among images that is none that is read here."""

    source: str
    """Folder or tar that holds it."""
    kind: str
    """Its suffix in lower case with the dot."""


def kinds_of(files: Mapping[PassedOver, int]) -> dict[str, int]:
    """How many files of which kind were passed over."""
    kinds: Counter[str] = Counter()
    for file, count in files.items():
        kinds[file.kind] += count
    return dict(sorted(kinds.items()))


def passed_over_line(kinds: Mapping[str, int]) -> str:
    """As ``passed over: .heic 3, .txt 1``."""
    return f"passed over: {', '.join(f'{kind} {count}' for kind, count in kinds.items())}"


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


def _open_at_once(path: str, flags: int) -> int:
    # Of a named pipe among images no writer is waited for.
    return os.open(path, flags | os.O_NONBLOCK)


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An encoded image: ``data``, or the file ``path``, or ``size`` bytes of it at ``offset``."""

    source: str
    record: str
    path: str = ""
    offset: int = 0
    size: int | None = None
    data: bytes | None = None

    def read(self, limit: int | None = None) -> bytes:
        """The encoded bytes, or at most ``limit`` of them. Raises DataError (a reason, without the record) if
        unreadable.
        """
        if self.data is not None:
            return self.data[:limit]
        size = self.size if limit is None or self.size is None else min(self.size, limit)
        try:
            with open(self.path, "rb", opener=_open_at_once) as file:
                found = os.fstat(file.fileno())
                # A device that a link leads to may have no end.
                if not stat.S_ISREG(found.st_mode):
                    raise DataError(f"no regular file: {self.path}")
                # Memory for all that is asked for is taken before anything is read.
                there = found.st_size - self.offset
                if size is not None and size > there:
                    raise DataError(f"{self.path} ends inside it")
                if limit is None and (there if size is None else size) > LARGEST_FILE:
                    raise DataError(f"longer than {LARGEST_FILE} bytes: {self.path}")
                file.seek(self.offset)
                data = file.read(next((n for n in (size, limit) if n is not None), -1))
        except FileNotFoundError as error:
            raise DataError(f"no such image file: {self.path}") from error
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error.strerror or error}") from error
        if size is not None and len(data) != size:
            raise DataError(f"{self.path} ends inside it")
        return data


@dataclass(frozen=True, slots=True)
class CaptionedImage:
    """An image and its captions (objects as parsed; checked later, one by one)."""

    source: str
    record: str
    image: ImageFile
    captions: tuple[object, ...]
    caption_records: tuple[str, ...] = ()
    """The record of each caption, where that is not the image's own."""
    captions_per_record: tuple[int, ...] = ()
    """How the captions come in records of the input, in order; empty: all in one."""

    def caption_record(self, number: int) -> str:
        """The name of caption ``number`` (from 0) in errors."""
        if self.caption_records:
            return self.caption_records[number]
        return f"{self.record}, caption {number}"


PairItem = CaptionedImage | Reject | LeftOut
"""What readers of captioned images yield; those of whole folders and tars also `PassedOver`."""


def is_image(name: str) -> bool:
    """Whether a file name has the suffix of an image; hidden files (``._a.jpg``) are none."""
    base = os.path.basename(name)
    return os.path.splitext(base)[1].lower() in IMAGE_SUFFIXES and not base.startswith(".")


_SIDE_NAMES = frozenset(
    {
        *("__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information"),
        *("lost+found", "__pycache__", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"),
    }
)


def is_side_file(path: str) -> bool:
    """Whether a path below the data is hidden, or something that systems, archivers or notebooks put beside data."""
    parts = path.replace("\\", "/").split("/")
    return any(
        (part.startswith(".") and part not in (".", "..")) or part.lower() in _SIDE_NAMES
        for part in parts
    )


def is_tar(name: str) -> bool:
    """Whether a file name has the suffix of a tar archive."""
    return name.lower().endswith(TAR_SUFFIXES)


def check_inputs(paths: tuple[str, ...]) -> None:
    """Raises DataError for the first path that does not exist."""
    for path in paths:
        if not Path(path).exists():
            raise DataError(f"{path}: not found")


def walk_files(folder: str, ancestors: tuple[str, ...] = ()) -> Iterator[str]:
    """Paths of all files under a folder, in sorted order, through symbolic links; without side files.

    Raises DataError if a folder cannot be listed.
    """
    real = os.path.realpath(folder)
    if real in ancestors:  # a link back to a folder that we are in
        return
    try:
        with os.scandir(folder) as entries:
            found = (entry for entry in entries if not is_side_file(entry.name))
            names = sorted((entry.name, entry.is_dir()) for entry in found)
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror}") from error
    for name, is_folder in names:
        path = os.path.join(folder, name)
        if is_folder:
            yield from walk_files(path, (*ancestors, real))
        else:
            yield path


def files_by_name(folder: str) -> dict[str, list[str]]:
    """Paths of all files under a folder by their name; holds every path in memory. Raises DataError."""
    found: dict[str, list[str]] = {}
    for path in walk_files(folder):
        found.setdefault(os.path.basename(path), []).append(path)
    return found
