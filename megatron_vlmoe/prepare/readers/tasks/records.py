"""What the sources of tasks share: options, samples, choosing by hash, and finding files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Protocol, TypeVar

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.data.task_labels import Labels
from megatron_vlmoe.prepare.readers.records import ImageFile, LeftOut, Reject, Row, Rows

Item = TypeVar("Item", int, str)


@dataclass(frozen=True)
class TaskInput:
    """Which raw data, and how to read it.

    Attributes:
        task: its name.
        raw: folder of the raw data.
        seed: of what is held out of training (vqa, imagenet).
        num_val_images: vqa: images of val2014 that are held out; at most half of them are.
        min_answer_count: vqa: how often an answer must occur to be a class.
        annotations: retrieval: Karpathy's JSON file; None: the one in ``raw``.
        val_fraction: imagenet: share of each class's training images that makes ``val``.
        val_labels: imagenet: classes of images that lie in ``val`` without class folders.
        words: imagenet: file of a class id and its words per line; None: one in ``raw``, if any.
        sentence1: mnli: name of the column of the premise; None: one of the usual names.
        sentence2: mnli: name of the column of the hypothesis; None: one of the usual names.
        label: mnli: name of the column of the class; None: one of the usual names.
        class_names: mnli and imagenet: the classes in the order of their labels; None: those that
            the data names, for mnli else entailment, neutral, contradiction.
    """

    task: str
    raw: str
    seed: int = 0
    num_val_images: int = 1000
    min_answer_count: int = 9
    annotations: str | None = None
    val_fraction: float = 0.0
    val_labels: str | None = None
    words: str | None = None
    sentence1: str | None = None
    sentence2: str | None = None
    label: str | None = None
    class_names: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class TaskSample:
    """A sample of the raw data; texts are objects as parsed, checked later.

    ``source`` and ``record`` name it in errors; the other fields are those of `TaskRow` before
    images and texts have numbers. For retrieval it is an image with all its captions. An ``id`` that
    is a whole number is taken as its text.
    """

    source: str
    record: str
    id: str
    images: tuple[ImageFile, ...] = ()
    texts: tuple[object, ...] = ()
    labels: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    answers: tuple[str, ...] = ()
    answer_type: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.id, Integral) and not isinstance(self.id, bool):
            object.__setattr__(self, "id", str(self.id))


SampleStream = Iterator[TaskSample | LeftOut | Reject]
"""What is `LeftOut` are good samples that the task itself does without."""


@dataclass(frozen=True)
class Classes:
    """The classes of a task whose samples give them by name or by number.

    Attributes:
        names: the classes in the order of their labels.
        numbered: what whole numbers in the data stand for, in their order; None: unknown.
    """

    names: tuple[str, ...]
    numbered: tuple[str, ...] | None

    def label(self, value: object) -> int:
        """The label of a class as the data gives it: a name, a number, or the number as text.

        Raises DataError if there is no such class, or nobody says what its number means.
        """
        number = value if isinstance(value, int) and not isinstance(value, bool) else None
        if number is None and isinstance(value, str):
            if value in self.names:
                return self.names.index(value)
            number = int(value) if value.isascii() and value.isdigit() else None
        if number is None:
            raise DataError(f"class {value!r} is none of {', '.join(self.names)}")
        if self.numbered is None:
            raise DataError(f"class {value!r} is a number: name the classes with --class-names")
        if not 0 <= number < len(self.numbered):
            last = len(self.numbered) - 1
            raise DataError(f"class {value!r} is none of 0 to {last} ({', '.join(self.numbered)})")
        return self.names.index(self.numbered[number])


class TaskSource(Protocol):
    """One task's raw data."""

    @property
    def labels(self) -> Labels | None:
        """The classes; None if the task has none. Raises DataError."""
        ...

    @property
    def fallback_answer(self) -> str | None:
        """For vqa the most frequent answer of training; else None."""
        ...

    def splits(self) -> tuple[str, ...]:
        """The splits that are prepared unless others are asked for."""
        ...

    def read(self, split: str) -> SampleStream:
        """The samples of a split; looks for its files at once, and reads them when iterated.

        Raises:
            DataError: an unknown split, or a file or folder of it is missing.
        """
        ...


def id_of(row: Row) -> str:
    """The ``id`` of a row; empty if it has none."""
    value = row.get("id")
    return "" if value is None else str(value)


def row_samples(
    files: Sequence[tuple[str, Rows]],
    raw: str,
    came_before: str,
    make: Callable[[str, str, str, Row], TaskSample | LeftOut | Reject],
) -> SampleStream:
    """The samples of the rows of files, of which those that have an ``id`` may come once.

    ``came_before`` says what is wrong with an id that comes again, which stands in the place of {}. ``make`` makes a
    sample of path, record, name and row, or raises DataError; the name is the id, else the record, of several files
    with the file's path below ``raw``.
    """
    seen: set[str] = set()
    for path, rows in files:
        for item in rows:
            if isinstance(item, Reject):
                # Its id may be that of a sample that is there.
                yield replace(item, sample="") if item.sample in seen else item
                continue
            record, row = item
            name = id_of(row)
            if name and name in seen:
                yield Reject(path, record, came_before.format(name))
                continue
            seen.add(name)
            own = record if len(files) == 1 else f"{os.path.relpath(path, raw)} {record}"
            try:
                yield make(path, record, name or own, row)
            except DataError as error:
                yield Reject(path, record, str(error), sample=name)


def chosen(items: Iterable[Item], count: int, seed: int) -> frozenset[Item]:
    """``count`` of the items, by the smallest hashes of seed and item.

    The choice depends neither on the order of the items nor on Python's hash seed.
    """

    def key(item: Item) -> tuple[bytes, Item]:
        digest = hashlib.blake2b(f"{seed}:{item}".encode("utf-8", "surrogateescape"), digest_size=8)
        return digest.digest(), item

    return frozenset(sorted(set(items), key=key)[:count])


def check_split(task: str, split: str, known: Sequence[str]) -> None:
    """Raises DataError unless the task has a split of this name."""
    if split not in known:
        raise DataError(f"task {task} has no split {split!r}: one of {', '.join(known)}")


def first_file(raw: str, folders: Sequence[str], name: str) -> str | None:
    """Path of ``name`` in the first of the folders below ``raw`` that has it; None: none has."""
    paths = (os.path.normpath(os.path.join(raw, folder, name)) for folder in folders)
    return next(filter(os.path.isfile, paths), None)


def find_file(raw: str, folders: Sequence[str], name: str) -> str:
    """As `first_file`. Raises DataError if none of the folders has it."""
    return _first(raw, [os.path.join(folder, name) for folder in folders], os.path.isfile, "file")


def find_folder(raw: str, names: Sequence[str]) -> str:
    """Path of the first of these folders below ``raw`` that exists. Raises DataError."""
    return _first(raw, names, os.path.isdir, "folder")


def _first(raw: str, names: Sequence[str], exists: Callable[[str], bool], what: str) -> str:
    paths = [os.path.normpath(os.path.join(raw, name)) for name in names]
    if (found := next(filter(exists, paths), None)) is not None:
        return found
    others = f" (nor {', '.join(paths[1:])})" if len(paths) > 1 else ""
    raise DataError(f"{paths[0]}: no such {what}{others}")
