"""Visual Genome: ``region_descriptions.json``.

A list of {id, regions: [{image_id, phrase, x, y, width, height}]}, read whole. Every phrase is a
caption of the whole image, as VLMo takes it. Images are found by the stem of their name, which is
the image id, in ``VG_100K`` and ``VG_100K_2`` below the image folder (or anywhere below it).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

from megatron_vlmoe.prepare.readers.images import as_image
from megatron_vlmoe.prepare.readers.pairs import PairInput, json_list, load_json
from megatron_vlmoe.prepare.readers.records import (
    CaptionedImage,
    ImageFile,
    PairItem,
    Reject,
    walk_files,
)


def read_visual_genome(source: PairInput) -> Iterator[PairItem]:
    """Yields each image with the phrases of its regions. Raises DataError."""
    files = _images_by_stem(source.image_folder())
    for path in source.annotations:
        entries = json_list(path, load_json(path))
        times = Counter(str(_image_id(entry)) for entry in entries)
        for number, entry in enumerate(entries):
            regions = entry.get("regions") if isinstance(entry, dict) else None
            if not isinstance(regions, list):
                yield Reject(path, f"entry {number}", 'no list "regions"')
                continue
            image_id = str(_image_id(entry))
            record = f"image {image_id}"
            found = files.get(image_id, [])
            reason = ""
            if times[image_id] > 1:
                reason = f"this image id comes {times[image_id]} times (here in entry {number})"
            elif len(found) != 1:
                reason = (
                    f"several image files: {' and '.join(found)}" if found else "no such image file"
                )
                reason += f" (stem {image_id} below {source.images})"
            if reason:
                yield Reject(path, record, reason, unit="image", captions=len(regions))
                continue
            phrases, names = list[object](), list[str]()
            for place, region in enumerate(regions):
                name = f"{record}, region {region.get('region_id', place) if isinstance(region, dict) else place}"
                other = region.get("image_id") if isinstance(region, dict) else None
                if other is not None and str(other) != image_id:
                    yield Reject(
                        path, name, f"a region of image {other}", unit="caption", records=0
                    )
                    continue
                phrases.append(region.get("phrase") if isinstance(region, dict) else None)
                names.append(name)
            image = ImageFile(path, record, found[0])
            yield CaptionedImage(path, record, image, tuple(phrases), tuple(names))


def _images_by_stem(folder: str) -> dict[str, list[str]]:
    """Paths of all images under a folder by their name without suffix; holds every path in memory."""
    found: dict[str, list[str]] = {}
    for path in walk_files(folder):
        if isinstance(as_image(ImageFile(folder, path, path), path), ImageFile):
            found.setdefault(os.path.splitext(os.path.basename(path))[0], []).append(path)
    return found


def _image_id(entry: Any) -> object:
    """The id of an entry, or of the first region of one that gives none itself."""
    if not isinstance(entry, dict):
        return None
    regions = entry.get("regions")
    first = regions[0] if isinstance(regions, list) and regions else None
    return entry.get("id", first.get("image_id") if isinstance(first, dict) else None)
