"""Pictures in ImageNet's folders; those of the task are equally many of every class."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from megatron_vlmoe.sample_corpus.scene import (
    COLORS,
    KINDS,
    SHAPE_NAMES,
    ShapeName,
    draw_object_scene,
    generator_for,
)
from megatron_vlmoe.sample_corpus.task_files import FreshScenes, Picture, TaskFiles, class_truth


def synset_of(name: ShapeName) -> str:
    """Folder name of a class, formed like a WordNet id: n00CCCKKK."""
    color, kind = name
    return f"n{(COLORS.index(color) + 1) * 1000 + KINDS.index(kind) + 1:08d}"


CLASS_NAMES = "".join(f"{synset_of(name)}\t{' '.join(name)}\n" for name in SHAPE_NAMES)
"""Content of words.txt, which says what the classes are called."""


def make_imagenet(fresh: FreshScenes, seed: int, num_images: int) -> TaskFiles:
    """Half as many pictures as ``num_images`` to train, and a fifth of that to validate."""
    numbers = {
        "train": max(2, num_images // (2 * len(SHAPE_NAMES))),
        "val": max(1, num_images // (10 * len(SHAPE_NAMES))),
    }
    pictures: list[Picture] = []
    for split, number in numbers.items():
        mains = [name for name in SHAPE_NAMES for _ in range(number)]
        # So that the numbers of validation pictures tell no classes.
        generator_for(seed, f"imagenet-{split}-order", 0).shuffle(mains)
        for index, main in enumerate(mains):
            synset = synset_of(main)
            stem = f"{synset}_{index}" if split == "train" else f"ILSVRC2012_val_{index + 1:08d}"
            pictures.append(
                Picture(
                    split=split,
                    file=Path("imagenet", split, synset, f"{stem}.JPEG"),
                    scene=fresh.take(f"imagenet-{split}", partial(draw_object_scene, main=main)),
                )
            )
    return TaskFiles(
        pictures=tuple(pictures),
        texts={Path("imagenet", "words.txt"): CLASS_NAMES},
        truth={"val": class_truth(p.file.parent.name for p in pictures if p.split == "val")},
    )
