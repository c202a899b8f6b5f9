"""Captions in records: JSON lists and lines of objects, CSV and TSV, parquet and Arrow, Flickr30K, WebDataset.

A record names its image (a path below the image folder) and its caption or list of captions under
the usual keys, `IMAGE_KEYS` and `CAPTION_KEYS`. In parquet and Arrow the image may also be the
encoded bytes, or Hugging Face's {bytes, path}. Records of one image that follow each other become
one image with several captions. A record may name its split.

A line of Flickr30K's ``results_20130124.token`` is ``1000092795.jpg#0``, a tab and the caption; the ``results.csv``
of copies is read as any CSV (``image_name| comment_number| comment``). Neither names splits: the validation and test
images are among them.

WebDataset's consecutive members that agree up to the first dot of their file name are one sample: an image, by
its suffix or its contents, and the caption in ``.txt``, else under a usual key of ``.json`` (a
string or a list of strings). Other members of a sample do not count. The same files may lie in folders;
img2dataset's ``webdataset`` and ``files`` outputs are of this form.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.prepare.readers.files import (
    columns_of,
    json_list,
    json_rows,
    load_json,
    numbered_lines,
    wrong_number_of,
)
from megatron_vlmoe.prepare.readers.images import BrokenTar, as_image, tar_members
from megatron_vlmoe.prepare.readers.pairs import (
    CAPTION_KEYS,
    DOWNLOAD_FIRST,
    IMAGE_KEYS,
    CaptionRow,
    PairInput,
    PairItems,
    SplitChoice,
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
    is_tar,
    kinds_of,
    passed_over_line,
    walk_files,
)
from megatron_vlmoe.prepare.readers.tables import column_names, table_rows
from megatron_vlmoe.runtime.json_files import parse_json

NumberedRow = tuple[str, Mapping[str, Any]]
"""The name of a record and what it holds by key."""
RowReader = Callable[[PairInput, str], Iterator[NumberedRow | Reject]]


def read_records(read_rows: RowReader, source: PairInput) -> Iterator[PairItem]:
    """Yields the images of files of records in order.

    Args:
        read_rows: reads one file.
        source: the files.

    Raises:
        DataError: a file is of another kind, or lacks a column.
    """
    items, splits = PairItems(source), SplitChoice(source)
    for path in source.annotations:
        rows = (
            item if isinstance(item, Reject) else _pair(source, splits, path, *item)
            for item in read_rows(source, path)
        )
        yield from items.grouped(rows)
    splits.finish(source.annotations[0])


def _pair(
    source: PairInput, splits: SplitChoice, path: str, record: str, row: Mapping[str, Any]
) -> CaptionRow | Reject | LeftOut:
    refusal = splits.refusal(path, record, row.get(source.split_key))
    if refusal is not None:
        return refusal
    image_key, caption_key = find_keys(source, row)
    for key, wanted in (
        (image_key, source.image_key or " or ".join(IMAGE_KEYS)),
        (caption_key, source.caption_key or " or ".join(CAPTION_KEYS)),
    ):
        if key is None:
            _check_urls(f"{path}: {record}", row)
            return Reject(path, record, f"no key {wanted}: it has {', '.join(row) or 'none'}")
    image, captions = row[str(image_key)], as_captions(row[str(caption_key)])
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str) and image_key == "filename" and row.get("filepath"):
        image = os.path.join(str(row["filepath"]), image)  # Karpathy's columns
    if isinstance(image, bytes | str) and image:
        return CaptionRow(path, record, image, captions)
    reason = "the image is neither a path nor bytes"
    return Reject(path, record, reason, unit="image", captions=len(captions))


def find_keys(source: PairInput, row: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The keys of the image and of the caption."""
    return (
        find_key(row, source.image_key, IMAGE_KEYS),
        find_key(row, source.caption_key, CAPTION_KEYS),
    )


def _check_urls(place: str, row: Mapping[str, Any]) -> None:
    """Raises DataError if a record names its image by a URL alone."""
    if any(key.lower() in ("url", "image_url") for key in row):
        raise DataError(f"{place} {DOWNLOAD_FIRST}")


def _check_columns(source: PairInput, path: str, names: Mapping[str, Any]) -> tuple[str, str]:
    """The columns of the image and the caption. Raises DataError if one is missing."""
    image_key, caption_key = find_keys(source, names)
    if image_key is None:
        _check_urls(path, names)
    if image_key is None or caption_key is None:
        raise DataError(
            f"{path}: no column for the image or the caption among {', '.join(names)}: "
            "name them with --image-key and --caption-key"
        )
    if source.splits is not None and source.split_key not in names:
        raise DataError(
            f"{path}: --split, but no column {source.split_key!r} among {', '.join(names)}"
        )
    return image_key, caption_key


def json_line_rows(source: PairInput, path: str) -> Iterator[NumberedRow | Reject]:
    """The objects of JSON lines."""
    return json_rows(path)


def json_list_rows(source: PairInput, path: str) -> Iterator[NumberedRow | Reject]:
    """The objects of a JSON list, as ALBEF, BLIP and LAVIS have them."""
    for number, entry in enumerate(json_list(path, load_json(path))):
        record = f"entry {number}"
        yield (record, entry) if isinstance(entry, dict) else Reject(path, record, "no JSON object")


def column_rows(source: PairInput, path: str) -> Iterator[NumberedRow | Reject]:
    """The rows of parquet and Arrow files."""
    names = dict.fromkeys(column_names(path))
    wanted = {*_check_columns(source, path, names), source.split_key, "filepath"}
    return table_rows(path, {name: name for name in names if name in wanted})


def csv_rows(source: PairInput, path: str) -> Iterator[NumberedRow | Reject]:
    """The rows of a table of text with a line of column names."""
    rejects: list[Reject] = []
    lines = _decoded(path, rejects)
    head = next(lines, "")
    if rejects:
        raise DataError(str(rejects[0]))
    if not head:
        raise DataError(f"{path}: the file is empty")
    separator, names = columns_of(head, source.separator)
    rows = csv.reader(itertools.chain([head], lines), delimiter=separator)
    next(rows)
    image_key, _ = _check_columns(source, path, dict.fromkeys(names))
    while True:
        first = rows.line_num + 1
        try:
            values = next(rows, None)
            reason = ""
            if values:
                image = names.index(image_key)
                reason = wrong_number_of(values, names) or _swallowed(values, image, separator)
        except csv.Error as error:
            values, reason = [], str(error)
        yield from rejects
        rejects.clear()
        if values is None:
            return
        record = f"line {first}" + (f" to {rows.line_num}" if rows.line_num > first else "")
        if reason:
            yield Reject(path, record, reason)
        elif values:
            yield record, dict(zip(names, values, strict=True))


def _decoded(path: str, rejects: list[Reject]) -> Iterator[str]:
    """Lines with their ends; what cannot be read is an empty one, and goes to ``rejects``."""
    for item in numbered_lines(path, strip=False):
        if isinstance(item, Reject):
            rejects.append(item)
            yield "\n"
        else:
            # A caption that is no UTF-8 is rejected with the other bad captions.
            yield item[1].decode("utf-8", "surrogateescape") + "\n"


def _swallowed(values: list[str], image: int, separator: str) -> str:
    """What is wrong with a row whose cell seems to hold further rows; empty: nothing.

    A caption over several lines is as good as any, unless there is a file name in it like that of the
    row's own image, or any column where that name has no suffix.
    """
    suffix = os.path.splitext(values[image])[1].lower()
    for cell in values:
        lines = cell.splitlines()
        if len(lines) > 1 and any(
            os.path.splitext(part.strip('" '))[1].lower() == suffix
            for line in lines
            if separator in line
            for part in line.split(separator)
        ):
            return "a quotation mark that is not closed takes in what follows"
    return ""


TOKEN_LINE = re.compile(r"(?P<image>[^\t]+)#\d+\t(?P<caption>.*)")
"""A line of the ``.token`` file."""


def read_flickr30k(source: PairInput) -> Iterator[PairItem]:
    """Yields each image with its captions. Raises DataError."""
    for path in source.annotations:
        part = dataclasses.replace(source, annotations=(path,))
        first = next(numbered_lines(path, strip=False), (1, b""))
        if not isinstance(first, Reject) and TOKEN_LINE.fullmatch(
            first[1].decode("utf-8", "replace")
        ):
            yield from PairItems(part).grouped(_token_rows(path))
        else:
            yield from read_records(csv_rows, part)


def _token_rows(path: str) -> Iterator[CaptionRow | Reject]:
    for item in numbered_lines(path, strip=False):
        if isinstance(item, Reject):
            yield item
            continue
        # A caption that is no UTF-8 is rejected with the other bad captions.
        line = item[1].decode("utf-8", "surrogateescape")
        match = TOKEN_LINE.fullmatch(line)
        if match is not None:
            record = f"line {item[0]} ({match['image']})"
            yield CaptionRow(path, record, match["image"], (match["caption"],))
        elif line.strip():
            yield Reject(path, f"line {item[0]}", "not NAME#NUMBER, tab, caption")


def read_webdataset(source: PairInput) -> Iterator[PairItem | PassedOver]:
    """Yields the samples of all tars in order.

    Tars are the annotation files, or lie in a folder given as one or as the image folder.

    Raises:
        DataError: no tar is given.
    """
    inputs = source.annotations or ((source.images,) if source.images else ())
    check_inputs(inputs)
    tars = [
        path
        for given in inputs
        for path in (filter(is_tar, walk_files(given)) if os.path.isdir(given) else (given,))
    ]
    if not tars:
        raise DataError(f"no tar in {', '.join(inputs) or '--annotations'}")
    keys = _CaptionKeys(source.caption_key)
    for tar in tars:
        yield from _samples(tar, tar_members(tar), keys)
    keys.finish(inputs)


def read_sample_files(source: PairInput) -> Iterator[PairItem | PassedOver]:
    """Yields the samples of folders, the annotations or the image folder, in sorted order.

    Raises:
        DataError: a folder is none.
    """
    folders = source.annotations or ((source.images,) if source.images else ())
    keys = _CaptionKeys(source.caption_key)
    for folder in folders:
        if not os.path.isdir(folder):
            raise DataError(f"{folder}: not a folder; --format files reads folders of samples")
        # Besides the samples img2dataset leaves tables of them and statistics.
        members = (
            ImageFile(folder, os.path.relpath(file, folder), file)
            for file in walk_files(folder)
            if not file.endswith(("_stats.json", ".parquet", ".tar"))
        )
        yield from _samples(folder, members, keys)
    keys.finish(folders)


class _CaptionKeys:
    """The key of captions in ``.json`` files: the one that was asked for, or the usual ones."""

    def __init__(self, wanted: str | None) -> None:
        self.wanted = wanted
        self._found = False

    def captions(self, content: str) -> tuple[object, ...]:
        """The captions in a JSON text; none without the key. Raises DataError."""
        value = parse_json(content)
        key = find_key(value, self.wanted, CAPTION_KEYS) if isinstance(value, dict) else None
        self._found = self._found or key is not None
        return as_captions(value[key]) if key is not None else ()

    def finish(self, inputs: Sequence[str]) -> None:
        """Raises DataError if no sample had the key that was asked for."""
        if self.wanted and not self._found:
            raise DataError(f"{', '.join(inputs)}: no .json has the key {self.wanted!r}")


@dataclass
class _Sample:
    """The members of one sample as they come."""

    key: str
    images: list[ImageFile] = field(default_factory=list)
    text: tuple[object, ...] = ()
    described: tuple[object, ...] = ()
    seen: set[str] = field(default_factory=set)
    """Suffixes of captions."""
    others: list[PassedOver] = field(default_factory=list)
    """Members that are neither image nor caption."""
    problem: str = ""
    """Why the sample is of no use: the first of its members that is not."""

    def add(self, member: ImageFile, keys: _CaptionKeys) -> None:
        """Takes one member, an image or not. Raises DataError if it is unreadable."""
        suffix = os.path.splitext(member.record)[1].lower()
        if suffix not in (".txt", ".json"):
            found = as_image(member, member.record)
            if isinstance(found, Reject):
                raise DataError(found.reason)
            if isinstance(found, PassedOver):
                self.others.append(found)
            else:
                self.images.append(found)
            return
        if suffix in self.seen:
            raise DataError(f"a second {suffix} in the sample")
        self.seen.add(suffix)
        try:
            content = member.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"invalid UTF-8 at byte {error.start}") from error
        if suffix == ".txt":
            self.text = (content,)
        else:
            self.described = keys.captions(content)

    def captions(self, keys: _CaptionKeys) -> tuple[object, ...]:
        """Those under a key that was asked for come before ``.txt``."""
        return (self.described if keys.wanted else ()) or self.text or self.described

    def finish(self, tar: str, keys: _CaptionKeys) -> Iterator[PairItem | PassedOver]:
        """The complete sample, or why there is none.

        What has neither an image nor the file of a caption is no sample.
        """
        captions = self.captions(keys)
        if self.problem:
            yield Reject(tar, self.key, self.problem, captions=len(captions))
        elif len(self.images) == 1:
            yield CaptionedImage(tar, self.key, self.images[0], captions)
        elif self.images or self.seen:
            others = f" ({passed_over_line(kinds_of(Counter(self.others)))})" if self.others else ""
            reason = f"{len(self.images)} images in the sample, not 1{others}"
            yield Reject(tar, self.key, reason, captions=len(captions))
        else:
            yield from self.others


def _samples(
    tar: str, members: Iterable[ImageFile | Reject], keys: _CaptionKeys
) -> Iterator[PairItem | PassedOver]:
    """The samples of a tar or folder."""
    sample: _Sample | None = None
    for member in members:
        if isinstance(member, BrokenTar):
            # It stands for the sample under way too, which may lack its rest.
            lost = 0 if sample is None else len(sample.captions(keys))
            yield replace(member, captions=lost)
            sample = None
            continue
        folder, base = os.path.split(member.record)
        key = os.path.join(folder, base.split(".")[0])
        if sample is not None and sample.key != key:
            yield from sample.finish(tar, keys)
            sample = None
        sample = sample or _Sample(key)
        try:
            if isinstance(member, Reject):
                raise DataError(member.reason)
            sample.add(member, keys)
        except DataError as error:
            sample.problem = sample.problem or f"{member.record}: {error}"
    if sample is not None:
        yield from sample.finish(tar, keys)
