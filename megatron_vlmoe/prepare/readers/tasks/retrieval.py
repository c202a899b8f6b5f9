"""Image-text retrieval: Karpathy's splits, the lists of ALBEF and BLIP, tables of Hugging Face.

| Files | An image and its captions |
|---|---|
| ``dataset_coco.json``, ``dataset_flickr30k.json`` | an entry of ``images``, with its split; COCO's lie in ``train2014`` and ``val2014``, Flickr30K's in ``flickr30k-images`` |
| ``coco_karpathy_{train,val,test}.json``, ``flickr30k_{train,val,test}.json`` | objects of a list: ``image`` (a path) and ``caption``, one or several; an image may come again with more captions |
| ``test-*.parquet`` and so on | a row: image (or filename and filepath) and all captions; a column ``split`` counts more than the name of the file |
"""  # noqa: E501

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import cached_property, partial

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.prepare.readers.files import json_entries
from megatron_vlmoe.prepare.readers.pair_formats import read_karpathy
from megatron_vlmoe.prepare.readers.pairs import PairInput, as_captions
from megatron_vlmoe.prepare.readers.records import LeftOut, Reject, check_inputs
from megatron_vlmoe.prepare.readers.tables import (
    ListedImages,
    TableFiles,
    choose_columns,
    column_names,
    table_rows,
)
from megatron_vlmoe.prepare.readers.tasks.records import (
    Row,
    Rows,
    SampleStream,
    TaskInput,
    TaskSample,
    check_split,
    id_of,
    row_samples,
)

_ANNOTATIONS = ("dataset_coco.json", "dataset_flickr30k.json")
_IMAGE_FOLDERS = ("flickr30k-images", "flickr30k_images", "images")
# COCO's restval images are of val2014 but belong to neither val nor test.
_PARTS = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}
_LIST = re.compile(r"(coco_karpathy|coco|flickr30k)_(train|val|test)\.json")
_LIST_FOLDERS = ("", "annotation", "annotations", "data")
_TABLE_WORDS = {"train": ("train",), "val": ("val", "validation", "dev"), "test": ("test",)}
_COLUMNS = {
    "image": ("image",),
    "captions": ("caption", "captions", "sentences", "raw", "text"),
    "split": ("split",),
    "id": ("filename", "file_name", "image_id", "img_id", "imgid"),
    "folder": ("filepath",),
}


class RetrievalSource:
    """A captioned corpus in a folder. Raises DataError unless it has one set of annotations."""

    labels = None
    fallback_answer = None

    def __init__(self, source: TaskInput) -> None:
        self._raw = source.raw
        self._listed = ListedImages(source.raw)
        check_inputs(() if source.annotations is None else (source.annotations,))
        self._lists: Mapping[str, str] = {}
        there = [p for name in _ANNOTATIONS if os.path.isfile(p := os.path.join(source.raw, name))]
        if len(there) > 1 and source.annotations is None:
            raise DataError(f"{' and '.join(there)}: choose one with --annotations")
        self._annotations = source.annotations or next(iter(there), None)
        folder, name = os.path.split(self._annotations or "")
        listed = _LIST.fullmatch(name)
        if self._annotations is None or listed is not None:
            self._annotations = None
            # One list of a corpus stands for all of them.
            where, corpus = (source.raw, None) if listed is None else (folder, listed[1])
            self._lists = _find_lists(where, corpus)
            if not self._lists and not self._tables:
                raise DataError(
                    f"{source.raw}: no {' or '.join(_ANNOTATIONS)} in it (or give --annotations), no "
                    "coco_karpathy_{train,val,test}.json and no parquet or .arrow table"
                )
            return
        folders = [os.path.join(source.raw, name) for name in _IMAGE_FOLDERS]
        self._images = next((path for path in folders if os.path.isdir(path)), source.raw)

    @cached_property
    def _tables(self) -> TableFiles:
        return TableFiles(self._raw)

    def splits(self) -> tuple[str, ...]:
        """All three; of lists and tables those that are there."""
        if self._annotations is not None:
            return tuple(_PARTS)
        if self._lists:
            return tuple(self._lists)
        return tuple(name for name in _PARTS if self._tables_of(name))

    def read(self, split: str) -> SampleStream:
        """The images of a split, each with all its captions. Raises DataError."""
        check_split("retrieval", split, tuple(_PARTS))
        if self._annotations is not None:
            pairs = PairInput("karpathy", (self._annotations,), self._images, _PARTS[split])
            return _karpathy_samples(pairs)
        if self._lists:
            if split not in self._lists:
                shown = next(iter(self._lists.values()))
                raise DataError(f"{shown}: no list of split {split} beside it")
            return _list_samples(self._lists[split], self._listed)
        tables = self._tables_of(split)
        if not tables:
            self._tables.found(split, _TABLE_WORDS[split])
        files = [(path, self._table_rows(path, split)) for path in tables]
        reason = "image {} came before: a row must have all captions of its image"
        return row_samples(files, self._raw, reason, partial(_table_sample, self._listed))

    @cached_property
    def _columns(self) -> dict[str, dict[str, str]]:
        """The columns of every table. Raises DataError if one that is needed is missing."""
        found: dict[str, dict[str, str]] = {}
        for path in self._tables.paths:
            names = column_names(path)
            optional = ("split", "folder", "image" if "filename" in names else "id")
            found[path] = choose_columns(path, _COLUMNS, optional, names)
        return found

    @cached_property
    def _splits_in(self) -> dict[str, set[str]]:
        """What the column ``split`` of a table holds; without one it is told by the name of the file."""
        found: dict[str, set[str]] = {}
        for path, columns in self._columns.items():
            if "split" in columns:
                rows = table_rows(path, {"split": columns["split"]})
                found[path] = {str(row[1]["split"]) for row in rows if not isinstance(row, Reject)}
            else:
                words = _TABLE_WORDS.items()
                found[path] = {split for split, names in words if path in self._tables.of(names)}
        return found

    def _tables_of(self, split: str) -> list[str]:
        return [path for path, has in self._splits_in.items() if has.intersection(_PARTS[split])]

    def _table_rows(self, path: str, split: str) -> Rows:
        wanted = (*_PARTS[split], split)
        for item in table_rows(path, self._columns[path]):
            if isinstance(item, Reject) or str(item[1].get("split", split)) in wanted:
                yield item


def _table_sample(
    images: ListedImages, path: str, record: str, own: str, row: Row
) -> TaskSample | Reject:
    name = id_of(row)
    record = f"{record} ({name})" if name else record
    try:
        if "image" in row:
            image = images.cell(path, record, row["image"])
        else:
            image = images.listed(path, record, os.path.join(row.get("folder") or "", name))
    except DataError as error:
        return Reject(path, record, str(error), sample=name)
    return TaskSample(path, record, own, (image,), as_captions(row["captions"]))


def _find_lists(raw: str, corpus: str | None) -> dict[str, str]:
    """The list of each split that has one, in the folder or one of the usual ones below it.

    Raises DataError if no corpus is given, and several have lists.
    """
    found: dict[str, dict[str, str]] = {}
    for folder in (os.path.normpath(os.path.join(raw, name)) for name in _LIST_FOLDERS):
        names = os.listdir(folder) if os.path.isdir(folder) else []
        for match in filter(None, map(_LIST.fullmatch, sorted(names))):
            if corpus in (None, match[1]):
                found.setdefault(match[1], {}).setdefault(match[2], os.path.join(folder, match[0]))
    if len(found) > 1:
        paths = [next(iter(lists.values())) for lists in found.values()]
        raise DataError(f"{' and '.join(paths)}: choose one with --annotations")
    lists = next(iter(found.values()), {})
    return {split: lists[split] for split in _PARTS if split in lists}


def _karpathy_samples(pairs: PairInput) -> SampleStream:
    seen: set[str] = set()
    for item in read_karpathy(pairs):
        if isinstance(item, Reject):
            yield item
        elif not isinstance(item, LeftOut):
            name = os.path.relpath(item.image.path, pairs.images)
            if name in seen:
                yield Reject(item.source, item.record, f"image {name} came before")
                continue
            seen.add(name)
            yield TaskSample(item.source, item.record, name, (item.image,), item.captions)


def _list_samples(path: str, images: ListedImages) -> SampleStream:
    captions: dict[str, list[object]] = {}
    image_of: dict[str, str] = {}
    for record, entry in json_entries(path):
        image, words = entry.get("image"), entry.get("caption")
        if not isinstance(image, str) or not image or words is None:
            yield Reject(path, record, "no image or no caption")
            continue
        name = str(entry.get("image_id", image))
        if image_of.setdefault(name, image) != image:
            reason = f"image_id {name} is that of {image_of[name]} too"
            yield Reject(path, f"{record} ({image})", reason)
            continue
        captions.setdefault(image, []).extend(words if isinstance(words, list) else [words])
    for image, words in captions.items():
        record = f"image {image}"
        try:
            file = images.listed(path, record, image)
        except DataError as error:
            yield Reject(path, record, str(error), sample=image)
            continue
        yield TaskSample(path, record, image, (file,), tuple(words))
