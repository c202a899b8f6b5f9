"""Pictures with captions in COCO's layout, and the same captions as a Karpathy split."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_vlmoe.sample_corpus.captions import CAPTIONS_PER_IMAGE, write_captions
from megatron_vlmoe.sample_corpus.scene import VALIDATION_PERIOD, Scene, split_of


def coco_id(index: int) -> int:
    """COCO's image id; with gaps, as the real ones, so that nobody takes it for a position."""
    return 100 + 3 * index


def coco_file(index: int) -> Path:
    """Path of a picture below the corpus."""
    folder = f"{split_of(index)}2014"
    return Path("coco", folder, f"COCO_{folder}_{coco_id(index):012d}.jpg")


def _karpathy_split(index: int) -> str:
    """Of val2014, Karpathy's split gives a part to each of val, test and further training."""
    if split_of(index) == "train":
        return "train"
    return ("val", "test", "val", "test", "restval")[index // VALIDATION_PERIOD % 5]


def write_caption_files(
    directory: Path, pictures: Sequence[tuple[int, Path, Scene]], seed: int
) -> None:
    """Writes annotations/captions_{train,val}2014.json and dataset_coco.json under ``directory``.

    ``pictures`` are (index, path, scene).
    """
    images: dict[str, list[dict[str, Any]]] = {"train": [], "val": []}
    annotations: dict[str, list[dict[str, Any]]] = {"train": [], "val": []}
    karpathy = []
    for index, file, scene in pictures:
        captions = write_captions(scene, seed, index)
        sentence_ids = [CAPTIONS_PER_IMAGE * index + k + 1 for k in range(len(captions))]
        images[split_of(index)].append(
            {
                "id": coco_id(index),
                "file_name": file.name,
                "height": scene.height,
                "width": scene.width,
            }
        )
        annotations[split_of(index)] += [
            {"id": i, "image_id": coco_id(index), "caption": caption}
            for i, caption in zip(sentence_ids, captions, strict=True)
        ]
        karpathy.append(_karpathy_entry(index, file, sentence_ids, captions))
    for split, found in annotations.items():
        # As in the original, the captions of a picture do not stand together.
        found.sort(key=lambda a: ((a["id"] - 1) % CAPTIONS_PER_IMAGE, a["id"]))
        content = {
            "info": {"description": "sample corpus", "year": 2014, "version": "1.0"},
            "licenses": [],
            "images": images[split],
            "annotations": found,
        }
        _write_json(directory / "annotations" / f"captions_{split}2014.json", content)
    _write_json(directory / "dataset_coco.json", {"images": karpathy, "dataset": "coco"})


def _karpathy_entry(
    index: int, file: Path, sentence_ids: list[int], captions: list[str]
) -> dict[str, Any]:
    return {
        "filepath": file.parent.name,
        "sentids": sentence_ids,
        "filename": file.name,
        "imgid": index,
        "split": _karpathy_split(index),
        "sentences": [
            {
                "tokens": re.findall(r"\w+", caption.lower()),
                "raw": caption,
                "imgid": index,
                "sentid": sentence_id,
            }
            for sentence_id, caption in zip(sentence_ids, captions, strict=True)
        ],
        "cocoid": coco_id(index),
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
