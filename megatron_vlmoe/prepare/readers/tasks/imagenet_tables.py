"""ImageNet, or any labelled images, in tables of Hugging Face: an image and a class number per row."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from functools import cached_property

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.data.task_labels import Labels
from megatron_vlmoe.prepare.readers.parquet import class_names, column_names
from megatron_vlmoe.prepare.readers.records import Reject
from megatron_vlmoe.prepare.readers.tasks.imagenet import (
    ImageNetSource,
    has_class_folders,
    read_words,
)
from megatron_vlmoe.prepare.readers.tasks.records import (
    Classes,
    SampleStream,
    TaskInput,
    TaskSample,
    TaskSource,
    check_split,
)
from megatron_vlmoe.prepare.readers.tasks.tables import (
    TABLE_SUFFIXES,
    ListedImages,
    TableFiles,
    choose_columns,
    row_name,
    table_rows,
)

_TABLE_WORDS = {"train": ("train",), "val": ("val", "validation"), "test": ("test",)}
_COLUMNS = {"image": ("image", "img", "jpg"), "label": ("label", "labels", "cls")}
_FOLDERS = ("", "data", "default", *(word for words in _TABLE_WORDS.values() for word in words))


def open_imagenet(source: TaskInput) -> TaskSource:
    """Tables, where some lie in the raw folder or where they usually do below it, else class folders.

    A table beside class folders in ``train`` is not the images.

    Raises:
        DataError: neither, or options that contradict what is there.
    """
    if has_class_folders(os.path.join(source.raw, "train")):
        return ImageNetSource(source)
    # Not looked for everywhere: there may be millions of images.
    for folder in (os.path.join(source.raw, name) for name in _FOLDERS):
        if os.path.isdir(folder):
            with os.scandir(folder) as entries:
                if any(entry.name.endswith(TABLE_SUFFIXES) for entry in entries):
                    return ImageNetTables(source)
    return ImageNetSource(source)


class ImageNetTables:
    """Tables of labelled images. Raises DataError if options are for folders only."""

    fallback_answer = None

    def __init__(self, source: TaskInput) -> None:
        self._source = source
        self._tables = TableFiles(source.raw)
        self._images = ListedImages(source.raw)
        for name, value in (("fraction", source.val_fraction), ("labels", source.val_labels)):
            if value:
                raise DataError(
                    f"{source.raw}: holds tables; --val-{name} is for folders of images"
                )

    def splits(self) -> tuple[str, ...]:
        """Those that are there."""
        found = (name for name, words in _TABLE_WORDS.items() if self._tables.of(words))
        return tuple(found) or ("train",)

    @cached_property
    def _classes(self) -> Classes:
        """The classes and what the numbers stand for, by the schema or ``--class-names``."""
        told: dict[tuple[str, ...], str] = {}
        for path in self._tables.paths:
            column = next((c for c in _COLUMNS["label"] if c in column_names(path)), None)
            names = class_names(path, column) if column is not None else None
            if names is not None:
                told.setdefault(names, path)
        if len(told) > 1:
            raise DataError(f"{' and '.join(list(told.values())[:2])} name different classes")
        names = self._source.class_names or next(iter(told), None)
        if names is None:
            raise DataError(
                f"{self._source.raw}: no table's schema names the classes: give --class-names in the "
                "order of their numbers"
            )
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise DataError(
                f"{self._source.raw}: two classes are named {twice!r}: give --class-names"
            )
        return Classes(names, names)

    @cached_property
    def labels(self) -> Labels:
        """The names of the classes; their ids, where a file of words has the id of every name."""
        names, words = self._classes.names, read_words(self._source)
        if words is None:
            return Labels("imagenet", names)
        texts = Counter(words.values())
        wnids = {text: wnid for wnid, text in words.items() if texts[text] == 1}
        missing = next((name for name in names if name not in wnids), None)
        if missing is not None:
            if self._source.words is not None:
                raise DataError(f"{self._source.words}: {missing!r} are not the words of one class")
            return Labels("imagenet", names)
        return Labels("imagenet", tuple(wnids[name] for name in names), names)

    def read(self, split: str) -> SampleStream:
        """The rows of a split in order. Raises DataError."""
        check_split("imagenet", split, tuple(_TABLE_WORDS))
        paths = self._tables.found(split, _TABLE_WORDS[split])
        optional = ("label",) if split == "test" else ()
        columns = {p: choose_columns(p, column_names(p), _COLUMNS, optional) for p in paths}
        return self._samples(split, columns)

    def _samples(self, split: str, files: Mapping[str, Mapping[str, str]]) -> SampleStream:
        for path, columns in files.items():
            for item in table_rows(path, columns):
                if isinstance(item, Reject):
                    yield item
                    continue
                record, row = item
                name = row_name(path, record, self._source.raw, len(files))
                label = row.get("label")
                hidden = split == "test" and label in (None, -1)
                try:
                    image = self._images.cell(path, record, row["image"])
                    labels = () if hidden else (self._classes.label(label),)
                except DataError as error:
                    yield Reject(path, record, str(error), sample=name)
                    continue
                yield TaskSample(path, record, name, (image,), (), labels, (1.0,) * len(labels))
