"""What the objectives of downstream tasks have in common: an evaluation is made once for the same weights."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Iterator

import numpy as np
import pytest

from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.config.task_schema import TaskConfig
from megatron_vlmoe.config.tasks import TASKS, TaskSpec


@pytest.fixture
def objective() -> Any:
    """Judges two splits and notes whatever it does."""
    from megatron_vlmoe.runtime.lazy import prepare_megatron

    prepare_megatron()
    from megatron_vlmoe.finetune.objective import Measured, TaskObjective

    class Noting(TaskObjective):
        done: list[str] = []

        def prepare_step(self, runner: Any, batches: Iterator[Any]) -> Iterator[Any]:
            self.done.append("step")
            return super().prepare_step(runner, batches)

        def loss(self, batch: Any, outputs: Any) -> Any:
            return None

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
    objective.prepare_step(None, iter(()))
    objective.evaluate_split(None, dev)
    objective.evaluate(None)
    objective.forget()
    objective.evaluate_split(None, dev)
    assert objective.done == ["dev", "step", "dev", "dev", "dev"]


def test_lines_and_losses(objective: Any) -> None:
    metrics = {"dev/accuracy": 50.0, "dev/samples": 4.0, "dev/unlabelled": 0.0}
    assert objective.evaluation_line(metrics) == "evaluation | dev/accuracy 50.00"
    assert objective.loss_metrics({"nlvr2": 0.5, "total": 0.7}) == {"loss/nlvr2": 0.5}


def test_scores_without_the_metric_that_chooses_the_best_are_named(
    objective: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_vlmoe.finetune.objective import ClassificationObjective

    class Samples(list[Any]):
        sample_parts = None

        def __init__(self, spec: Any) -> None:
            self.spec = spec

    found = {"ranks": np.array([0, 1])}
    monkeypatch.setattr(ClassificationObjective, "evaluate_items", lambda *_: found)
    spec = replace(TASKS["nlvr2"], best_metric="hits")

    class Task(TaskConfig):
        @property
        def spec(self) -> TaskSpec:
            return spec

    config: Any = SimpleNamespace(task=Task(name="nlvr2"))
    split = SimpleNamespace(name="dev", samples=Samples(spec))
    judge = ClassificationObjective(config, None, SimpleNamespace(labels=None))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="^task nlvr2: .*:accuracy gives accuracy, and not its"):
        judge._measure(None, split)  # type: ignore[arg-type]
