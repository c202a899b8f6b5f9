"""Parquet files, a batch of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from megatron_vlmoe.data.errors import DataError
from megatron_vlmoe.data.readers.records import Reject

_READ_BUFFER = 1 << 22

INVALID_TEXT = b"\xff"
"""Stands for a text of an ``any`` column that is not UTF-8 (nor is this)."""

ColumnKind = Literal["text", "any"]


def column_names(path: str) -> list[str]:
    """Top-level columns of a parquet file. Raises DataError if it is not one."""
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        return list(pyarrow.parquet.read_schema(path).names)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: not a readable parquet file: {_one_line(error)}") from error


def read_columns(
    path: str, columns: Mapping[str, ColumnKind], batch_rows: int
) -> Iterator[tuple[int, dict[str, list[Any]] | Reject]]:
    """Yields (number of the first row, values by column), ``batch_rows`` rows at a time.

    Args:
        path: a parquet file.
        columns: what to read. A ``text`` column comes as bytes, so that one string of invalid
            UTF-8 spoils one row and not the batch; an ``any`` column as Python objects.

    Raises:
        DataError: not a parquet file, a missing column, or a text column that holds no strings.
    """
    import pyarrow
    import pyarrow.parquet

    names = column_names(path)
    for name in columns:
        if name not in names:
            raise DataError(f"{path}: no column {name!r}; it has {', '.join(names)}")
    row = 0
    try:
        # With a read buffer a column streams; else a whole row group of it is held.
        with pyarrow.parquet.ParquetFile(path, buffer_size=_READ_BUFFER) as file:
            for batch in file.iter_batches(batch_rows, columns=list(columns), use_threads=False):
                values = {
                    name: _values(path, name, batch.column(name), kind)
                    for name, kind in columns.items()
                }
                yield row, values
                row += batch.num_rows
    except (OSError, pyarrow.ArrowException) as error:
        yield row, Reject(path, f"row {row}", f"unreadable from here on: {_one_line(error)}")


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
        or types.is_binary(column.type)
        or types.is_large_binary(column.type)
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
