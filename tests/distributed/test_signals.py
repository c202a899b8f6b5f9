"""A scheduler's signal to one process: all save after the current step and exit with 0."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from commands import REPOSITORY, as_ranks, child, environment
from helpers import LAYOUT_OPTIONS, SMALL, start_process


def launch(folder: Path, *options: str) -> list[Any]:
    """Two expert-parallel processes of the real entry point on random data."""
    words = ["-m", "megatron_vlmoe.train.random_pretrain", "--preset", "tiny-8e", *SMALL]
    words += [LAYOUT_OPTIONS["ep"], "2", *options, "--save", str(folder)]
    return [
        start_process(child, words, str(REPOSITORY), own, os.devnull, os.devnull)
        for own in as_ranks(environment(), 2)
    ]


def logged_steps(folder: Path) -> list[int]:
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [json.loads(line)["step"] for line in whole]


@pytest.mark.parametrize(("name", "rank"), [("SIGTERM", 1), ("SIGUSR1", 0)])
def test_signal_saves_and_exits_cleanly(name: str, rank: int, tmp_path: Path) -> None:
    processes = launch(tmp_path, "--train.steps", "100000")
    try:
        deadline = time.monotonic() + 300
        while 2 not in logged_steps(tmp_path):
            assert time.monotonic() < deadline, "no second step"
            assert all(process.is_alive() for process in processes), "a process ended"
            time.sleep(0.1)
        os.kill(processes[rank].pid, signal.Signals[name])
        for process in processes:
            process.join(timeout=200)
        assert [process.exitcode for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.join()
    last = logged_steps(tmp_path)[-1]
    assert 2 <= last < 100000
    folder = tmp_path / "checkpoints"
    assert (folder / "latest_checkpointed_iteration.txt").read_text().strip() == str(last)
    assert (folder / f"iter_{last:07d}/metadata.json").exists()
    assert not list(folder.glob("*.tmp"))


def test_a_second_signal_does_not_end_a_process_that_is_leaving() -> None:
    from megatron_vlmoe.config.schema import TrainConfig
    from megatron_vlmoe.train.trainer import ExitWatch

    before = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    try:
        watch = ExitWatch(TrainConfig(exit_signals=("SIGUSR2",)))
        assert watch.reason(1) == ""
        watch.close()
        assert signal.getsignal(signal.SIGUSR2) is signal.SIG_IGN
        watch = ExitWatch(TrainConfig(exit_signals=("SIGUSR2",)))
        signal.raise_signal(signal.SIGUSR2)
        assert watch.reason(1) == "SIGUSR2"
        watch.close()
        assert callable(signal.getsignal(signal.SIGUSR2)), "it has its former effect again"
    finally:
        signal.signal(signal.SIGUSR2, before)
