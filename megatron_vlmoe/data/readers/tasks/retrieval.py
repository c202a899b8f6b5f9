"""Image-text retrieval on Karpathy's splits: ``dataset_coco.json`` or ``dataset_flickr30k.json``.

COCO's images lie in ``train2014`` and ``val2014``, Flickr30K's in ``flickr30k-images``.
"""

from __future__ import annotations

import os

from megatron_vlmoe.data.errors import DataError
from megatron_vlmoe.data.readers.karpathy import read_karpathy
from megatron_vlmoe.data.readers.pairs import PairInput
from megatron_vlmoe.data.readers.records import Reject, check_inputs
from megatron_vlmoe.data.readers.tasks.records import (
    SampleStream,
    TaskInput,
    TaskSample,
    check_split,
)

_ANNOTATIONS = ("dataset_coco.json", "dataset_flickr30k.json")
_IMAGE_FOLDERS = ("flickr30k-images", "flickr30k_images", "images")
# COCO's restval images are of val2014 but belong to neither val nor test.
_PARTS = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}


class RetrievalSource:
    """A captioned corpus in a folder. Raises DataError unless it has one annotation file."""

    labels = None
    fallback_answer = None

    def __init__(self, source: TaskInput) -> None:
        self._annotations = source.annotations or _find_annotations(source.raw)
        check_inputs((self._annotations,))
        folders = [os.path.join(source.raw, name) for name in _IMAGE_FOLDERS]
        self._images = next((path for path in folders if os.path.isdir(path)), source.raw)

    def splits(self) -> tuple[str, ...]:
        """All three."""
        return tuple(_PARTS)

    def read(self, split: str) -> SampleStream:
        """The images of a split, each with all its captions. Raises DataError."""
        check_split("retrieval", split, tuple(_PARTS))
        pairs = PairInput("karpathy", (self._annotations,), self._images, _PARTS[split])
        return _samples(pairs)


def _find_annotations(raw: str) -> str:
    found = [path for name in _ANNOTATIONS if os.path.isfile(path := os.path.join(raw, name))]
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(f"{' and '.join(found)}: choose one with --annotations")
    raise DataError(f"{raw}: no {' or '.join(_ANNOTATIONS)} in it (or give --annotations)")


def _samples(pairs: PairInput) -> SampleStream:
    for item in read_karpathy(pairs):
        if isinstance(item, Reject):
            yield item
            continue
        name = os.path.basename(item.image.path)
        yield TaskSample(item.source, item.record, name, (item.image,), item.captions)
