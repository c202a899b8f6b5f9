"""Raw image-caption pairs: what their readers share, and captions in records.

Records are JSON lists and lines of objects, rows of CSV, TSV, parquet and Arrow, Flickr30K's lines, and WebDataset.

A record names its image (a path below the image folder) and its caption or list of captions under
the usual keys, `IMAGE_KEYS` and `CAPTION_KEYS`. In parquet and Arrow the image may also be the
encoded bytes, or Hugging Face's {bytes, path}. Records of one image that follow each other become
one image with several captions. A record may name its split.

A line of Flickr30K's ``results_20130124.token`` is ``1000092795.jpg#0``, a tab and the caption; the ``results.csv``
of copies is read as any CSV (``image_name| comment_number| comment``). Neither names splits: the validation and test
images are among them.

WebDataset's consecutive members that agree up to the first dot of their file name are one sample: an image, by
its suffix or its contents, and the caption in ``.txt``, else under a usual key of ``.json`` (a
string or a list of strings). Other members of a sample do not count. The same files may lie in folders;
img2dataset's ``webdataset`` and ``files`` outputs are of this form.
"""

from __future__ import annotations

import csv
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.prepare.readers.files import (
    TableLines,
    columns_of,
    json_list,
    lines_record,
    load_json,
    text_lines,
)
from megatron_vlmoe.prepare.readers.images import (
    BrokenTar,
    ImageFinder,
    NoImageError,
    as_image,
    tar_members,
)
from megatron_vlmoe.prepare.readers.records import (
    CaptionedImage,
    ImageFile,
    LeftOut,
    PairItem,
    PassedOver,
    Reject,
    Row,
    Rows,
    check_inputs,
    decoded,
    is_tar,
    kinds_of,
    passed_over_line,
    walk_files,
)
from megatron_vlmoe.prepare.readers.tables import column_names, table_rows
from megatron_vlmoe.prepare.remote import is_remote_folder, remote_files
from megatron_vlmoe.runtime.files import is_remote
from megatron_vlmoe.runtime.json_files import parse_json

DEFAULT_SPLITS = ("train", "restval")
SPLIT_KEY = "split"
DOWNLOAD_FIRST = (
    "lists URLs: download the images first, for example with img2dataset, whose output is read "
    "with --format webdataset, files or parquet"
)


@dataclass(frozen=True)
class PairInput:
    """Which files, and how to read them.

    Attributes:
        format: a key of `PAIR_FORMATS`, or ``auto``: what the annotation files hold decides.
        annotations: annotation files (for ``webdataset`` and ``files`` also folders).
        images: folder of the images; not needed where the annotation files hold them or name them
            by paths that are absolute and exist.
        splits: the splits to take, where the records name theirs; None: ``train`` and ``restval``,
            and records that name none.
        image_key: for records with keys or columns the one of the image; None: the usual ones.
        caption_key: for these and ``webdataset`` JSON the one of the caption or captions.
        split_key: for these the one of the split.
        separator: for ``csv`` what separates the columns; None: what the first line has.
        unmet: takes the error, by what is missing, where only a part of the input is read; None: it is raised.
    """

    format: str
    annotations: tuple[str, ...]
    images: str | None = None
    splits: tuple[str, ...] | None = None
    image_key: str | None = None
    caption_key: str | None = None
    split_key: str = SPLIT_KEY
    separator: str | None = None
    unmet: dict[str, str] | None = field(default=None, compare=False, repr=False)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Where a layout without lists is read: the annotations, or the folder of the images."""
        return self.annotations or ((self.images,) if self.images else ())

    def image_folder(self) -> str:
        """The folder of the images. Raises DataError if there is none."""
        if self.images is None:
            raise DataError(f"--format {self.format} needs --images, the folder of the images")
        if not os.path.isdir(self.images):
            raise DataError(f"{self.images}: not a folder of images")
        return self.images


PairReader = Callable[[PairInput], Iterator[PairItem | PassedOver]]


@dataclass(frozen=True, slots=True)
class CaptionRow:
    """One record of a list: an image, by its path as listed or as encoded bytes, and its caption or captions."""

    source: str
    record: str
    image: str | bytes
    captions: tuple[object, ...]


class PairItems:
    """Makes what readers yield of what their records say, and chooses by the splits that these may name."""

    def __init__(self, source: PairInput) -> None:
        self._source = source
        self._wanted = DEFAULT_SPLITS if source.splits is None else source.splits
        self._seen: Counter[str] = Counter()
        self._undivided = 0

    @cached_property
    def finder(self) -> ImageFinder:
        """Finds the listed images. Raises DataError without an image folder."""
        return ImageFinder(self._source.image_folder())

    def item(
        self, rows: list[CaptionRow], caption_records: tuple[str, ...] = ()
    ) -> CaptionedImage | Reject:
        """The image that all ``rows`` name, with their captions; a `Reject` if it is not found.

        ``caption_records`` are the records of the captions of a single row; empty: the row's.
        """
        first = rows[0]
        captions = tuple(caption for row in rows for caption in row.captions)
        if len(rows) > 1:
            caption_records = tuple(
                row.record if len(row.captions) == 1 else f"{row.record}, caption {place}"
                for row in rows
                for place in range(len(row.captions))
            )
        record = first.record if len(rows) == 1 else f"{first.record} and {len(rows) - 1} more"
        if isinstance(first.image, bytes):
            image = ImageFile(first.source, record, data=first.image)
        else:
            found = first.image
            if self._source.images is not None or not os.path.isabs(found):
                finder = self.finder
                try:
                    found = finder.find(found)
                except NoImageError as error:
                    reason, lost = str(error), len(captions)
                    return Reject(
                        first.source, record, reason, unit="image", records=len(rows), captions=lost
                    )
                except DataError as error:
                    raise DataError(f"{first.source}: {record}: {error}") from error
            image = ImageFile(first.source, record, found)
        sizes = tuple(len(row.captions) for row in rows)
        return CaptionedImage(first.source, record, image, captions, caption_records, sizes)

    def grouped(self, rows: Iterable[CaptionRow | Reject | LeftOut]) -> Iterator[PairItem]:
        """Joins rows of one image that follow each other, as lists with a row per caption have them.

        Rejects between such rows come after their image.
        """
        group: list[CaptionRow] = []
        between: list[Reject] = []
        for row in rows:
            if isinstance(row, LeftOut):
                yield row
            elif isinstance(row, Reject):
                between.append(row)
            elif group and (row.source, row.image) != (group[0].source, group[0].image):
                yield self.item(group)
                yield from between
                group, between = [row], []
            else:
                group.append(row)
        if group:
            yield self.item(group)
        yield from between

    def refusal(self, source: str, record: str, split: object) -> LeftOut | Reject | None:
        """Why a record of this split is not taken; None: it is. No split is None or an empty text."""
        if split is None or split == "":
            self._undivided += 1
            if self._source.splits is None:
                return None
            return Reject(source, record, f"names no split (key {self._source.split_key})")
        self._seen[str(split)] += 1
        return None if str(split) in self._wanted else LeftOut(f"split {split}")

    def check_splits(self) -> None:
        """Raises DataError if no record was of a wanted split.

        ``restval`` may be absent while it is wanted together with ``train``: Flickr30K has none.
        """
        absent = [split for split in self._wanted if not self._seen[split]]
        if absent == ["restval"] and "train" in self._wanted:
            return
        given = self._source.splits
        if not absent or (given is None and (self._undivided or not self._seen)):
            return
        has = f"it has {', '.join(sorted(self._seen))}" if self._seen else "none is named"
        choose = "" if given else ": choose with --split"
        source = self._source.annotations[0]
        message = f"{source}: no image of split {', '.join(absent)}; {has}{choose}"
        if self._source.unmet is None:
            raise DataError(message)
        self._source.unmet.update({f"split {split}": message for split in absent})


IMAGE_KEYS = (
    *("image", "image_path", "file_name", "filename", "filepath", "image_name"),
    *("jpg", "jpeg", "png", "webp"),
)
CAPTION_KEYS = ("caption", "captions", "text", "title", "comment", "sentences", "sentence")


def as_captions(value: object) -> tuple[object, ...]:
    """One caption or a list of them, as a tuple; of COCO's {raw, tokens, ...} the raw one."""
    if isinstance(value, str):
        return (value,)
    captions = tuple(value) if isinstance(value, list | tuple) else (value,)
    return tuple(c.get("raw") if isinstance(c, dict) else c for c in captions)


def find_key(record: Row, wanted: str | None, usual: tuple[str, ...]) -> str | None:
    """``wanted``, or else the first of the usual keys, if the record has it."""
    for key in (wanted,) if wanted else usual:
        if key in record:
            return key
    return None


RowReader = Callable[[PairInput, str], Rows]


def read_records(read_rows: RowReader, source: PairInput) -> Iterator[PairItem]:
    """Yields the images of files of records. Raises DataError if a file is of another kind, or lacks a column."""
    items = PairItems(source)
    for path in source.annotations:
        rows = (
            item if isinstance(item, Reject) else _pair(source, items, path, *item)
            for item in read_rows(source, path)
        )
        yield from items.grouped(rows)
    items.check_splits()


def _pair(
    source: PairInput, items: PairItems, path: str, record: str, row: Row
) -> CaptionRow | Reject | LeftOut:
    refusal = items.refusal(path, record, row.get(source.split_key))
    if refusal is not None:
        return refusal
    image_key, caption_key = find_keys(source, row)
    if image_key is None or caption_key is None:
        _check_urls(f"{path}: {record}", row)
        wanted = source.caption_key or " or ".join(CAPTION_KEYS)
        if image_key is None:
            wanted = source.image_key or " or ".join(IMAGE_KEYS)
        return Reject(path, record, f"no key {wanted}: it has {', '.join(row) or 'none'}")
    image, captions = row[image_key], as_captions(row[caption_key])
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str) and image_key == "filename" and row.get("filepath"):
        image = os.path.join(str(row["filepath"]), image)  # Karpathy's columns
    if isinstance(image, bytes | str) and image:
        return CaptionRow(path, record, image, captions)
    reason = "the image is neither a path nor bytes"
    return Reject(path, record, reason, unit="image", captions=len(captions))


def find_keys(source: PairInput, row: Row) -> tuple[str | None, str | None]:
    """The keys of the image and of the caption."""
    return (
        find_key(row, source.image_key, IMAGE_KEYS),
        find_key(row, source.caption_key, CAPTION_KEYS),
    )


def _check_urls(place: str, row: Row) -> None:
    """Raises DataError if a record names its image by a URL alone."""
    if any(key.lower() in ("url", "image_url") for key in row):
        raise DataError(f"{place} {DOWNLOAD_FIRST}")


def _check_columns(source: PairInput, path: str, names: Row) -> tuple[str, str]:
    """The columns of the image and the caption. Raises DataError if one is missing."""
    image_key, caption_key = find_keys(source, names)
    if image_key is None:
        _check_urls(path, names)
    if image_key is None or caption_key is None:
        raise DataError(
            f"{path}: no column for the image or the caption among {', '.join(names)}: "
            "name them with --image-key and --caption-key"
        )
    if source.splits is not None and source.split_key not in names:
        raise DataError(
            f"{path}: --split, but no column {source.split_key!r} among {', '.join(names)}"
        )
    return image_key, caption_key


def json_list_rows(source: PairInput, path: str) -> Rows:
    """The objects of a JSON list, as ALBEF, BLIP and LAVIS have them."""
    for number, entry in enumerate(json_list(path, load_json(path))):
        record = f"entry {number}"
        yield (record, entry) if isinstance(entry, dict) else Reject(path, record, "no JSON object")


def column_rows(source: PairInput, path: str) -> Rows:
    """The rows of parquet and Arrow files."""
    names = dict.fromkeys(column_names(path))
    wanted = {*_check_columns(source, path, names), source.split_key, "filepath"}
    return table_rows(path, {name: name for name in names if name in wanted})


def csv_rows(source: PairInput, path: str) -> Rows:
    """The rows of a table of text with a line of column names."""
    lines = TableLines(path, "surrogateescape")
    head = next(lines, "")
    if lines.rejects:
        raise DataError(str(lines.rejects[0]))
    if not head:
        raise DataError(f"{path}: the file is empty")
    separator, names = columns_of(head, source.separator)
    image_key, _ = _check_columns(source, path, dict.fromkeys(names))
    for row in lines.rows(csv.reader(lines, delimiter=separator), names):
        if isinstance(row, Reject):
            yield row
            continue
        first, last, values = row
        # A caption over several lines is as good as any, unless there is a file name in it like that of the
        # row's own image, or any column where that name has no suffix: then it seems to hold further rows.
        suffix = os.path.splitext(values[names.index(image_key)])[1].lower()
        over_lines = [cell.splitlines() for cell in values if len(cell.splitlines()) > 1]
        if any(
            os.path.splitext(part.strip('" '))[1].lower() == suffix
            for line in itertools.chain.from_iterable(over_lines)
            if separator in line
            for part in line.split(separator)
        ):
            reason = "a quotation mark that is not closed takes in what follows"
            yield Reject(path, lines_record(first, last), reason)
        else:
            yield lines_record(first, last), dict(zip(names, values, strict=True))


TOKEN_LINE = re.compile(r"(?P<image>[^\t]+)#\d+\t(?P<caption>.*)")
"""A line of the ``.token`` file."""


def read_flickr30k(source: PairInput) -> Iterator[PairItem]:
    """Yields each image with its captions. Raises DataError."""
    for path in source.annotations:
        part = replace(source, annotations=(path,))
        first = next(text_lines(path, "replace"), (1, ""))
        if not isinstance(first, Reject) and TOKEN_LINE.fullmatch(first[1]):
            yield from PairItems(part).grouped(_token_rows(path))
        else:
            yield from read_records(csv_rows, part)


def _token_rows(path: str) -> Iterator[CaptionRow | Reject]:
    for item in text_lines(path, "surrogateescape"):
        if isinstance(item, Reject):
            yield item
        elif (match := TOKEN_LINE.fullmatch(item[1])) is not None:
            record = f"line {item[0]} ({match['image']})"
            yield CaptionRow(path, record, match["image"], (match["caption"],))
        elif item[1].strip():
            yield Reject(path, f"line {item[0]}", "not NAME#NUMBER, tab, caption")


def tars_of(source: PairInput) -> list[str]:
    """The tars of ``webdataset``, and those in its folders. Raises DataError if there is none."""
    tars = []
    for given in source.inputs:
        if is_remote(given) and is_remote_folder(given):
            tars += [file for file, _ in remote_files(given) if is_tar(file)]
        else:
            tars += filter(is_tar, walk_files(given)) if os.path.isdir(given) else (given,)
    if not tars:
        raise DataError(f"no tar in {', '.join(source.inputs) or '--annotations'}")
    return tars


def read_webdataset(source: PairInput) -> Iterator[PairItem | PassedOver]:
    """Yields the samples of all tars in order, and of those in folders. Raises DataError if there is no tar."""
    check_inputs(source.inputs)
    tars = tars_of(source)
    keys = _CaptionKeys(source)
    for tar in tars:
        yield from _samples(tar, tar_members(tar), keys)
    keys.finish()


def read_sample_files(source: PairInput) -> Iterator[PairItem | PassedOver]:
    """Yields the samples of folders in sorted order. Raises DataError if one is none."""
    keys = _CaptionKeys(source)
    for folder in source.inputs:
        if not os.path.isdir(folder):
            raise DataError(f"{folder}: not a folder; --format files reads folders of samples")
        # Besides the samples img2dataset leaves tables of them and statistics.
        members = (
            ImageFile(folder, os.path.relpath(file, folder), file)
            for file in walk_files(folder)
            if not file.endswith(("_stats.json", ".parquet", ".tar"))
        )
        yield from _samples(folder, members, keys)
    keys.finish()


class _CaptionKeys:
    """The key of captions in ``.json`` files: the one that was asked for, or the usual ones."""

    def __init__(self, source: PairInput) -> None:
        self.wanted = source.caption_key
        self._source = source
        self._found = False

    def captions(self, content: str) -> tuple[object, ...]:
        """The captions in a JSON text; none without the key. Raises DataError."""
        value = parse_json(content)
        key = find_key(value, self.wanted, CAPTION_KEYS) if isinstance(value, dict) else None
        self._found = self._found or key is not None
        return as_captions(value[key]) if key is not None else ()

    def finish(self) -> None:
        """Raises DataError if no sample had the key that was asked for."""
        if self.wanted and not self._found:
            inputs = ", ".join(self._source.inputs)
            message = f"{inputs}: no .json has the key {self.wanted!r}"
            if self._source.unmet is None:
                raise DataError(message)
            self._source.unmet["caption key"] = message


@dataclass
class _Sample:
    """The members of one sample as they come."""

    key: str
    images: list[ImageFile] = field(default_factory=list)
    captions: dict[str, tuple[object, ...]] = field(default_factory=dict)
    """By the suffix of their file."""
    others: list[PassedOver] = field(default_factory=list)
    """Members that are neither image nor caption."""
    problem: str = ""
    """Why the sample is of no use: the first of its members that is not."""

    def add(self, member: ImageFile | Reject, keys: _CaptionKeys) -> None:
        """Takes one member, an image or not. Raises DataError if it is of no use."""
        suffix = os.path.splitext(member.record)[1].lower()
        caption = suffix in (".txt", ".json") and not isinstance(member, Reject)
        found = member if caption or isinstance(member, Reject) else as_image(member, member.record)
        if isinstance(found, Reject):
            raise DataError(found.reason)
        if isinstance(found, PassedOver):
            self.others.append(found)
        elif not caption:
            self.images.append(found)
        elif suffix in self.captions:
            raise DataError(f"a second {suffix} in the sample")
        else:
            self.captions[suffix] = ()
            content = decoded(found.read(), "utf-8-sig")
            self.captions[suffix] = keys.captions(content) if suffix == ".json" else (content,)

    def chosen(self, keys: _CaptionKeys) -> tuple[object, ...]:
        """The captions that count: those under a key that was asked for come before ``.txt``."""
        text, described = (self.captions.get(suffix, ()) for suffix in (".txt", ".json"))
        return (described if keys.wanted else ()) or text or described

    def finish(self, tar: str, keys: _CaptionKeys) -> Iterator[PairItem | PassedOver]:
        """The complete sample, or why there is none.

        What has neither an image nor the file of a caption is no sample.
        """
        captions = self.chosen(keys)
        if self.problem:
            yield Reject(tar, self.key, self.problem, captions=len(captions))
        elif len(self.images) == 1:
            yield CaptionedImage(tar, self.key, self.images[0], captions)
        elif self.images or self.captions:
            others = f" ({passed_over_line(kinds_of(Counter(self.others)))})" if self.others else ""
            reason = f"{len(self.images)} images in the sample, not 1{others}"
            yield Reject(tar, self.key, reason, captions=len(captions))
        else:
            yield from self.others


def _samples(
    tar: str, members: Iterable[ImageFile | Reject], keys: _CaptionKeys
) -> Iterator[PairItem | PassedOver]:
    """The samples of a tar or folder."""
    sample: _Sample | None = None
    for member in members:
        if isinstance(member, BrokenTar):
            # It stands for the sample under way too, which may lack its rest.
            yield replace(member, captions=0 if sample is None else len(sample.chosen(keys)))
            sample = None
            continue
        folder, base = os.path.split(member.record)
        key = os.path.join(folder, base.split(".")[0])
        if sample is not None and sample.key != key:
            yield from sample.finish(tar, keys)
            sample = None
        sample = sample or _Sample(key)
        try:
            sample.add(member, keys)
        except DataError as error:
            sample.problem = sample.problem or f"{member.record}: {error}"
    if sample is not None:
        yield from sample.finish(tar, keys)
