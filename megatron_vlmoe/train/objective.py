"""What a run trains on and how it is judged: the part in which pretraining and every downstream task differ."""

from __future__ import annotations

from typing import Iterator, Mapping, Protocol

from torch import Tensor

from megatron_vlmoe.stream.batch import Batch
from megatron_vlmoe.train.step import StepRunner

Losses = list[dict[str, Tensor]]
"""For every micro-batch of a step, on the last pipeline stage: `total` and the single losses by name."""


class Objective(Protocol):
    """The loop around it is `Trainer`."""

    loss_names: tuple[str, ...]
    """Names of the single losses, the same on every rank."""

    best_metric: str
    """Evaluation metric whose largest value marks the best checkpoint; empty keeps none."""

    patience: int
    """Evaluations without a better one after which the run ends; 0 never."""

    resumes_others: bool
    """Whether `--load` names a run to go on with; else the model was made from it before training."""

    evaluates_at_start: bool
    """Whether the untrained model is evaluated at step 0."""

    def train_step(
        self, runner: StepRunner, batches: Iterator[Batch], num_micro_batches: int
    ) -> Losses:
        """Forward and backward of one step; the gradients are zeroed before it."""
        ...

    def loss_metrics(self, means: Mapping[str, float]) -> dict[str, float]:
        """Logged losses from the means of an interval, by `loss/...`, without `loss/total`."""
        ...

    def evaluate(self, runner: StepRunner) -> dict[str, float]:
        """Metrics of held-out data, the same on every rank."""
        ...

    def evaluation_line(self, metrics: Mapping[str, float]) -> str:
        """One line for the log."""
        ...
