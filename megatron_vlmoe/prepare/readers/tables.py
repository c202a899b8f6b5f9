"""Tables, a batch of rows at a time: parquet, and Arrow's IPC file and IPC stream.

Hugging Face's ``datasets`` keeps its caches and what ``save_to_disk`` writes as IPC streams in files
named ``.arrow``; Feather (version 2) is an IPC file. What a file is, its first bytes say.

In a folder of raw data the tables are named as the Hub, ``save_to_disk`` and the cache of ``datasets`` do:
``data/train-00000-of-00004.parquet``, ``train/0000.parquet``, ``validation/data-00000-of-00001.arrow``,
``vqav2-train-00000-of-00012.arrow``. A split is a word of the path below the raw folder.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any, Literal

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.prepare.readers.images import ImageFinder
from megatron_vlmoe.prepare.readers.records import ImageFile, Reject, Rows, walk_files
from megatron_vlmoe.runtime.arrow_batches import check_batch
from megatron_vlmoe.runtime.json_files import parse_json

_TABLE_BUFFER = 1 << 22

ColumnKind = Literal["text", "any"]
TableFormat = Literal["parquet", "arrow file", "arrow stream"]

TABLE_MAGIC: Mapping[bytes, TableFormat] = {
    b"PAR1": "parquet",
    b"PARE": "parquet",  # with an encrypted footer: pyarrow says what it lacks
    b"ARROW1": "arrow file",
    b"\xff\xff\xff\xff": "arrow stream",
}
"""First bytes of each kind of table."""

INVALID_TEXT = b"\xff"
"""Stands for a text of an ``any`` column that is not UTF-8 (nor is this)."""

_NO_VALUE = (ValueError, OverflowError, LookupError)
"""For a text that is not UTF-8, and a date or time that Python has none for: its year, nanoseconds or time zone."""


def table_format(path: str) -> TableFormat | None:
    """Which kind of table a file begins as; None: it is none. Raises DataError if unreadable."""
    try:
        with open(path, "rb") as file:
            first = file.read(8)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    return next((kind for magic, kind in TABLE_MAGIC.items() if first.startswith(magic)), None)


def column_names(path: str) -> list[str]:
    """Top-level columns of a table. Raises DataError if it is not one."""
    with _open_table(path) as (schema, _):
        return list(schema.names)


def told_classes(paths: Iterable[str], columns: Sequence[str]) -> tuple[str, ...] | None:
    """Names of the classes that the whole numbers of a column stand for, in their order; None if no table tells them.

    Hugging Face's ``datasets`` writes them into the schema (a ``ClassLabel`` in the JSON text under ``huggingface``).
    Of the possible names of the column the first that a table has counts.

    Raises DataError if two tables tell different names, or one is no table.
    """
    told: dict[tuple[str, ...], str] = {}
    for path in paths:
        with _open_table(path) as (schema, _):
            column = next((column for column in columns if column in schema.names), None)
            written = (schema.metadata or {}).get(b"huggingface", b"{}")
        try:
            names = parse_json(written)["info"]["features"][column]["names"]
        except (ValueError, LookupError, TypeError):
            continue
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            told.setdefault(tuple(names), path)
    if len(told) > 1:
        raise DataError(f"{' and '.join(list(told.values())[:2])} name different classes")
    return next(iter(told), None)


def read_columns(
    path: str, columns: Mapping[str, ColumnKind], batch_rows: int
) -> Iterator[tuple[int, dict[str, list[Any]] | Reject]]:
    """Yields (number of the first row, values by column), at most ``batch_rows`` rows at a time.

    A ``text`` column comes as bytes, so that one string of invalid UTF-8 spoils one row and not the batch; an ``any``
    column as Python objects.

    Raises DataError if it is no table, a column is missing or there twice, or a text column holds no strings.
    """
    import pyarrow

    with _open_table(path, columns, batch_rows) as (schema, batches):
        for name in columns:
            if name not in schema.names:
                raise DataError(f"{path}: no column {name!r}; it has {', '.join(schema.names)}")
            if schema.names.count(name) > 1:
                raise DataError(f"{path}: has several columns {name!r}")
        row = 0
        try:
            for batch in batches:
                values = {
                    name: _values(path, name, batch.column(name), kind)
                    for name, kind in columns.items()
                }
                yield row, values
                row += batch.num_rows
        except (OSError, pyarrow.ArrowException) as error:
            yield row, Reject(path, f"row {row}", f"unreadable from here on: {_one_line(error)}")


@contextmanager
def _open_table(
    path: str, columns: Collection[str] = (), batch_rows: int = 1
) -> Iterator[tuple[Any, Iterator[Any]]]:
    """The schema of a table and its record batches. Raises DataError if it is none."""
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    kind = table_format(path)
    with ExitStack() as stack:
        try:
            if kind == "arrow stream":
                batches = pyarrow.ipc.open_stream(stack.enter_context(pyarrow.memory_map(path)))
                opened = batches.schema, _slices(batches, columns, batch_rows)
            elif kind == "arrow file":
                file = pyarrow.ipc.open_file(stack.enter_context(pyarrow.memory_map(path)))
                batches = (file.get_batch(i) for i in range(file.num_record_batches))
                opened = file.schema, _slices(batches, columns, batch_rows)
            else:
                # With a read buffer a column streams; else a whole row group of it is held.
                table = pyarrow.parquet.ParquetFile(path, buffer_size=_TABLE_BUFFER)
                stack.enter_context(table)
                rows = table.iter_batches(batch_rows, columns=list(columns), use_threads=False)
                opened = table.schema_arrow, rows
            _ = opened[0].names  # decoded only now
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: the name of a column is not UTF-8") from error
        except (OSError, pyarrow.ArrowException) as error:
            what = "parquet or Arrow" if kind is None else kind.replace("arrow", "Arrow IPC")
            raise DataError(f"{path}: not a readable {what} file: {_one_line(error)}") from error
        yield opened


def _slices(batches: Iterable[Any], columns: Collection[str], rows: int) -> Iterator[Any]:
    """Record batches of at most ``rows`` rows, of which these columns are sound."""
    for batch in batches:
        check_batch(batch, columns)
        for start in range(0, batch.num_rows, rows):
            yield batch.slice(start, rows)


def _values(path: str, name: str, column: Any, kind: ColumnKind) -> list[Any]:
    import pyarrow

    if kind == "any":
        try:
            return list(column.to_pylist())
        except _NO_VALUE:
            return [_value_or_invalid(item) for item in column]
    types = pyarrow.types
    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not (
        types.is_string(column.type)
        or types.is_large_string(column.type)
        or types.is_string_view(column.type)
        or types.is_binary(column.type)
        or types.is_large_binary(column.type)
        or types.is_binary_view(column.type)
    ):
        raise DataError(f"{path}: column {name!r} holds {column.type}, not text")
    return list(column.cast(pyarrow.large_binary()).to_pylist())


def _value_or_invalid(item: Any) -> Any:
    try:
        return item.as_py()
    except UnicodeDecodeError:
        return INVALID_TEXT
    except _NO_VALUE:
        # Of a date, its number: a column of text has none, and others need not be read.
        return getattr(item, "value", None)


def _one_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


TABLE_SUFFIXES = (".parquet", ".arrow")
_BATCH_ROWS = 32


class TableFiles:
    """The tables below the folder of the raw data, found once."""

    def __init__(self, raw: str) -> None:
        self._raw = raw
        self._words: dict[str, set[str]] = {}
        for path in walk_files(raw):
            name = os.path.relpath(path, raw)
            # What programs keep for themselves: the Hub's downloads, results of ``Dataset.map``.
            hidden = any(part.startswith((".", "__", "cache-")) for part in name.split(os.sep))
            if name.endswith(TABLE_SUFFIXES) and not hidden:
                joined = name.lower().replace("test-dev", "testdev")
                self._words[path] = set(re.split(r"[^a-z0-9_]+", joined))

    def __bool__(self) -> bool:
        return bool(self._words)

    @property
    def paths(self) -> list[str]:
        """All of them, in order."""
        return list(self._words)

    def of(self, names: Sequence[str]) -> list[str]:
        """The tables of the split that has one of these names, in the order of their paths."""
        return [path for path, words in self._words.items() if not words.isdisjoint(names)]

    def splits(self, names: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
        """Those of the splits, given with their names, that have a table; ``train`` if none has."""
        return tuple(split for split in names if self.of(names[split])) or ("train",)

    def found(self, split: str, names: Sequence[str]) -> list[str]:
        """As `of`. Raises DataError if there is none."""
        files = self.of(names)
        if not files:
            seen = ", ".join(os.path.relpath(path, self._raw) for path in list(self._words)[:4])
            raise DataError(
                f"{self._raw}: no table of split {split}: none has {' or '.join(names)} in its path "
                f"({seen}{', ...' if len(self._words) > 4 else ''})"
            )
        return files


def choose_columns(
    path: str,
    wanted: Mapping[str, Sequence[str]],
    optional: Sequence[str],
    names: Sequence[str] | None = None,
) -> dict[str, str]:
    """The column of each thing that is wanted: the first of its usual names that a table has.

    ``names`` are the columns; None: of parquet or Arrow, which tell them. Raises DataError if one is missing that is
    not optional; the result lacks those that are.
    """
    found: dict[str, str] = {}
    names = column_names(path) if names is None else names
    for name, usual in wanted.items():
        column = next((column for column in usual if column in names), None)
        if column is not None:
            found[name] = column
        elif name not in optional:
            raise DataError(f"{path}: no column {' or '.join(usual)}; it has {', '.join(names)}")
    return found


def table_rows(path: str, columns: Mapping[str, str]) -> Rows:
    """Yields (record, values by name) of a table, given the column of each name."""
    kinds: dict[str, ColumnKind] = {column: "any" for column in columns.values()}
    for first, batch in read_columns(path, kinds, _BATCH_ROWS):
        if isinstance(batch, Reject):
            yield batch
            continue
        lists = [batch[column] for column in columns.values()]
        for number, values in enumerate(zip(*lists, strict=True), start=first):
            yield f"row {number}", dict(zip(columns, values, strict=True))


class ListedImages:
    """The images that lists and tables name by their paths, below a folder of raw data.

    A path is taken as it stands below the folder; else `ImageFinder` looks it up below ``images``, or
    in the folder itself where there is none.
    """

    def __init__(self, raw: str) -> None:
        self._raw = raw

    @cached_property
    def _finder(self) -> ImageFinder:
        images = os.path.join(self._raw, "images")
        return ImageFinder(images if os.path.isdir(images) else self._raw)

    def listed(self, source: str, record: str, name: str) -> ImageFile:
        """The image of a path. Raises DataError if no file, or several, may be meant."""
        direct = os.path.join(self._raw, name)
        path = direct if os.path.isfile(direct) else self._finder.find(name)
        return ImageFile(source, record, path)

    def cell(self, source: str, record: str, value: Any) -> ImageFile:
        """The image of a table's cell: encoded bytes, Hugging Face's {bytes, path}, or a path.

        Raises DataError if it is none of these, or the path is that of no file.
        """
        data = value.get("bytes") if isinstance(value, dict) else value
        name = value.get("path") if isinstance(value, dict) else value
        if isinstance(data, bytes):
            # Equal pictures have equal names, so that samples share them, whatever their ids say.
            digest = hashlib.blake2b(data, digest_size=16).hexdigest()
            return ImageFile(source, record, f"blake2b:{digest}", data=data)
        if isinstance(name, str) and name:
            return self.listed(source, record, name)
        raise DataError("the image is neither bytes nor a path")
