"""Tasks with classes: one label per sample, or soft scores over answers."""

from __future__ import annotations

from typing import Any, Mapping, Optional

import numpy as np
from torch import Tensor

from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.config.tasks import find_task, load_code
from megatron_vlmoe.data.task_labels import Labels
from megatron_vlmoe.finetune.data import SplitData, TaskData
from megatron_vlmoe.finetune.evaluation import (
    EvalItems,
    Found,
    evaluate_items,
    share_metrics,
    to_numpy,
)
from megatron_vlmoe.finetune.metrics import Score, label_ranks
from megatron_vlmoe.finetune.objective import Measured, TaskObjective
from megatron_vlmoe.finetune.predictions import MOST_LIKELY, best_classes, class_probabilities
from megatron_vlmoe.losses.tasks import class_loss, soft_target_loss
from megatron_vlmoe.runtime.distributed import Ranks
from megatron_vlmoe.stream.batch import Batch
from megatron_vlmoe.train.objective import Losses
from megatron_vlmoe.train.step import StepRunner

Array = np.ndarray[Any, Any]


class ClassificationObjective(TaskObjective):
    """Trains and judges a task whose heads give `logits`.

    Args:
        config: the run.
        ranks: where this process stands.
        data: its splits.
    """

    def __init__(self, config: FinetuneConfig, ranks: Ranks, data: TaskData) -> None:
        super().__init__(config, ranks, data, (config.task.name,))

    def _measure(self, runner: StepRunner, split: SplitData) -> Measured:
        """Metrics, and what `digest` tells of all samples."""
        samples, task = split.samples, self.config.task.name
        items = EvalItems(len(samples), samples.spec.stream, samples.sample_parts)

        def reduce(batch: Batch, outputs: Mapping[str, Tensor]) -> Found:
            labels = batch["labels"].cpu().numpy() if "labels" in batch else None
            return digest(task, to_numpy(outputs["logits"]), labels)

        found = evaluate_items(runner, self.data, items, reduce, self.ranks)
        metrics = None
        if found is not None:
            scores = classification_scores(task, found, split, self.data.labels)
            metrics = {f"{split.name}/{name}": value for name, value in scores.items()}
        return share_metrics(metrics), found

    def loss(self, batch: Batch, outputs: Mapping[str, Tensor]) -> tuple[Tensor, Losses]:
        """Of the classes, or of soft scores over answers."""
        logits, task = outputs["logits"], self.config.task
        if task.spec.has_answers:
            loss = soft_target_loss(logits, batch["answers"], batch["scores"])
        else:
            loss = class_loss(
                logits,
                batch["labels"],
                task.label_smoothing,
                batch.get("partner_labels"),
                batch.get("own_share"),
            )
        # The schedule divides the loss in place.
        shown = loss.detach().clone()
        return loss, {"total": shown, task.name: shown}


def digest(task: str, logits: Array, labels: Optional[Array]) -> Found:
    """What is kept of the logits ``[n, C]`` of a micro-batch: all of them would not fit for 3,129 answers.

    Args:
        task: name of the task.
        logits: of the classes.
        labels: right classes ``[n]``, -1 where unknown; None for VQA.

    Returns:
        `classes` and `probabilities` of the most likely ones ``[n, k]``, best first, and `ranks` of the labels ``[n]``.
    """
    classes = best_classes(logits, MOST_LIKELY)
    chosen = np.take_along_axis(class_probabilities(task, logits), classes, axis=1)
    found = {"classes": classes, "probabilities": chosen}
    if labels is not None:
        found["ranks"] = label_ranks(logits, labels)
    return found


def classification_scores(
    task: str, found: Found, split: SplitData, labels: Optional[Labels]
) -> dict[str, float]:
    """Scores in percent, and how many samples they are over; none where no sample is labelled.

    Args:
        task: name of the task.
        found: what `digest` kept of every sample.
        split: the samples.
        labels: the classes; those of VQA are its answers.
    """
    named: Mapping[str, Score] = load_code(find_task(task).scores)(found, split, labels)
    first = next(iter(named.values()))
    if not first.count:
        return {"unlabelled": float(first.unlabelled)}
    scores = {name: score.percent for name, score in named.items()}
    return scores | {"samples": float(first.count), "unlabelled": float(first.unlabelled)}
