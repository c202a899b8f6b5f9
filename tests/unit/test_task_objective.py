"""What the objectives of downstream tasks have in common: an evaluation is made once for the same weights."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Iterator

import pytest

from megatron_vlmoe.config.task_schema import TaskConfig


@pytest.fixture
def objective() -> Any:
    """Judges two splits and notes whatever it does."""
    from megatron_vlmoe.runtime.lazy import prepare_megatron

    prepare_megatron()
    from megatron_vlmoe.finetune.objective import Measured, TaskObjective

    class Noting(TaskObjective):
        done: list[str] = []

        def _step(self, runner: Any, batches: Iterator[Any], num_micro_batches: int) -> list[Any]:
            self.done.append("step")
            return []

        def _measure(self, runner: Any, split: Any) -> Measured:
            self.done.append(split.name)
            return {f"{split.name}/accuracy": float(len(self.done))}, None

    config: Any = SimpleNamespace(task=TaskConfig(name="nlvr2"))
    data: Any = SimpleNamespace(splits=[SimpleNamespace(name=name) for name in ("dev", "test")])
    made = Noting(config, None, data, ("nlvr2",))  # type: ignore[arg-type]
    made.done = []
    return made


def test_a_final_evaluation_takes_over_what_is_known(objective: Any) -> None:
    dev, test = objective.data.splits
    assert objective.best_metric == "dev/accuracy"
    shown = objective.evaluate(None)
    shown["eval/moe"] = 1.0
    assert objective.evaluate_split(None, dev)[0] == {"dev/accuracy": 1.0}
    objective.evaluate_split(None, test)
    assert objective.done == ["dev", "test"]


def test_other_weights_are_evaluated_again(objective: Any) -> None:
    dev = objective.data.splits[0]
    objective.evaluate(None)
    objective.train_step(None, iter(()), 1)
    objective.evaluate_split(None, dev)
    objective.evaluate(None)
    objective.forget()
    objective.evaluate_split(None, dev)
    assert objective.done == ["dev", "step", "dev", "dev", "dev"]


def test_lines_and_losses(objective: Any) -> None:
    metrics = {"dev/accuracy": 50.0, "dev/samples": 4.0, "dev/unlabelled": 0.0}
    assert objective.evaluation_line(metrics) == "evaluation | dev/accuracy 50.00"
    assert objective.loss_metrics({"nlvr2": 0.5, "total": 0.7}) == {"loss/nlvr2": 0.5}
