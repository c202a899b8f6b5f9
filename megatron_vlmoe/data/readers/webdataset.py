"""WebDataset tars of image-caption pairs.

Consecutive members that agree up to the first dot of their file name are one sample: an image, and
the caption in ``.txt``, else under a usual key of ``.json`` (a string or a list of strings).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from megatron_vlmoe.data.errors import DataError
from megatron_vlmoe.data.readers.images import TarMember, tar_members
from megatron_vlmoe.data.readers.pairs import CAPTION_KEYS, PairInput, as_captions, find_key
from megatron_vlmoe.data.readers.records import (
    CaptionedImage,
    ImageFile,
    Reject,
    check_inputs,
    is_image,
    is_tar,
    walk_files,
)


def read_webdataset(source: PairInput) -> Iterator[CaptionedImage | Reject]:
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
        yield from _tar_samples(tar, source.caption_key)


@dataclass
class _Sample:
    """The members of one sample as they come."""

    key: str
    images: list[ImageFile] = field(default_factory=list)
    text: tuple[object, ...] = ()
    described: tuple[object, ...] = ()

    def add(self, tar: str, member: TarMember, caption_key: str | None) -> None:
        """Takes one member. Raises DataError if it is an unreadable caption."""
        suffix = os.path.splitext(member.name)[1].lower()
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

    def finish(self, tar: str) -> CaptionedImage | Reject:
        """The complete sample."""
        if len(self.images) != 1:
            return Reject(tar, self.key, f"{len(self.images)} images in the sample, not 1")
        return CaptionedImage(tar, self.key, self.images[0], self.text or self.described)


def _decode(member: TarMember, tar: str) -> str:
    try:
        return member.contents(tar).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{member.name}: invalid UTF-8 at byte {error.start}") from error


def _tar_samples(tar: str, caption_key: str | None) -> Iterator[CaptionedImage | Reject]:
    sample: _Sample | None = None
    spoiled = ""
    for member in tar_members(tar):
        if isinstance(member, Reject):
            # The sample under way may lack its rest.
            yield member
            return
        folder, base = os.path.split(member.name)
        key = os.path.join(folder, base.split(".")[0])
        if not os.path.splitext(base)[1] or base.startswith(".") or key == spoiled:
            continue
        if sample is not None and sample.key != key:
            yield sample.finish(tar)
            sample = None
        sample = sample or _Sample(key)
        try:
            sample.add(tar, member, caption_key)
        except DataError as error:
            yield Reject(tar, key, str(error))
            sample, spoiled = None, key
    if sample is not None:
        yield sample.finish(tar)
