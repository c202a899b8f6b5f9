"""Tables, a batch of rows at a time: parquet, and Arrow's IPC file and IPC stream.

Hugging Face's ``datasets`` keeps its caches and what ``save_to_disk`` writes as IPC streams in files
named ``.arrow``; Feather (version 2) is an IPC file. What a file is, its first bytes say.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any, Literal

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.prepare.readers.records import Reject

_READ_BUFFER = 1 << 22

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
    with ExitStack() as stack:
        schema, _ = _open_table(path, None, 1, stack)
        return list(schema.names)


def class_names(path: str, column: str) -> tuple[str, ...] | None:
    """Names of the classes that the whole numbers of a column stand for, in their order.

    Hugging Face's ``datasets`` writes them into the schema (a ``ClassLabel`` in the JSON text under
    ``huggingface``). None: this table does not tell. Raises DataError if it is no table.
    """
    with ExitStack() as stack:
        schema, _ = _open_table(path, None, 1, stack)
        written = (schema.metadata or {}).get(b"huggingface", b"{}")
    try:
        names = json.loads(written)["info"]["features"][column]["names"]
    except (ValueError, LookupError, TypeError):
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    return tuple(names)


def read_columns(
    path: str, columns: Mapping[str, ColumnKind], batch_rows: int
) -> Iterator[tuple[int, dict[str, list[Any]] | Reject]]:
    """Yields (number of the first row, values by column), at most ``batch_rows`` rows at a time.

    Args:
        path: a table of any kind that `table_format` knows.
        columns: what to read. A ``text`` column comes as bytes, so that one string of invalid
            UTF-8 spoils one row and not the batch; an ``any`` column as Python objects.

    Raises:
        DataError: not a table, a missing column, or a text column that holds no strings.
    """
    import pyarrow

    with ExitStack() as stack:
        schema, batches = _open_table(path, columns, batch_rows, stack)
        for name in columns:
            if name not in schema.names:
                raise DataError(f"{path}: no column {name!r}; it has {', '.join(schema.names)}")
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


def _open_table(
    path: str, columns: Mapping[str, ColumnKind] | None, batch_rows: int, stack: ExitStack
) -> tuple[Any, Iterator[Any]]:
    """The schema of a table and its record batches, open as long as ``stack`` is.

    Raises:
        DataError: not a table.
    """
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    kind = table_format(path)
    try:
        if kind == "arrow stream":
            stream = pyarrow.ipc.open_stream(stack.enter_context(pyarrow.memory_map(path)))
            return stream.schema, _slices(stream, batch_rows)
        if kind == "arrow file":
            file = pyarrow.ipc.open_file(stack.enter_context(pyarrow.memory_map(path)))
            batches = (file.get_batch(i) for i in range(file.num_record_batches))
            return file.schema, _slices(batches, batch_rows)
        # With a read buffer a column streams; else a whole row group of it is held.
        table = stack.enter_context(pyarrow.parquet.ParquetFile(path, buffer_size=_READ_BUFFER))
        wanted = None if columns is None else list(columns)
        rows = table.iter_batches(batch_rows, columns=wanted, use_threads=False)
        return table.schema_arrow, rows
    except (OSError, pyarrow.ArrowException) as error:
        what = "parquet or Arrow" if kind is None else kind.replace("arrow", "Arrow IPC")
        raise DataError(f"{path}: not a readable {what} file: {_one_line(error)}") from error


def _slices(batches: Iterable[Any], rows: int) -> Iterator[Any]:
    """Record batches of at most ``rows`` rows."""
    for batch in batches:
        for start in range(0, batch.num_rows, rows):
            yield batch.slice(start, rows)


def _values(path: str, name: str, column: Any, kind: ColumnKind) -> list[Any]:
    import pyarrow

    if kind == "any":
        return _any_values(column)
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


def _any_values(column: Any) -> list[Any]:
    """Python objects; `INVALID_TEXT` in the place of a value with invalid UTF-8."""
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        pass
    values: list[Any] = []
    for item in column:
        try:
            values.append(item.as_py())
        except UnicodeDecodeError:
            values.append(INVALID_TEXT)
    return values


def _one_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
