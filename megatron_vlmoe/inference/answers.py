"""What a model says: from logits to answers, labels and scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Mapping, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_vlmoe.data.task_labels import Labels
from megatron_vlmoe.finetune.predictions import best_classes, class_probabilities

Array = npt.NDArray[Any]


class Scored(NamedTuple):
    """A class and how likely it is.

    Attributes:
        label: VQA answer, ImageNet class id, or name of a relation.
        name: words for it where they are known, else the label.
        score: probability, 0 to 1.
    """

    label: str
    name: str
    score: float


@dataclass(frozen=True)
class Answer:
    """The answer to a question.

    Args:
        text: the answer.
        score: its probability. Every answer has one of its own; over all answers they do not add up to 1.
        most_likely: the best answers, best first; the first one is `text`.
    """

    text: str
    score: float
    most_likely: tuple[Scored, ...]


@dataclass(frozen=True)
class Decision:
    """One of a few classes.

    Args:
        label: the most likely class.
        score: its probability.
        scores: probability of every class, in the order of the labels; they add up to 1.
    """

    label: str
    score: float
    scores: Mapping[str, float]


def ranked(task: str, logits: Array, labels: Labels, k: int) -> list[list[Scored]]:
    """The k most likely classes of every row of logits ``[N, C]``, best first."""
    names = labels.names or labels.labels
    scores = class_probabilities(task, logits)
    return [
        [Scored(labels.labels[i], names[i], float(row[i])) for i in best]
        for row, best in zip(scores, best_classes(logits, k), strict=True)
    ]


def decisions(task: str, logits: Array, labels: Labels) -> list[Decision]:
    """The decision of every row of logits ``[N, C]``."""
    scores = class_probabilities(task, logits)
    best = np.argmax(logits, axis=1)
    return [
        Decision(labels.labels[i], float(row[i]), dict(zip(labels.labels, row.tolist())))
        for row, i in zip(scores, best, strict=True)
    ]
