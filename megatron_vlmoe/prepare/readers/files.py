"""Files of characters: what a file is, its lines, its JSON, and a column of its table.

What a file is, its content says first, and its suffix where that leaves it open. Every tool that reads text asks
here; what is not read is refused by name, with what to do.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
import stat
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import IO, Any, Literal, cast

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.prepare.readers.records import Reject, Row, Rows
from megatron_vlmoe.prepare.readers.tables import TABLE_MAGIC, table_format
from megatron_vlmoe.runtime.json_files import parse_json

TextFormat = Literal["auto", "jsonl", "text", "parquet", "arrow"]
"""What the user may say a file is; ``auto``: find out."""

FileKind = Literal["text", "jsonl", "json", "table", "delimited", "tar"]
"""Plain text, an object per line, one JSON value, parquet or Arrow, .csv and its like, a tar."""

MAX_DOCUMENT_BYTES = 32 << 20
"""Longer lines and documents are rejected: no writer means them, and they would fill the memory."""

DAMAGE = (OSError, EOFError, lzma.LZMAError, zlib.error)
"""What reading a file, compressed or not, may raise."""

LARGEST_EXPANSION = 200
"""So many times its size may a file become that is decompressed as a whole; JSON becomes 5 to 30 times as long."""
_SMALL_BYTES = 64 << 20
"""What is decompressed to no more than this may become longer by any factor."""

_READ_BUFFER = 1 << 20
_HEAD_BYTES = 1 << 16
_TABLE_LINES = 8
"""So many lines are looked at for columns."""

_COMPRESSIONS: Mapping[str, re.Pattern[bytes]] = {
    "gzip": re.compile(rb"\x1f\x8b"),
    "bz2": re.compile(rb"BZh[1-9](?:1AY&SY|\x17\x72\x45\x38\x50\x90)"),
    "xz": re.compile(rb"\xfd7zXZ\0|\x5d\0\0"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd"),
    "lz4": re.compile(rb"\x04\x22\x4d\x18"),
}
_COMPRESSION_SUFFIXES = (".gz", ".bz2", ".xz", ".lzma", ".zst", ".lz4")

_SUFFIXES: Mapping[str, FileKind] = {
    ".txt": "text",
    ".text": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "table",
    ".arrow": "table",
    ".feather": "table",
    ".csv": "delimited",
    ".tsv": "delimited",
}

_GIVEN: Mapping[TextFormat, FileKind] = {
    "jsonl": "jsonl",
    "text": "text",
    "parquet": "table",
    "arrow": "table",
}

_UNPACK = "unpack it, and give the files in it"
_EXPORT = "write its texts as JSON lines or parquet"
_BINARY: tuple[tuple[bytes, str, str], ...] = (
    (rb"PK(?:\x03\x04|\x05\x06)", "a zip archive (as .docx, .xlsx and .epub are too)", _UNPACK),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (rb"Rar!\x1a\x07", "a rar archive", _UNPACK),
    (rb"\x1f\x9d", "a file of compress (.Z)", "decompress it"),
    (rb"%PDF-", "a PDF", "take the text out of it (pdftotext)"),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "a document of MS Office", "save it as plain text"),
    (rb"SQLite format 3\0", "an SQLite database", _EXPORT),
    (rb"\x80[\x02-\x05][\x28-\x95]", "a Python pickle", _EXPORT),
    (rb"\x93NUMPY", "a NumPy array", _EXPORT),
    (rb"\x89HDF\r\n\x1a\n", "an HDF5 file", _EXPORT),
    (rb"MATLAB 5\.0", "a MATLAB file", _EXPORT),
    (rb"Obj\x01", "an Avro file", _EXPORT),
    (rb"FEA1", "a Feather file of version 1", _EXPORT),
    (rb"MMIDIDX\0\0", "an index of tokens", "give the text that it was made from"),
    (rb"version https://git-lfs", "a pointer of Git LFS, not the file", "run: git lfs pull"),
    (rb"\xff\xd8\xff|\x89PNG\r|GIF8[79]a|RIFF.{4}WEBP", "a picture", "give the text"),
    (rb"\xff\xfe\0\0|\0\0\xfe\xff", "text in UTF-32", "convert it: iconv -f UTF-32 -t UTF-8"),
    (rb"\xff\xfe|\xfe\xff", "text in UTF-16", "convert it: iconv -f UTF-16 -t UTF-8"),
)
"""Never text: pattern at the start, what it is, what to do."""

_MARKUP: tuple[tuple[bytes, str, str], ...] = (
    (rb"<doc id=", "WikiExtractor's output with tags", "run WikiExtractor with --json"),
    (rb"<mediawiki", "a dump of MediaWiki", "take the text out of it with WikiExtractor --json"),
    (rb"(?i)<!doctype html|<html", "a web page", "take the text out of it (is it the download?)"),
    (rb"(?i)<\?xml|<!doctype|<(?:feed|rss|tei|doc)[ >]", "XML", _EXPORT),
    (rb"\{\\rtf", "a rich text document (.rtf)", "save it as plain text"),
    (rb"-- (?:MySQL|MariaDB|PostgreSQL)|--\n-- PostgreSQL", "an SQL dump", _EXPORT),
    (rb"WARC/\d", "a web archive (.warc, .wet)", _EXPORT),
    (rb"\{'[^'\n]+': ", "Python dictionaries, not JSON", "write them with json.dumps"),
)
"""Text whose lines are no documents, in the same columns."""

# An image and a caption, or the header of such columns; a caption and an address.
_DELIMITED = re.compile(
    rb"[^\s,|]+\.(?i:jpe?g|png|webp)(?:#\d)?[\t,|]"
    rb"|(?i:image|image_(?:name|path|id)|file_?(?:name|path)|url)[\t,|]"
    rb"|[^\t\n]+\thttps?://\S+\s*\Z|https?://\S+\t"
)

_IMAGE_OR_ADDRESS = re.compile(r"https?://\S+|\S+\.(?i:jpe?g|png|webp)(?:#\d)?")


def open_binary(path: str) -> IO[bytes]:
    """Opens a file for reading, decompressed as its first bytes say (gzip, bz2, xz, zstd, lz4).

    Raises OSError if it cannot be opened. Damage inside raises one of `DAMAGE` later.
    """
    file = open(path, "rb", buffering=_READ_BUFFER)
    first = cast(io.BufferedReader, file).peek(16)
    kind = next((name for name, magic in _COMPRESSIONS.items() if magic.match(first)), None)
    if kind is None:
        return file
    source: Any = file
    if os.path.isfile(path):  # of a pipe, what has been read cannot be read again
        file.close()
        source = path
    opener: Any = {"gzip": gzip.open, "bz2": bz2.open, "xz": lzma.open}.get(kind)
    if opener is not None:
        return cast(IO[bytes], opener(source))
    import pyarrow  # type: ignore[import-untyped]

    return io.BufferedReader(pyarrow.input_stream(source, compression=kind), _READ_BUFFER)


def read_whole(path: str) -> bytes:
    """All bytes of a file, decompressed.

    Raises one of `DAMAGE`, or DataError for a decompression bomb.
    """
    parts, size = list[bytes](), 0
    with open_binary(path) as file:
        limit = max(_SMALL_BYTES, LARGEST_EXPANSION * os.path.getsize(path))
        # What comes out of a pipe has no size.
        limit = limit if os.path.isfile(path) else sys.maxsize
        while part := file.read(_READ_BUFFER):
            size += len(part)
            if size > limit:
                raise DataError(
                    f"{path}: decompression bomb: more than {LARGEST_EXPANSION} times as long"
                )
            parts.append(part)
    return b"".join(parts)


def file_kind(path: str, given: TextFormat = "auto") -> FileKind:
    """What a file is.

    A first line that is a JSON object makes it JSON lines, whatever its name; compressed files are looked into.
    ``given`` decides between what a file of characters could be; binary content is refused all the same.

    Raises DataError for a file that cannot be read, or that is not read as text; it says what it is and what to do.
    """
    kind = None if given == "auto" else _GIVEN[given]
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            names = sorted(name for name in os.listdir(path) if not name.startswith("."))
            first = f", as {os.path.join(path, names[0])}" if names else " (it is empty)"
            raise DataError(f"{path}: a folder: name the files in it{first}")
        if not stat.S_ISREG(mode):
            # By the suffix alone: what is read of a pipe to find out is gone.
            if kind := kind or _SUFFIXES.get(_suffix(path)):
                return kind
            raise DataError(f"{path}: no regular file: say with --format what comes out of it")
        if kind == "table" or table_format(path) is not None:
            return "table"
        with open_binary(path) as file:
            try:
                head = file.read(_HEAD_BYTES).removeprefix(b"\xef\xbb\xbf")
                return _kind_of_head(path, head, file, kind)
            except DAMAGE:
                # Where it breaks off is said by who reads it.
                return kind or _SUFFIXES.get(_suffix(path), "text")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error


def check_characters(path: str) -> None:
    """Raises DataError if a file is none of characters, whatever they say; names what it is."""
    kind = file_kind(path, "text")
    if kind in ("table", "tar"):
        what = "a tar archive" if kind == "tar" else "a table of parquet or Arrow"
        raise refused(path, what, "give the file of characters that belongs here")


def _kind_of_head(path: str, head: bytes, file: IO[bytes], given: FileKind | None) -> FileKind:
    """`file_kind` by the first bytes; ``file`` stands behind them."""
    _refuse(path, head, _BINARY)
    if head[257:262] == b"ustar":
        return "tar"
    twice = any(magic.match(head) for magic in _COMPRESSIONS.values())
    if twice or any(map(head.startswith, TABLE_MAGIC)):
        what = "a file that was compressed twice" if twice else "a compressed table"
        raise refused(path, what, "decompress it")
    if b"\0" in head:
        advice = "convert it to UTF-8 text, JSON lines, parquet or Arrow"
        raise refused(path, "binary content (there are NUL bytes)", advice)
    if given is not None:
        return given
    _refuse(path, head.lstrip(), _MARKUP)
    if _suffix(path) in (".xml", ".html", ".htm"):
        raise refused(path, f"a {_suffix(path)} file", _EXPORT)
    if (json_kind := _json_kind(path, head, file)) is not None:
        return json_kind
    kind = _SUFFIXES.get(_suffix(path), "text")
    lines = head.strip().splitlines()[:_TABLE_LINES]
    # Three columns or more, as of SNLI's .txt: prose has no tabs at all the same places.
    tabs = {line.count(b"\t") for line in lines}
    columns = len(lines) > 1 and len(tabs) == 1 and max(tabs) > 1
    if kind == "text" and lines and (columns or _DELIMITED.match(lines[0])):
        return "delimited"
    # An empty .json is without documents, which is no damage.
    return "text" if kind == "json" and not lines else kind


def _suffix(path: str) -> str:
    name = path.lower()
    for suffix in _COMPRESSION_SUFFIXES:
        name = name.removesuffix(suffix)
    return os.path.splitext(name)[1]


def _refuse(path: str, head: bytes, table: tuple[tuple[bytes, str, str], ...]) -> None:
    for pattern, what, advice in table:
        if re.match(pattern, head, re.DOTALL):
            raise refused(path, what, advice)


def refused(path: str, what: str, advice: str) -> DataError:
    """The error for a file that is not read as text."""
    return DataError(f"{path}: {what}, which is not read as text: {advice}")


def _json_kind(path: str, head: bytes, file: IO[bytes]) -> FileKind | None:
    """JSON lines or one JSON value, if it is either; ``file`` stands behind ``head``."""
    start = head.lstrip()
    if start[:1] not in (b"{", b"["):
        return None
    first, end, rest = start.partition(b"\n")
    if not end:
        first += file.readline(MAX_DOCUMENT_BYTES)
    value = _parsed(first)
    if isinstance(value, dict):
        return "jsonl"
    if isinstance(value, list) and any(isinstance(one, (str, dict, list)) for one in value):
        return "json"
    if not re.match(rb"\{\s*\"|\[\s*[\[{\"]", start):
        return None
    # One value over several lines, or a long one; unless only the first line of many is damaged.
    lines = _SUFFIXES.get(_suffix(path)) == "jsonl"
    return "jsonl" if lines or isinstance(_parsed(rest.partition(b"\n")[0]), dict) else "json"


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None


_SKIP_BYTES = 1 << 17

Payload = tuple[int, bytes]
"""Number of a line, row or entry, and its bytes."""


def numbered_lines(
    path: str, strip: bool = True, span: tuple[int, int] | None = None
) -> Iterator[Payload | Reject]:
    """Lines with their numbers, from 1, of a file that may be compressed.

    White space is taken off both ends (``strip``), so that a blank line is ``b""``; else the line end alone. Of a file
    that is not compressed ``span`` are the offsets between which the lines begin; None: all.

    Raises DataError if the file cannot be opened, or is binary. What breaks off later is a `Reject`.
    """
    check_characters(path)
    number = 0
    try:
        with open_binary(path) as file:
            place, end = 0, float("inf")
            if span is not None:
                number, end = _skip_lines(file, span[0]), span[1]
                place = file.tell()
            while place < end and (line := file.readline(MAX_DOCUMENT_BYTES + 1)):
                number += 1
                place += len(line)
                if len(line) > MAX_DOCUMENT_BYTES and not line.endswith(b"\n"):
                    while (rest := file.readline(_SKIP_BYTES)) and not rest.endswith(b"\n"):
                        place += len(rest)
                    place += len(rest)
                    yield too_long(path, "line", number)
                    continue
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                yield number, line.strip() if strip else line.rstrip(b"\r\n")
    except (*DAMAGE, ValueError) as error:
        if number == 0 and isinstance(error, OSError):
            raise DataError(f"{path}: {error.strerror or error}") from error
        yield Reject(path, f"line {number + 1}", f"unreadable from here on: {error}")


def _skip_lines(file: IO[bytes], offset: int) -> int:
    """Goes to the first line that begins at an offset or behind it; gives the number of lines before it."""
    if not offset:
        return 0
    number, left = 0, offset - 1
    while left and (block := file.read(min(left, _READ_BUFFER))):
        number += block.count(b"\n")
        left -= len(block)
    # The line that the byte before the offset belongs to is that of an earlier span.
    while (rest := file.readline(_SKIP_BYTES)) and not rest.endswith(b"\n"):
        pass
    return number + 1


def filled_lines(path: str, span: tuple[int, int] | None = None) -> Iterator[Payload | Reject]:
    """`numbered_lines` without the blank ones."""
    lines = numbered_lines(path, span=span)
    return (item for item in lines if isinstance(item, Reject) or item[1])


def is_compressed(path: str) -> bool:
    """Whether `open_binary` decompresses a file. Raises OSError if it cannot be read."""
    with open(path, "rb") as file:
        head = file.read(16)
    return any(magic.match(head) for magic in _COMPRESSIONS.values())


def too_long(path: str, unit: str, number: int, why: str = "") -> Reject:
    """The reject of a line or document over `MAX_DOCUMENT_BYTES`."""
    return Reject(path, f"{unit} {number}", f"longer than {MAX_DOCUMENT_BYTES} bytes{why}")


def text_lines(path: str, errors: str = "strict") -> Iterator[tuple[int, str] | Reject]:
    """`numbered_lines` as text without line ends.

    ``errors`` is as of `bytes.decode`: with "surrogateescape" a caption that is no UTF-8 is rejected later, with the
    other bad captions; with "strict" the whole line is rejected here.
    """
    for item in numbered_lines(path, strip=False):
        if isinstance(item, Reject):
            yield item
            continue
        try:
            yield item[0], item[1].decode("utf-8", errors)
        except UnicodeDecodeError as error:
            yield Reject(path, f"line {item[0]}", f"invalid UTF-8 at byte {error.start}")


def columns_of(line: str, separator: str | None = None) -> tuple[str, list[str]]:
    """The separator of a first line, if it is not given, and the cells of the line."""
    separator = separator or next((one for one in "\t,|;" if one in line), "\t")
    csv.field_size_limit(MAX_DOCUMENT_BYTES)
    try:
        cells = next(csv.reader([line], delimiter=separator), [])
    except csv.Error:  # of a line end within the line
        cells = line.split(separator)
    return separator, [cell.strip() for cell in cells]


class TableLines(Iterator[str]):
    """The lines of a file for `csv.reader`; what is no line goes to ``rejects``.

    Attributes:
        first: number of the first line since it was set to 0; ``last``: of the last line.
    """

    def __init__(self, path: str, errors: str = "strict") -> None:
        self.path = path
        self._items = text_lines(path, errors)
        self.first = self.last = 0
        self.rejects: list[Reject] = []

    def __next__(self) -> str:
        for item in self._items:
            if not isinstance(item, Reject):
                self.first, self.last = self.first or item[0], item[0]
                return item[1] + "\n"
            self.rejects.append(item)
        raise StopIteration

    def rows(
        self, reader: Iterator[list[str]], columns: Sequence[str]
    ) -> Iterator[tuple[int, int, list[str]] | Reject]:
        """Yields (number of the first line, number of the last, cells) of each row that ``reader`` makes of the lines.

        A `Reject` stands for a row that is none, or that has not as many cells as there are columns.
        """
        cells: list[str] | None = []
        while cells is not None:
            bad, self.first = "", 0
            try:
                cells = next(reader, None)
            except csv.Error as error:
                bad = f"not a row of the table: {error}"
            yield from self.rejects
            self.rejects.clear()
            if cells and not bad and len(cells) != len(columns):
                bad = f"{len(cells)} columns, not the {len(columns)} of the first line"
            first = self.first or 1  # 1: that of a first line that is no header
            if bad:
                yield Reject(self.path, lines_record(first, self.last), bad)
            elif cells:
                yield first, self.last, cells


def lines_record(first: int, last: int) -> str:
    """The name of a row in errors, by the numbers of its lines."""
    return f"line {first}" + (f" to {last}" if last > first else "")


def read_column(
    path: str, names: Sequence[str], captions: bool = False
) -> Iterator[tuple[int, str] | Reject]:
    """Yields (number of the first line, cell) of one column, row by row.

    The best of the ``names`` that the header has counts. With ``captions`` files without a header are read too, whose
    captions stand beside an address or behind the name of an image. Raises DataError if there is no such column.
    """
    lines = TableLines(path)
    first = next(lines, None)
    if first is None:
        yield from lines.rejects
        return
    delimiter, header = columns_of(first)
    place = next((header.index(name) for name in names if name in header), None)
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    if place is None and captions:
        header = first.strip().split(delimiter)
        if len(header) == 2 and re.match(r"https?://", header[1]):
            place = 0
        elif len(header) == 2 and _IMAGE_OR_ADDRESS.fullmatch(header[0]):
            place = 1
        strings = chain([first], lines)
        rows = csv.reader(strings, delimiter=delimiter, quoting=csv.QUOTE_NONE, strict=True)
    if place is None:
        yield from lines.rejects
        what = f"a table of columns ({', '.join(header[:8])}) without {' or '.join(names)}"
        advice = "name the column with --text-key, or write it as JSON lines"
        raise refused(
            path, what, f"{advice}; plain text: --format text" if not captions else advice
        )
    for row in lines.rows(rows, header):
        yield row if isinstance(row, Reject) else (row[0], row[2][place])


def load_json(path: str) -> Any:
    """Parses a whole JSON file, compressed or not; memory is several times its size.

    Raises DataError, which names the line, if it is unreadable, binary, invalid UTF-8 or invalid JSON.
    """
    try:
        check_characters(path)
        return json.loads(read_whole(path).decode("utf-8-sig"))
    except DAMAGE as error:
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: invalid JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: invalid UTF-8 at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: invalid JSON: {error}") from error


def json_list(path: str, value: Any, key: str = "") -> list[Any]:
    """``value`` if it is a list. Raises DataError naming the file and the key of the list, if it has one."""
    if not isinstance(value, list):
        raise DataError(
            f"{path}: {key} is missing or not a list" if key else f"{path}: not a JSON list"
        )
    return value


def json_lists(path: str, *keys: str) -> list[list[Any]]:
    """The lists under some keys of a file that is one JSON object. Raises DataError."""
    value = load_json(path)
    if not isinstance(value, dict):
        raise DataError(f"{path}: not a JSON object")
    return [json_list(path, value.get(key), f'"{key}"') for key in keys]


def json_entries(path: str) -> Iterator[tuple[str, Row]]:
    """Yields (``entry N``, object) of a file that is one JSON list; what is no object comes as an empty one."""
    for number, entry in enumerate(json_list(path, load_json(path))):
        yield f"entry {number}", entry if isinstance(entry, dict) else {}


def json_rows(path: str) -> Rows:
    """Yields (``line N``, object) of a JSON-lines file, and a `Reject` for a line that is none.

    Raises DataError if the file cannot be opened, or is binary.
    """
    for item in filled_lines(path):
        if isinstance(item, Reject):
            yield item
            continue
        record, payload = f"line {item[0]}", item[1]
        try:
            row = parse_json(payload)
        except DataError as error:
            yield Reject(path, record, str(error))
            continue
        yield (record, row) if isinstance(row, dict) else Reject(path, record, "not a JSON object")
