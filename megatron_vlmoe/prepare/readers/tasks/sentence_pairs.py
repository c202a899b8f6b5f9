"""MNLI, SNLI and any task of two sentences: GLUE's tables, the publishers' files, Hugging Face's tables.

| Files | Layout |
|---|---|
| ``SPLIT.tsv`` | GLUE: a header line names the columns; tabs part them, and nothing is quoted |
| ``multinli_1.0_SPLIT.txt``, ``snli_1.0_SPLIT.txt`` | the same |
| ``multinli_1.0_SPLIT.jsonl``, ``snli_1.0_SPLIT.jsonl`` | a JSON object per line |
| ``SPLIT-*.parquet``, ``SPLIT/*.arrow`` and so on | Hugging Face: premise, hypothesis and the number of the class |

A class "-" (the annotators did not agree) leaves the sample out, and so does -1 outside of test
splits, where it means that the class is not published.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property, partial

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.data.task_labels import Labels
from megatron_vlmoe.prepare.readers.files import json_rows, text_lines
from megatron_vlmoe.prepare.readers.records import LeftOut, Reject
from megatron_vlmoe.prepare.readers.tables import (
    TableFiles,
    choose_columns,
    table_rows,
    told_classes,
)
from megatron_vlmoe.prepare.readers.tasks.records import (
    Classes,
    Row,
    Rows,
    SampleStream,
    TaskInput,
    TaskSample,
    id_of,
    row_samples,
)

_MNLI_SPLITS = ("train", "dev_matched", "dev_mismatched")
_SNLI_SPLITS = ("train", "dev", "test")
_CLASSES = ("entailment", "neutral", "contradiction")
_NO_CLASS = "-"
_HIDDEN = "hidden"  # in MultiNLI's test files
_FOLDERS = ("", "MNLI", "original", "multinli_1.0", "snli_1.0")
_SUFFIXES = (".tsv", ".jsonl", ".txt")
_FILE = re.compile(r"(?:(?:multi|s)nli_\d[\d.]*_)?(\w+?)(?:_unlabeled)?(\.tsv|\.jsonl|\.txt)")
_PREMISES, _HYPOTHESES = ("sentence1", "premise"), ("sentence2", "hypothesis")
_LABELS = ("gold_label", "label")
_IDS = ("index", "pairID", "idx", "uid")


class SentencePairSource:
    """Tables of sentence pairs in a folder."""

    fallback_answer = None

    def __init__(self, source: TaskInput) -> None:
        names = source.class_names or ()
        if len(set(names)) != len(names):
            raise DataError(f"--class-names {' '.join(names)}: one name twice")
        self._source = source
        self._columns = {
            "sentence1": (source.sentence1,) if source.sentence1 else _PREMISES,
            "sentence2": (source.sentence2,) if source.sentence2 else _HYPOTHESES,
            "label": (source.label,) if source.label else _LABELS,
        }
        self._files = _named_files(source.raw)
        self._told_numbers: set[str] = set()  # splits

    @cached_property
    def _tables(self) -> TableFiles:
        return TableFiles(self._source.raw)

    def splits(self) -> tuple[str, ...]:
        """MNLI's or SNLI's, with the test files that are there."""
        names = {*self._files, *(n for n in _SNLI_SPLITS if self._table_files(n))}
        if "dev" in names and not names.intersection(_MNLI_SPLITS[1:]):
            return tuple(name for name in _SNLI_SPLITS if name in names)
        tests = [f"test_{kind}" for kind in ("matched", "mismatched")]
        found = {name for name in self._files if name.startswith("test_")}
        found |= {name for name in tests if self._table_files(name)}
        return (*_MNLI_SPLITS, *sorted(found))

    def _table_files(self, split: str) -> list[str]:
        # Not looked for where there are other files: they may be the same samples.
        if any(name.startswith(("train", "dev", "test")) for name in self._files):
            return []
        return self._tables.of((split, split.replace("dev", "validation")))

    @cached_property
    def _classes(self) -> Classes:
        given, told = self._source.class_names, self._told_names
        if given and told and set(given) != set(told):
            raise DataError(
                f"--class-names {' '.join(given)}: the tables in {self._source.raw} name "
                f"{', '.join(told)}"
            )
        if told:
            return Classes(given or told, told)
        if given:
            return Classes(given, given)
        # The order of MNLI's and SNLI's numbers; other tables may have another one.
        usual = self._source.sentence1 is None and self._source.sentence2 is None
        return Classes(_CLASSES, _CLASSES if usual else None)

    @cached_property
    def _told_names(self) -> tuple[str, ...] | None:
        """The classes that the schema of Hugging Face's tables names."""
        paths = [path for name in (*_MNLI_SPLITS, "dev") for path in self._table_files(name)]
        return told_classes(paths, self._columns["label"])

    @property
    def labels(self) -> Labels:
        """The classes. Raises DataError if ``--class-names`` contradicts the tables."""
        return Labels("mnli", self._classes.names)

    def read(self, split: str) -> SampleStream:
        """The rows of a split. Raises DataError if its file or a column of it is missing."""
        paths = self._files.get(split) or self._table_files(split)
        if not paths:
            raise DataError(
                f"{os.path.join(self._source.raw, split)}.tsv: no such file (nor multinli_1.0_{split} "
                "as .jsonl or .txt, nor a parquet or .arrow table with the split in its name)"
            )
        optional = ("id", "label") if split.startswith("test") else ("id",)
        opened = {path: _open(path, self._columns, optional) for path in paths}
        make = partial(self._sample, split, {path: one[0] for path, one in opened.items()})
        rows = [(path, rows) for path, (_, rows) in opened.items()]
        return row_samples(rows, self._source.raw, "id {} came before", make)

    def _sample(
        self, split: str, columns: Mapping[str, Row], path: str, record: str, name: str, row: Row
    ) -> TaskSample | LeftOut:
        value = row.get("label")
        value = value.strip() if isinstance(value, str) else value
        is_test, unlabelled = split.startswith("test"), value in (-1, "-1")
        if value == _NO_CLASS or (unlabelled and not is_test):
            return LeftOut(f"{columns[path]['label']} is {value}")
        hidden = is_test and (unlabelled or value in (None, _HIDDEN))
        classes = self._classes
        labels = () if hidden else (classes.label(value),)
        if labels and str(value) not in classes.names and split not in self._told_numbers:
            self._told_numbers.add(split)
            numbered = ", ".join(f"{i} {name}" for i, name in enumerate(classes.numbered or ()))
            why = "--class-names" if self._source.class_names else "the order of MNLI and SNLI"
            why = "their schema" if self._told_names else why
            print(f"mnli {split}: class numbers stand for {numbered} (by {why})", file=sys.stderr)
        texts, scores = (row["sentence1"], row["sentence2"]), (1.0,) * len(labels)
        return TaskSample(path, record, name, (), texts, labels, scores)


def _named_files(raw: str) -> dict[str, list[str]]:
    """The file of each split: of the first folder and the first layout that has it. Raises DataError."""
    found: dict[str, list[str]] = {}
    for folder in (os.path.join(raw, name) if name else raw for name in _FOLDERS):
        if not os.path.isdir(folder):
            continue
        try:
            names = sorted(os.listdir(folder))
        except OSError as error:
            raise DataError(f"{folder}: {error.strerror}") from error
        matches = [match for match in map(_FILE.fullmatch, names) if match is not None]
        for suffix in _SUFFIXES:
            here: dict[str, list[str]] = {}
            for match in matches:
                if match[2] == suffix:
                    here.setdefault(match[1], []).append(os.path.join(folder, match[0]))
            for split, paths in here.items():
                if len(paths) > 1 and split not in found:
                    raise DataError(f"{' and '.join(paths)}: both are split {split}: keep one")
                found.setdefault(split, paths)
    return found


def _open(
    path: str, wanted: Mapping[str, Sequence[str]], optional: Sequence[str]
) -> tuple[dict[str, str], Rows]:
    """The columns of a file by name, and its rows. Raises DataError if a column that is needed is missing."""
    wanted = {**wanted, "id": _IDS}
    suffix = os.path.splitext(path)[1]
    if suffix == ".jsonl":
        first = next((item for item in json_rows(path) if not isinstance(item, Reject)), None)
        if first is None:
            raise DataError(f"{path}: no JSON object in it")
        columns = choose_columns(path, wanted, optional, list(first[1]))
        return columns, _json_rows(path, columns)
    if suffix in (".tsv", ".txt"):
        header = next(text_lines(path), None)
        if header is None or isinstance(header, Reject):
            raise DataError(str(header) if header else f"{path}: empty file")
        names = header[1].split("\t")
        columns = choose_columns(path, wanted, optional, names)
        return columns, _tsv_rows(path, names, columns)
    columns = choose_columns(path, wanted, optional)
    return columns, table_rows(path, columns)


def _json_rows(path: str, columns: Mapping[str, str]) -> Rows:
    for item in json_rows(path):
        if isinstance(item, Reject):
            yield item
            continue
        record, row = item
        missing = [column for column in columns.values() if column not in row]
        if missing:
            yield Reject(path, record, f"no key {missing[0]!r}")
        else:
            yield record, {name: row[column] for name, column in columns.items()}


def _tsv_rows(path: str, names: Sequence[str], columns: Mapping[str, str]) -> Rows:
    """The rows after the header."""
    lines = text_lines(path)
    next(lines)
    places = {name: names.index(column) for name, column in columns.items()}
    place = max(place for name, place in places.items() if name != "id")
    for item in lines:
        if isinstance(item, Reject):
            yield item
            continue
        record, line = f"line {item[0]}", item[1]
        if not line.strip():
            continue
        cells = line.split("\t")
        row = {name: cells[p] for name, p in places.items() if p < len(cells)}
        reason = ""
        if len(cells) <= place:
            reason = f"{len(cells)} columns, but {names[place]!r} is column {place + 1}"
        elif len(cells) > len(names):
            reason = f"{len(cells)} columns, but the header names {len(names)}"
        yield Reject(path, record, reason, sample=id_of(row)) if reason else (record, row)
