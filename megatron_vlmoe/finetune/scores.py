"""What tasks are judged by: the functions that their rows name as `scores` and `guess`.

A function of scores takes what `classification.digest` kept of every sample, the split and the labels; the first of
its metrics decides whether a split is labelled. A function of guesses takes a split and the labels; it gives, in
percent, what the best prediction that is the same for all samples scores, or a ranking at random.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Optional

import numpy as np

from megatron_vlmoe.data.task_dataset import Labels, TaskDataset
from megatron_vlmoe.finetune.evaluation import Found
from megatron_vlmoe.finetune.metrics import (
    Score,
    majority_rate,
    random_recall,
    topk_accuracy,
    vqa_majority,
    vqa_official,
)

if TYPE_CHECKING:
    from megatron_vlmoe.finetune.data import SplitData

# Those that VQA v2 has, in the order in which they are reported.
_ANSWER_TYPES = ("yes_no", "number", "other")


def accuracy(found: Found, split: SplitData, labels: Labels) -> Mapping[str, Score]:
    """Share of samples whose class is the most likely one."""
    return {"accuracy": topk_accuracy(found["ranks"], 1)}


def top1_and_top5(found: Found, split: SplitData, labels: Labels) -> Mapping[str, Score]:
    """Shares of samples whose class is the most likely one, and one of the five most likely."""
    return {f"top{k}": topk_accuracy(found["ranks"], k) for k in (1, 5)}


def vqa_scores(found: Found, split: SplitData, labels: Labels) -> Mapping[str, Score]:
    """The official accuracy over all questions, then over those of each type of answer."""
    rows = list(split.dataset.rows())
    predicted = [labels.labels[label] for label in found["classes"][:, 0]]
    gained = vqa_official(predicted, [row.answers for row in rows])
    known = ~np.isnan(gained)
    scores = {"vqa_official": Score.of(gained[known], int((~known).sum()))}
    types = np.array([row.answer_type.replace("/", "_") for row in rows])
    for kind in dict.fromkeys((*_ANSWER_TYPES, *types[known].tolist())):
        chosen = known & (types == kind)
        if kind and chosen.any():
            scores[f"vqa_official/{kind}"] = Score.of(gained[chosen], 0)
    return scores


def guess_class(dataset: TaskDataset, labels: Optional[Labels]) -> float:
    """Accuracy of the most frequent class."""
    return majority_rate(np.array([row.labels[0] if row.labels else -1 for row in dataset.rows()]))


def guess_answer(dataset: TaskDataset, labels: Optional[Labels]) -> float:
    """Official VQA accuracy of the best answer that is the same for all questions."""
    assert labels is not None
    return vqa_majority(labels.labels, [row.answers for row in dataset.rows()])


def guess_match(dataset: TaskDataset, labels: Optional[Labels]) -> float:
    """Expected mean recall of a ranking at random."""
    recalls = random_recall(dataset.image_of_text(), dataset.num_images)
    return float(np.mean(list(recalls.values())))
