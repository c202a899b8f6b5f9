"""MNLI, and any task of two sentences in GLUE's layout: ``SPLIT.tsv`` with a header line.

Columns are parted by tabs and never quoted. A class "-" (the annotators did not agree) leaves the
sample out; test files have no column of classes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_vlmoe.data.errors import DataError
from megatron_vlmoe.data.readers.records import Reject
from megatron_vlmoe.data.readers.tasks.records import (
    Omitted,
    SampleStream,
    TaskInput,
    TaskSample,
    find_file,
)
from megatron_vlmoe.data.readers.text import numbered_lines
from megatron_vlmoe.data.task_labels import Labels

_MNLI_SPLITS = ("train", "dev_matched", "dev_mismatched")
_NO_CLASS = "-"
_ID_COLUMNS = ("index", "pairID")


class SentencePairSource:
    """Tables of sentence pairs in a folder."""

    def __init__(self, source: TaskInput) -> None:
        if len(set(source.class_names)) != len(source.class_names):
            raise DataError(f"--class-names {' '.join(source.class_names)}: one name twice")
        self._source = source
        self.labels = Labels("mnli", source.class_names)

    def splits(self) -> tuple[str, ...]:
        """MNLI's, with the test files that are there."""
        try:
            names = sorted(os.listdir(self._source.raw))
        except OSError as error:
            raise DataError(f"{self._source.raw}: {error.strerror}") from error
        tests = [n.removesuffix(".tsv") for n in names if n.startswith("test_")]
        return (*_MNLI_SPLITS, *(name for name in tests if f"{name}.tsv" in names))

    def read(self, split: str) -> SampleStream:
        """The rows of ``SPLIT.tsv``. Raises DataError if it or a column of it is missing."""
        path = find_file(self._source.raw, ("",), f"{split}.tsv")
        lines = numbered_lines(path, strip=False)
        table = _header(path, next(lines, None), split.startswith("test"), self._source)
        return table.samples(lines)


def _header(
    path: str, first: tuple[int, bytes] | Reject | None, is_test: bool, source: TaskInput
) -> _Table:
    """Finds the columns in the header line. Raises DataError."""
    if first is None or isinstance(first, Reject):
        raise DataError(f"{path}: {first.reason if first else 'empty file'}")
    try:
        names = first[1].decode("utf-8").split("\t")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: line 1: invalid UTF-8 at byte {error.start}") from error
    places = {name: place for place, name in enumerate(names)}
    needed = [source.sentence1, source.sentence2]
    if not is_test or source.label in places:
        needed.append(source.label)
    for name in needed:
        if name not in places:
            raise DataError(f"{path}: no column {name!r}; it has {', '.join(names)}")
    found = next((places[name] for name in _ID_COLUMNS if name in places), None)
    columns = tuple((name, places[name]) for name in needed)
    return _Table(path, columns, found, len(names), source.class_names)


@dataclass(frozen=True)
class _Table:
    """A table whose header has been read.

    Attributes:
        path: the file.
        columns: name and place of the two sentences and, unless it is a test, of the class.
        id_column: place of the sample's name; None: the number of the line.
        width: columns of the header.
        class_names: the classes.
    """

    path: str
    columns: tuple[tuple[str, int], ...]
    id_column: int | None
    width: int
    class_names: tuple[str, ...]

    def samples(self, lines: Iterator[tuple[int, bytes] | Reject]) -> SampleStream:
        """The samples of all lines after the header."""
        for item in lines:
            if isinstance(item, Reject):
                yield item
                continue
            number, line = item
            if line.strip():
                yield self._sample(f"line {number}", line)

    def _sample(self, record: str, line: bytes) -> TaskSample | Omitted | Reject:
        try:
            cells = line.decode("utf-8").split("\t")
        except UnicodeDecodeError as error:
            return Reject(self.path, record, f"invalid UTF-8 at byte {error.start}")
        last, place = max(self.columns, key=lambda column: column[1])
        if len(cells) <= place:
            reason = f"{len(cells)} columns, but {last!r} is column {place + 1}"
            return Reject(self.path, record, reason)
        if len(cells) > self.width:
            reason = f"{len(cells)} columns, but the header names {self.width}"
            return Reject(self.path, record, reason)
        first, second, *rest = (cells[place] for _, place in self.columns)
        labels: tuple[int, ...] = ()
        if rest:
            name = rest[0].strip()
            if name == _NO_CLASS:
                return Omitted(f"{self.columns[2][0]} is {_NO_CLASS}")
            if name not in self.class_names:
                reason = f"class {name!r} is none of {', '.join(self.class_names)}"
                return Reject(self.path, record, reason)
            labels = (self.class_names.index(name),)
        known = self.id_column is not None and self.id_column < len(cells)
        name = cells[self.id_column] if known and self.id_column is not None else record
        scores = (1.0,) * len(labels)
        return TaskSample(self.path, record, name, (), (first, second), labels, scores)
