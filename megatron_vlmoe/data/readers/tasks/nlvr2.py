"""NLVR2 as its authors publish it.

``data/{train,dev,test1}.json`` hold one JSON object per line: ``sentence``, ``label`` ("True" or
"False"), ``identifier`` (split-set-pair-sentence), for train ``directory``. The two images of a
sentence are ``{identifier without its last part}-img{0,1}.png`` (left, right), in
``images/train/{directory}``, ``images/dev`` and ``images/test1``.
"""

from __future__ import annotations

import os
from typing import Any

from megatron_vlmoe.data.readers.records import ImageFile, Reject
from megatron_vlmoe.data.readers.tasks.records import (
    SampleStream,
    TaskInput,
    TaskSample,
    check_split,
    find_file,
    find_folder,
)
from megatron_vlmoe.data.readers.text import json_rows
from megatron_vlmoe.data.task_labels import Labels

_PARTS = {"train": "train", "dev": "dev", "test": "test1"}
_CLASSES = ("False", "True")
_DATA_FOLDERS = ("data", os.path.join("nlvr2", "data"))


class Nlvr2Source:
    """NLVR2 in a folder."""

    fallback_answer = None

    def __init__(self, source: TaskInput) -> None:
        self._raw = source.raw
        self.labels = Labels("nlvr2", _CLASSES)

    def splits(self) -> tuple[str, ...]:
        """All three."""
        return tuple(_PARTS)

    def read(self, split: str) -> SampleStream:
        """The sentences of a split in order. Raises DataError."""
        check_split("nlvr2", split, tuple(_PARTS))
        part = _PARTS[split]
        path = find_file(self._raw, _DATA_FOLDERS, f"{part}.json")
        folder = find_folder(self._raw, (os.path.join("images", part), part))
        return _samples(path, folder)


def _samples(path: str, folder: str) -> SampleStream:
    for item in json_rows(path):
        yield item if isinstance(item, Reject) else _sample(path, folder, *item)


def _sample(path: str, folder: str, number: int, row: dict[str, Any]) -> TaskSample | Reject:
    record = f"line {number}"
    identifier, label = row.get("identifier"), str(row.get("label"))
    if not isinstance(identifier, str) or "-" not in identifier:
        return Reject(path, record, "no identifier of the form split-set-pair-sentence")
    record = f"{record} ({identifier})"
    if label not in _CLASSES:
        return Reject(path, record, f"label {row.get('label')!r} is neither True nor False")
    stem = identifier.rpartition("-")[0]
    where = os.path.join(folder, str(row.get("directory", "")))
    images = tuple(
        ImageFile(path, record, os.path.join(where, f"{stem}-img{side}.png")) for side in (0, 1)
    )
    texts = (row.get("sentence"),)
    return TaskSample(path, record, identifier, images, texts, (_CLASSES.index(label),), (1.0,))
