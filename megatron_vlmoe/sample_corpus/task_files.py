"""What every task of the sample corpus is made of: fresh scenes, pictures, files and known truth."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_vlmoe.sample_corpus.world import Scene, draw_scene, generator_for


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture to be drawn for one split of a task."""

    split: str
    file: Path
    """Below the folder of all tasks; the suffix says whether JPEG or PNG."""
    scene: Scene


@dataclass(frozen=True, kw_only=True)
class TaskFiles:
    """All that one task consists of."""

    pictures: tuple[Picture, ...]
    texts: Mapping[Path, str]
    """Content of every other file, by path below the folder of all tasks."""
    truth: Mapping[str, Any]
    """For each evaluation split the samples, how often each label occurs, and what guessing scores."""


class FreshScenes:
    """Gives out scenes that look like none before, not even with their shapes moved a little.

    So no picture of an evaluation split is in any training split, and a picture that a model was
    pretrained on is in no task.
    """

    def __init__(self, seed: int, known: Iterable[Scene] = ()) -> None:
        self._seed = seed
        self._given: set[Scene] = set(map(_centered, known))
        self._drawn: Counter[str] = Counter()

    def take(
        self,
        stream: str,
        draw: Callable[[random.Random], Scene] = draw_scene,
        accept: Callable[[Scene], bool] = lambda scene: True,
    ) -> Scene:
        """The next scene of a stream that is acceptable and new; every try has its own generator."""
        while True:
            scene = draw(generator_for(self._seed, f"{stream}-scene", self._drawn[stream]))
            self._drawn[stream] += 1
            centered = _centered(scene)
            if centered not in self._given and accept(scene):
                self._given.add(centered)
                return scene


def _centered(scene: Scene) -> Scene:
    """The same with all shapes in the middle of their cells."""
    shapes = tuple(replace(shape, shift=(0.0, 0.0)) for shape in scene.shapes)
    return replace(scene, shapes=shapes)


def class_truth(labels: Iterable[str]) -> dict[str, Any]:
    """Truth of a classification split, of which always saying the most frequent label is a guess."""
    counts = Counter(labels)
    total = counts.total()
    return {
        "samples": total,
        "labels": dict(sorted(counts.items())),
        "guess_percent": percent(max(counts.values()) / total),
    }


def guess_by(
    train: Iterable[tuple[Hashable, str]], held_out: Iterable[tuple[Hashable, str]]
) -> float:
    """Percent right for a reader who is told one cue of a sample and nothing else.

    Args:
        train: cue and label of the training samples. The reader says the label that is most frequent
            with a cue there, of equally frequent ones the first in the alphabet; to an unknown cue
            the one that is most frequent overall.
        held_out: cue and label of the samples that are judged.
    """
    overall: Counter[str] = Counter()
    by_cue: dict[Hashable, Counter[str]] = {}
    for cue, label in train:
        overall[label] += 1
        by_cue.setdefault(cue, Counter())[label] += 1
    right = [label == most_frequent(by_cue.get(cue, overall)) for cue, label in held_out]
    return percent(sum(right) / len(right))


def most_frequent(counts: Mapping[str, int]) -> str:
    """Of equally frequent ones the first in the alphabet."""
    return min(counts, key=lambda label: (-counts[label], label))


def percent(fraction: float) -> float:
    """Rounded as results are reported."""
    return round(100 * fraction, 2)


def json_text(content: object) -> str:
    """One line of JSON."""
    return json.dumps(content) + "\n"
