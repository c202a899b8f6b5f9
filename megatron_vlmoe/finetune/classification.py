"""VQA, NLVR2, ImageNet and MNLI: one label per sample, or soft scores over answers."""

from __future__ import annotations

from typing import Any, Iterator, Mapping, Optional

import numpy as np
from torch import Tensor

from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.finetune.collect import Found, run_sweep, share_metrics
from megatron_vlmoe.finetune.data import SplitData, TaskData
from megatron_vlmoe.finetune.metrics import accuracy, topk_accuracy, vqa_score
from megatron_vlmoe.finetune.samples import NO_LABEL
from megatron_vlmoe.finetune.sweeps import SampleSweep
from megatron_vlmoe.objectives.classification import class_loss, soft_target_loss
from megatron_vlmoe.runtime.distributed import Ranks
from megatron_vlmoe.train.objective import Losses
from megatron_vlmoe.train.step import Batch, StepRunner


class ClassificationObjective:
    """Trains and judges a task whose heads give `logits`.

    Args:
        config: the run.
        ranks: where this process stands.
        data: its splits.
    """

    resumes_others = False
    evaluates_at_start = False

    def __init__(self, config: FinetuneConfig, ranks: Ranks, data: TaskData) -> None:
        self.config = config
        self.ranks = ranks
        self.data = data
        self.loss_names: tuple[str, ...] = (config.task.name,)
        best = f"{config.task.splits[0]}/{config.task.best_metric}"
        self.best_metric = best if config.task.save_best else ""
        self.patience = config.task.early_stopping

    def train_step(
        self, runner: StepRunner, batches: Iterator[Batch], num_micro_batches: int
    ) -> Losses:
        """Forward and backward of one step."""
        return runner.train(batches, num_micro_batches, self._loss)

    def loss_metrics(self, means: Mapping[str, float]) -> dict[str, float]:
        """`loss/TASK`."""
        name = self.config.task.name
        return {f"loss/{name}": means[name]}

    def evaluate(self, runner: StepRunner) -> dict[str, float]:
        """Metrics of the split that chooses the best checkpoint."""
        metrics, _ = self.evaluate_split(runner, self.data.splits[0])
        return metrics

    def evaluate_split(
        self, runner: StepRunner, split: SplitData
    ) -> tuple[dict[str, float], Optional[Found]]:
        """Metrics by `SPLIT/NAME` on every rank, and on rank 0 the logits ``[N, C]`` of all samples."""
        sweep = SampleSweep(split.samples)
        found = run_sweep(runner, self.data, sweep, ("logits",), self.ranks, self.config)
        metrics = None
        if found is not None:
            scores = classification_scores(self.config.task.name, found["logits"], split)
            metrics = {f"{split.name}/{name}": value for name, value in scores.items()}
        return share_metrics(metrics), found

    def evaluation_line(self, metrics: Mapping[str, float]) -> str:
        """Metrics in one line."""
        return metrics_line(metrics)

    def _loss(self, batch: Batch, heads: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
        logits, task = heads["logits"], self.config.task
        if task.name == "vqa":
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


def classification_scores(
    task: str, logits: np.ndarray[Any, Any], split: SplitData
) -> dict[str, float]:
    """Scores in percent, and how many samples they are over; none where no sample is labelled.

    Args:
        task: name of the task.
        logits: ``[N, C]``.
        split: the samples.
    """
    rows = [split.dataset.row(number) for number in range(len(split.dataset))]
    if task == "vqa":
        predicted = logits.argmax(axis=1)
        # A question whose answers are all outside the vocabulary cannot be answered right, but it counts.
        hopeless = ((NO_LABEL,), (0.0,))
        known = [
            hopeless if row.answers and not row.labels else (row.labels, row.scores) for row in rows
        ]
        named = {"vqa_score": vqa_score(predicted, *zip(*known))}
    else:
        labels = np.array([row.labels[0] if row.labels else NO_LABEL for row in rows])
        if task == "imagenet":
            named = {f"top{k}": topk_accuracy(logits, labels, k) for k in (1, 5)}
        else:
            named = {"accuracy": accuracy(logits, labels)}
    first = next(iter(named.values()))
    if not first.count:
        return {"unlabelled": float(first.unlabelled)}
    scores = {name: score.percent for name, score in named.items()}
    return scores | {"samples": float(first.count), "unlabelled": float(first.unlabelled)}


def metrics_line(metrics: Mapping[str, float]) -> str:
    """Percentages of an evaluation in one line."""
    parts = [
        f"{name} {value:.2f}"
        for name, value in metrics.items()
        if not name.endswith(("/samples", "/unlabelled"))
    ]
    return "evaluation | " + " | ".join(parts)
