"""Raw image-caption pairs: one reader per layout, chosen by name or by what the files hold."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.prepare.readers.images import ImageFinder, NoImageError
from megatron_vlmoe.prepare.readers.records import (
    CaptionedImage,
    ImageFile,
    LeftOut,
    PairItem,
    PassedOver,
    Reject,
)

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
    """

    format: str
    annotations: tuple[str, ...]
    images: str | None = None
    splits: tuple[str, ...] | None = None
    image_key: str | None = None
    caption_key: str | None = None
    split_key: str = SPLIT_KEY
    separator: str | None = None

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
    """One record of a list: an image and its caption or captions.

    ``image`` is a path as listed, or the encoded bytes.
    """

    source: str
    record: str
    image: str | bytes
    captions: tuple[object, ...]


class PairItems:
    """Makes what readers yield of what their records say.

    Args:
        source: the options.
    """

    def __init__(self, source: PairInput) -> None:
        self._source = source

    @cached_property
    def finder(self) -> ImageFinder:
        """Finds the listed images. Raises DataError without an image folder."""
        return ImageFinder(self._source.image_folder())

    def item(
        self, rows: list[CaptionRow], caption_records: tuple[str, ...] = ()
    ) -> CaptionedImage | Reject:
        """The image that all ``rows`` name, with their captions; a `Reject` if it is not found.

        Args:
            rows: one row, or several of the same image.
            caption_records: the record of each caption; empty: the row's.
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
                continue
            if isinstance(row, Reject):
                between.append(row)
                continue
            if group and (row.source, row.image) != (group[0].source, group[0].image):
                yield self.item(group)
                yield from between
                group, between = [], []
            group.append(row)
        if group:
            yield self.item(group)
        yield from between


class SplitChoice:
    """Which records are taken where they name their split.

    Args:
        source: the options.
    """

    def __init__(self, source: PairInput) -> None:
        self._given = source.splits
        self._wanted = DEFAULT_SPLITS if source.splits is None else source.splits
        self._key = source.split_key
        self._seen: Counter[str] = Counter()
        self._undivided = 0

    def refusal(self, source: str, record: str, split: object) -> LeftOut | Reject | None:
        """Why a record of this split is not taken; None: it is.

        Args:
            source: file of the record.
            record: its name.
            split: as parsed; None and the empty string name none.
        """
        if split is None or split == "":
            self._undivided += 1
            if self._given is None:
                return None
            return Reject(source, record, f"names no split (key {self._key})")
        self._seen[str(split)] += 1
        return None if str(split) in self._wanted else LeftOut(f"split {split}")

    def finish(self, source: str) -> None:
        """Raises DataError if no record was of a wanted split.

        ``restval`` may be absent while it is wanted together with ``train``: Flickr30K has none.
        """
        absent = [split for split in self._wanted if not self._seen[split]]
        if absent == ["restval"] and "train" in self._wanted:
            return
        if not absent or (self._given is None and (self._undivided or not self._seen)):
            return
        has = f"it has {', '.join(sorted(self._seen))}" if self._seen else "none is named"
        choose = "" if self._given else ": choose with --split"
        raise DataError(f"{source}: no image of split {', '.join(absent)}; {has}{choose}")


IMAGE_KEYS = ("image", "image_path", "file_name", "filename", "filepath", "image_name") + (
    "jpg",
    "jpeg",
    "png",
    "webp",
)
CAPTION_KEYS = ("caption", "captions", "text", "title", "comment", "sentences", "sentence")


def as_captions(value: object) -> tuple[object, ...]:
    """One caption or a list of them, as a tuple; of COCO's {raw, tokens, ...} the raw one."""
    captions = tuple(value) if isinstance(value, list | tuple) else (value,)
    return tuple(c.get("raw") if isinstance(c, dict) else c for c in captions)


def find_key(record: Mapping[str, Any], wanted: str | None, usual: tuple[str, ...]) -> str | None:
    """``wanted``, or else the first of the usual keys, if the record has it."""
    return next((key for key in ((wanted,) if wanted else usual) if key in record), None)
