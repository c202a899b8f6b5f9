"""Steps that go wrong: the update that is refused changes nothing, and a run that went back resumes bit for bit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from helpers import Layout, Workers, assemble, assert_identical, layout
from training_runs import trainer_run

from megatron_vlmoe.config.schema import HealthConfig, TrainConfig
from megatron_vlmoe.train.checkpoint_files import TrainState
from megatron_vlmoe.train.health import HealthPolicy

# Four micro-batches are a step: those of the second, third and fourth begin with 4, 8 and 12.
SHORT = "--model.num_layers 2 --moe.layers 2 --train.eval_steps 0 --moe.balance_bias_rate 0.01"
NAN = math.nan


def run(
    workers: Workers,
    where: Layout,
    folder: Path,
    options: str,
    factors: dict[int, float],
) -> dict[str, Any]:
    words = (*SHORT.split(), *options.split())
    ranks = workers.run(where, trainer_run, where, words, str(folder), "", factors)
    assert len({own.get("step", own.get("message")) for own in ranks}) == 1, "ranks disagree"
    if "weights" in ranks[0]:
        ranks[0]["weights"] = assemble([own["weights"] for own in ranks])
        ranks[0]["optimizer"] = {
            f"{number}{name}": value
            for number, own in enumerate(ranks)
            for name, value in own["optimizer"].items()
        }
    return ranks[0]


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_training(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert_identical(mine["weights"], theirs["weights"], "weights")
    assert_identical(mine["optimizer"], theirs["optimizer"], "optimizer")


@pytest.mark.parametrize("where", [Layout(1), layout(2, pp=2), layout(2, ep=2)], ids=str)
def test_a_skipped_step_changes_neither_weights_nor_moments(
    workers: Workers, tmp_path: Path, where: Layout
) -> None:
    before = run(workers, where, tmp_path / "before", "--train.steps 4 --exit-interval 2", {})
    skip = "--train.steps 4 --exit-interval 3 --health.on_nonfinite skip"
    skipped = run(workers, where, tmp_path / "skipped", skip, {9: NAN})
    assert skipped["step"] == 3
    assert_same_training(skipped, before)
    (warning,) = [text for text in skipped["warnings"] if text.startswith("step 3:")]
    assert "gradient norm is nan" in warning and "micro-batch 9 of rank" in warning
    *_, last = logged(tmp_path / "skipped")
    assert last["skipped_steps"] == 1 and last["grad_norm"] is None
    event = json.loads((tmp_path / "skipped" / "health" / "step_3.json").read_text())
    found = {
        batch["micro_batch"]: batch["losses"]
        for own in event["ranks"]
        for batch in own["micro_batches"]
        if batch["losses"]
    }
    assert sorted(found) == [8, 9, 10, 11]
    assert found[9]["mlm"] == "nan" and found[8]["mlm"] > 0.0


REWIND = "--train.steps 6 --save-interval 2 --health.on_nonfinite rewind --data.num_workers 0"


def test_going_back_passes_over_data_and_resumes_bit_for_bit(
    workers: Workers, tmp_path: Path
) -> None:
    where, bad = layout(2, tp=2), {12: NAN}
    whole = run(workers, where, tmp_path / "whole", REWIND, bad)
    assert whole["step"] == 6
    records = logged(tmp_path / "whole")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert [record.get("passed_steps", 0) for record in records] == [0, 0, 2, 2, 2, 2]
    assert (tmp_path / "whole" / "metrics.set_aside.jsonl").exists(), "the third step, once before"
    stopped = run(workers, where, tmp_path / "stopped", f"{REWIND} --exit-interval 4", bad)
    assert stopped["step"] == 4
    resumed = run(workers, where, tmp_path / "stopped", REWIND, bad)
    assert_same_training(resumed, whole)
    losses = [record["loss/total"] for record in records]
    assert losses == [record["loss/total"] for record in logged(tmp_path / "stopped")]


def test_the_run_ends_before_the_update(workers: Workers, tmp_path: Path) -> None:
    options = "--train.steps 4 --save-interval 2"
    ended = run(workers, Layout(1), tmp_path, options, {8: NAN})
    assert ended["error"] == "TrainingError"
    for word in ("step 3", "nan", "mlm", "rank 0", "iter_0000002", "step_3.json"):
        assert word in ended["message"], word
    state = [record["step"] for record in logged(tmp_path)]
    assert state == [1, 2]


def test_there_is_nothing_to_go_back_to(workers: Workers, tmp_path: Path) -> None:
    ended = run(workers, Layout(1), tmp_path, REWIND, {0: NAN})
    assert "step 1" in ended["message"] and "no checkpoint to go back to" in ended["message"]


def test_skips_in_a_row_are_bounded(workers: Workers, tmp_path: Path) -> None:
    options = "--train.steps 6 --health.on_nonfinite skip --health.max_skips 2"
    ended = run(workers, Layout(1), tmp_path, options, {4: NAN, 8: NAN, 12: NAN})
    assert "step 4" in ended["message"] and "health.max_skips=2" in ended["message"]


def test_a_spike_is_skipped(workers: Workers, tmp_path: Path) -> None:
    options = "--train.steps 4 --health.on_spike skip --health.spike_window 2"
    spiked = run(workers, layout(2), tmp_path, options, {8: 1e4})
    assert spiked["step"] == 4
    assert [record["skipped_steps"] for record in logged(tmp_path)] == [0, 0, 1, 1]


def judged(options: HealthConfig, norms: list[float]) -> list[str]:
    """What becomes of updates with these gradient norms, one after the other."""
    import dataclasses

    policy, state, found = HealthPolicy(options, TrainConfig()), TrainState(), []
    for norm in norms:
        finding = policy.judge(norm, state)
        found.append(finding.action if finding else "")
        if finding is None:
            state = policy.updated(norm, state)
        else:
            state = dataclasses.replace(state, skips_in_a_row=state.skips_in_a_row + 1)
    return found


def test_spikes_are_told_by_the_median() -> None:
    options = HealthConfig(on_spike="skip", spike_window=3, spike_factor=4.0, max_skips=2)
    # Not before there are three updates; one outlier among them does not hide the next.
    assert judged(options, [1.0, 9.0, 1.0, 5.0, 1.0]) == ["", "", "", "skip", ""]
    assert judged(options, [1.0, 1.0, 1.0, 4.1, 1.0, 4.1]) == ["", "", "", "skip", "", "skip"]
    # What is skipped is no part of the median; a level that stays ends the run.
    assert judged(options, [1.0, 1.0, 1.0, 9.0, 9.0, 9.0]) == ["", "", "", "skip", "skip", "stop"]
    assert judged(HealthConfig(), [1.0, 1.0, 1e9, NAN]) == ["", "", "", "stop"]
