"""Some drills of `tests/drills/run.sh`, and that they find what they look for."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from drills import files, kills, system
from drills.desk import Desk, Verdict, tracked
from small_corpus import Corpus

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def desk(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    folder = tmp_path_factory.mktemp("drills")
    (folder / "corpus").symlink_to(corpus.folder)
    return Desk.prepare(folder, seed=5)


def test_a_killed_run_goes_on_as_if_nothing_had_been(desk: Desk) -> None:
    desk.number = 1
    desk.rng = random.Random(5)
    found = kills.kill_training(desk, "save")
    assert found.verdict is Verdict.RECOVERED and not found.lost_steps, found.detail


def test_damage_is_named(desk: Desk) -> None:
    cases = ((files.damage_checkpoint, "tensors"), (files.damage_data, "data"))
    for desk.number, (damage, kind) in enumerate(cases, 2):
        found = damage(desk, kind, "flip")
        assert found.verdict is Verdict.CLEAR, found.detail


def test_of_two_runs_in_a_folder_one_goes_on(desk: Desk) -> None:
    desk.number = 4
    found = system.start_twice(desk)
    assert found.verdict in (Verdict.CLEAR, Verdict.RECOVERED), found.detail


def test_another_result_and_steps_trained_again_are_found(desk: Desk, tmp_path: Path) -> None:
    desk.number = 5
    save = files.half_done(desk)
    whole = desk.finished(save, "plain", tracked(save) + 2, "half")
    assert whole.verdict is Verdict.RECOVERED and whole.lost_steps == 2
    log = save / "metrics.jsonl"
    log.write_text(log.read_text().replace('"grad_norm": ', '"grad_norm": 1', 1))
    assert desk.compared(save, "plain", "changed").verdict is Verdict.SILENT
