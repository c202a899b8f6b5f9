"""WebDataset tars of image-caption pairs, and the same files in folders.

Consecutive members that agree up to the first dot of their file name are one sample: an image, and
the caption in ``.txt``, else under a usual key of ``.json`` (a string or a list of strings).
img2dataset's ``webdataset`` and ``files`` outputs are of this form.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from megatron_vlmoe.data.errors import DataError
from megatron_vlmoe.data.readers.images import tar_members
from megatron_vlmoe.data.readers.pairs import CAPTION_KEYS, PairInput, as_captions, find_key
from megatron_vlmoe.data.readers.records import (
    CaptionedImage,
    ImageFile,
    PairItem,
    Reject,
    check_inputs,
    is_image,
    is_tar,
    walk_files,
)


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


def read_webdataset(source: PairInput) -> Iterator[PairItem]:
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
    for tar in tars:
        yield from _samples(tar, tar_members(tar), source.caption_key)


def read_sample_files(source: PairInput) -> Iterator[PairItem]:
    """Yields the samples of folders, the annotations or the image folder, in sorted order.

    Raises:
        DataError: a folder is none.
    """
    folders = source.annotations or ((source.images,) if source.images else ())
    for folder in folders:
        if not os.path.isdir(folder):
            raise DataError(f"{folder}: not a folder; --format files reads folders of samples")
        # Besides the samples img2dataset leaves tables of them and statistics.
        names = (
            os.path.relpath(file, folder)
            for file in walk_files(folder)
            if not file.endswith(("_stats.json", ".parquet", ".tar"))
        )
        yield from _samples(folder, map(FolderMember, names), source.caption_key)


@dataclass
class _Sample:
    """The members of one sample as they come."""

    key: str
    images: list[ImageFile] = field(default_factory=list)
    text: tuple[object, ...] = ()
    described: tuple[object, ...] = ()
    seen: set[str] = field(default_factory=set)
    """Suffixes."""

    def add(self, tar: str, member: Member, caption_key: str | None) -> None:
        """Takes one member. Raises DataError if it is an unreadable caption."""
        suffix = os.path.splitext(member.name)[1].lower()
        if suffix in (".txt", ".json") and suffix in self.seen:
            raise DataError(f"{member.name}: a second {suffix} in the sample")
        self.seen.add(suffix)
        if is_image(member.name):
            self.images.append(member.image(tar))
        elif suffix == ".txt":
            self.text = (_decode(member, tar),)
        elif suffix == ".json":
            try:
                value = json.loads(_decode(member, tar))
            except (ValueError, RecursionError) as error:
                raise DataError(f"{member.name}: invalid JSON: {error}") from error
            key = find_key(value, caption_key, CAPTION_KEYS) if isinstance(value, dict) else None
            self.described = as_captions(value[key]) if key is not None else ()

    def finish(self, tar: str, caption_key: str | None) -> CaptionedImage | Reject:
        """The complete sample; a caption under a key that was asked for comes before ``.txt``."""
        captions = (self.described if caption_key else ()) or self.text or self.described
        if len(self.images) != 1:
            reason = f"{len(self.images)} images in the sample, not 1"
            return Reject(tar, self.key, reason, captions=len(captions))
        return CaptionedImage(tar, self.key, self.images[0], captions)


def _decode(member: Member, tar: str) -> str:
    try:
        return member.contents(tar).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{member.name}: invalid UTF-8 at byte {error.start}") from error


def _samples(
    tar: str, members: Iterable[Member | Reject], caption_key: str | None
) -> Iterator[PairItem]:
    """The samples of a tar or folder."""
    sample: _Sample | None = None
    spoiled = ""
    for member in members:
        if isinstance(member, Reject):
            # The sample under way may lack its rest.
            yield member
            return
        folder, base = os.path.split(member.name)
        key = os.path.join(folder, base.split(".")[0])
        if not os.path.splitext(base)[1] or base.startswith(".") or key == spoiled:
            continue
        if sample is not None and sample.key != key:
            yield sample.finish(tar, caption_key)
            sample = None
        sample = sample or _Sample(key)
        try:
            sample.add(tar, member, caption_key)
        except DataError as error:
            yield Reject(tar, key, str(error))
            sample, spoiled = None, key
    if sample is not None:
        yield sample.finish(tar, caption_key)
