"""What a file of text is, by its content first and by its suffix where that leaves it open.

Every tool that reads text asks here. What is not read is refused by name, with what to do.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import re
import stat
import zlib
from collections.abc import Mapping
from typing import IO, Any, Literal, cast

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.prepare.readers.parquet import TABLE_MAGIC, table_format

TextFormat = Literal["auto", "jsonl", "text", "parquet", "arrow"]
"""What the user may say a file is; ``auto``: find out."""

FileKind = Literal["text", "jsonl", "json", "table", "delimited", "tar"]
"""Plain text, an object per line, one JSON value, parquet or Arrow, .csv and its like, a tar."""

MAX_DOCUMENT_BYTES = 32 << 20
"""Longer lines and documents are rejected: no writer means them, and they would fill the memory."""

DAMAGE = (OSError, EOFError, lzma.LZMAError, zlib.error)
"""What reading a file, compressed or not, may raise."""

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


def open_binary(path: str) -> IO[bytes]:
    """Opens a file for reading, decompressed as its first bytes say (gzip, bz2, xz, zstd, lz4).

    Raises:
        OSError: it cannot be opened. Damage inside raises one of `DAMAGE` later.
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
    if kind == "gzip":
        return cast(IO[bytes], gzip.open(source))
    if kind == "bz2":
        return bz2.open(source)
    if kind == "xz":
        return lzma.open(source)
    import pyarrow  # type: ignore[import-untyped]

    return io.BufferedReader(pyarrow.input_stream(source, compression=kind), _READ_BUFFER)


def file_kind(path: str, given: TextFormat = "auto") -> FileKind:
    """What a file is.

    A first line that is a JSON object makes it JSON lines, whatever its name; compressed files are
    looked into. ``given`` decides between what a file of characters could be; binary content is
    refused all the same.

    Raises:
        DataError: a file that cannot be read, or that holds what is not read as text; the message
            says what it is and what to do.
    """
    kind = None if given == "auto" else _GIVEN[given]
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise DataError(f"{path}: a folder: name the files in it{_first_file(path)}")
        if not stat.S_ISREG(mode):
            return kind or _kind_of_pipe(path)
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
    return _json_kind(path, head, file) or _kind_of_characters(path, head)


def _first_file(folder: str) -> str:
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    return f", as {os.path.join(folder, names[0])}" if names else " (it is empty)"


def _kind_of_pipe(path: str) -> FileKind:
    """By the suffix alone: what is read of a pipe to find out is gone."""
    kind = _SUFFIXES.get(_suffix(path))
    if kind is None:
        raise DataError(f"{path}: no regular file: say with --format what comes out of it")
    return kind


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


def _kind_of_characters(path: str, head: bytes) -> FileKind:
    """Between plain text and delimited columns, by the suffix and the first line."""
    kind = _SUFFIXES.get(_suffix(path), "text")
    lines = head.strip().splitlines()[:_TABLE_LINES]
    if kind == "text" and lines and _DELIMITED.match(lines[0]):
        return "delimited"
    # Three columns or more, as of SNLI's .txt: prose has no tabs at all the same places.
    tabs = {line.count(b"\t") for line in lines}
    if kind == "text" and len(lines) > 1 and len(tabs) == 1 and tabs.pop() > 1:
        return "delimited"
    if kind == "json" and not head.strip():
        return "text"  # without documents, which is no damage
    return kind
