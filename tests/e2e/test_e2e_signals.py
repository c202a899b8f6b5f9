"""A signal, to whatever it reaches: the run is saved, goes on as if unbroken, and leaves no process behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from commands import REPOSITORY, environment, run_many
from small_corpus import Corpus, assert_same_metrics, metrics

# The fixtures count: they run all cases.
pytestmark = pytest.mark.timeout(1800)

TORCHRUN = [sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node 1".split()]
# What the example scripts do once they have put their options together.
SCRIPT = [
    *("bash", "-c", 'set -euo pipefail; source "$0/examples/launch_common.sh"; start_workers "$@"'),
    str(REPOSITORY),
]
STEPS = 60
# A loader worker that lives through the run, and from the seed checkpoint on a manager of checkpoint writers.
HELPERS = (
    "--data.num_workers 1 --checkpoint.save_initial true --save-interval 0 --train.eval_steps 0"
)


@dataclass
class Started:
    """A run after some steps and a save, in a process group of its own."""

    launcher: subprocess.Popen[bytes]
    folder: Path

    @property
    def rank(self) -> psutil.Process:
        """The process that trains: the first one of the program itself below the launcher."""
        found = [
            self.launcher.pid,
            *(p.pid for p in psutil.Process(self.launcher.pid).children(True)),
        ]
        processes = [psutil.Process(pid) for pid in found]
        return next(p for p in processes if p.cmdline()[1:4] == ["-u", "-m", "megatron_vlmoe"])

    @property
    def saved_step(self) -> int:
        """Step of the last checkpoint."""
        path = self.folder / "checkpoints" / "latest_checkpointed_iteration.txt"
        return int(path.read_text())

    @property
    def steps(self) -> int:
        """Steps that have been logged."""
        path = self.folder / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        # Seconds on a machine that has nothing else to do.
        deadline = time.monotonic() + 300
        while not condition():
            assert time.monotonic() < deadline, f"{what}: not within 300 s"
            time.sleep(0.05)


def start(corpus: Corpus, folder: Path, launcher: list[str]) -> Started:
    words = corpus.words(folder, STEPS, *HELPERS.split())
    program = words if launcher is SCRIPT else ["-m", "megatron_vlmoe", *words]
    process = subprocess.Popen(
        [*launcher, *program],
        cwd=corpus.folder,
        env=environment(NPROC="1"),
        start_new_session=True,
    )
    started = Started(process, folder)
    started.wait_until(lambda: started.steps > 1 or process.poll() is not None, "two steps")
    assert process.poll() is None, "the run ended"
    return started


CASES = {
    "rank": (TORCHRUN, lambda run: run.rank.send_signal(signal.SIGUSR1), 0),
    "rank's group": (TORCHRUN, lambda run: os.killpg(run.rank.pid, signal.SIGUSR1), 0),
    "torchrun": (TORCHRUN, lambda run: run.launcher.terminate(), 1),
    "torchrun dies": (
        TORCHRUN,
        lambda run: run.launcher.send_signal(signal.SIGUSR1),
        -signal.SIGUSR1,
    ),
    "script": (SCRIPT, lambda run: run.launcher.send_signal(signal.SIGUSR1), 0),
    "script's group": (SCRIPT, lambda run: os.killpg(run.launcher.pid, signal.SIGTERM), 0),
}


@pytest.fixture(scope="module")
def stopped(corpus: Corpus) -> dict[str, tuple[Started, int]]:
    """The run of every case, and the launcher's exit status."""
    return {case: stop(corpus, case) for case in CASES}


def stop(corpus: Corpus, case: str) -> tuple[Started, int]:
    launcher, send, _ = CASES[case]
    run = start(corpus, corpus.folder / "runs" / f"signal {case}", launcher)
    rank = run.rank
    everyone = [rank, *rank.children(recursive=True)]
    try:
        assert len(everyone) >= 4, "rank, loader worker, manager, resource tracker"
        send(run)
        status = run.launcher.wait(timeout=300)
        run.wait_until(lambda: not any(p.is_running() for p in everyone), "the end of all")
    finally:
        run.launcher.kill()
        for process in everyone:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    return run, status


@pytest.fixture(scope="module")
def resumed(
    stopped: dict[str, tuple[Started, int]], corpus: Corpus
) -> dict[str, list[dict[str, float]]]:
    """The metrics of every run with one step more, and of the run that nothing stopped."""
    one_more = (*HELPERS.split(), "--exit-interval", "1")
    folders = {case: run.folder for case, (run, _) in stopped.items()}
    lines = [corpus.words(folder, STEPS, *one_more) for folder in folders.values()]
    folders["whole"] = corpus.folder / "runs" / "whole"
    longest = max(run.saved_step for run, _ in stopped.values()) + 1
    as_far = (*HELPERS.split(), "--exit-interval", str(longest))
    lines.append(corpus.words(folders["whole"], STEPS, *as_far))
    for outcome in run_many(lines, cwd=corpus.folder, timeout=700):
        outcome.succeeded()
    return {case: metrics(folder) for case, folder in folders.items()}


@pytest.mark.parametrize("case", CASES)
def test_signal_saves(
    case: str,
    stopped: dict[str, tuple[Started, int]],
    resumed: dict[str, list[dict[str, float]]],
) -> None:
    run, status = stopped[case]
    assert status == CASES[case][2]
    # It goes on where it was, bit for bit.
    records = resumed[case]
    assert 3 <= len(records) < STEPS and run.saved_step == records[-1]["step"] == len(records)
    assert_same_metrics(records, resumed["whole"][: len(records)])
    assert not list(run.folder.rglob("*.tmp"))


def test_a_signal_before_there_are_workers_ends_the_script(corpus: Corpus) -> None:
    folder = corpus.folder / "runs" / "early"
    words = [*SCRIPT, *corpus.words(folder, STEPS)]
    script = subprocess.Popen(words, env=environment(NPROC="1"), cwd=corpus.folder)
    torchrun: list[psutil.Process] = []
    deadline = time.monotonic() + 300
    # Once it has taken the place of the script's subshell, it ignores the signal.
    while not torchrun:
        assert time.monotonic() < deadline, "no torchrun"
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(script.pid).children()
            torchrun = [child for child in children if "torchrun" in " ".join(child.cmdline())]
    script.terminate()
    assert script.wait(timeout=300) != 0
    assert not torchrun[0].is_running() and not folder.exists()


def test_helpers_end_with_a_rank_that_is_killed(corpus: Corpus) -> None:
    run = start(corpus, corpus.folder / "runs" / "killed", [sys.executable])
    helpers = psutil.Process(run.launcher.pid).children(recursive=True)
    assert len(helpers) >= 3
    # Signals that reach the helpers alone change nothing either.
    for helper in helpers:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            helper.send_signal(number)
    steps = run.steps
    run.wait_until(lambda: run.steps > steps + 2, "further steps")
    assert all(helper.is_running() for helper in helpers)
    run.launcher.kill()
    run.launcher.wait()
    run.wait_until(lambda: not any(helper.is_running() for helper in helpers), "the end of all")
