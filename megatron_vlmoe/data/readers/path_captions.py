"""SBU and Conceptual Captions 3M as VLMo lays them out: a JSON list of [path, caption].

``annot.json`` goes with ``images_train/*/*`` (SBU), ``{train,val}_annot.json`` with
``images_{train,val}/*/*`` (CC3M). A path is looked up below the image folder as it stands, then by
its last part alone. The annotation file is read whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cached_property

from megatron_vlmoe.data.readers.pairs import PairInput, images_by_name, json_list, load_json
from megatron_vlmoe.data.readers.records import CaptionedImage, ImageFile, Reject


class _ImageFinder:
    """Finds image files below a folder; lists it only once a path is not there as it stands."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    @cached_property
    def _by_name(self) -> dict[str, list[str]]:
        return images_by_name(self._folder, str)

    def find(self, path: str) -> list[str]:
        """Files that ``path`` may mean."""
        direct = os.path.join(self._folder, path)
        if os.path.isfile(direct):
            return [direct]
        return self._by_name.get(os.path.basename(path), [])


def read_path_captions(source: PairInput) -> Iterator[CaptionedImage | Reject]:
    """Yields each [path, caption] as an image with one caption. Raises DataError."""
    finder = _ImageFinder(source.image_folder())
    for file in source.annotations:
        for number, entry in enumerate(json_list(file, load_json(file), "the file")):
            if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)):
                yield Reject(file, f"entry {number}", "not [path, caption]")
                continue
            path, caption = entry
            record = f"entry {number} ({path})"
            found = finder.find(path)
            if len(found) != 1:
                reason = f"several image files: {' and '.join(found)}" if found else ""
                yield Reject(file, record, reason or f"no such image file: {path}")
                continue
            yield CaptionedImage(file, record, ImageFile(file, record, found[0]), (caption,))
