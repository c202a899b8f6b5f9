"""What a run trains on and how it is judged: the part in which pretraining and every downstream task differ.

A step is `runner.train(batches, n, objective)`. It asks three things of a `StepObjective`: `prepare_step`, once, for
the micro-batches of the step; then for each of them `prepare`, when it is on the device, and `loss`, with what the
heads made of it. Evaluation needs no objective, only a function of a micro-batch and the heads' outputs.
"""

from __future__ import annotations

from typing import Iterable, Mapping, Optional, Protocol

from megatron_vlmoe.data.sources import Split
from megatron_vlmoe.stream.batch import Batch
from megatron_vlmoe.train.step import Outputs, StepObjective, StepRunner


class BatchSource(Protocol):
    """Where micro-batches come from."""

    def loader(
        self, split: Split, first_micro_batch: int, num_micro_batches: Optional[int]
    ) -> Iterable[Batch]:
        """Micro-batches of this data-parallel rank in order.

        Args:
            split: `train` or `eval`.
            first_micro_batch: number of the first among the rank's own.
            num_micro_batches: how many; None: endless.
        """
        ...


class Objective(StepObjective[Outputs], Protocol[Outputs]):
    """What `Trainer` asks of an objective."""

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

    def loss_metrics(self, means: Mapping[str, float]) -> dict[str, float]:
        """Logged losses from the means of an interval, by `loss/...`, without `loss/total`."""
        ...

    def evaluate(self, runner: StepRunner) -> dict[str, float]:
        """Metrics of held-out data, the same on every rank."""
        ...

    def evaluation_line(self, metrics: Mapping[str, float]) -> str:
        """One line for the log."""
        ...
