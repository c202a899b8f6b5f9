"""Records with keys or columns: JSON lists and lines of objects, CSV and TSV, parquet and Arrow.

A record names its image (a path below the image folder) and its caption or list of captions under
the usual keys, `IMAGE_KEYS` and `CAPTION_KEYS`. In parquet and Arrow the image may also be the
encoded bytes, or Hugging Face's {bytes, path}. Records of one image that follow each other become
one image with several captions. A record may name its split.
"""

from __future__ import annotations

import csv
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.prepare.readers.delimited import columns_of, wrong_number_of
from megatron_vlmoe.prepare.readers.lines import numbered_lines
from megatron_vlmoe.prepare.readers.pairs import (
    CAPTION_KEYS,
    IMAGE_KEYS,
    CaptionRow,
    PairInput,
    PairItems,
    SplitChoice,
    as_captions,
    find_key,
    json_list,
    load_json,
)
from megatron_vlmoe.prepare.readers.parquet import column_names, read_columns
from megatron_vlmoe.prepare.readers.path_captions import DOWNLOAD_FIRST
from megatron_vlmoe.prepare.readers.records import LeftOut, PairItem, Reject
from megatron_vlmoe.prepare.readers.text import json_rows

_BATCH_ROWS = 32

NumberedRow = tuple[str, Mapping[str, Any]]
"""The name of a record and what it holds by key."""


def read_jsonl_pairs(source: PairInput) -> Iterator[PairItem]:
    """Yields the images of JSON-lines files in order. Raises DataError."""
    return _read(source, _json_lines)


def read_object_list(source: PairInput) -> Iterator[PairItem]:
    """Yields the images of JSON lists of objects, as ALBEF, BLIP and LAVIS have them; DataError."""
    return _read(source, _json_objects)


def read_csv_pairs(source: PairInput) -> Iterator[PairItem]:
    """Yields the images of tables of text with a line of column names. Raises DataError."""
    return _read(source, _csv_rows)


def read_table_pairs(source: PairInput) -> Iterator[PairItem]:
    """Yields the images of parquet and Arrow files in order.

    Raises:
        DataError: no such table, or a column is missing.
    """
    return _read(source, _table_rows)


RowReader = Callable[[PairInput, str], Iterator[NumberedRow | Reject]]


def _read(source: PairInput, read_rows: RowReader) -> Iterator[PairItem]:
    items, splits = PairItems(source), SplitChoice(source)
    for path in source.annotations:
        rows = (
            item if isinstance(item, Reject) else _row(source, splits, path, *item)
            for item in read_rows(source, path)
        )
        yield from items.grouped(rows)
    splits.finish(source.annotations[0])


def _row(
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


def _json_lines(source: PairInput, path: str) -> Iterator[NumberedRow | Reject]:
    for item in json_rows(path):
        yield item if isinstance(item, Reject) else (f"line {item[0]}", item[1])


def _json_objects(source: PairInput, path: str) -> Iterator[NumberedRow | Reject]:
    for number, entry in enumerate(json_list(path, load_json(path))):
        record = f"entry {number}"
        yield (record, entry) if isinstance(entry, dict) else Reject(path, record, "no JSON object")


def _table_rows(source: PairInput, path: str) -> Iterator[NumberedRow | Reject]:
    names = dict.fromkeys(column_names(path))
    wanted = {*_check_columns(source, path, names), source.split_key, "filepath"}
    columns = [name for name in names if name in wanted]
    for first, batch in read_columns(path, dict.fromkeys(columns, "any"), _BATCH_ROWS):
        if isinstance(batch, Reject):
            yield batch
            continue
        rows = zip(*(batch[name] for name in columns), strict=True)
        for number, values in enumerate(rows, start=first):
            yield f"row {number}", dict(zip(columns, values, strict=True))


def _csv_rows(source: PairInput, path: str) -> Iterator[NumberedRow | Reject]:
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
