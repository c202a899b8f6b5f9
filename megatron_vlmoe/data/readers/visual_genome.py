"""Visual Genome: ``region_descriptions.json``.

A list of {id, regions: [{image_id, phrase, x, y, width, height}]}, read whole. Every phrase is a
caption of the whole image, as VLMo takes it. Images are found by the stem of their name, which is
the image id, in ``VG_100K`` and ``VG_100K_2`` below the image folder (or anywhere below it).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from megatron_vlmoe.data.readers.pairs import PairInput, images_by_name, json_list, load_json
from megatron_vlmoe.data.readers.records import CaptionedImage, ImageFile, Reject


def read_visual_genome(source: PairInput) -> Iterator[CaptionedImage | Reject]:
    """Yields each image with the phrases of its regions. Raises DataError."""
    files = images_by_name(source.image_folder(), lambda name: os.path.splitext(name)[0])
    for path in source.annotations:
        for number, entry in enumerate(json_list(path, load_json(path), "the file")):
            regions = entry.get("regions") if isinstance(entry, dict) else None
            if not isinstance(regions, list):
                yield Reject(path, f"entry {number}", 'no list "regions"')
                continue
            image_id = _image_id(entry, regions)
            record = f"image {image_id}"
            found = files.get(str(image_id), [])
            if len(found) != 1:
                names = " and ".join(found)
                reason = f"several image files: {names}" if found else "no such image file"
                yield Reject(path, record, f"{reason} (stem {image_id} below {source.images})")
                continue
            phrases = tuple(r.get("phrase") if isinstance(r, dict) else None for r in regions)
            yield CaptionedImage(path, record, ImageFile(path, record, found[0]), phrases)


def _image_id(entry: dict[str, Any], regions: list[Any]) -> object:
    if regions and isinstance(regions[0], dict) and "image_id" in regions[0]:
        return regions[0]["image_id"]
    return entry.get("id")
