"""The table of pair layouts, and which of them a file has."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.prepare.readers.files import columns_of, filled_lines, load_json
from megatron_vlmoe.prepare.readers.pair_lists import (
    first_character,
    is_url,
    read_coco,
    read_karpathy,
    read_path_captions,
    read_visual_genome,
)
from megatron_vlmoe.prepare.readers.pair_records import (
    TOKEN_LINE,
    RowReader,
    column_rows,
    csv_rows,
    find_keys,
    json_line_rows,
    json_list_rows,
    read_flickr30k,
    read_records,
    read_sample_files,
    read_webdataset,
)
from megatron_vlmoe.prepare.readers.pairs import SPLIT_KEY, PairInput, PairReader
from megatron_vlmoe.prepare.readers.records import (
    PairItem,
    PassedOver,
    Reject,
    check_inputs,
    is_image,
    is_tar,
    walk_files,
)
from megatron_vlmoe.prepare.readers.tables import table_format


@dataclasses.dataclass(frozen=True)
class PairFormat:
    """How a layout is read, and what its files have.

    Attributes:
        read: the reader.
        keys: the records have keys or columns.
        splits: the records may name their split.
        lists: there are annotation files; else the images lie beside their captions.
        pipe: an annotation file is read once, so that it may be a pipe.
    """

    read: PairReader
    keys: bool = False
    splits: bool = False
    lists: bool = True
    pipe: bool = False


def _records(read_rows: RowReader, pipe: bool = False) -> PairFormat:
    return PairFormat(partial(read_records, read_rows), keys=True, splits=True, pipe=pipe)


PAIR_FORMATS: Mapping[str, PairFormat] = {
    "coco": PairFormat(read_coco, pipe=True),
    "karpathy": PairFormat(read_karpathy, splits=True, pipe=True),
    "visual-genome": PairFormat(read_visual_genome, pipe=True),
    "sbu": PairFormat(read_path_captions),
    "cc3m": PairFormat(read_path_captions),
    "flickr30k": PairFormat(read_flickr30k),
    "albef": _records(json_list_rows, pipe=True),
    "webdataset": PairFormat(read_webdataset, lists=False),
    "files": PairFormat(read_sample_files, lists=False),
    "jsonl": _records(json_line_rows, pipe=True),
    "csv": _records(csv_rows, pipe=True),
    "parquet": _records(column_rows),
    "arrow": _records(column_rows),
}
"""Layouts by the value of ``--format``."""

FORMATS_WITH_KEYS = tuple(name for name, one in PAIR_FORMATS.items() if one.keys)
FORMATS_WITH_SPLITS = tuple(name for name, one in PAIR_FORMATS.items() if one.splits)


def with_format(source: PairInput) -> PairInput:
    """The options with a format that is known.

    Raises:
        DataError: a missing file, an unknown format, files of several, of none, or options that mean nothing in it.
    """
    check_inputs(source.annotations)
    if source.format == "auto":
        inputs = source.annotations or ((source.images,) if source.images else ())
        found = {path: _format_of(source, path) for path in inputs}
        if len(set(found.values())) != 1:
            names = ", ".join(f"{path} is {kind}" for path, kind in found.items())
            raise DataError(f"files of one format at a time: {names or 'none is given'}")
        source = dataclasses.replace(source, format=next(iter(found.values())))
    check_options(source)
    for path in source.annotations:
        _check_container(source.format, path)
    return source


def check_options(source: PairInput) -> None:
    """Raises DataError for an unknown format, and for options that mean nothing in a known one."""
    format = source.format
    if format not in PAIR_FORMATS:
        raise DataError(f"unknown format {format!r}: one of auto, {', '.join(PAIR_FORMATS)}")
    without_lists = tuple(name for name, one in PAIR_FORMATS.items() if not one.lists)
    for option, value, formats in (
        ("--split", source.splits, FORMATS_WITH_SPLITS),
        ("--split-key", source.split_key != SPLIT_KEY, FORMATS_WITH_KEYS),
        ("--image-key", source.image_key, FORMATS_WITH_KEYS),
        ("--caption-key", source.caption_key, (*FORMATS_WITH_KEYS, *without_lists)),
        ("--separator", source.separator, ("csv", "flickr30k")),
    ):
        if value and format not in formats:
            raise DataError(
                f"{option} means nothing with --format {format}, only with {', '.join(formats)}"
            )
    if source.separator is not None and len(source.separator) != 1:
        raise DataError(f"--separator {source.separator!r}: is not one character")
    if format not in without_lists and not source.annotations:
        raise DataError(f"--format {format} needs --annotations")
    if format in without_lists and bool(source.annotations) == (source.images is not None):
        raise DataError(
            f"--format {format} needs either --annotations or --images, the files or folders"
        )


def _check_container(format: str, path: str) -> None:
    """Raises DataError if a file is of a kind that the format never is."""
    if not os.path.isfile(path) and not os.path.isdir(path):
        if not PAIR_FORMATS[format].pipe:
            raise DataError(f"{path}: is no regular file, which --format {format} needs")
    elif os.path.isdir(path):
        if PAIR_FORMATS[format].lists:
            raise DataError(f"{path}: is a folder; --format {format} reads files: name those in it")
    elif is_tar(path) and format != "webdataset":
        raise DataError(f"{path}: is a tar, which --format webdataset reads, not {format}")
    elif table_format(path) is not None and format not in ("parquet", "arrow"):
        raise DataError(f"{path}: is a table, which --format parquet or arrow reads, not {format}")
    elif format == "jsonl" and first_character(path) == b"[":
        raise DataError(f"{path}: is a JSON list, which --format albef reads, not lines of JSON")


def _format_of(source: PairInput, path: str) -> str:
    """The format of an input by what it holds. Raises DataError naming that if none is known."""
    if os.path.isdir(path):
        return _format_of_folder(path)
    if not os.path.isfile(path):
        raise DataError(f"{path}: is no regular file: give its --format")
    if is_tar(path):
        return "webdataset"
    table = table_format(path)
    if table is not None:
        return "parquet" if table == "parquet" else "arrow"
    first = next(filled_lines(path), None)
    if first is None:
        raise DataError(f"{path}: the file is empty")
    if isinstance(first, Reject) or first[1][:1] in (b"[", b"{"):
        found = _format_of_json(source, path, b"{}" if isinstance(first, Reject) else first[1])
    else:
        found = _format_of_line(source, first[1].decode("utf-8", "replace"))
    if found is None:
        begin = str(first) if isinstance(first, Reject) else repr(first[1][:80])[1:]
        raise DataError(
            f"{path}: not recognised; give its --format, for albef, jsonl and csv with --image-key "
            f"and --caption-key. It begins with {begin}"
        )
    return found


def _format_of_line(source: PairInput, line: str) -> str | None:
    """The format of a text file by its first line."""
    if TOKEN_LINE.fullmatch(line):
        return "flickr30k"
    pair = [
        column.strip() for column in line.split("\t")
    ]  # a caption may begin with a quotation mark
    if len(pair) == 2 and (any(map(is_url, pair)) or {"caption", "url"} == {*map(str.lower, pair)}):
        return "cc3m"
    _, names = columns_of(line, source.separator)
    return "csv" if all(find_keys(source, dict.fromkeys(names))) else None


def _format_of_json(source: PairInput, path: str, line: bytes) -> str | None:
    """The format of a file of JSON, of which ``line`` is the first one with anything in it."""
    try:
        first = json.loads(line)
    except (ValueError, RecursionError):
        first = None  # one value on many lines
    if isinstance(first, dict) and _kind_of_object(first) is None and find_keys(source, first)[1]:
        return "jsonl"
    content = load_json(path) if first is None or first == {} else first
    if isinstance(content, dict):
        return _kind_of_object(content)
    entry = content[0] if isinstance(content, list) and content else None
    if isinstance(entry, list):
        return "sbu"
    if not isinstance(entry, dict):
        return None
    if isinstance(entry.get("regions"), list):
        return "visual-genome"
    return "albef" if find_keys(source, entry)[1] else None


def _format_of_folder(folder: str) -> str:
    captions, images, tables = set[str](), set[str](), ""
    for file in walk_files(folder):
        stem, suffix = os.path.splitext(file)
        if is_tar(file):
            return "webdataset"
        # Beside its samples img2dataset leaves tables of them.
        tables = tables or (suffix if suffix in (".parquet", ".arrow") else "")
        images |= {stem} if is_image(file) else set()
        captions |= {stem} if suffix in (".txt", ".json") else set()
        if images & captions:
            return "files"
    if tables:
        raise DataError(f"{folder}: name the {tables} files in it that are to be read")
    raise DataError(f"{folder}: has neither tars nor images with a .txt or .json of their name")


def _kind_of_object(content: dict[str, Any]) -> str | None:
    """The format of a whole file that is this object."""
    images = content.get("images")
    if isinstance(images, list):
        first = images[0] if images else None
        karpathy = isinstance(first, dict) and "sentences" in first
        return "karpathy" if karpathy else "coco"
    return "sbu" if "image_urls" in content else None


def read_pairs(source: PairInput) -> Iterator[PairItem | PassedOver]:
    """Yields the images of a corpus with their captions, in the order of the annotations.

    Raises:
        DataError: an unknown format, a missing file, or annotations of another layout.
    """
    source = with_format(source)
    return PAIR_FORMATS[source.format].read(source)
