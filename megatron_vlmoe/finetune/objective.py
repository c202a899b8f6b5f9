"""What the objectives of all downstream tasks share: by which metric they are judged, and evaluation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Iterator, Mapping, Optional

from torch import Tensor

from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.finetune.data import SplitData, TaskData
from megatron_vlmoe.finetune.evaluation import Found
from megatron_vlmoe.runtime.distributed import Ranks
from megatron_vlmoe.stream.batch import Batch
from megatron_vlmoe.train.objective import Losses
from megatron_vlmoe.train.step import StepRunner

Measured = tuple[dict[str, float], Optional[Found]]
"""Metrics by `SPLIT/NAME` on every rank, and on rank 0 what the predictions of all samples are made from."""


class TaskObjective(ABC):
    """Trains a task and judges it by the first evaluation split.

    Args:
        config: the run.
        ranks: where this process stands.
        data: its splits.
        loss_names: names of the single losses.
    """

    resumes_others = False
    evaluates_at_start = False

    def __init__(
        self, config: FinetuneConfig, ranks: Ranks, data: TaskData, loss_names: tuple[str, ...]
    ) -> None:
        self.config = config
        self.ranks = ranks
        self.data = data
        self.loss_names = loss_names
        best = f"{config.task.splits[0]}/{config.task.spec.best_metric}"
        self.best_metric = best if config.task.save_best else ""
        self.patience = config.task.early_stopping
        self._measured: Optional[Measured] = None

    def prepare_step(self, runner: StepRunner, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The micro-batches as they are; what was measured before the step is forgotten."""
        self.forget()
        return batches

    def prepare(self, batch: Batch) -> Batch:
        """The micro-batch as it is."""
        return batch

    def loss_metrics(self, means: Mapping[str, float]) -> dict[str, float]:
        """`loss/NAME` of every single loss."""
        return {f"loss/{name}": means[name] for name in self.loss_names}

    def evaluate(self, runner: StepRunner) -> dict[str, float]:
        """Metrics of the split that chooses the best checkpoint."""
        metrics, found = self._measure(runner, self.data.splits[0])
        # The caller adds to what it gets.
        self._measured = dict(metrics), found
        return metrics

    def evaluate_split(self, runner: StepRunner, split: SplitData) -> Measured:
        """The full evaluation of a split, at the end of a run or without one.

        What `evaluate` found is taken over if the weights are still the same.
        """
        if self._measured is not None and split is self.data.splits[0]:
            return self._measured
        return self._measure(runner, split)

    def forget(self) -> None:
        """To be called when the weights become others."""
        self._measured = None

    def evaluation_line(self, metrics: Mapping[str, float]) -> str:
        """Percentages of an evaluation in one line."""
        parts = [
            f"{name} {value:.2f}"
            for name, value in metrics.items()
            if not name.endswith(("/samples", "/unlabelled"))
        ]
        return "evaluation | " + " | ".join(parts)

    @abstractmethod
    def loss(self, batch: Batch, outputs: Mapping[str, Tensor]) -> tuple[Tensor, Losses]:
        """The loss of a micro-batch with its graph, and the losses to log."""

    @abstractmethod
    def _measure(self, runner: StepRunner, split: SplitData) -> Measured:
        """The model's outputs for all samples of a split, and their metrics."""
