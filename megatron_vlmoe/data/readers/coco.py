"""COCO captions: ``captions_train2014.json`` and its like.

The file holds ``images`` ({id, file_name}) and ``annotations`` ({image_id, caption}); it is read
whole. Images lie in the given folder or in the folder of the split below it (``train2014/``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from megatron_vlmoe.data.readers.pairs import PairInput, json_list, json_object
from megatron_vlmoe.data.readers.records import CaptionedImage, Reject


def read_coco(source: PairInput) -> Iterator[CaptionedImage | Reject]:
    """Yields each image of ``images`` with all its captions. Raises DataError."""
    folder = source.image_folder()
    for path in source.annotations:
        content = json_object(path)
        images = json_list(path, content.get("images"), '"images"')
        captions: dict[str, list[object]] = {}
        known = {str(image.get("id")) for image in images if isinstance(image, dict)}
        for number, note in enumerate(json_list(path, content.get("annotations"), '"annotations"')):
            record = f"annotation {number}"
            if not isinstance(note, dict) or "image_id" not in note or "caption" not in note:
                yield Reject(path, record, "no image_id or no caption")
            elif str(note["image_id"]) not in known:
                yield Reject(path, record, f"no image with id {note['image_id']}")
            else:
                captions.setdefault(str(note["image_id"]), []).append(note["caption"])
        for number, image in enumerate(images):
            if not isinstance(image, dict) or not isinstance(image.get("file_name"), str):
                yield Reject(path, f"image {number}", "no file_name")
                continue
            name = image["file_name"]
            record = f"image {image.get('id')} ({name})"
            file = source.image(path, record, os.path.join(_split(folder, path, name), name))
            yield CaptionedImage(path, record, file, tuple(captions.get(str(image.get("id")), ())))


def _split(folder: str, annotations: str, name: str) -> str:
    """Subfolder of an image: from its own name (2014) or the annotations' (2017), if it exists."""
    for text in (name, os.path.basename(annotations)):
        match = re.search(r"(?:train|val|test)\d{4}", text)
        if match and "/" not in name and os.path.isdir(os.path.join(folder, match.group())):
            return match.group()
    return ""
