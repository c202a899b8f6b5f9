"""Steps in the tensors of a CUDA graph are those of the ordinary path, bit for bit, evaluation in between included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graph_runs import steps_with_evaluations
from helpers import Layout, Workers, layout

from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.config.schema import TrainConfig
from megatron_vlmoe.train.step_graph import StepGraph, check_cuda_graph

COUNTER = ("--train.counter_draws", "true")
RUNS = {
    "dropping": (Layout(1), "--moe.capacity_factor 1.05 --moe.topk 2"),
    "tp2-ep2": (layout(2, tp=2, ep=2), "--moe.balance_bias_rate 0.01"),
    "contrastive": (
        layout(2),
        "--objectives.kind contrastive --data.micro_texts 0 --data.micro_images 0 --moe.routing expert_choice",
    ),
}


def equal(left: Any, right: Any) -> bool:
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(equal, left, right))
    return bool((left == right).all()) if hasattr(left, "all") else bool(left == right)


@pytest.mark.parametrize("name", RUNS)
def test_steps_in_the_tensors_of_a_graph_are_the_ordinary_ones(name: str, workers: Workers) -> None:
    where, options = RUNS[name]
    arguments = (*COUNTER, *options.split())
    plain, graphed = (
        workers.run(where, steps_with_evaluations, where, arguments, graph)
        for graph in (False, True)
    )
    for mine, theirs in zip(graphed, plain, strict=True):
        assert (mine.pop("replays"), theirs.pop("replays")) == (3, 0)
        assert equal(mine, theirs)
        losses = [step["losses"] for step in mine["steps"]]
        assert losses[3] and losses[3].values() != losses[4].values()
        assert any(vector.any() for vector in mine["steps"][-1]["counters"].values())


def test_batches_of_another_shape_are_no_replay() -> None:
    graph = StepGraph(capture=lambda work: work)

    def step(**texts: Any) -> float:
        batch: Any = {"micro_batch": torch.tensor(3), "texts": texts}
        return graph.run([batch], lambda batches: float(batches[0]["texts"]["ids"].sum()))

    assert [step(ids=torch.full((2, 3), value)) for value in range(6)] == [0, 6, 12, 18, 24, 30]
    # A single row would fit by broadcasting.
    for other in ({"ids": torch.ones(1, 3)}, {"ids": torch.ones(2, 3), "lengths": torch.ones(2)}):
        with pytest.raises(ValueError, match="texts/"):
            step(**other)


def test_a_machine_that_cannot_have_a_graph_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    train = TrainConfig(cuda_graph=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="train.cuda_graph=true needs a GPU"):
        check_cuda_graph(train, "fp32")
    check_cuda_graph(TrainConfig(), "fp32")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_cuda_graph(train, "bf16")
    # An older GPU, on which `auto` is fp16.
    with pytest.raises(ConfigError, match="loss scale"):
        check_cuda_graph(train, "fp16")
