"""Flickr30K's pictures and captions, as a Karpathy split."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path
from typing import Any

from megatron_vlmoe.sample_corpus.captions import CAPTIONS_PER_IMAGE, write_captions
from megatron_vlmoe.sample_corpus.scene import Scene, ShapeName
from megatron_vlmoe.sample_corpus.task_files import (
    FreshScenes,
    Picture,
    TaskFiles,
    json_text,
    percent,
)

MAX_EVALUATION = 1000
"""Pictures of val and of test, as in the real split: more could not be kept distinct."""


class _Distinct:
    """Accepts scenes of which none names all that another one names.

    A caption names every group of its picture, so it can then be true of no other picture. A scene
    of one group says too little for that.
    """

    def __init__(self) -> None:
        self._chosen: set[frozenset[ShapeName]] = set()
        self._parts: set[frozenset[ShapeName]] = set()

    def accepts(self, scene: Scene) -> bool:
        """Whether the scene fits those accepted so far; remembers it if so."""
        names = frozenset((group.color, group.kind) for group in scene.groups)
        parts = {
            frozenset(part)
            for size in range(2, len(names) + 1)
            for part in combinations(sorted(names), size)
        }
        if len(names) < 2 or names in self._parts or parts & self._chosen:
            return False
        self._chosen.add(names)
        self._parts |= parts
        return True


def make_flickr30k(fresh: FreshScenes, seed: int, num_images: int) -> TaskFiles:
    """Half as many pictures as ``num_images`` to train, a tenth of that for each of val and test."""
    evaluation = min(MAX_EVALUATION, max(10, num_images // 20))
    numbers = {"train": max(20, num_images // 2), "val": evaluation, "test": evaluation}
    pictures: list[Picture] = []
    entries = []
    truth = {}
    for split, number in numbers.items():
        distinct = _Distinct()
        for _ in range(number):
            stream = f"flickr30k-{split}"
            if split == "train":
                scene = fresh.take(stream)
            else:
                scene = fresh.take(stream, accept=distinct.accepts)
            index = len(pictures)
            file = Path("flickr30k", "flickr30k-images", f"{1_000_000_000 + 7919 * index}.jpg")
            pictures.append(Picture(split=split, file=file, scene=scene))
            captions = write_captions(scene, seed, index, "flickr30k-captions")
            entries.append(_entry(index, file.name, split, captions))
        if split != "train":
            truth[split] = {
                "samples": number * CAPTIONS_PER_IMAGE,
                "images": number,
                # Of either direction: one in ``number`` is right.
                "guess_percent": percent(1 / number),
            }
    content = {"images": entries, "dataset": "flickr30k"}
    texts = {Path("flickr30k", "dataset_flickr30k.json"): json_text(content)}
    return TaskFiles(pictures=tuple(pictures), texts=texts, truth=truth)


def _entry(index: int, filename: str, split: str, captions: list[str]) -> dict[str, Any]:
    first = CAPTIONS_PER_IMAGE * index
    sentences = [
        {
            "tokens": re.findall(r"\w+", caption.lower()),
            "raw": caption,
            "imgid": index,
            "sentid": first + place,
        }
        for place, caption in enumerate(captions)
    ]
    return {
        "sentids": [sentence["sentid"] for sentence in sentences],
        "imgid": index,
        "sentences": sentences,
        "split": split,
        "filename": filename,
    }
