"""ImageNet as folders of classes, ``train/{wnid}/*.JPEG`` and ``val/{wnid}/*.JPEG``, or as tables.

The classes are the sorted names of the folders of ``train``; a class may also be ``{wnid}.tar``, as
ImageNet-22K is published. Without a ``train`` folder the classes lie in the raw folder itself.
Without ``val`` a share of each class may be held out. The images of ``val`` may also lie in it
without folders, as published; then a file tells their classes, or the development kit does.

Tables of Hugging Face, read where no image lies in folders, hold an image and a class number per row;
their schema names the classes.
"""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cached_property, partial

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.data.task_labels import Labels
from megatron_vlmoe.prepare.readers.images import as_image, read_images
from megatron_vlmoe.prepare.readers.records import (
    ImageFile,
    LeftOut,
    PassedOver,
    Reject,
    check_inputs,
    is_side_file,
    is_tar,
)
from megatron_vlmoe.prepare.readers.tables import (
    TABLE_SUFFIXES,
    ListedImages,
    TableFiles,
    choose_columns,
    table_rows,
    told_classes,
)
from megatron_vlmoe.prepare.readers.tasks.records import (
    Classes,
    Row,
    SampleStream,
    TaskInput,
    TaskSample,
    TaskSource,
    check_split,
    chosen,
    find_folder,
    first_file,
    row_samples,
)

_WORDS = ("words.txt", "LOC_synset_mapping.txt")
_SPLITS = ("train", "val")
_GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_KIT_FOLDERS = tuple(os.path.join(f"ILSVRC2012_devkit_{v}", "data") for v in ("t12", "t3"))


class ImageNetSource:
    """Class folders. Raises DataError if there is none, or options contradict the folders."""

    fallback_answer = None

    def __init__(self, source: TaskInput) -> None:
        if source.class_names is not None:
            raise DataError(f"{source.raw}: holds class folders; --class-names is for tables")
        self._source = source
        train, self._val = (os.path.join(source.raw, split) for split in _SPLITS)
        has_val = os.path.isdir(self._val)
        self._train = train if has_val or os.path.isdir(train) else source.raw
        if not 0.0 <= source.val_fraction < 1.0:
            raise DataError(f"--val-fraction {source.val_fraction} is not in [0, 1)")
        if source.val_fraction and has_val:
            raise DataError(f"{self._val}: exists, so --val-fraction must not be given")
        self._classes = _class_folders(find_folder(self._train, ("",)))
        if not self._classes:
            raise DataError(f"{self._train}: no class folder in it")
        self._val_labels: Mapping[str, str] | list[str] | None = None
        given = source.val_labels
        if given is None and has_val and not _class_folders(self._val):
            given = first_file(source.raw, ("", *_KIT_FOLDERS), _GROUND_TRUTH)
        if given is not None:
            self._val_labels_file = given
            self._val_labels = read_val_labels(given, source.raw)

    def splits(self) -> tuple[str, ...]:
        """``train`` and ``val``."""
        return _SPLITS

    @cached_property
    def labels(self) -> Labels:
        """The class ids, and their words if a file tells them. Raises DataError."""
        words = read_words(self._source) or {}
        names = tuple(words.get(wnid, wnid) for wnid in self._classes)
        known = any(wnid in words for wnid in self._classes)
        if self._source.words is not None and not known:
            raise DataError(
                f"{self._source.words}: names none of the {len(names)} classes in {self._train}"
            )
        return Labels("imagenet", tuple(self._classes), names if known else None)

    @cached_property
    def _label_of(self) -> dict[str, int]:
        return {wnid: label for label, wnid in enumerate(self._classes)}

    def read(self, split: str) -> SampleStream:
        """The images of a split, class by class (a flat ``val`` by name). Raises DataError."""
        check_split("imagenet", split, _SPLITS)
        if split == "train" or self._source.val_fraction:
            return self._class_samples(self._classes, split)
        if not os.path.isdir(self._val):
            raise DataError(
                f"{self._val}: no such folder; --val-fraction holds images of train out, "
                "--splits train does without"
            )
        if self._val_labels is not None:
            return self._flat_samples(self._val_labels)
        folders = _class_folders(self._val)
        if not folders:
            raise DataError(
                f"{self._val}: no class folder in it; images without folders need --val-labels"
            )
        return self._class_samples(folders, split)

    def _class_samples(self, folders: Mapping[str, str], split: str) -> SampleStream:
        for wnid, folder in folders.items():
            if os.path.isdir(folder) and os.path.isfile(f"{folder}.tar"):
                reason = f"class {wnid} is the folder beside it too, which is read: remove one"
                yield Reject(f"{folder}.tar", "", reason)
            if wnid not in self._label_of:
                yield Reject(folder, "", f"class {wnid} is not in {self._train}")
                continue
            found: Iterable[ImageFile | Reject | PassedOver] = read_images((folder,))
            fraction, held_out, empty = self._source.val_fraction, frozenset[str](), True
            if fraction:
                found = list(found)
                names = [f"{wnid}/{item.record}" for item in found if isinstance(item, ImageFile)]
                count = min(int(fraction * len(names) + 0.5), max(len(names) - 1, 0))
                held_out = chosen(names, count, self._source.seed)
            for item in found:
                is_held_out = isinstance(item, ImageFile) and f"{wnid}/{item.record}" in held_out
                of_other_split = bool(fraction) and is_held_out != (split == "val")
                empty = empty and isinstance(item, PassedOver) and not of_other_split
                if of_other_split:
                    continue
                if isinstance(item, Reject):
                    yield item
                elif isinstance(item, PassedOver):
                    yield LeftOut(f"passed over: {item.kind}")
                else:
                    if is_tar(folder) and is_tar(item.record.partition("/")[0]):
                        raise DataError(f"{folder}: a tar of tars: unpack it into {self._train}")
                    yield self._sample(item, f"{wnid}/{item.record}", wnid)
            if empty:
                yield Reject(folder, "", "no image in it")

    def _flat_samples(self, classes: Mapping[str, str] | list[str]) -> SampleStream:
        given, folder = self._val_labels_file, self._val
        files = sorted((entry.name, entry.path) for entry in _entries(folder) if entry.is_file())
        found = [as_image(ImageFile(folder, name, path), name) for name, path in files]
        images = [file.record for file in found if isinstance(file, ImageFile)]
        yield from (item for item in found if isinstance(item, Reject))
        others = (item.kind for item in found if isinstance(item, PassedOver))
        yield from (LeftOut(f"passed over: {kind}") for kind in others)
        if isinstance(classes, list) and len(classes) != len(images):
            raise DataError(
                f"{given}: {len(classes)} classes for {len(images)} images in {self._val}"
            )
        for number, name in enumerate(images):
            stem = os.path.splitext(name)[0]
            wnid = classes[number] if isinstance(classes, list) else classes.get(stem)
            if wnid not in self._label_of:
                reason = f"class {wnid} is not in {self._train}" if wnid else f"not in {given}"
                yield Reject(self._val, name, reason, sample=name)
                continue
            image = ImageFile(self._val, name, os.path.join(self._val, name))
            yield self._sample(image, name, wnid)

    def _sample(self, image: ImageFile, name: str, wnid: str) -> TaskSample:
        label = self._label_of[wnid]
        return TaskSample(image.source, image.record, name, (image,), (), (label,), (1.0,))


def _class_folders(folder: str) -> dict[str, str]:
    """Path of each class's folder, or else its tar, by class in sorted order. Raises DataError."""
    entries = _entries(folder)
    folders = {entry.name: entry.path for entry in entries if entry.is_dir()}
    files = {entry.name: entry.path for entry in entries if entry.name not in folders}
    tars = {n.removesuffix(".tar"): path for n, path in files.items() if n.endswith(".tar")}
    # A tar that has been unpacked beside itself is not a second class.
    return dict(sorted((tars | folders).items()))


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """What is in a folder, but for side files. Raises DataError."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not is_side_file(entry.name)]
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror}") from error


def _text_lines(path: str) -> list[str]:
    check_inputs((path,))
    try:
        with open(path, encoding="utf-8-sig") as file:
            return [line.strip() for line in file if line.strip()]
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: invalid UTF-8 at byte {error.start}") from error


def read_words(source: TaskInput) -> dict[str, str] | None:
    """Words by class id, from the file of words, whose lines are the id, white space, and the words; None: there is
    none.

    Raises DataError if it cannot be read.
    """
    paths = [os.path.join(source.raw, name) for name in _WORDS]
    path = source.words or next(filter(os.path.isfile, paths), None)
    if path is None:
        return None
    words: dict[str, str] = {}
    for pair in (line.split(maxsplit=1) for line in _text_lines(path)):
        if len(pair) == 2 and words.setdefault(*pair) != pair[1]:
            raise DataError(f"{path}: class {pair[0]} comes twice, with other words")
    return words


def read_val_labels(path: str, raw: str) -> dict[str, str] | list[str]:
    """Class ids of flat images: by file name without suffix, or in the order of the names.

    The file is a CSV file of ``ImageId,PredictionString`` (the string begins with the class id), a file name and a
    class id per line, a class id per line, or the development kit's ground truth: a class number per line, which the
    kit's ``meta.mat`` (beside the file, or in the raw folder) explains.

    Raises DataError if it is unreadable or empty, or nothing explains its class numbers.
    """
    lines = _text_lines(path)
    if not lines:
        raise DataError(f"{path}: empty file")
    if lines[0].lower().startswith("imageid,"):
        rows = ((row[0], "".join(row[1:2])) for row in csv.reader(lines[1:]) if row)
        return _classes_by_name(path, rows, first=2)
    words = [line.split() for line in lines]
    if len(words[0]) > 1 and os.path.splitext(words[0][0])[1]:
        stems = (os.path.splitext(os.path.basename(name))[0] for name, *_ in words)
        pairs = ((stem, " ".join(rest)) for stem, (_, *rest) in zip(stems, words, strict=True))
        return _classes_by_name(path, pairs, first=1)
    if not lines[0].isdigit():
        return [line[0] for line in words]
    folders = (os.path.dirname(path), raw, *(os.path.join(raw, name) for name in _KIT_FOLDERS))
    meta = next(filter(os.path.isfile, (os.path.join(name, "meta.mat") for name in folders)), None)
    if meta is None:
        raise DataError(
            f"{path}: class numbers of the development kit, which its meta.mat explains: put it beside "
            "them, or give one class id (n01440764) per line, or LOC_val_solution.csv"
        )
    wnids = _read_meta(meta)
    for number, line in enumerate(lines, start=1):
        if not line.isdigit() or int(line) not in wnids:
            raise DataError(f"{path}: line {number}: {line!r} is no class number of {meta}")
    return [wnids[int(line)] for line in lines]


def _classes_by_name(path: str, rows: Iterable[tuple[str, str]], first: int) -> dict[str, str]:
    """Class id by image, of rows of an image and what begins with its class id. Raises DataError."""
    classes: dict[str, str] = {}
    for number, (image, said) in enumerate(rows, start=first):
        wnid = next(iter(said.split()), "")
        if not wnid:
            raise DataError(f"{path}: line {number}: not an image and a class id")
        if wnid.isdigit():
            raise DataError(
                f"{path}: line {number}: class {wnid} is a number, of which there are several countings: "
                "give the class id (n01440764)"
            )
        if (other := classes.setdefault(image, wnid)) != wnid:
            raise DataError(
                f"{path}: line {number}: image {image} comes twice, of {other} and {wnid}"
            )
    return classes


def _read_meta(path: str) -> dict[int, str]:
    """Class id by ILSVRC number, from the development kit's ``synsets``. Raises DataError."""
    try:
        from scipy.io import loadmat  # type: ignore[import-untyped]
    except ImportError as error:
        raise DataError(
            f"{path}: reading it needs scipy (pip install scipy); or give --val-labels with one class "
            "id (n01440764) per line, or LOC_val_solution.csv"
        ) from error
    try:
        synsets = loadmat(path, squeeze_me=True)["synsets"]
        numbers, wnids = synsets["ILSVRC2012_ID"].tolist(), synsets["WNID"].tolist()
        found = {int(number): str(wnid) for number, wnid in zip(numbers, wnids, strict=True)}
    except Exception as error:  # what a damaged file raises, scipy does not say
        raise DataError(f"{path}: not the development kit's meta.mat: {error}") from error
    if len(found) != len(numbers):
        raise DataError(f"{path}: a class number comes twice")
    return found


_TABLE_WORDS = {"train": ("train",), "val": ("val", "validation"), "test": ("test",)}
_TABLE_COLUMNS = {"image": ("image", "img", "jpg"), "label": ("label", "labels", "cls")}
_TABLE_FOLDERS = (
    "",
    "data",
    "default",
    *(word for words in _TABLE_WORDS.values() for word in words),
)


def open_imagenet(source: TaskInput) -> TaskSource:
    """Tables, where some lie in the raw folder or where they usually do below it, else class folders.

    A table beside class folders in ``train`` is not the images. Raises DataError if there are neither, or options
    contradict what is there.
    """
    train = os.path.join(source.raw, "train")
    if os.path.isdir(train) and _class_folders(train):
        return ImageNetSource(source)
    # Not looked for everywhere: there may be millions of images.
    for folder in (os.path.join(source.raw, name) for name in _TABLE_FOLDERS):
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
        return self._tables.splits(_TABLE_WORDS)

    @cached_property
    def _classes(self) -> Classes:
        """The classes and what the numbers stand for, by the schema or ``--class-names``."""
        told = told_classes(self._tables.paths, _TABLE_COLUMNS["label"])
        names = self._source.class_names or told
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
        columns = {path: choose_columns(path, _TABLE_COLUMNS, optional) for path in paths}
        files = [(path, table_rows(path, named)) for path, named in columns.items()]
        return row_samples(files, self._source.raw, "", partial(self._sample, split))

    def _sample(
        self, split: str, path: str, record: str, name: str, row: Row
    ) -> TaskSample | Reject:
        label = row.get("label")
        hidden = split == "test" and label in (None, -1)
        try:
            image = self._images.cell(path, record, row["image"])
            labels = () if hidden else (self._classes.label(label),)
        except DataError as error:
            return Reject(path, record, str(error), sample=name)
        return TaskSample(path, record, name, (image,), (), labels, (1.0,) * len(labels))
