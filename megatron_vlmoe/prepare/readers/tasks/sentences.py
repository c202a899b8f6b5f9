"""Labelled sentences: NLVR2, of two pictures; and MNLI, SNLI and any task of two sentences.

NLVR2, as its publishers have it, in lists of ALBEF and BLIP, and in tables of Hugging Face:

| Files | A sentence |
|---|---|
| ``data/{train,dev,test1}.json`` | a JSON object per line: ``sentence``, ``label`` ("True" or "False"), ``identifier`` (split-set-pair-sentence), for train ``directory``; its images are ``{identifier without its last part}-img{0,1}.png`` (left, right) in ``images/train/{directory}``, ``images/dev`` and ``images/test1`` |
| ``nlvr_{train,dev,test}.json`` | an object of a list: ``sentence``, ``label``, ``images`` (paths of left and right) |
| ``train-*.parquet`` and so on | a row: sentence, label, left and right image, identifier |

Pairs of sentences, in GLUE's tables, the publishers' files, and Hugging Face's tables:

| Files | Layout |
|---|---|
| ``SPLIT.tsv`` | GLUE: a header line names the columns; tabs part them, and nothing is quoted |
| ``multinli_1.0_SPLIT.txt``, ``snli_1.0_SPLIT.txt`` | the same |
| ``multinli_1.0_SPLIT.jsonl``, ``snli_1.0_SPLIT.jsonl`` | a JSON object per line |
| ``SPLIT-*.parquet``, ``SPLIT/*.arrow`` and so on | Hugging Face: premise, hypothesis and the number of the class |

A class "-" (the annotators did not agree) leaves the sample out, and so does -1 outside of test
splits, where it means that the class is not published.
"""  # noqa: E501

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property, partial

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.data.task_labels import Labels
from megatron_vlmoe.prepare.readers.files import json_entries, json_rows, text_lines
from megatron_vlmoe.prepare.readers.records import ImageFile, LeftOut, Reject
from megatron_vlmoe.prepare.readers.tables import (
    TABLE_SUFFIXES,
    ListedImages,
    TableFiles,
    choose_columns,
    column_names,
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
    check_split,
    find_file,
    find_folder,
    first_file,
    id_of,
    row_samples,
)

_PARTS = {"train": "train", "dev": "dev", "test": "test1"}
_NLVR2_CLASSES = ("False", "True")
_DATA_FOLDERS = ("data", os.path.join("nlvr2", "data"))
_LIST_FOLDERS = ("", "annotation", "annotations", "data")
_TABLE_WORDS = {"train": ("train",), "dev": ("dev", "validation", "val"), "test": ("test", "test1")}
_NLVR2_COLUMNS = {
    "sentence": ("sentence", "Sentence", "question"),
    "label": ("label", "Label", "answer"),
    "id": ("identifier", "Identifier", "uid", "question_id", "id"),
}
_SIDES = (
    *(("left_image", "right_image"), ("left", "right"), ("image_left", "image_right")),
    *(("image0", "image1"), ("image_0", "image_1"), ("img0", "img1"), ("image1", "image2")),
    *(("image_1", "image_2"), ("images",)),
)


class Nlvr2Source:
    """NLVR2 in a folder. Raises DataError if ``--class-names`` are not those of the task."""

    fallback_answer = None

    def __init__(self, source: TaskInput) -> None:
        self._source = source
        self.labels = Labels("nlvr2", _NLVR2_CLASSES)
        self._images = ListedImages(source.raw)
        names = source.class_names
        self._given = None if names is None else _true_and_false(names, "--class-names")
        self._published = {
            s for s, p in _PARTS.items() if first_file(source.raw, _DATA_FOLDERS, f"{p}.json")
        }
        found = {s: first_file(source.raw, _LIST_FOLDERS, f"nlvr_{s}.json") for s in _PARTS}
        self._lists = {split: path for split, path in found.items() if path is not None}
        self._told_numbers: set[str] = set()  # splits

    @cached_property
    def _tables(self) -> TableFiles | None:
        """None where the publishers' files or lists are there."""
        tables = None if self._published or self._lists else TableFiles(self._source.raw)
        return tables or None

    def splits(self) -> tuple[str, ...]:
        """All three; of lists and tables those that are there."""
        if self._tables is not None:
            return self._tables.splits(_TABLE_WORDS)
        return tuple(_PARTS) if self._published or not self._lists else tuple(self._lists)

    def read(self, split: str) -> SampleStream:
        """The sentences of a split in order; of tables any split that their names tell. Raises DataError."""
        raw = self._source.raw
        if self._tables is not None:
            paths = self._tables.found(split, _TABLE_WORDS.get(split, (split,)))
            files = [(path, self._table_rows(path, _table_columns(path, split))) for path in paths]
            return self._samples(split, files)
        check_split("nlvr2", split, tuple(_PARTS))
        if split in self._lists and split not in self._published:
            path = self._lists[split]
            return self._samples(split, [(path, self._list_rows(path))])
        if not self._published and not self._lists:
            raise DataError(
                f"{raw}: no NLVR2 in it: no data/{_PARTS[split]}.json, no nlvr_{split}.json and no "
                "parquet or .arrow table"
            )
        part = _PARTS[split]
        path = find_file(raw, _DATA_FOLDERS, f"{part}.json")
        folder = find_folder(raw, (os.path.join("images", part), part))
        return self._samples(split, [(path, _published_rows(path, folder))])

    def _table_rows(self, path: str, columns: Mapping[str, str]) -> Rows:
        for item in table_rows(path, columns):
            if isinstance(item, Reject):
                yield item
                continue
            record, row = item
            cells = row["images"] if "images" in row else [row["left"], row["right"]]
            try:
                if not isinstance(cells, list) or len(cells) != 2:
                    raise DataError("not two images")
                images = tuple(self._images.cell(path, record, cell) for cell in cells)
            except DataError as error:
                yield Reject(path, record, str(error), sample=id_of(row))
            else:
                yield record, {**row, "images": images}

    def _list_rows(self, path: str) -> Rows:
        for record, entry in json_entries(path):
            identifier, images = entry.get("identifier"), entry.get("images")
            name = "" if identifier is None else str(identifier)
            record = f"{record} ({name})" if name else record
            try:
                if (
                    not isinstance(images, list)
                    or len(images) != 2
                    or not all(isinstance(image, str) and image for image in images)
                ):
                    raise DataError('"images" is no list of two paths')
                files = tuple(self._images.listed(path, record, image) for image in images)
            except DataError as error:
                yield Reject(path, record, str(error), sample=name)
            else:
                yield record, {**entry, "id": name, "images": files}

    def _samples(self, split: str, files: Sequence[tuple[str, Rows]]) -> SampleStream:
        known: dict[str, tuple[str, ...] | None] = {}
        for path, _ in files:
            # What the schema of a table says that the numbers of its labels stand for.
            is_table = path.endswith(TABLE_SUFFIXES)
            told = told_classes((path,), _NLVR2_COLUMNS["label"]) if is_table else None
            known[path] = _true_and_false(told, path) if told else self._given
        make = partial(self._sample, split, known)
        return row_samples(files, self._source.raw, "identifier {} came before", make)

    def _sample(
        self,
        split: str,
        known: Mapping[str, tuple[str, ...] | None],
        path: str,
        record: str,
        name: str,
        row: Row,
    ) -> TaskSample:
        label, names = row.get("label"), known[path]
        labels: tuple[int, ...] = ()
        if label not in (None, -1) or "test" not in split:
            spelled = str(label).capitalize() if isinstance(label, bool | str) else label
            try:
                labels = (Classes(_NLVR2_CLASSES, names or _NLVR2_CLASSES).label(spelled),)
            except DataError as error:
                raise DataError(f"label {label!r} is neither True nor False") from error
        if type(label) is int and labels and not names and split not in self._told_numbers:
            self._told_numbers.add(split)
            print(f"nlvr2 {split}: labels 0 and 1 stand for False and True", file=sys.stderr)
        texts, scores = (row.get("sentence"),), (1.0,) * len(labels)
        return TaskSample(path, record, name, row["images"], texts, labels, scores)


def _published_rows(path: str, folder: str) -> Rows:
    for item in json_rows(path):
        if isinstance(item, Reject):
            yield item
            continue
        record, row = item
        identifier = row.get("identifier")
        if not isinstance(identifier, str) or "-" not in identifier:
            yield Reject(path, record, "no identifier of the form split-set-pair-sentence")
            continue
        record = f"{record} ({identifier})"
        stem, where = identifier.rpartition("-")[0], str(row.get("directory", ""))
        names = (os.path.join(folder, where, f"{stem}-img{side}.png") for side in (0, 1))
        images = tuple(ImageFile(path, record, name) for name in names)
        yield record, {**row, "id": identifier, "images": images}


def _table_columns(path: str, split: str) -> dict[str, str]:
    """Columns of the sentence, the label, the identifier and the images. Raises DataError."""
    names = column_names(path)
    optional = ("id", "label") if "test" in split else ("id",)
    columns = choose_columns(path, _NLVR2_COLUMNS, optional, names)
    sides = next((sides for sides in _SIDES if all(side in names for side in sides)), None)
    if sides is None:
        raise DataError(
            f"{path}: no columns left_image and right_image, nor images; it has {', '.join(names)}"
        )
    return columns | dict(zip(("left", "right") if len(sides) == 2 else ("images",), sides))


def _true_and_false(names: Sequence[str], where: str) -> tuple[str, ...]:
    """The names as the task spells them. Raises DataError unless they are True and False."""
    spelled = tuple(name.capitalize() for name in names)
    if sorted(spelled) != sorted(_NLVR2_CLASSES):
        raise DataError(f"{where}: classes {', '.join(names)} are not True and False")
    return spelled


_MNLI_SPLITS = ("train", "dev_matched", "dev_mismatched")
_SNLI_SPLITS = ("train", "dev", "test")
_MNLI_CLASSES = ("entailment", "neutral", "contradiction")
_NO_CLASS = "-"
_HIDDEN = "hidden"  # in MultiNLI's test files
_FOLDERS = ("", "MNLI", "original", "multinli_1.0", "snli_1.0")
_SUFFIXES = (".tsv", ".jsonl", ".txt")
_FILE = re.compile(r"(?:(?:multi|s)nli_\d[\d.]*_)?(\w+?)(?:_unlabeled)?(\.tsv|\.jsonl|\.txt)")


class SentencePairSource:
    """Tables of sentence pairs in a folder."""

    fallback_answer = None

    def __init__(self, source: TaskInput) -> None:
        names = source.class_names or ()
        if len(set(names)) != len(names):
            raise DataError(f"--class-names {' '.join(names)}: one name twice")
        self._source = source
        self._columns = {
            "sentence1": (source.sentence1,) if source.sentence1 else ("sentence1", "premise"),
            "sentence2": (source.sentence2,) if source.sentence2 else ("sentence2", "hypothesis"),
            "label": (source.label,) if source.label else ("gold_label", "label"),
            "id": ("index", "pairID", "idx", "uid"),
        }
        self._files = _named_files(source.raw)
        self._told_numbers: set[str] = set()  # splits

    @cached_property
    def _tables(self) -> TableFiles:
        return TableFiles(self._source.raw)

    def splits(self) -> tuple[str, ...]:
        """MNLI's or SNLI's, with the test files that are there."""
        usual = (*_SNLI_SPLITS, "test_matched", "test_mismatched")
        names = {*self._files, *(name for name in usual if self._table_files(name))}
        if "dev" in names and not names.intersection(_MNLI_SPLITS[1:]):
            return tuple(name for name in _SNLI_SPLITS if name in names)
        return (*_MNLI_SPLITS, *sorted(name for name in names if name.startswith("test_")))

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
        return Classes(_MNLI_CLASSES, _MNLI_CLASSES if usual else None)

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
