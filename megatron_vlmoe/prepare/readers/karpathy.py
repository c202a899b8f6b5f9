"""Karpathy's splits: ``dataset_coco.json``, ``dataset_flickr30k.json``.

``images`` holds {filename, split, sentences: [{raw}]}, for COCO also ``filepath`` ("train2014"),
the folder below the image folder. The file is read whole. All sentences of an image are kept.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from megatron_vlmoe.prepare.readers.pairs import (
    CaptionRow,
    PairInput,
    PairItems,
    SplitChoice,
    json_list,
    json_object,
)
from megatron_vlmoe.prepare.readers.records import PairItem, Reject


def read_karpathy(source: PairInput) -> Iterator[PairItem]:
    """Yields the images of the wanted splits with their sentences.

    Raises:
        DataError: another layout, or a wanted split that no image of any file has.
    """
    items, splits = PairItems(source), SplitChoice(source)
    source.image_folder()
    for path in source.annotations:
        images = json_list(path, json_object(path).get("images"), '"images"')
        first: dict[str, int] = {}
        for number, image in enumerate(images):
            if not isinstance(image, dict) or not isinstance(image.get("filename"), str):
                yield Reject(path, f"image {number}", "no filename")
                continue
            name = os.path.join(str(image.get("filepath") or ""), image["filename"])
            record = f"image {number} ({name})"
            earlier = first.setdefault(name, number)
            refusal = splits.refusal(path, record, image.get("split"))
            if refusal is not None:
                yield refusal
                continue
            sentences = image.get("sentences")
            sentences = sentences if isinstance(sentences, list) else []
            if earlier != number:
                split = images[earlier].get("split")
                reason = f"the same file as image {earlier} (split {split})"
                yield Reject(path, record, reason, unit="image", captions=len(sentences))
                continue
            captions, names = list[object](), list[str]()
            for place, sentence in enumerate(sentences):
                name_of_caption = f"{record}, caption {place}"
                if _belongs(sentence, image):
                    captions.append(sentence.get("raw") if isinstance(sentence, dict) else None)
                    names.append(name_of_caption)
                else:
                    reason = (
                        f"of image {sentence['imgid']}, in the entry of {image['imgid']} (imgid)"
                    )
                    yield Reject(path, name_of_caption, reason, unit="caption", records=0)
            yield items.item([CaptionRow(path, record, name, tuple(captions))], tuple(names))
    splits.finish(source.annotations[0])


def _belongs(sentence: Any, image: dict[str, Any]) -> bool:
    """Whether a sentence is of the image in whose entry it stands, as far as both say so."""
    if not isinstance(sentence, dict) or "imgid" not in sentence or "imgid" not in image:
        return True
    return bool(sentence["imgid"] == image["imgid"])
