"""WebDataset tars of image-caption pairs, and the same files in folders.

Consecutive members that agree up to the first dot of their file name are one sample: an image, by
its suffix or its contents, and the caption in ``.txt``, else under a usual key of ``.json`` (a
string or a list of strings). Other members of a sample do not count.
img2dataset's ``webdataset`` and ``files`` outputs are of this form.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.prepare.readers.images import BrokenTar, as_image, tar_members
from megatron_vlmoe.prepare.readers.pairs import CAPTION_KEYS, PairInput, as_captions, find_key
from megatron_vlmoe.prepare.readers.records import (
    CaptionedImage,
    ImageFile,
    PairItem,
    PassedOver,
    Reject,
    check_inputs,
    is_tar,
    kinds_of,
    passed_over_line,
    walk_files,
)
from megatron_vlmoe.runtime.json_files import parse_json


class Member(Protocol):
    """A file of a tar (`TarMember`) or of a folder (`FolderMember`)."""

    @property
    def name(self) -> str:
        """Its path in the tar or folder."""
        ...

    def image(self, source: str) -> ImageFile:
        """The file as an image of ``source``."""
        ...

    def contents(self, source: str) -> bytes:
        """Its bytes. Raises DataError."""
        ...


@dataclass(frozen=True, slots=True)
class FolderMember:
    """A file below a folder."""

    name: str

    def image(self, source: str) -> ImageFile:
        """The file as an image."""
        return ImageFile(source, self.name, os.path.join(source, self.name))

    def contents(self, source: str) -> bytes:
        """Its bytes. Raises DataError."""
        return self.image(source).read()


def read_webdataset(source: PairInput) -> Iterator[PairItem | PassedOver]:
    """Yields the samples of all tars in order.

    Tars are the annotation files, or lie in a folder given as one or as the image folder.

    Raises:
        DataError: no tar is given.
    """
    inputs = source.annotations or ((source.images,) if source.images else ())
    check_inputs(inputs)
    tars = [
        path
        for given in inputs
        for path in (filter(is_tar, walk_files(given)) if os.path.isdir(given) else (given,))
    ]
    if not tars:
        raise DataError(f"no tar in {', '.join(inputs) or '--annotations'}")
    keys = _CaptionKeys(source.caption_key)
    for tar in tars:
        yield from _samples(tar, tar_members(tar), keys)
    keys.finish(inputs)


def read_sample_files(source: PairInput) -> Iterator[PairItem | PassedOver]:
    """Yields the samples of folders, the annotations or the image folder, in sorted order.

    Raises:
        DataError: a folder is none.
    """
    folders = source.annotations or ((source.images,) if source.images else ())
    keys = _CaptionKeys(source.caption_key)
    for folder in folders:
        if not os.path.isdir(folder):
            raise DataError(f"{folder}: not a folder; --format files reads folders of samples")
        # Besides the samples img2dataset leaves tables of them and statistics.
        names = (
            os.path.relpath(file, folder)
            for file in walk_files(folder)
            if not file.endswith(("_stats.json", ".parquet", ".tar"))
        )
        yield from _samples(folder, map(FolderMember, names), keys)
    keys.finish(folders)


class _CaptionKeys:
    """The key of captions in ``.json`` files: the one that was asked for, or the usual ones."""

    def __init__(self, wanted: str | None) -> None:
        self.wanted = wanted
        self._found = False

    def captions(self, content: str) -> tuple[object, ...]:
        """The captions in a JSON text; none without the key. Raises DataError."""
        value = parse_json(content)
        key = find_key(value, self.wanted, CAPTION_KEYS) if isinstance(value, dict) else None
        self._found = self._found or key is not None
        return as_captions(value[key]) if key is not None else ()

    def finish(self, inputs: Sequence[str]) -> None:
        """Raises DataError if no sample had the key that was asked for."""
        if self.wanted and not self._found:
            raise DataError(f"{', '.join(inputs)}: no .json has the key {self.wanted!r}")


@dataclass
class _Sample:
    """The members of one sample as they come."""

    key: str
    images: list[ImageFile] = field(default_factory=list)
    text: tuple[object, ...] = ()
    described: tuple[object, ...] = ()
    seen: set[str] = field(default_factory=set)
    """Suffixes of captions."""
    others: list[PassedOver] = field(default_factory=list)
    """Members that are neither image nor caption."""
    problem: str = ""
    """Why the sample is of no use: the first of its members that is not."""

    def add(self, tar: str, member: Member, keys: _CaptionKeys) -> None:
        """Takes one member. Raises DataError if it is unreadable."""
        suffix = os.path.splitext(member.name)[1].lower()
        if suffix not in (".txt", ".json"):
            found = as_image(member.image(tar), member.name)
            if isinstance(found, Reject):
                raise DataError(found.reason)
            if isinstance(found, PassedOver):
                self.others.append(found)
            else:
                self.images.append(found)
            return
        if suffix in self.seen:
            raise DataError(f"a second {suffix} in the sample")
        self.seen.add(suffix)
        content = _decode(member.contents(tar))
        if suffix == ".txt":
            self.text = (content,)
        else:
            self.described = keys.captions(content)

    def captions(self, keys: _CaptionKeys) -> tuple[object, ...]:
        """Those under a key that was asked for come before ``.txt``."""
        return (self.described if keys.wanted else ()) or self.text or self.described

    def finish(self, tar: str, keys: _CaptionKeys) -> Iterator[PairItem | PassedOver]:
        """The complete sample, or why there is none.

        What has neither an image nor the file of a caption is no sample.
        """
        captions = self.captions(keys)
        if self.problem:
            yield Reject(tar, self.key, self.problem, captions=len(captions))
        elif len(self.images) == 1:
            yield CaptionedImage(tar, self.key, self.images[0], captions)
        elif self.images or self.seen:
            others = f" ({passed_over_line(kinds_of(Counter(self.others)))})" if self.others else ""
            reason = f"{len(self.images)} images in the sample, not 1{others}"
            yield Reject(tar, self.key, reason, captions=len(captions))
        else:
            yield from self.others


def _decode(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"invalid UTF-8 at byte {error.start}") from error


def _samples(
    tar: str, members: Iterable[Member | Reject], keys: _CaptionKeys
) -> Iterator[PairItem | PassedOver]:
    """The samples of a tar or folder."""
    sample: _Sample | None = None
    for member in members:
        if isinstance(member, BrokenTar):
            # It stands for the sample under way too, which may lack its rest.
            lost = 0 if sample is None else len(sample.captions(keys))
            yield replace(member, captions=lost)
            sample = None
            continue
        name = member.record if isinstance(member, Reject) else member.name
        folder, base = os.path.split(name)
        key = os.path.join(folder, base.split(".")[0])
        if sample is not None and sample.key != key:
            yield from sample.finish(tar, keys)
            sample = None
        sample = sample or _Sample(key)
        try:
            if isinstance(member, Reject):
                raise DataError(member.reason)
            sample.add(tar, member, keys)
        except DataError as error:
            sample.problem = sample.problem or f"{name}: {error}"
    if sample is not None:
        yield from sample.finish(tar, keys)
