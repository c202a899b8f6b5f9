"""The error that every reader and writer of data raises."""

from __future__ import annotations


class DataError(ValueError):
    """Bad input or a damaged file: one line that names the file and, where known, the record."""
