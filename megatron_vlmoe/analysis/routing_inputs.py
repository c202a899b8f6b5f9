"""Pictures and captions as a user has them, for the routing explorer: which belong together, and which are taken.

Captions come in every layout of `vlmoe index-pairs` (COCO, Karpathy's splits, JSON lines, tables with column names and
the rest), as lines of a picture's file name, a tab and its caption, or as plain text with one caption per line.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Optional

import numpy as np

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.prepare.readers.files import file_kind, json_rows, text_lines
from megatron_vlmoe.prepare.readers.images import read_images
from megatron_vlmoe.prepare.readers.pair_formats import PAIR_FORMATS, with_format
from megatron_vlmoe.prepare.readers.pairs import (
    CAPTION_KEYS,
    CaptionRow,
    PairInput,
    PairItems,
    as_captions,
    find_key,
)
from megatron_vlmoe.prepare.readers.records import (
    CaptionedImage,
    ImageFile,
    LeftOut,
    PairItem,
    PassedOver,
    Reject,
    check_inputs,
    is_image,
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
        others: good records that nobody asked for, as those of other splits.
    """

    sources: list[Source] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    others: int = 0

    def choose(self, count: int, seed: int) -> list[Source]:
        """At most so many of them, at random, in order."""
        chosen = np.random.default_rng(seed).permutation(len(self.sources))[:count]
        return [self.sources[number] for number in sorted(chosen.tolist())]

    def line(self, chosen: int) -> str:
        """What became of everything, in one line."""
        total = len(self.sources) + len(self.left_out) + self.others
        line = f"{total} found, {chosen} chosen, {len(self.sources) - chosen} not needed"
        if self.others:
            line += f", {self.others} of other splits"
        if self.left_out:
            line += f", {len(self.left_out)} left out (first: {self.left_out[0]})"
        return line


def find_sources(
    images: Optional[str], captions: Optional[str], splits: Optional[tuple[str, ...]] = None
) -> Found:
    """All pictures, captions or pairs of what a user named.

    Args:
        images: folder (or tar) of pictures; None: captions alone are read.
        captions: their file; None: pictures alone are read.
        splits: of a file that has some (Karpathy's); None: those of training.

    Raises:
        DataError: a file that is missing or not recognised, plain text that does not go with the pictures, or nothing
            that can be used.
    """
    check_inputs(tuple(path for path in (images, captions) if path is not None))
    found = Found()
    if captions is None:
        assert images is not None
        for one in read_images((images,)):
            if isinstance(one, ImageFile):
                found.sources.append(Source(one.record or os.path.basename(one.path), one))
            elif isinstance(one, Reject):
                found.left_out.append(str(one))
    elif images is None:
        _captions_alone(captions, found)
    else:
        _pairs(images, captions, splits, found)
    if not found.sources:
        where = captions or images
        why = f" (first: {found.left_out[0]})" if found.left_out else ""
        raise DataError(f"{where}: {found.line(0)}" if why else f"{where}: nothing in it to read")
    return found


def _captions_alone(path: str, found: Found) -> None:
    kind = file_kind(path)
    rows: Iterable[tuple[str, object] | Reject]
    # COCO's and Karpathy's files may be a single line, which makes them JSON lines of one.
    listed = kind == "jsonl" and next(
        ("images" in row[1] for row in json_rows(path) if not isinstance(row, Reject)), False
    )
    if kind == "text":
        rows = _lines(path)
    elif kind == "jsonl" and not listed:
        rows = _json_captions(path)
    else:
        raise DataError(
            f"{path}: without --images, captions are plain text or JSON lines; this layout names "
            "pictures: give their folder with --images"
        )
    for row in rows:
        if isinstance(row, Reject):
            found.left_out.append(str(row))
            continue
        _add(found, row[0], None, [(f"{path}: {row[0]}", row[1])])


def _lines(path: str) -> Iterator[tuple[str, str] | Reject]:
    for item in text_lines(path):
        if isinstance(item, Reject):
            yield item
        elif item[1].strip():
            yield f"line {item[0]}", item[1]


def _json_captions(path: str) -> Iterator[tuple[str, object] | Reject]:
    for row in json_rows(path):
        if isinstance(row, Reject):
            yield row
            continue
        key = find_key(row[1], None, CAPTION_KEYS)
        if key is None:
            yield Reject(path, row[0], f"no key {' or '.join(CAPTION_KEYS)}")
        else:
            yield row[0], next(iter(as_captions(row[1][key])), "")


def _pairs(images: str, captions: str, splits: Optional[tuple[str, ...]], found: Found) -> None:
    source = PairInput("auto", (captions,), images, splits)
    items: Iterable[PairItem | PassedOver]
    try:
        known = with_format(source)
    except DataError as error:
        rows = list(_lines(captions)) if file_kind(captions) in ("text", "delimited") else []
        if not rows:
            raise error
        lines = [row for row in rows if not isinstance(row, Reject)]
        found.left_out += [str(row) for row in rows if isinstance(row, Reject)]
        named = sum(is_image(text.split("\t")[0].strip()) and "\t" in text for _, text in lines)
        if not named:
            _in_order(images, captions, lines, found)
            return
        items = PairItems(source).grouped(_named_lines(captions, lines))
    else:
        items = PAIR_FORMATS[known.format].read(known)
    for item in items:
        if isinstance(item, Reject):
            found.left_out.append(str(item))
        elif isinstance(item, LeftOut):
            found.others += 1
        elif isinstance(item, CaptionedImage):
            said = [
                (f"{item.source}: {item.caption_record(number)}", caption)
                for number, caption in enumerate(item.captions)
            ]
            name = item.image.path and os.path.relpath(item.image.path, images)
            _add(found, name or item.record, item.image, said)


def _named_lines(path: str, lines: list[tuple[str, str]]) -> Iterator[CaptionRow | Reject]:
    for record, text in lines:
        name, tab, caption = text.partition("\t")
        if tab and is_image(name.strip()):
            yield CaptionRow(path, f"{record} ({name.strip()})", name.strip(), (caption,))
        else:
            yield Reject(path, record, "not a picture's file name, a tab and its caption")


def _in_order(images: str, captions: str, lines: list[tuple[str, str]], found: Found) -> None:
    """Plain text: the first line is of the first picture by name."""
    pictures = [one for one in read_images((images,)) if isinstance(one, ImageFile)]
    if len(pictures) != len(lines):
        raise DataError(
            f"{captions}: {len(lines)} lines of plain text for {len(pictures)} pictures in {images}; as many "
            "would be paired in order of file names. Put the file name and a tab before each caption, or leave "
            "out --images to read the captions alone"
        )
    for picture, (record, text) in zip(pictures, lines):
        name = picture.record or os.path.basename(picture.path)
        _add(found, name, picture, [(f"{captions}: {record}", text)])


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
            found.sources.append(Source(name, picture, text))
            return
    found.left_out.append(reason)
