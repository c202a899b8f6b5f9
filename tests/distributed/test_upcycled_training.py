"""Upcycled checkpoints in the real model: the same outputs and losses, any layout, and a run that goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Layout, Workers, assert_close, layout
from training_runs import trainer_run
from upcycled_runs import evaluate_checkpoint, start_from

from megatron_vlmoe.convert.upcycle.plan import UpcycleOptions, sparse_config
from megatron_vlmoe.convert.upcycle.run import read_source, upcycle_checkpoint

ONE, EP2 = Layout(1), layout(2, ep=2)
DENSE = ("--moe.modalities", "none", "--moe.layers", "[]")
FEW = ("--data.global_texts", "4", "--data.global_images", "4", "--data.global_pairs", "4")
# The small model's blocks and pools of different sizes; its capacity factors drop nothing.
EXPERTS = "--moe.layers 2 4 --moe.num_vision_experts 8 --moe.num_text_experts 4".split()
TWICE = "--moe.num_vision_experts 16 --moe.num_text_experts 8 --moe.eval_capacity_factor 16".split()
# Padding slots of captions, which nothing reads, go through a dense FFN, but by default through no expert.
ALL_SLOTS = ("--moe.route_padding", "true")
STEPS = 3


@pytest.fixture(scope="module")
def dense(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense run of three steps."""
    folder = tmp_path_factory.mktemp("dense")
    options = (*DENSE, *FEW, "--optim.lr", "0.01")
    assert workers.run(ONE, trainer_run, ONE, options, str(folder))[0]["step"] == STEPS
    return folder


@pytest.fixture(scope="module")
def expected(workers: Workers, dense: Path) -> dict[str, Any]:
    """What the dense model computes."""
    return workers.run(ONE, evaluate_checkpoint, ONE, (*DENSE, *FEW), str(dense))[0]


def upcycle(source: Path, output: Path, *words: str, **options: Any) -> Path:
    reader = read_source(source)
    config = sparse_config(reader.config, str(source), "", 0, words)
    upcycle_checkpoint(reader, config, output, UpcycleOptions(**options))
    return output


def same(actual: dict[str, Any], expected: dict[str, Any], what: str) -> None:
    losses = {key: value for key, value in expected["evaluation"].items() if "loss" in key}
    assert len(losses) >= 4
    assert_close({key: actual["evaluation"][key] for key in losses}, losses, what)
    assert np.abs(actual["hidden"] - expected["hidden"]).max() < 1e-5, what


WAYS = {
    "small router": ("small", ()),
    "zero router": ("zero", ()),
    "two experts per token": ("small", ("--moe.topk", "2")),
    "normalised gate": ("fresh", ("--moe.normalize_gate", "true")),
}


@pytest.mark.parametrize("name", WAYS)
def test_upcycled_model_computes_what_the_dense_one_did(
    name: str, workers: Workers, dense: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    router, words = WAYS[name]
    folder = upcycle(dense, tmp_path, *EXPERTS, *words, router=router)
    actual = workers.run(ONE, evaluate_checkpoint, ONE, (*FEW, *ALL_SLOTS, *words), str(folder))
    same(actual[0], expected, name)


def test_twice_as_many_experts_and_two_ranks(
    workers: Workers, dense: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    folder = upcycle(dense, tmp_path / "once", *EXPERTS)
    folder = upcycle(folder, tmp_path / "twice", *TWICE)
    options = (*FEW, *TWICE)
    every = (*options, *ALL_SLOTS)
    same(workers.run(ONE, evaluate_checkpoint, ONE, every, str(folder))[0], expected, "twice")
    for result in workers.run(EP2, evaluate_checkpoint, EP2, options, str(folder)):
        evaluation = result["evaluation"]
        losses = {key: value for key, value in expected["evaluation"].items() if "loss" in key}
        assert_close({key: evaluation[key] for key in losses}, losses, "two ranks")


def test_carried_run_goes_on(workers: Workers, dense: Path, tmp_path: Path) -> None:
    """From step 3 with moments; loading is strict, so every tensor of a sparse run's optimizer is there."""
    folder = str(upcycle(dense, tmp_path / "start", *EXPERTS, carry_optimizer=True))
    options = (*FEW, "--load", folder, "--train.steps", str(STEPS + 2))
    records = []
    for name, where in (("one", ONE), ("ep2", EP2)):
        results = workers.run(where, trainer_run, where, options, str(tmp_path / name))
        assert [result.get("step") for result in results] == [STEPS + 2] * where.world, results
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        records.append([json.loads(line) for line in lines])
    for one, two in zip(*records, strict=True):
        assert one["step"] == two["step"]
        names = [key for key in one if key.startswith("loss/")]
        assert_close({k: two[k] for k in names}, {k: one[k] for k in names}, "ep2", 1e-4)
    assert [record["step"] for record in records[0]] == [STEPS + 1, STEPS + 2]


def test_other_gates_are_warned_of(workers: Workers, dense: Path, tmp_path: Path) -> None:
    """Once, on the first rank, by runs that start from another's experts; not by one that goes on with its own."""
    folder = str(upcycle(dense, tmp_path / "start", *EXPERTS, "--moe.topk", "2"))
    start = (*FEW, "--load", folder, "--checkpoint.load_optimizer", "false", "--train.steps", "1")
    other = ("--moe.topk", "1", "--moe.normalize_gate", "true")
    changes = "moe.topk: 2 -> 1, moe.normalize_gate: False -> True"

    def warnings(name: str, *options: str) -> list[list[str]]:
        results = workers.run(EP2, trainer_run, EP2, (*start, *options), str(tmp_path / name))
        return [result["warnings"] for result in results]

    assert warnings("same", "--moe.topk", "2") == [[], []]
    (line,), none = warnings("other", *other)
    assert line.startswith(f"the experts of {folder}/iter_0000000 were") and line.endswith(changes)
    assert none == []
    assert not any("experts" in line for lines in warnings("other", *other) for line in lines)
    (line,) = workers.run(ONE, start_from, ONE, (*FEW, *other), folder)[0]
    assert line.endswith(changes)
    assert workers.run(ONE, start_from, ONE, (*FEW, "--moe.topk", "2"), folder)[0] == []


def test_dense_runs_have_no_gates(workers: Workers, dense: Path) -> None:
    options = (*DENSE, *FEW, "--moe.topk", "2")
    assert workers.run(ONE, start_from, ONE, options, str(dense))[0] == []
