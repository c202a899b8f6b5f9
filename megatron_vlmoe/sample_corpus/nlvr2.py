"""NLVR2's layout: sets of four pairs of pictures, and statements that hold for two of the four."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import starmap
from pathlib import Path
from typing import Any

from megatron_vlmoe.sample_corpus.scene import (
    BACKGROUNDS,
    COLORS,
    KINDS,
    Scene,
    ShapeName,
    draw_scene,
    generator_for,
)
from megatron_vlmoe.sample_corpus.task_files import (
    FreshScenes,
    Picture,
    TaskFiles,
    class_truth,
    guess_by,
    json_text,
)
from megatron_vlmoe.sample_corpus.visual_reasoning import WEIGHTS, Statement, statements

PAIRS_PER_SET = 4
STATEMENTS_PER_SET = 2
TRAIN_DIRECTORIES = 10
"""Training pictures are spread over numbered folders; the real data set has a hundred."""
PALETTES = ((2, 3), (3, 2))
"""Colours and kinds of a set: few, so that a statement can be true of one pair and false of another."""
NUMBERS_OF_BACKGROUNDS = (2, 3)
"""In a set, few for the same reason."""
SINGLE_SHAPE_SHARE = 0.5
"""Of the pictures that must show one shape only; few of the others do."""

Pair = tuple[Scene, Scene]


@dataclass(frozen=True)
class _Sample:
    """A record of the file and the pictures that it is about."""

    record: dict[str, Any]
    pair: Pair

    @property
    def label(self) -> str:
        return str(self.record["label"])


@dataclass(frozen=True)
class _Palette:
    """What the pictures of a set are made of."""

    names: Sequence[ShapeName]
    backgrounds: Sequence[str]


def make_nlvr2(fresh: FreshScenes, seed: int, num_images: int) -> TaskFiles:
    """About twice ``num_images`` training pictures and as many training sentences.

    A sentence comes with four pairs and is true of two of them, so it alone says nothing about
    the label. (The authors of the real sentences were asked to do the same.)
    """
    evaluation = max(2, num_images // 40)
    numbers = {"train": max(4, num_images // 4), "dev": evaluation, "test1": evaluation}
    pictures: list[Picture] = []
    texts: dict[Path, str] = {}
    samples: dict[str, list[_Sample]] = {}
    for split, number in numbers.items():
        used: Counter[str] = Counter()
        samples[split] = []
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
                    samples[split].append(_Sample(record, pair))
        generator_for(seed, f"nlvr2-{split}-order", 0).shuffle(samples[split])
        lines = (json_text(sample.record) for sample in samples[split])
        texts[Path("nlvr2", "data", f"{split}.json")] = "".join(lines)
    train = samples.pop("train")
    truth = {split: _truth(train, held_out) for split, held_out in samples.items()}
    return TaskFiles(pictures=tuple(pictures), texts=texts, truth=truth)


def _truth(train: Sequence[_Sample], held_out: Sequence[_Sample]) -> dict[str, Any]:
    """Three guesses more: by the two backgrounds alone, and by the sentence with one picture's."""

    def score(cue: Callable[[_Sample], Hashable]) -> float:
        return guess_by(
            ((cue(sample), sample.label) for sample in train),
            ((cue(sample), sample.label) for sample in held_out),
        )

    return {
        **class_truth(sample.label for sample in held_out),
        "guess_by_backgrounds_percent": score(lambda s: tuple(p.background for p in s.pair)),
        "guess_by_sentence_and_left_background_percent": score(
            lambda s: (s.record["sentence"], s.pair[0].background)
        ),
        "guess_by_sentence_and_right_background_percent": score(
            lambda s: (s.record["sentence"], s.pair[1].background)
        ),
    }


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
    """Pairs and worded statements of a set, of the forms that are most behind; counts them."""
    num_colors, num_kinds = rng.choice(PALETTES)
    colors, kinds = rng.sample(COLORS, num_colors), rng.sample(KINDS, num_kinds)
    names = [(color, kind) for color in colors for kind in kinds]
    palette = _Palette(names, rng.sample(BACKGROUNDS, rng.choice(NUMBERS_OF_BACKGROUNDS)))
    possible = list(statements(names))
    wanted = min(WEIGHTS, key=lambda form: used[form] / WEIGHTS[form])
    while True:
        pairs = [_draw_pair(fresh, split, palette) for _ in range(PAIRS_PER_SET)]
        if not any(_fits(s, pairs) for s in possible if s.form == wanted):
            continue
        fitting: dict[str, list[Statement]] = {}
        for statement in possible:
            if _fits(statement, pairs):
                fitting.setdefault(statement.form, []).append(statement)
        if len(fitting) >= STATEMENTS_PER_SET:
            break
    rarest = sorted(fitting, key=lambda form: used[form] / WEIGHTS[form])[:STATEMENTS_PER_SET]
    used.update(rarest)
    chosen = [rng.choice(fitting[form]) for form in rarest]
    rng.shuffle(chosen)
    return pairs, [(_wording(statement, used), statement) for statement in chosen]


def _fits(statement: Statement, pairs: Sequence[Pair]) -> bool:
    """Whether it is true of half of the pairs, and may be asked of all."""
    is_half = sum(starmap(statement.holds, pairs)) == PAIRS_PER_SET // 2
    return is_half and all(starmap(statement.needs_both, pairs))


def _wording(statement: Statement, used: Counter[str]) -> str:
    """In turn, so that the rarest forms have all of theirs too."""
    return statement.wordings[used[statement.form] % len(statement.wordings)]


def _draw_pair(fresh: FreshScenes, split: str, palette: _Palette) -> Pair:
    def draw(rng: random.Random) -> Scene:
        single = rng.random() < SINGLE_SHAPE_SHARE
        scene = draw_scene(rng, palette.names)
        while single and len(scene.shapes) > 1:
            scene = draw_scene(rng, palette.names)
        return replace(scene, background=rng.choice(palette.backgrounds))

    stream = f"nlvr2-{split}"
    return fresh.take(stream, draw), fresh.take(stream, draw)
