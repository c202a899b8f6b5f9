"""``PREFIX_labels.json``: the class names of a task, shared by its splits."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.runtime.files import write_text_atomic
from megatron_vlmoe.runtime.json_files import read_json


@dataclass(frozen=True)
class Labels:
    """The classes of a task; a label is a place in ``labels``.

    Attributes:
        task: name of the task.
        labels: VQA answers, ImageNet class ids, or names of relations.
        names: words for each class where they are known (ImageNet); else None.
    """

    task: str
    labels: tuple[str, ...]
    names: tuple[str, ...] | None = None

    @cached_property
    def sha256(self) -> str:
        """Hash of task and labels (not of ``names``): equal where label numbers mean the same."""
        content = json.dumps([self.task, list(self.labels)])
        return hashlib.sha256(content.encode("ascii")).hexdigest()

    def to_json(self) -> str:
        """The content of the file."""
        content: dict[str, Any] = {"task": self.task, "labels": list(self.labels)}
        if self.names is not None:
            content["names"] = list(self.names)
        return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


def labels_path(prefix: str | Path) -> Path:
    """``PREFIX_labels.json``, where ``PREFIX`` is shared by all splits."""
    return Path(f"{prefix}_labels.json")


def load_labels(prefix: str | Path) -> Labels:
    """Reads ``PREFIX_labels.json``, where ``PREFIX`` is shared by all splits.

    Raises:
        DataError: the file is missing or damaged.
    """
    return read_labels(labels_path(prefix))


def read_labels(path: Path) -> Labels:
    """Reads the class names of a task from a file, whatever its name.

    Raises:
        DataError: the file is missing or damaged.
    """
    value = read_json(path, "not found (made by vlmoe index-task)")
    if not (isinstance(value, dict) and isinstance(value.get("task"), str)):
        raise DataError(f"{path}: damaged: no task is named")
    labels, names = _texts(value.get("labels")), _texts(value.get("names"))
    if not labels or len(set(labels)) != len(labels):
        raise DataError(f"{path}: damaged: labels are not a list of different texts")
    if "names" in value and (names is None or len(names) != len(labels)):
        raise DataError(f"{path}: damaged: names are not a list of one text for each label")
    return Labels(value["task"], labels, names)


def _texts(value: Any) -> tuple[str, ...] | None:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        return None
    return tuple(value)


def write_labels(prefix: str | Path, labels: Labels) -> None:
    """Writes ``PREFIX_labels.json``. Raises FileError."""
    write_text_atomic(labels_path(prefix), labels.to_json())
