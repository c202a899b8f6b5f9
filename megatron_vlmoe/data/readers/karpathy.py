"""Karpathy's splits: ``dataset_coco.json``, ``dataset_flickr30k.json``.

``images`` holds {filename, split, sentences: [{raw}]}, for COCO also ``filepath`` ("train2014"),
the folder below the image folder. The file is read whole. All sentences of an image are kept.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from megatron_vlmoe.data.errors import DataError
from megatron_vlmoe.data.readers.pairs import PairInput, json_list, json_object
from megatron_vlmoe.data.readers.records import CaptionedImage, Reject


def read_karpathy(source: PairInput) -> Iterator[CaptionedImage | Reject]:
    """Yields the images of the wanted splits with their sentences.

    Raises:
        DataError: another layout, or a wanted split that no image of any file has. (``restval``
            may be absent while it is wanted together with ``train``: Flickr30K has none.)
    """
    source.image_folder()
    seen: set[str] = set()
    for path in source.annotations:
        images = json_list(path, json_object(path).get("images"), '"images"')
        for number, image in enumerate(images):
            if not isinstance(image, dict) or not isinstance(image.get("filename"), str):
                yield Reject(path, f"image {number}", "no filename")
                continue
            seen.add(str(image.get("split")))
            if image.get("split") not in source.splits:
                continue
            name = os.path.join(str(image.get("filepath") or ""), image["filename"])
            record = f"image {number} ({name})"
            sentences = image.get("sentences")
            captions = tuple(
                sentence.get("raw") if isinstance(sentence, dict) else None
                for sentence in (sentences if isinstance(sentences, list) else ())
            )
            yield CaptionedImage(path, record, source.image(path, record, name), captions)
    absent = [split for split in source.splits if split not in seen]
    if absent and not (absent == ["restval"] and "train" in source.splits):
        raise DataError(
            f"{source.annotations[0]}: no image of split {', '.join(absent)}; "
            f"it has {', '.join(sorted(seen))}"
        )
