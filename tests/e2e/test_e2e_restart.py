"""A process of a run is killed: torchrun starts all of them again, and the run ends as if nothing had been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from commands import REPOSITORY, environment, run
from helpers import SMALL
from small_corpus import assert_same_metrics, metrics

STEPS = 12
WORDS = (
    *("-m", "megatron_vlmoe", "pretrain-random", "--preset", "tiny-8e", *SMALL),
    *("--parallel.expert_model_parallel_size", "2", "--train.steps", str(STEPS)),
    *("--data.global_texts", "4", "--data.global_images", "4", "--data.global_pairs", "4"),
    *("--train.eval_steps", "0", "--checkpoint.save_interval", "4"),
)
TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node 2 --max-restarts 2".split()


@pytest.mark.timeout(600)
def test_a_killed_rank_is_started_again(tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    launcher = subprocess.Popen(
        [sys.executable, *TORCHRUN, *WORDS, "--save", str(killed)],
        cwd=REPOSITORY,
        env=environment(CUDA_VISIBLE_DEVICES=""),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        kill_a_rank(launcher, killed, after=5)
        said = launcher.communicate(timeout=300)[1]
    finally:
        launcher.kill()
    assert launcher.returncode == 0, said[-3000:]
    assert (killed / "log.txt").read_text().count("started on ") == 2
    run(*WORDS, "--save", whole, ranks=2).succeeded()
    assert_same_metrics(metrics(killed), metrics(whole))


def kill_a_rank(launcher: subprocess.Popen[str], folder: Path, after: int) -> None:
    """Kills rank 1 once so many steps are logged, more than are saved."""
    log, deadline = folder / "metrics.jsonl", time.monotonic() + 300
    while not log.exists() or log.read_text().count("\n") < after:
        assert launcher.poll() is None and time.monotonic() < deadline, "no steps"
        time.sleep(0.02)
    for process in psutil.Process(launcher.pid).children():
        if process.environ().get("RANK") == "1":
            os.kill(process.pid, signal.SIGKILL)
            return
    raise AssertionError("no rank 1")
