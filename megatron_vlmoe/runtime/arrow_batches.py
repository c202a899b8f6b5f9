"""Batches of Arrow's IPC format, which are views of a file: a damaged one would end the process, or read beyond it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any


def check_batch(batch: Any, columns: Iterable[str]) -> None:
    """Checks that lists and texts of some columns lie within their buffers; texts may be other than UTF-8.

    Args:
        batch: a ``pyarrow.RecordBatch``.
        columns: names; each stands once in the batch.

    Raises:
        pyarrow.ArrowInvalid: they do not.
    """
    import pyarrow

    for name in columns:
        column = batch.column(name)
        column.validate()
        # Where pyarrow makes no view of a type, or a wrong one as of columns of nothing in a list, texts must be UTF-8.
        with contextlib.suppress(pyarrow.ArrowException):
            view = column.view(_with_bytes(column.type))
            view.validate()
            column = view
        column.validate(full=True)


def _with_bytes(kind: Any) -> Any:
    """The type with bytes in the place of texts, which are then not looked at one by one."""
    import pyarrow as pa

    types = pa.types
    if types.is_string(kind):
        return pa.binary()
    if types.is_large_string(kind):
        return pa.large_binary()
    if types.is_string_view(kind):
        return pa.binary_view()
    if types.is_dictionary(kind):
        return pa.dictionary(kind.index_type, _with_bytes(kind.value_type), kind.ordered)
    if types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_with_bytes(kind.value_type)))
    if types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_with_bytes(kind.value_type)))
    if types.is_struct(kind):
        return pa.struct([field.with_type(_with_bytes(field.type)) for field in kind])
    return kind
