"""Ranks that hang or fail end the whole run with a line that names them, and a bad step is run again by one command."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from commands import REPOSITORY, as_ranks, child, environment, run
from helpers import SMALL, start_process

FEW = "--model.num_layers 2 --moe.layers 2 --train.eval_steps 0".split()


class Pair:
    """Two data-parallel processes of the real entry point on random data.

    Args:
        folder: `--save`; what they say is beside it.
        options: of the run.
    """

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        words = ["-m", "megatron_vlmoe", "pretrain-random", "--preset", "tiny-8e", *SMALL, *FEW]
        words += [*options, "--save", str(folder)]
        self.processes: list[Any] = []
        for rank, own in enumerate(as_ranks(environment(), 2)):
            for path in (self._said(rank, "out"), self._said(rank, "err")):
                path.touch()
            out, err = (str(self._said(rank, name)) for name in ("out", "err"))
            self.processes.append(start_process(child, words, str(REPOSITORY), own, out, err))

    def _said(self, rank: int, name: str) -> Path:
        return self.folder.with_name(f"{self.folder.name}_{rank}.{name}")

    def errors(self, rank: int) -> str:
        return self._said(rank, "err").read_text()

    def wait_for_step(self, step: int) -> None:
        path, deadline = self.folder / "metrics.jsonl", time.monotonic() + 300
        while not path.exists() or path.read_text().count("\n") < step:
            assert time.monotonic() < deadline, f"no step {step}: {self.errors(0)}"
            assert all(process.is_alive() for process in self.processes), self.errors(0)
            time.sleep(0.05)

    def ended(self, rank: int, seconds: float) -> int:
        self.processes[rank].join(timeout=seconds)
        assert self.processes[rank].exitcode is not None, "it goes on"
        return int(self.processes[rank].exitcode)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def test_a_rank_that_is_stopped_is_named(tmp_path: Path) -> None:
    pair = Pair(
        tmp_path / "run",
        *"--train.steps 100000 --health.hang_seconds 8 --health.hang_factor 2".split(),
    )
    try:
        pair.wait_for_step(3)
        os.kill(pair.processes[1].pid, signal.SIGSTOP)
        assert pair.ended(0, 120) == 75
    finally:
        pair.kill()
    said = pair.errors(0)
    assert "no sign of life from rank 1 on" in said and said.count("error: ") == 1
    stacks = (tmp_path / "run" / "health" / "stacks_rank_0.txt").read_text()
    assert "trainer.py" in stacks and "vlmoe-watchdog" not in stacks.splitlines()[0]
    assert "no sign of life from rank 1" in (tmp_path / "run" / "log.txt").read_text()


def test_the_error_of_one_rank_ends_the_other(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "profile").write_text("a file where rank 1 alone wants a folder")
    options = "--train.steps 100000 --profile.steps 2 2 --profile.ranks 1"
    pair = Pair(tmp_path / "run", *options.split())
    try:
        assert [pair.ended(rank, 300) for rank in (1, 0)] == [1, 1]
    finally:
        pair.kill()
    said = pair.errors(0)
    assert "error: rank 1 has failed: FileExistsError" in said and "Traceback" not in said
    assert "Traceback" in pair.errors(1)


@pytest.fixture(scope="module")
def diverged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose first update is far too long, so that nothing is finite in its second step."""
    folder = tmp_path_factory.mktemp("diverged") / "run"
    options = "--train.steps 3 --save-interval 1 --optim.lr 1e30 --optim.min_lr 1e29".split()
    words = ["pretrain-random", "--preset", "tiny-8e", *SMALL, *FEW, *options]
    line = run("-m", "megatron_vlmoe", *words, "--save", folder).refused(code=1)
    for name in ("step 2", "gradient norm is nan", "rank 0", "iter_0000001", "vlmoe replay"):
        assert name in line, line
    return folder


def test_a_bad_step_is_run_again(diverged: Path) -> None:
    event = diverged / "health" / "step_2.json"
    content = json.loads(event.read_text())
    assert content["step"] == 2 and len(content["ranks"][0]["micro_batches"]) == 4
    said = run("-m", "megatron_vlmoe", "replay", event).succeeded().stdout
    assert "iter_0000001" in said
    for number in (4, 5, 6, 7):
        assert f"micro-batch {number} (rank 0): " in said
    assert "first output that is not finite: " in said
    assert "gradients that are not finite: " in said


def test_a_damaged_record_of_a_step_is_named(tmp_path: Path) -> None:
    path = tmp_path / "health" / "step_2.json"
    path.parent.mkdir()
    path.write_text('{"format_version": 1, "step": 2')
    run("-m", "megatron_vlmoe", "replay", path).refused(str(path), code=1)
