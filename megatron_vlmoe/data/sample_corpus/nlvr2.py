"""NLVR2's layout: sets of four pairs of pictures, and statements that hold for two of the four."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from itertools import starmap
from pathlib import Path
from typing import Any

from megatron_vlmoe.data.sample_corpus.scene import (
    COLORS,
    KINDS,
    Scene,
    ShapeName,
    draw_scene,
    generator_for,
)
from megatron_vlmoe.data.sample_corpus.task_files import (
    FreshScenes,
    Picture,
    TaskFiles,
    class_truth,
    json_text,
)
from megatron_vlmoe.data.sample_corpus.visual_reasoning import WEIGHTS, Statement, statements

PAIRS_PER_SET = 4
STATEMENTS_PER_SET = 4
MIN_FITTING_FORMS = 6
"""A set has statements of the rarest forms that fit it; others fit it too."""
TRAIN_DIRECTORIES = 10
"""Training pictures are spread over numbered folders; the real data set has a hundred."""
PALETTES = ((2, 3), (3, 2))
"""Colours and kinds of a set: few, so that a statement can be true of one pair and false of another."""

Pair = tuple[Scene, Scene]


def make_nlvr2(fresh: FreshScenes, seed: int, num_images: int) -> TaskFiles:
    """About ``num_images`` training pictures and twice as many training sentences.

    A sentence comes with four pairs and is true of two of them, so it alone says nothing about
    the label. (The authors of the real sentences were asked to do the same.)
    """
    evaluation = max(2, num_images // 80)
    numbers = {"train": max(4, num_images // 8), "dev": evaluation, "test1": evaluation}
    pictures: list[Picture] = []
    texts: dict[Path, str] = {}
    truth = {}
    for split, number in numbers.items():
        used: Counter[str] = Counter()
        records = []
        for set_number in range(number):
            rng = generator_for(seed, f"nlvr2-{split}", set_number)
            pairs, stated = _draw_set(fresh, split, used, rng)
            for pair_number, pair in enumerate(pairs):
                stem = f"{split}-{set_number}-{pair_number}"
                pictures += _pictures(split, set_number, stem, pair)
                for number_in_set, (text, statement) in enumerate(stated):
                    record: dict[str, Any] = {
                        "sentence": text,
                        "label": str(statement.holds(*pair)),
                        "identifier": f"{stem}-{number_in_set}",
                    }
                    if split == "train":
                        record["directory"] = _directory(set_number)
                    records.append(record)
        generator_for(seed, f"nlvr2-{split}-order", 0).shuffle(records)
        texts[Path("nlvr2", "data", f"{split}.json")] = "".join(map(json_text, records))
        if split != "train":
            truth[split] = class_truth(record["label"] for record in records)
    return TaskFiles(pictures=tuple(pictures), texts=texts, truth=truth)


def _directory(set_number: int) -> int:
    return set_number % TRAIN_DIRECTORIES


def _pictures(split: str, set_number: int, stem: str, pair: Pair) -> list[Picture]:
    folder = Path("nlvr2", "images", split)
    if split == "train":
        folder /= str(_directory(set_number))
    return [
        Picture(split=split, file=folder / f"{stem}-img{place}.png", scene=scene)
        for place, scene in enumerate(pair)
    ]


def _draw_set(
    fresh: FreshScenes, split: str, used: Counter[str], rng: random.Random
) -> tuple[list[Pair], list[tuple[str, Statement]]]:
    """Pairs and worded statements of a set; counts the forms that it uses."""
    num_colors, num_kinds = rng.choice(PALETTES)
    colors, kinds = rng.sample(COLORS, num_colors), rng.sample(KINDS, num_kinds)
    names = [(color, kind) for color in colors for kind in kinds]
    while True:
        pairs = [_draw_pair(fresh, split, names) for _ in range(PAIRS_PER_SET)]
        fitting: dict[str, list[Statement]] = {}
        for statement in statements(names):
            labels = [statement.holds(*pair) for pair in pairs]
            if sum(labels) == PAIRS_PER_SET // 2 and all(starmap(statement.needs_both, pairs)):
                fitting.setdefault(statement.form, []).append(statement)
        if len(fitting) >= MIN_FITTING_FORMS:
            break
    rarest = sorted(fitting, key=lambda form: used[form] / WEIGHTS[form])[:STATEMENTS_PER_SET]
    used.update(rarest)
    chosen = [rng.choice(fitting[form]) for form in rarest]
    rng.shuffle(chosen)
    return pairs, [(rng.choice(statement.wordings), statement) for statement in chosen]


def _draw_pair(fresh: FreshScenes, split: str, names: Sequence[ShapeName]) -> Pair:
    def draw(rng: random.Random) -> Scene:
        return draw_scene(rng, names)

    stream = f"nlvr2-{split}"
    return fresh.take(stream, draw), fresh.take(stream, draw)
