"""Pictures and captions as a user has them, for the routing explorer: which belong together, and which are taken.

Captions come in every layout of `vlmoe index-pairs` (COCO, Karpathy's splits, JSON lines, tables with column names and
the rest), as lines of a picture's file name, a tab and its caption, or as plain text with one caption per line. Tars,
folders and tables may hold the pictures too.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Optional

import numpy as np

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.prepare.readers.files import file_kind, json_rows, text_lines
from megatron_vlmoe.prepare.readers.images import read_images
from megatron_vlmoe.prepare.readers.pair_formats import PAIR_FORMATS, check_options, with_format
from megatron_vlmoe.prepare.readers.pairs import (
    CAPTION_KEYS,
    CaptionRow,
    PairInput,
    PairItems,
    as_captions,
    find_key,
)
from megatron_vlmoe.prepare.readers.records import (
    ImageFile,
    LeftOut,
    PairItem,
    PassedOver,
    Reject,
    check_inputs,
    is_image,
    kinds_of,
    passed_over_line,
)
from megatron_vlmoe.prepare.tool import checked_text

MAX_CHARACTERS = 1 << 14
"""Longer captions are refused: they would only be cut."""


@dataclass(frozen=True)
class Source:
    """A picture, a caption, or a pair of both, still to be read.

    Args:
        name: of the picture, or the record of a caption alone.
        picture: None for a caption alone.
        caption: the first one of the picture; empty for a picture alone.
    """

    name: str
    picture: Optional[ImageFile]
    caption: str = ""


@dataclass
class Found:
    """What there is, and what was left out of it.

    Attributes:
        sources: in the order of the files.
        left_out: reasons, of records that cannot be used.
        damaged: of those left out, how many are among `sources`, as only their contents show that they are damaged.
        others: good records that nobody asked for, as those of other splits.
        passed_over: files among the pictures that are none; they are not among those found.
    """

    sources: list[Source] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    damaged: int = 0
    others: int = 0
    passed_over: Counter[PassedOver] = field(default_factory=Counter)

    def choose(self, count: int, seed: int) -> list[Source]:
        """At most so many of them, at random, in order."""
        chosen = np.random.default_rng(seed).permutation(len(self.sources))[:count]
        return [self.sources[number] for number in sorted(chosen.tolist())]

    def leave_out(self, reasons: Sequence[str]) -> None:
        """Counts chosen sources that turned out to be damaged as left out, for these reasons."""
        self.damaged += len(reasons)
        self.left_out += reasons

    def line(self, chosen: int) -> str:
        """What became of everything, in one line."""
        good = len(self.sources) - self.damaged
        total = good + len(self.left_out) + self.others
        line = f"{total} found, {chosen} chosen, {good - chosen} not needed"
        if self.others:
            line += f", {self.others} of other splits"
        if self.left_out:
            line += f", {len(self.left_out)} left out (first: {printable(self.left_out[0])})"
        if self.passed_over:
            line += f"; {passed_over_line(kinds_of(self.passed_over))}"
        return line


def printable(text: str) -> str:
    """A text that may have the name of a file in it, as UTF-8 can hold it: no system asks that of file names."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def find_sources(
    images: Optional[str], captions: Optional[str], splits: Optional[tuple[str, ...]] = None
) -> Found:
    """All pictures, captions or pairs of what a user named.

    Args:
        images: folder (or tar) of pictures; None: captions alone are read, or pairs that hold their pictures.
        captions: their file, or a tar or folder of pairs; None: pictures alone are read.
        splits: of a file that has some (Karpathy's); None: those of training.

    Raises:
        DataError: a file that is missing or not recognised, plain text that does not go with the pictures, splits of
            what has none, or nothing that can be used.
    """
    check_inputs(tuple(path for path in (images, captions) if path is not None))
    found = Found()
    if captions is None:
        assert images is not None
        _check_no_splits(images, splits)
        for one in _pictures(images, found):
            if isinstance(one, ImageFile):
                found.sources.append(Source(printable(_picture_name(one)), one))
            else:
                found.left_out.append(str(one))
        return _checked(found, images)
    kind = "folder" if os.path.isdir(captions) else file_kind(captions)
    if images is not None and kind in ("folder", "tar"):
        raise DataError(f"{captions}: a {kind} that has its pictures in it: leave out --images")
    if images is not None or kind in ("folder", "tar", "table"):
        _pairs(images, captions, splits, found)
    else:
        _check_no_splits(captions, splits)
        _captions_alone(captions, kind, found)
    return _checked(found, captions)


def _checked(found: Found, where: str) -> Found:
    if not found.sources:
        raise DataError(f"{where}: nothing in it to read: {found.line(0)}")
    return found


def _check_no_splits(path: str, splits: Optional[tuple[str, ...]]) -> None:
    if splits:
        raise DataError(f"--split {' '.join(splits)}: nothing in {path} names a split")


def _pictures(images: str, found: Found) -> Iterator[ImageFile | Reject]:
    for one in read_images((images,)):
        if isinstance(one, PassedOver):
            found.passed_over[one] += 1
        else:
            yield one


def _picture_name(picture: ImageFile) -> str:
    return picture.record or os.path.basename(picture.path)


def _captions_alone(path: str, kind: str, found: Found) -> None:
    rows: Iterable[tuple[str, tuple[object, ...]] | Reject] = ()
    # COCO's and Karpathy's files may be a single line, which makes them JSON lines of one.
    listed = kind == "jsonl" and next(
        ("images" in row[1] for row in json_rows(path) if not isinstance(row, Reject)), False
    )
    if kind == "text":
        lines = list(_lines(path))
        listed = any(not isinstance(row, Reject) and _named_picture(row[1]) for row in lines)
        rows = (row if isinstance(row, Reject) else (row[0], (row[1],)) for row in lines)
    elif kind == "jsonl":
        rows = _json_captions(path)
    if listed or kind not in ("text", "jsonl"):
        raise DataError(
            f"{path}: without --images, captions are plain text or JSON lines; this layout names "
            "pictures: give their folder with --images"
        )
    for row in rows:
        if isinstance(row, Reject):
            found.left_out.append(str(row))
        else:
            _add(found, row[0], None, [(f"{path}: {row[0]}", caption) for caption in row[1]])


def _named_picture(line: str) -> str:
    """The file name that a line of a picture's name, a tab and its caption begins with; empty for another line."""
    name, tab, _ = line.partition("\t")
    # Flickr30K numbers the captions of a picture.
    name = re.sub(r"#\d+$", "", name.strip())
    return name if tab and is_image(name) else ""


def _lines(path: str) -> Iterator[tuple[str, str] | Reject]:
    for item in text_lines(path):
        if isinstance(item, Reject):
            yield item
        elif item[1].strip():
            yield f"line {item[0]}", item[1]


def _json_captions(path: str) -> Iterator[tuple[str, tuple[object, ...]] | Reject]:
    for row in json_rows(path):
        if isinstance(row, Reject):
            yield row
            continue
        key = find_key(row[1], None, CAPTION_KEYS)
        if key is None:
            yield Reject(path, row[0], f"no key {' or '.join(CAPTION_KEYS)}")
        else:
            yield row[0], as_captions(row[1][key])


def _pairs(
    images: Optional[str], captions: str, splits: Optional[tuple[str, ...]], found: Found
) -> None:
    source = PairInput("auto", (captions,), images)
    items: Iterable[PairItem | PassedOver]
    try:
        source = with_format(source)
    except DataError as error:
        kind = "" if images is None else file_kind(captions)
        rows = list(_lines(captions)) if kind in ("text", "delimited") else []
        named = any(not isinstance(row, Reject) and _named_picture(row[1]) for row in rows)
        # A table without known columns is no plain text.
        if images is None or not rows or not (named or kind == "text"):
            raise error
        _check_no_splits(captions, splits)
        if not named:
            _in_order(images, captions, rows, found)
            return
        items = PairItems(source).grouped(_named_lines(captions, rows))
    else:
        source = replace(source, splits=splits)
        check_options(source)
        items = PAIR_FORMATS[source.format].read(source)
    for item in items:
        if isinstance(item, Reject):
            found.left_out.append(str(item))
        elif isinstance(item, LeftOut):
            found.others += 1
        elif isinstance(item, PassedOver):
            found.passed_over[item] += 1
        else:
            said = [
                (f"{item.source}: {item.caption_record(number)}", caption)
                for number, caption in enumerate(item.captions)
            ]
            name, file = _picture_name(item.image), item.image
            # Of a tar the path is that of the tar.
            if images is not None and file.path and file.size is None:
                name = os.path.relpath(file.path, images)
            _add(found, name, file, said)


def _named_lines(path: str, rows: list[tuple[str, str] | Reject]) -> Iterator[CaptionRow | Reject]:
    for row in rows:
        if isinstance(row, Reject):
            yield row
        elif name := _named_picture(row[1]):
            caption = row[1].partition("\t")[2]
            yield CaptionRow(path, f"{row[0]} ({name})", name, (caption,))
        else:
            yield Reject(path, row[0], "not a picture's file name, a tab and its caption")


def _in_order(
    images: str, captions: str, rows: list[tuple[str, str] | Reject], found: Found
) -> None:
    """Plain text: the first line is of the first picture by name."""
    pictures = list(_pictures(images, found))
    if len(pictures) != len(rows):
        raise DataError(
            f"{captions}: {len(rows)} lines of plain text for {len(pictures)} pictures in {images}; as many "
            "would be paired in order of file names. Put the file name and a tab before each caption, or leave "
            "out --images to read the captions alone"
        )
    for picture, row in zip(pictures, rows):
        if isinstance(picture, Reject) or isinstance(row, Reject):
            found.left_out.append(str(picture if isinstance(picture, Reject) else row))
        else:
            _add(found, _picture_name(picture), picture, [(f"{captions}: {row[0]}", row[1])])


def _add(
    found: Found, name: str, picture: Optional[ImageFile], captions: list[tuple[str, object]]
) -> None:
    """Adds what a record says with the first caption that can be used; without one it is left out."""
    reason = f"{name}: no caption"
    for where, caption in captions:
        try:
            text = checked_text(caption, "caption", MAX_CHARACTERS)
            # Half of a surrogate pair cannot be tokenized.
            text.encode("utf-8")
        except UnicodeEncodeError:
            reason = f"{where}: invalid Unicode"
        except DataError as error:
            reason = f"{where}: {error}"
        else:
            found.sources.append(Source(printable(name), picture, text))
            return
    found.left_out.append(reason)
