"""NLVR2: the publishers' files, lists of ALBEF and BLIP, tables of Hugging Face.

| Files | A sentence |
|---|---|
| ``data/{train,dev,test1}.json`` | a JSON object per line: ``sentence``, ``label`` ("True" or "False"), ``identifier`` (split-set-pair-sentence), for train ``directory``; its images are ``{identifier without its last part}-img{0,1}.png`` (left, right) in ``images/train/{directory}``, ``images/dev`` and ``images/test1`` |
| ``nlvr_{train,dev,test}.json`` | an object of a list: ``sentence``, ``label``, ``images`` (paths of left and right) |
| ``train-*.parquet`` and so on | a row: sentence, label, left and right image, identifier |
"""  # noqa: E501

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property, partial

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.data.task_labels import Labels
from megatron_vlmoe.prepare.readers.files import json_entries, json_rows
from megatron_vlmoe.prepare.readers.records import ImageFile, Reject
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
_CLASSES = ("False", "True")
_DATA_FOLDERS = ("data", os.path.join("nlvr2", "data"))
_LIST_FOLDERS = ("", "annotation", "annotations", "data")
_TABLE_WORDS = {"train": ("train",), "dev": ("dev", "validation", "val"), "test": ("test", "test1")}
_COLUMNS = {
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
        self.labels = Labels("nlvr2", _CLASSES)
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
            name = identifier if isinstance(identifier, str) else ""
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
        known = {path: _told_names(path) or self._given for path, _ in files}
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
                labels = (Classes(_CLASSES, names or _CLASSES).label(spelled),)
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
    columns = choose_columns(path, _COLUMNS, optional, names)
    sides = next((sides for sides in _SIDES if all(side in names for side in sides)), None)
    if sides is None:
        raise DataError(
            f"{path}: no columns left_image and right_image, nor images; it has {', '.join(names)}"
        )
    return columns | dict(zip(("left", "right") if len(sides) == 2 else ("images",), sides))


def _true_and_false(names: Sequence[str], where: str) -> tuple[str, ...]:
    """The names as the task spells them. Raises DataError unless they are True and False."""
    spelled = tuple(name.capitalize() for name in names)
    if sorted(spelled) != sorted(_CLASSES):
        raise DataError(f"{where}: classes {', '.join(names)} are not True and False")
    return spelled


def _told_names(path: str) -> tuple[str, ...] | None:
    """What the schema of a table says that the numbers of its labels stand for. Raises DataError."""
    if not path.endswith(TABLE_SUFFIXES):
        return None
    told = told_classes((path,), _COLUMNS["label"])
    return _true_and_false(told, path) if told else None
