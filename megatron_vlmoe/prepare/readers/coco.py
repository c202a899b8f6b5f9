"""COCO captions: ``captions_train2014.json`` and its like.

The file holds ``images`` ({id, file_name}) and ``annotations`` ({image_id, caption}); it is read
whole. Images lie in the given folder or in the folder of the split below it (``train2014/``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from megatron_vlmoe.prepare.readers.pairs import (
    CaptionRow,
    PairInput,
    PairItems,
    json_list,
    json_object,
)
from megatron_vlmoe.prepare.readers.records import PairItem, Reject


@dataclass
class _Entries:
    """What a file says about one image id."""

    images: list[int] = field(default_factory=list)
    """Places in ``images``; more than one is an error, since the captions belong to either."""
    notes: list[int] = field(default_factory=list)
    """Places of its captions in ``annotations``."""
    captions: list[object] = field(default_factory=list)


def read_coco(source: PairInput) -> Iterator[PairItem]:
    """Yields each image of ``images`` with all its captions. Raises DataError."""
    folder, items = source.image_folder(), PairItems(source)
    for path in source.annotations:
        content = json_object(path)
        images = json_list(path, content.get("images"), '"images"')
        found: dict[str, _Entries] = {}
        for number, image in enumerate(images):
            own = _id(image, "id")
            if own is not None:
                found.setdefault(own, _Entries()).images.append(number)
        notes = json_list(path, content.get("annotations"), '"annotations"')
        for number, note in enumerate(notes):
            of = _id(note, "image_id")
            if of is None or "caption" not in note or of not in found:
                incomplete = of is None or "caption" not in note
                reason = "no image_id or no caption" if incomplete else f"no image with id {of}"
                yield Reject(path, f"annotation {number}", reason, unit="caption", records=0)
                continue
            found[of].notes.append(number)
            found[of].captions.append(note["caption"])
        for number, image in enumerate(images):
            entries = found.get(_id(image, "id") or "", _Entries())
            if (problem := _problem(images, image, entries)) is not None:
                # The captions of an id that comes twice are counted once.
                lost = len(entries.captions) if number in entries.images[:1] else 0
                yield Reject(path, f"image {number}", problem, unit="image", captions=lost)
                continue
            name = image["file_name"]
            listed = os.path.join(_split(folder, path, name), name)
            row = CaptionRow(path, f"image {image['id']} ({name})", listed, tuple(entries.captions))
            yield items.item([row], tuple(f"annotation {note}" for note in entries.notes))


def _id(entry: Any, key: str) -> str | None:
    """An id as text; None if there is none."""
    value = entry.get(key) if isinstance(entry, dict) else None
    return str(value) if isinstance(value, int | str) and not isinstance(value, bool) else None


def _problem(images: list[Any], image: Any, entries: _Entries) -> str | None:
    """What is wrong with an entry of ``images``."""
    if not isinstance(image, dict) or not isinstance(image.get("file_name"), str):
        return "no file_name"
    if not entries.images:
        return f"{image['file_name']} has no id"
    if len(entries.images) > 1:
        named = [f"image {n} ({images[n].get('file_name')})" for n in entries.images[:3]]
        more = ", ..." if len(entries.images) > 3 else ""
        return (
            f"id {image['id']} comes {len(entries.images)} times, so its captions may be of any: "
            f"{', '.join(named)}{more}"
        )
    return None


def _split(folder: str, annotations: str, name: str) -> str:
    """Subfolder of an image: from its own name (2014) or the annotations' (2017), if it exists."""
    for text in (name, os.path.basename(annotations)):
        match = re.search(r"(?:train|val|test)\d{4}", text)
        if match and "/" not in name and os.path.isdir(os.path.join(folder, match.group())):
            return match.group()
    return ""
