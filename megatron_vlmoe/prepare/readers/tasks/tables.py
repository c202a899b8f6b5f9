"""Tables of Hugging Face in a folder of raw data: which belong to a split, and their rows.

The files are parquet or Arrow, named as the Hub, ``save_to_disk`` and the cache of ``datasets`` do:
``data/train-00000-of-00004.parquet``, ``train/0000.parquet``, ``validation/data-00000-of-00001.arrow``,
``vqav2-train-00000-of-00012.arrow``. A split is a word of the path below the raw folder.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.prepare.readers.image_paths import ImageFinder
from megatron_vlmoe.prepare.readers.parquet import ColumnKind, read_columns
from megatron_vlmoe.prepare.readers.records import ImageFile, Reject, walk_files

TABLE_SUFFIXES = (".parquet", ".arrow")
_BATCH_ROWS = 32


class TableFiles:
    """The tables below a folder, found once.

    Args:
        raw: folder of the raw data.
    """

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
    path: str, names: Sequence[str], wanted: Mapping[str, Sequence[str]], optional: Sequence[str]
) -> dict[str, str]:
    """The column of each thing that is wanted: the first of its usual names that a table has.

    Args:
        path: the table, for the error.
        names: its columns.
        wanted: usual columns by name.
        optional: the names that a table may lack; then the result does.

    Raises:
        DataError: one that is not optional is missing.
    """
    found: dict[str, str] = {}
    for name, usual in wanted.items():
        column = next((column for column in usual if column in names), None)
        if column is not None:
            found[name] = column
        elif name not in optional:
            raise DataError(f"{path}: no column {' or '.join(usual)}; it has {', '.join(names)}")
    return found


def table_rows(
    path: str, columns: Mapping[str, str]
) -> Iterator[tuple[str, dict[str, Any]] | Reject]:
    """Yields (record, values by name) of a table.

    Args:
        path: the table.
        columns: column by name.
    """
    kinds: dict[str, ColumnKind] = {column: "any" for column in columns.values()}
    for first, batch in read_columns(path, kinds, _BATCH_ROWS):
        if isinstance(batch, Reject):
            yield batch
            continue
        lists = [batch[column] for column in columns.values()]
        for number, values in enumerate(zip(*lists, strict=True), start=first):
            yield f"row {number}", dict(zip(columns, values, strict=True))


def row_name(path: str, record: str, raw: str, files: int) -> str:
    """Name of a sample without an id: its record, of several files with the file's path below ``raw``."""
    return record if files == 1 else f"{os.path.relpath(path, raw)} {record}"


class ListedImages:
    """The images that lists and tables name by their paths, below a folder of raw data.

    A path is taken as it stands below the folder; else `ImageFinder` looks it up below ``images``, or
    in the folder itself where there is none.

    Args:
        raw: the folder.
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

        Raises:
            DataError: it is none of these, or the path is that of no file.
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
