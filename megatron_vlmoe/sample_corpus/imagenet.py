"""ImageNet's folders with equally many pictures of every class."""

from __future__ import annotations

import random
from pathlib import Path

from megatron_vlmoe.sample_corpus.scene import (
    COLORS,
    KINDS,
    SHAPE_NAMES,
    Scene,
    draw_object_scene,
    generator_for,
)
from megatron_vlmoe.sample_corpus.task_files import FreshScenes, Picture, TaskFiles, class_truth


def synset_of(color: str, kind: str) -> str:
    """Folder name of a class, formed like a WordNet id: n00CCCKKK."""
    return f"n{(COLORS.index(color) + 1) * 1000 + KINDS.index(kind) + 1:08d}"


def class_names() -> str:
    """The file that says what the classes are called."""
    return "".join(f"{synset_of(*name)}\t{' '.join(name)}\n" for name in SHAPE_NAMES)


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

            def draw(rng: random.Random, main: tuple[str, str] = main) -> Scene:
                return draw_object_scene(rng, main)

            synset = synset_of(*main)
            stem = f"{synset}_{index}" if split == "train" else f"ILSVRC2012_val_{index + 1:08d}"
            pictures.append(
                Picture(
                    split=split,
                    file=Path("imagenet", split, synset, f"{stem}.JPEG"),
                    scene=fresh.take(f"imagenet-{split}", draw),
                )
            )
    truth = {"val": class_truth(p.file.parent.name for p in pictures if p.split == "val")}
    texts = {Path("imagenet", "words.txt"): class_names()}
    return TaskFiles(pictures=tuple(pictures), texts=texts, truth=truth)
