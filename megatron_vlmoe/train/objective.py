"""What a run trains on and how it is judged: the part in which pretraining and every downstream task differ.

A step is `runner.train(batches, n, objective)`. It asks three things of a `StepObjective`: `prepare_step`, once, for
the micro-batches of the step; then for each of them `prepare`, when it is on the device, and `loss`, with what the
heads made of it. Evaluation needs no objective, only a function of a micro-batch and the heads' outputs.
"""

from __future__ import annotations

import itertools
from typing import Any, Iterable, Iterator, Mapping, Optional, Protocol, Sequence

from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.data.sources import Split
from megatron_vlmoe.runtime.ranks import Ranks
from megatron_vlmoe.stream.batch import Batch
from megatron_vlmoe.train.step import (
    Measure,
    Outputs,
    Prepare,
    Result,
    StepObjective,
    StepRunner,
)


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

    def places(self, name: str, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Where samples that were trained on are stored: dataset, epoch and what names them there.

        Args:
            name: what a batch has the numbers under: a segment, or `samples`.
            numbers: of the samples; empty is returned where nothing is stored.
        """
        ...

    def check_files(self) -> None:
        """Looks whether the files are still those that were opened, by their sizes.

        Raises:
            DataError: naming one that is not.
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


class PretrainingObjective:
    """What the objectives of pretraining have in common: they train on the micro-batches as the data gives them, and
    are judged on the first held-out ones.

    Args:
        data: source of batches; needed to evaluate.
        num_micro_batches: micro-batches of a step on each data-parallel rank; needed to evaluate.
    """

    loss_names: tuple[str, ...] = ()
    best_metric = ""
    patience = 0
    resumes_others = True
    evaluates_at_start = True

    def __init__(
        self,
        config: RunConfig,
        ranks: Ranks,
        data: Optional[BatchSource] = None,
        num_micro_batches: int = 1,
    ) -> None:
        self.config = config
        self.ranks = ranks
        self.data = data
        self.num_micro_batches = num_micro_batches

    def prepare_step(self, runner: StepRunner, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The micro-batches as they are."""
        return batches

    def prepare(self, batch: Batch) -> Batch:
        """The micro-batch as it is."""
        return batch

    def evaluated(
        self,
        runner: StepRunner,
        measure: Measure[Outputs, Result],
        change: Prepare = lambda batch: batch,
    ) -> Iterator[tuple[Batch, Result]]:
        """The micro-batches of `train.eval_steps` held-out steps with what is measured of them, on the last stage.

        All tensor-parallel ranks hold the same; the first one speaks for them. Every rank must call it.

        Args:
            change: what becomes of every micro-batch before, on the host.
        """
        assert self.data is not None
        steps, count = self.config.train.eval_steps, self.num_micro_batches
        batches = iter(self.data.loader("eval", 0, steps * count))
        for _ in range(steps):
            step = list(itertools.islice(batches, count))
            results = runner.evaluate(map(change, step), count, measure, self.prepare)
            if self.ranks.tensor == 0:
                yield from zip(step, results)
