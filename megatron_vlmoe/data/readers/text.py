"""Raw text: JSON lines, plain text (a document per line, or between blank lines) and parquet."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, Literal, cast

from megatron_vlmoe.data.errors import DataError
from megatron_vlmoe.data.readers.parquet import read_columns, table_format
from megatron_vlmoe.data.readers.records import Reject, TextBlock, check_inputs

TextFormat = Literal["auto", "jsonl", "text", "parquet"]
DocumentSplit = Literal["line", "blank-line"]

_BLOCK_BYTES = 1 << 17
_BLOCK_DOCUMENTS = 1024
_BLOCK_ROWS = 256
MAX_DOCUMENT_BYTES = 32 << 20
"""Longer lines and documents are rejected: no writer means them, and they would fill the memory."""


@dataclass(frozen=True)
class TextInput:
    """Which files, and how to read them.

    Attributes:
        files: paths; ``.gz``, ``.bz2`` and ``.xz`` are decompressed (not parquet).
        format: ``auto`` goes by the suffix: ``.jsonl``, ``.json`` and ``.ndjson``, ``.parquet``,
            anything else plain text.
        text_key: JSON key or parquet column of the text.
        documents: what separates documents of plain text.
    """

    files: tuple[str, ...]
    format: TextFormat = "auto"
    text_key: str = "text"
    documents: DocumentSplit = "line"


def read_text(source: TextInput) -> Iterator[TextBlock | Reject]:
    """Yields the documents of all files in order, in blocks of about 128 KiB.

    Lines that are empty or blank separate documents and are no records.

    Raises:
        DataError: a file is missing or unreadable, or a parquet file lacks the column.
    """
    check_inputs(source.files)
    for path in source.files:
        kind = _format_of(path) if source.format == "auto" else source.format
        if kind == "parquet":
            yield from _parquet_blocks(path, source.text_key)
            continue
        key = source.text_key if kind == "jsonl" else None
        documents = numbered_lines(path)
        if kind == "text" and source.documents == "blank-line":
            documents = _paragraph_documents(path, documents)
        yield from _line_blocks(path, key, documents)


def _format_of(path: str) -> TextFormat:
    if table_format(path) is not None:
        return "parquet"
    name = path.lower()
    for suffix in (".gz", ".bz2", ".xz"):
        name = name.removesuffix(suffix)
    if name.endswith((".jsonl", ".json", ".ndjson")):
        return "jsonl"
    return "parquet" if name.endswith(".parquet") else "text"


def open_binary(path: str) -> IO[bytes]:
    """Opens a file for reading, decompressed as its suffix says. Raises OSError."""
    if path.endswith(".gz"):
        return cast(IO[bytes], gzip.open(path, "rb"))
    if path.endswith(".bz2"):
        return bz2.open(path, "rb")
    if path.endswith(".xz"):
        return lzma.open(path, "rb")
    return open(path, "rb", buffering=1 << 20)


def numbered_lines(path: str, strip: bool = True) -> Iterator[tuple[int, bytes] | Reject]:
    """Lines with their numbers, from 1.

    Args:
        path: file to read, decompressed as its suffix says.
        strip: take white space off both ends, so that a blank line is ``b""``; else the line end
            alone.

    Raises:
        DataError: the file cannot be opened. What breaks off later is a `Reject`.
    """
    number = 0
    try:
        with open_binary(path) as file:
            while line := file.readline(MAX_DOCUMENT_BYTES + 1):
                number += 1
                if len(line) > MAX_DOCUMENT_BYTES and not line.endswith(b"\n"):
                    while (rest := file.readline(_BLOCK_BYTES)) and not rest.endswith(b"\n"):
                        pass
                    yield _too_long(path, number)
                    continue
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                yield number, line.strip() if strip else line.rstrip(b"\r\n")
    except OSError as error:
        if number == 0:
            raise DataError(f"{path}: {error.strerror or error}") from error
        yield Reject(path, f"line {number + 1}", f"unreadable from here on: {error}")
    except (EOFError, lzma.LZMAError, ValueError) as error:
        yield Reject(path, f"line {number + 1}", f"unreadable from here on: {error}")


def _too_long(path: str, number: int) -> Reject:
    return Reject(path, f"line {number}", f"longer than {MAX_DOCUMENT_BYTES} bytes")


def _paragraph_documents(
    path: str, lines: Iterator[tuple[int, bytes] | Reject]
) -> Iterator[tuple[int, bytes] | Reject]:
    """Joins lines up to a blank one; a document has the number of its first line."""
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
            yield document if size <= MAX_DOCUMENT_BYTES else _too_long(path, first)
        first, parts, size = 0, [], 0
    if first:
        document = (first, b"\n".join(parts))
        yield document if size <= MAX_DOCUMENT_BYTES else _too_long(path, first)


def json_rows(path: str) -> Iterator[tuple[int, dict[str, Any]] | Reject]:
    """Yields (line number, object) of a JSON-lines file, and a `Reject` for a line that is none.

    Raises:
        DataError: the file cannot be opened.
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
            row = json.loads(payload.decode("utf-8"))
        except UnicodeDecodeError as error:
            yield Reject(path, record, f"invalid UTF-8 at byte {error.start}")
            continue
        except (ValueError, RecursionError) as error:
            yield Reject(path, record, f"invalid JSON: {error}")
            continue
        yield (number, row) if isinstance(row, dict) else Reject(path, record, "not a JSON object")


def _line_blocks(
    path: str, key: str | None, documents: Iterator[tuple[int, bytes] | Reject]
) -> Iterator[TextBlock | Reject]:
    numbers: list[int] = []
    payloads: list[bytes] = []
    size = 0
    for item in documents:
        if isinstance(item, Reject):
            if payloads:
                yield TextBlock(path, "line", key, numbers, payloads)
                numbers, payloads, size = [], [], 0
            yield item
            continue
        number, payload = item
        if not payload:
            continue
        numbers.append(number)
        payloads.append(payload)
        size += len(payload)
        if size >= _BLOCK_BYTES or len(payloads) >= _BLOCK_DOCUMENTS:
            yield TextBlock(path, "line", key, numbers, payloads)
            numbers, payloads, size = [], [], 0
    if payloads:
        yield TextBlock(path, "line", key, numbers, payloads)


def _parquet_blocks(path: str, key: str) -> Iterator[TextBlock | Reject]:
    for first, batch in read_columns(path, {key: "text"}, _BLOCK_ROWS):
        if isinstance(batch, Reject):
            yield batch
            continue
        column: Sequence[bytes | None] = batch[key]
        # A null is an empty document, which the worker rejects by its row number.
        payloads = [value or b"" for value in column]
        yield TextBlock(path, "row", None, list(range(first, first + len(payloads))), payloads)
