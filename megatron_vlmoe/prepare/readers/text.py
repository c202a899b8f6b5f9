"""Raw text: plain text, JSON lines or a JSON array, parquet, Arrow, and a column of .csv or .tsv.

Texts to train a tokenizer on are these and the captions in their publishers' files, read without the images, so that
no picture need be there.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NamedTuple

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.prepare.readers.files import (
    MAX_DOCUMENT_BYTES,
    Payload,
    TextFormat,
    file_kind,
    filled_lines,
    is_compressed,
    json_rows,
    load_json,
    numbered_lines,
    read_column,
    refused,
    too_long,
)
from megatron_vlmoe.prepare.readers.pairs import (
    PairInput,
    as_captions,
    find_key,
    read_webdataset,
)
from megatron_vlmoe.prepare.readers.records import (
    CaptionedImage,
    Reject,
    TextBlock,
    check_inputs,
    decoded,
)
from megatron_vlmoe.prepare.readers.tables import ColumnKind, column_names, read_columns
from megatron_vlmoe.prepare.remote import Mirror
from megatron_vlmoe.prepare.shards import Part
from megatron_vlmoe.runtime.json_files import parse_json

_BLOCK_BYTES = 1 << 17
_BLOCK_DOCUMENTS = 1024
_BLOCK_ROWS = 256
_LARGE_DOCUMENT_BYTES = 1 << 20


@dataclass(frozen=True)
class TextInput:
    """Which files, and how to read them.

    Attributes:
        files: paths; compressed ones (gzip, bz2, xz, zstd, lz4) are decompressed.
        format: what the files are; ``auto`` finds out (`file_kind`).
        text_key: JSON key or column of the text.
        documents: what a document is: ``line`` (or row, or entry), ``blank-line``: what is between
            blank lines of plain text, or ``lines:N``: N lines, rows or entries joined.
    """

    files: tuple[str, ...]
    format: TextFormat = "auto"
    text_key: str = "text"
    documents: str = "line"
    span: tuple[int, int] | None = None
    """Offsets between which the lines of the only file begin (`has_lines`); None: all of each file."""


def has_lines(source: TextInput, path: str) -> bool:
    """Whether each line of a file is a document, at an offset that can be gone to. Raises DataError or OSError."""
    if source.documents.startswith("lines:") or is_compressed(path):
        return False
    kind = file_kind(path, source.format)
    return kind == "jsonl" or (kind == "text" and source.documents == "line")


def lines_of_document(documents: str) -> int:
    """Lines, rows or entries of a document by `TextInput.documents`. Raises DataError on others."""
    if documents in ("line", "blank-line"):
        return 1
    match = re.fullmatch(r"lines:([1-9]\d*)", documents)
    if match is None:
        raise DataError(
            f"--documents {documents}: give line, blank-line, or lines:N with N from 1 on"
        )
    return int(match[1])


def read_text(source: TextInput) -> Iterator[TextBlock | Reject]:
    """Yields the documents of all files in order, in blocks of about 128 KiB.

    Blank lines of plain text and JSON lines separate documents and are no records. A document ends with its file.

    Raises DataError if a file is missing, unreadable or of a kind that is not read, or a table lacks the column.
    """
    key, join = source.text_key, lines_of_document(source.documents)
    check_inputs(source.files)
    for path in source.files:
        kind = file_kind(path, source.format)
        unit, json_key = "line", None
        items: Iterator[Payload | Reject]
        if kind == "tar":
            advice = "unpack it (pairs of WebDataset: vlmoe index-pairs)"
            raise refused(path, "a tar archive", advice)
        if kind == "table":
            # A null is an empty document, which the worker rejects by its row number.
            rows = _column(path, key, "text")
            unit, items = "row", (r if isinstance(r, Reject) else (r[0], r[1] or b"") for r in rows)
        elif kind == "json":
            unit, items = "entry", _json_entries(path, key)
        elif kind == "delimited":
            cells = read_column(path, (key,))
            items = (c if isinstance(c, Reject) else (c[0], c[1].encode()) for c in cells)
        elif kind == "jsonl":
            json_key, items = key, filled_lines(path, source.span)
        elif source.documents == "blank-line":
            items = _watched(path, _paragraph_documents(path))
        else:
            items = _watched(path, filled_lines(path, source.span))
        yield from _blocks(path, unit, json_key, items, join)


def text_parts(source: TextInput, mirror: Mirror) -> Iterator[Part[TextBlock | Reject]]:
    """The files of `read_text`, as parts. Raises DataError if one is not there, or is a pipe."""
    lines_of_document(source.documents)
    for name in source.files:

        def read(span: tuple[int, int] | None, name: str = name) -> Iterator[TextBlock | Reject]:
            return read_text(replace(source, files=(mirror.local(name),), span=span))

        def has_offsets(name: str = name) -> bool:
            return has_lines(source, mirror.local(name))

        yield Part(name, mirror.weight_of(name), read, has_offsets)


class TextDocument(NamedTuple):
    """One document, and the lines, rows or entries that it is made of."""

    number: int
    """That of its first part."""
    text: str
    parts: int = 1


def block_texts(block: TextBlock) -> tuple[list[TextDocument], list[tuple[int, str]]]:
    """The documents of a block, decoded and parsed; and number and reason of each part that is none."""
    documents: list[TextDocument] = []
    bad: list[tuple[int, str]] = []
    for start in range(0, len(block.payloads), block.join):
        parts: list[tuple[int, str]] = []
        for place in range(start, min(start + block.join, len(block.payloads))):
            number = block.numbers[place]
            try:
                content, key = block.payloads[place], block.json_key
                text = decoded(content) if key is None else text_of_object(parse_json(content), key)
                parts.append((number, text))
            except DataError as error:
                bad.append((number, str(error)))
        if block.join > 1:
            bad += [(number, "empty text") for number, text in parts if not text.strip()]
            parts = [(number, text) for number, text in parts if text.strip()]
        if parts:
            text = "\n".join(text for _, text in parts)
            documents.append(TextDocument(parts[0][0], text, len(parts)))
    return documents, sorted(bad)


def text_of_object(value: object, key: str) -> str:
    """The string under a key of a JSON object. Raises DataError with the reason if there is none."""
    if not isinstance(value, dict):
        raise DataError("not a JSON object")
    if key not in value:
        raise DataError(f"no key {key!r}{has_keys(value)}")
    if not isinstance(value[key], str):
        raise DataError(f"the value of {key!r} is not a string")
    return str(value[key])


def has_keys(value: Iterable[object]) -> str:
    """``; it has A, B``: the first keys of an object, for errors."""
    names = [str(name) for name in value]
    return f"; it has {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}" if names else ""


def _paragraph_documents(path: str) -> Iterator[Payload | Reject]:
    """Joins lines up to a blank one; a document has the number of its first line."""
    why = ": no blank line in it (a sentence per line is --documents line, or lines:N)"
    first, parts, size = 0, list[bytes](), 0
    for item in chain(numbered_lines(path), [(0, b"")]):  # the end of the file ends a document too
        if isinstance(item, Reject):
            yield item
            continue
        number, line = item
        if line:
            first = first or number
            size += len(line) + 1
            if size <= MAX_DOCUMENT_BYTES:
                parts.append(line)
            continue
        if first:
            document = (first, b"\n".join(parts))
            yield document if size <= MAX_DOCUMENT_BYTES else too_long(path, "line", first, why)
        first, parts, size = 0, [], 0


def _watched(path: str, documents: Iterable[Payload | Reject]) -> Iterator[Payload | Reject]:
    """The same; warns of a large file that turns out to be a single document."""
    count = size = 0
    for item in documents:
        count += 1
        size = size if isinstance(item, Reject) else len(item[1])
        yield item
    if count == 1 and size >= _LARGE_DOCUMENT_BYTES:
        print(
            f"warning: {path}: all of its {size / 2**20:.1f} MiB are one document; see --documents",
            file=sys.stderr,
        )


def _blocks(
    path: str, unit: str, key: str | None, items: Iterable[Payload | Reject], join: int
) -> Iterator[TextBlock | Reject]:
    """Collects payloads; a block ends where a document does."""
    numbers: list[int] = []
    payloads: list[bytes] = []
    size = document = 0  # bytes of the block, and of the unfinished document that it ends with
    for item in items:
        length = 0 if isinstance(item, Reject) else len(item[1])
        bad = isinstance(item, Reject) or length > MAX_DOCUMENT_BYTES
        full = size >= _BLOCK_BYTES or len(payloads) >= _BLOCK_DOCUMENTS
        full = full and len(payloads) % join == 0
        if payloads and (bad or full or document + length > MAX_DOCUMENT_BYTES):
            yield TextBlock(path, unit, key, numbers, payloads, join)
            numbers, payloads, size, document = [], [], 0, 0
        if isinstance(item, Reject) or bad:
            yield item if isinstance(item, Reject) else too_long(path, unit, item[0])
            continue
        numbers.append(item[0])
        payloads.append(item[1])
        size += length
        document = document + length if len(payloads) % join else 0
    if payloads:
        yield TextBlock(path, unit, key, numbers, payloads, join)


def _column(path: str, key: str, kind: ColumnKind) -> Iterator[tuple[int, Any] | Reject]:
    """Yields (number, value) of each row of a table."""
    for first, batch in read_columns(path, {key: kind}, _BLOCK_ROWS):
        if isinstance(batch, Reject):
            yield batch
        else:
            yield from enumerate(batch[key], start=first)


def _json_entries(path: str, key: str) -> Iterator[Payload | Reject]:
    """The texts of a file that is one JSON value: a list of strings or objects, or one object."""
    value = read_json(path)
    if isinstance(value, dict) and key not in value:
        what = f"one JSON object without a key {key!r}{has_keys(value)}"
        raise refused(path, what, "write its texts as JSON lines, an object per line")
    for number, entry in enumerate(value if isinstance(value, list) else [value]):
        try:
            text = entry if isinstance(entry, str) else text_of_object(entry, key)
        except DataError as error:
            known = isinstance(entry, dict)
            reason = str(error) if known else f"neither a string nor an object with {key!r}"
            yield Reject(path, f"entry {number}", reason)
            continue
        # Half of a surrogate pair becomes what the worker rejects as no UTF-8.
        yield number, text.encode("utf-8", "surrogatepass")


def read_json(path: str) -> Any:
    """`load_json` of a file that `file_kind` takes for one JSON value. Raises DataError."""
    try:
        return load_json(path)
    except DataError as error:
        raise DataError(
            f"{error} (JSON lines have an object per line; for lines of plain text: --format text)"
        ) from error


_TEXT_KEYS = ("text", "caption", "captions")
_TEXT_COLUMNS = (*_TEXT_KEYS, "title", "comment")
"""The same for .csv and .tsv: open_clip says title, Flickr30k comment."""

Found = Iterator[tuple[str, object] | Reject]
"""Name of a record and its text or texts as parsed."""


def read_training_texts(
    paths: Sequence[str], text_key: str | None = None
) -> Iterator[str | Reject]:
    """Yields the texts of all files in order; empty ones are passed over.

    Reads what `read_text` does, and captions: COCO, Karpathy, Visual Genome, lists of [path,
    caption] (CC3M, SBU), SBU's own file, JSON lines, lists and tables with a key or column of
    captions (``text_key``; None: the usual ones), CC3M's .tsv and Flickr30k's .token, tars of WebDataset.

    Raises DataError if a file is missing, unreadable, of another kind, or without any text.
    """
    check_inputs(tuple(paths))
    keys = (text_key,) if text_key else _TEXT_KEYS
    for path in paths:
        some = False
        for item in _found(path, keys, text_key):
            if isinstance(item, Reject):
                yield item
                continue
            record, value = item
            for text in as_captions(value):
                try:
                    if isinstance(text, bytes):
                        text = decoded(text)
                    if text is not None and not isinstance(text, str):
                        raise DataError("not a string")
                    if text:
                        text.encode("utf-8")
                        some = True
                        yield text
                except UnicodeEncodeError:
                    yield Reject(path, record, "invalid Unicode")
                except DataError as error:
                    yield Reject(path, record, str(error))
        if not some:
            raise DataError(f"{path} holds no text")


def _found(path: str, keys: tuple[str, ...], text_key: str | None) -> Found:
    kind = file_kind(path)
    if kind == "table":
        names = column_names(path)
        key = find_key(dict.fromkeys(names), None, keys)
        if key is None:
            raise DataError(
                f"{path}: no column {' or '.join(keys)}{has_keys(names)}: name it with --text-key"
            )
        for cell in _column(path, key, "any"):
            yield cell if isinstance(cell, Reject) else (f"row {cell[0]}", cell[1])
    elif kind == "json":
        yield from json_texts(path, read_json(path), keys)
    elif kind == "jsonl":
        yield from _line_texts(path, keys)
    elif kind == "delimited":
        columns = (text_key,) if text_key else _TEXT_COLUMNS
        for cell in read_column(path, columns, captions=True):
            yield cell if isinstance(cell, Reject) else (f"line {cell[0]}", cell[1])
    elif kind == "tar":
        for pair in read_webdataset(PairInput("webdataset", (path,), caption_key=text_key)):
            if isinstance(pair, CaptionedImage):
                yield pair.record, pair.captions
            elif isinstance(pair, Reject):
                yield pair
    else:
        for block in read_text(TextInput((path,), "text")):
            if isinstance(block, Reject):
                yield block
                continue
            texts, bad = block_texts(block)
            yield from ((f"line {one.number}", one.text) for one in texts)
            yield from (Reject(path, f"line {number}", reason) for number, reason in bad)


def _line_texts(path: str, keys: tuple[str, ...]) -> Found:
    """An object per line; a file of captions may be one object on one line."""
    for item in json_rows(path):
        if isinstance(item, Reject):
            yield item
            continue
        record, row = item
        key = find_key(row, None, keys)
        if key is not None:
            yield record, row[key]
        elif isinstance(row.get("annotations") or row.get("images"), list):
            yield from json_texts(path, row, keys)
        else:
            yield Reject(path, record, f"no key {' or '.join(keys)}{has_keys(row)}")


def json_texts(path: str, value: object, keys: tuple[str, ...]) -> Found:
    """The texts of a file that is one JSON value. Raises DataError for an object of no known layout."""
    if isinstance(value, list):
        for number, entry in enumerate(value):
            texts = _texts_of_entry(entry, keys)
            if texts is None:
                reason = f"neither [path, caption] nor an object with {' or '.join(keys)}"
                yield Reject(path, f"entry {number}", reason)
            else:
                yield f"entry {number}", texts
        return
    if not isinstance(value, dict):
        raise DataError(f"{path}: neither a JSON list nor a JSON object")
    for name in ("annotations", "images"):  # COCO has both, Karpathy's splits the second alone
        if isinstance(value.get(name), list):
            for item in json_texts(path, value[name], keys):
                if isinstance(item, Reject):
                    yield Reject(path, f'"{name}", {item.record}', "no caption")
                else:
                    yield f'"{name}", {item[0]}', item[1]
            return
    key = find_key(value, None, keys)  # SBU's own file has all captions in one list
    if key is None:
        raise DataError(f"{path}: no captions of a known layout{has_keys(value)}")
    yield f'"{key}"', value[key]


def _texts_of_entry(entry: object, keys: tuple[str, ...]) -> object:
    """The text or texts of one entry of a list; None if there are none."""
    if isinstance(entry, str):
        return entry
    if isinstance(entry, list):
        return entry[1] if len(entry) == 2 and isinstance(entry[0], str) else None
    if not isinstance(entry, dict):
        return None
    # Visual Genome's regions and Karpathy's sentences are lists of objects.
    for name, inner in (("regions", "phrase"), ("sentences", "raw")):
        if isinstance(entry.get(name), list):
            return tuple(e.get(inner) if isinstance(e, dict) else e for e in entry[name])
    key = find_key(entry, None, keys)
    return None if key is None else entry[key]
