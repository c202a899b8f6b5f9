"""A scheduler's signal to one process: all save after the current step and exit with 0."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import LAYOUT_OPTIONS, SMALL, free_port

ROOT = Path(__file__).resolve().parents[2]


def launch(folder: Path, *options: str) -> list[subprocess.Popen[bytes]]:
    """Two expert-parallel processes of the real entry point on random data."""
    words = [*SMALL, LAYOUT_OPTIONS["ep"], "2", *options, "--save", str(folder)]
    port = str(free_port())
    processes = []
    for rank in ("0", "1"):
        environment = {
            **os.environ,
            **{"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"},
            "CUDA_VISIBLE_DEVICES": "",
        }
        command = [sys.executable, "-m", "megatron_vlmoe.train.random_pretrain"]
        processes.append(
            subprocess.Popen(
                [*command, "--preset", "tiny-8e", *words],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.DEVNULL,
            )
        )
    return processes


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
            assert all(process.poll() is None for process in processes), "a process ended"
            time.sleep(0.1)
        processes[rank].send_signal(signal.Signals[name])
        assert [process.wait(timeout=200) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.wait()
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
