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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.data.task_labels import Labels
from megatron_vlmoe.prepare.readers.files import json_list, json_rows, load_json
from megatron_vlmoe.prepare.readers.records import ImageFile, Reject
from megatron_vlmoe.prepare.readers.tables import (
    TABLE_SUFFIXES,
    ListedImages,
    TableFiles,
    choose_columns,
    column_names,
    row_name,
    table_rows,
    told_classes,
)
from megatron_vlmoe.prepare.readers.tasks.records import (
    Classes,
    SampleStream,
    TaskInput,
    TaskSample,
    check_split,
    find_file,
    find_folder,
    first_file,
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


@dataclass(frozen=True, slots=True)
class _Pair:
    """A sentence as a file has it, before its label is read."""

    record: str
    id: str
    sentence: object
    label: object
    images: tuple[ImageFile, ...]


_Pairs = Iterator[_Pair | Reject]


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
            read = [(path, _table_columns(path, split)) for path in paths]
            files = [(path, self._table_pairs(path, columns)) for path, columns in read]
            return self._samples(split, files)
        check_split("nlvr2", split, tuple(_PARTS))
        if split in self._lists and split not in self._published:
            path = self._lists[split]
            return self._samples(split, [(path, _list_pairs(path, self._images))])
        if not self._published and not self._lists:
            raise DataError(
                f"{raw}: no NLVR2 in it: no data/{_PARTS[split]}.json, no nlvr_{split}.json and no "
                "parquet or .arrow table"
            )
        part = _PARTS[split]
        path = find_file(raw, _DATA_FOLDERS, f"{part}.json")
        folder = find_folder(raw, (os.path.join("images", part), part))
        return self._samples(split, [(path, _published_pairs(path, folder))])

    def _table_pairs(self, path: str, columns: Mapping[str, str]) -> _Pairs:
        for item in table_rows(path, columns):
            if isinstance(item, Reject):
                yield item
                continue
            record, row = item
            name = "" if row.get("id") is None else str(row["id"])
            cells = row["images"] if "images" in row else [row["left"], row["right"]]
            try:
                if not isinstance(cells, list) or len(cells) != 2:
                    raise DataError("not two images")
                images = tuple(self._images.cell(path, record, cell) for cell in cells)
            except DataError as error:
                yield Reject(path, record, str(error), sample=name)
                continue
            yield _Pair(record, name, row["sentence"], row.get("label"), images)

    def _samples(self, split: str, files: Sequence[tuple[str, _Pairs]]) -> SampleStream:
        seen: set[str] = set()
        given, said = self._given, False
        for path, pairs in files:
            told = _told_names(path)
            classes = Classes(_CLASSES, told or given or _CLASSES)
            for pair in pairs:
                if isinstance(pair, Reject):
                    # Its id may be that of a sample that is there.
                    yield replace(pair, sample="") if pair.sample in seen else pair
                    continue
                if pair.id and pair.id in seen:
                    yield Reject(path, pair.record, f"identifier {pair.id} came before")
                    continue
                seen.add(pair.id)
                try:
                    labels = _labels(pair.label, classes, "test" in split)
                except DataError as error:
                    yield Reject(path, pair.record, str(error), sample=pair.id)
                    continue
                if not said and type(pair.label) is int and labels and not (told or given):
                    said = True
                    print(
                        f"nlvr2 {split}: labels 0 and 1 stand for False and True", file=sys.stderr
                    )
                name = pair.id or row_name(path, pair.record, self._source.raw, len(files))
                texts = (pair.sentence,)
                scores = (1.0,) * len(labels)
                yield TaskSample(path, pair.record, name, pair.images, texts, labels, scores)


def _published_pairs(path: str, folder: str) -> _Pairs:
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
        yield _Pair(record, identifier, row.get("sentence"), row.get("label"), images)


def _list_pairs(path: str, found: ListedImages) -> _Pairs:
    for number, entry in enumerate(json_list(path, load_json(path))):
        record, given = f"entry {number}", entry if isinstance(entry, dict) else {}
        identifier, images = given.get("identifier"), given.get("images")
        name = identifier if isinstance(identifier, str) else ""
        record = f"{record} ({name})" if name else record
        if not (
            isinstance(images, list)
            and len(images) == 2
            and all(isinstance(image, str) and image for image in images)
        ):
            yield Reject(path, record, '"images" is no list of two paths', sample=name)
            continue
        try:
            files = tuple(found.listed(path, record, image) for image in images)
        except DataError as error:
            yield Reject(path, record, str(error), sample=name)
            continue
        yield _Pair(record, name, given.get("sentence"), given.get("label"), files)


def _table_columns(path: str, split: str) -> dict[str, str]:
    """Columns of the sentence, the label, the identifier and the images. Raises DataError."""
    names = column_names(path)
    optional = ("id", "label") if "test" in split else ("id",)
    columns = choose_columns(path, names, _COLUMNS, optional)
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


def _labels(value: object, classes: Classes, is_test: bool) -> tuple[int, ...]:
    """The class of a label as a file has it; () where a test split does not tell it. Raises DataError."""
    if value in (None, -1) and is_test:
        return ()
    try:
        return (classes.label(str(value).capitalize() if isinstance(value, bool | str) else value),)
    except DataError as error:
        raise DataError(f"label {value!r} is neither True nor False") from error
