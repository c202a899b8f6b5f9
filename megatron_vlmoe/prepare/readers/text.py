"""Raw text: plain text, JSON lines or a JSON array, parquet, Arrow, and a column of .csv or .tsv."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.prepare.readers.delimited import read_column
from megatron_vlmoe.prepare.readers.file_kinds import (
    MAX_DOCUMENT_BYTES,
    TextFormat,
    file_kind,
    refused,
)
from megatron_vlmoe.prepare.readers.lines import Payload, numbered_lines, too_long
from megatron_vlmoe.prepare.readers.pairs import load_json
from megatron_vlmoe.prepare.readers.parquet import read_columns
from megatron_vlmoe.prepare.readers.records import Reject, TextBlock, check_inputs
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

    Blank lines of plain text and JSON lines separate documents and are no records. A document ends
    with its file.

    Raises:
        DataError: a file is missing, unreadable or of a kind that is not read, or a table lacks
            the column.
    """
    key, join = source.text_key, lines_of_document(source.documents)
    check_inputs(source.files)
    for path in source.files:
        kind = file_kind(path, source.format)
        if kind == "table":
            yield from _blocks(path, "row", None, _rows(path, key), join)
        elif kind == "json":
            yield from _blocks(path, "entry", None, _json_entries(path, key), join)
        elif kind == "delimited":
            cells = read_column(path, (key,))
            column = (c if isinstance(c, Reject) else (c[0], c[1].encode()) for c in cells)
            yield from _blocks(path, "line", None, column, join)
        elif kind == "tar":
            advice = "unpack it (pairs of WebDataset: tools/preprocess_pairs.py)"
            raise refused(path, "a tar archive", advice)
        elif kind == "jsonl":
            yield from _blocks(path, "line", key, _filled(numbered_lines(path)), join)
        else:
            lines = numbered_lines(path)
            if source.documents == "blank-line":
                lines = _paragraph_documents(path, lines)
            yield from _blocks(path, "line", None, _watched(path, _filled(lines)), join)


class TextDocument(NamedTuple):
    """One document, and the lines, rows or entries that it is made of."""

    number: int
    """That of its first part."""
    text: str
    parts: int = 1


def block_texts(block: TextBlock) -> tuple[list[TextDocument], list[tuple[int, str]]]:
    """Decodes and parses a block.

    Returns:
        The documents; and number and reason of each part that is none.
    """
    documents: list[TextDocument] = []
    bad: list[tuple[int, str]] = []
    for start in range(0, len(block.payloads), block.join):
        parts: list[tuple[int, str]] = []
        for place in range(start, min(start + block.join, len(block.payloads))):
            number = block.numbers[place]
            try:
                parts.append((number, _parse(block.payloads[place], block.json_key)))
            except DataError as error:
                bad.append((number, str(error)))
        if block.join > 1:
            bad += [(number, "empty text") for number, text in parts if not text.strip()]
            parts = [(number, text) for number, text in parts if text.strip()]
        if parts:
            text = "\n".join(text for _, text in parts)
            documents.append(TextDocument(parts[0][0], text, len(parts)))
    return documents, sorted(bad)


def _parse(payload: bytes, json_key: str | None) -> str:
    """The text of one payload. Raises DataError with the reason why there is none."""
    if json_key is not None:
        return text_of_object(parse_json(payload), json_key)
    try:
        return payload.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"invalid UTF-8 at byte {error.start}") from error


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


def _paragraph_documents(
    path: str, lines: Iterator[Payload | Reject]
) -> Iterator[Payload | Reject]:
    """Joins lines up to a blank one; a document has the number of its first line."""
    why = ": no blank line in it (a sentence per line is --documents line, or lines:N)"
    first, parts, size = 0, list[bytes](), 0
    for item in lines:
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
    if first:
        document = (first, b"\n".join(parts))
        yield document if size <= MAX_DOCUMENT_BYTES else too_long(path, "line", first, why)


def json_rows(path: str) -> Iterator[tuple[int, dict[str, Any]] | Reject]:
    """Yields (line number, object) of a JSON-lines file, and a `Reject` for a line that is none.

    Raises:
        DataError: the file cannot be opened, or is binary.
    """
    for item in numbered_lines(path):
        if isinstance(item, Reject):
            yield item
            continue
        number, payload = item
        if not payload:
            continue
        record = f"line {number}"
        try:
            row = parse_json(payload)
        except DataError as error:
            yield Reject(path, record, str(error))
            continue
        yield (number, row) if isinstance(row, dict) else Reject(path, record, "not a JSON object")


def _filled(lines: Iterable[Payload | Reject]) -> Iterator[Payload | Reject]:
    """Without the blank lines."""
    return (item for item in lines if isinstance(item, Reject) or item[1])


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
    size = document = 0  # bytes of the block, and of the document that it ends with
    for item in items:
        if isinstance(item, Reject) or len(item[1]) > MAX_DOCUMENT_BYTES:
            if payloads:
                yield TextBlock(path, unit, key, numbers, payloads, join)
                numbers, payloads, size, document = [], [], 0, 0
            yield item if isinstance(item, Reject) else too_long(path, unit, item[0])
            continue
        number, payload = item
        if document + len(payload) > MAX_DOCUMENT_BYTES:
            yield TextBlock(path, unit, key, numbers, payloads, join)
            numbers, payloads, size, document = [], [], 0, 0
        numbers.append(number)
        payloads.append(payload)
        size += len(payload)
        document += len(payload)
        if len(payloads) % join:
            continue
        document = 0
        if size >= _BLOCK_BYTES or len(payloads) >= _BLOCK_DOCUMENTS:
            yield TextBlock(path, unit, key, numbers, payloads, join)
            numbers, payloads, size = [], [], 0
    if payloads:
        yield TextBlock(path, unit, key, numbers, payloads, join)


def _rows(path: str, key: str) -> Iterator[Payload | Reject]:
    for first, batch in read_columns(path, {key: "text"}, _BLOCK_ROWS):
        if isinstance(batch, Reject):
            yield batch
            continue
        for number, value in enumerate(batch[key], start=first):
            # A null is an empty document, which the worker rejects by its row number.
            yield number, value or b""


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
