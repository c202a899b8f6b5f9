"""A study as a user runs it: killed, gone on with, printed, and what it leaves against what its runs logged."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean, stdev

import psutil
import pytest
from commands import Outcome, environment, run
from small_corpus import SMALL_MODEL, Corpus, metrics

pytestmark = pytest.mark.timeout(1800)

STEPS = 24
STUDY = """
title: Batch priority
runs:
  - {label: paper, experts: 8e}
  - {label: first-come, experts: 8e, options: {moe.batch_priority: false}}
columns: [mlm, mim, vlm, dropped]
claims:
  - {text: Priority helps, source: the author, parts: [{below: [mim, paper, first-come]}]}
"""


def words(corpus: Corpus, *more: str, steps: int = STEPS, output: str = "studies") -> list[str]:
    # The study itself says what the preset and the seeds are.
    own = SMALL_MODEL[2 : SMALL_MODEL.index("--train.seed")]
    times = ["--train.steps", str(steps), "--train.eval_interval", "12", "--save-interval", "4"]
    options = [*own, *corpus.data, *times]
    return ["study", "mine.yaml", "--seeds", "1", "2", "--output", output, *options, *more]


def study(corpus: Corpus, *more: str) -> Outcome:
    return run("-m", "megatron_vlmoe", *words(corpus, *more), cwd=corpus.folder, timeout=900)


def launch(corpus: Corpus, words: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_vlmoe", *words, "--jobs", "1"],
        cwd=corpus.folder,
        # The tests themselves may run under nohup, which a study heeds.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def a_run_that_saved(studies: Path, launcher: subprocess.Popen[str]) -> psutil.Process:
    """The process of the first run that has saved and works."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and launcher.poll() is None:
        for tracker in studies.glob("runs/*/checkpoints/latest_checkpointed_iteration.txt"):
            for process in psutil.process_iter(["cmdline"]):
                if (process.info["cmdline"] or [""])[-1].endswith(tracker.parents[1].name):
                    return process
        time.sleep(0.02)
    raise AssertionError(f"no run has saved: {launcher.communicate(timeout=1)}")


def test_a_study_that_loses_its_terminal_stops_its_runs(corpus: Corpus) -> None:
    (corpus.folder / "mine.yaml").write_text(STUDY)
    launcher = launch(corpus, words(corpus, steps=10_000, output="closed"))
    process = a_run_that_saved(corpus.folder / "closed", launcher)
    launcher.send_signal(signal.SIGHUP)
    out, err = launcher.communicate()
    assert launcher.returncode == 130, out + err
    assert f"stopped {Path(process.info['cmdline'][-1]).name}, which goes on another time" in out
    assert not process.is_running()


def test_a_study_from_a_kill_to_its_table(corpus: Corpus) -> None:
    (corpus.folder / "mine.yaml").write_text(STUDY)
    studies = corpus.folder / "studies"
    launcher = launch(corpus, words(corpus))
    process = a_run_that_saved(studies, launcher)
    killed = Path(process.info["cmdline"][-1]).name
    process.send_signal(signal.SIGKILL)
    # Another one at the same time would run the same again.
    study(corpus).refused("studies: another `vlmoe study`", code=2)
    out, err = launcher.communicate()
    assert launcher.returncode == 1, out + err
    (line,) = err.splitlines()
    assert line.startswith(f"failed: {killed}: exit status -9") and "console.txt" in line
    assert "4 runs, 0 of them finished before" in out and "3 of 4: " in out
    rows = json.loads((studies / "mine" / "summary.json").read_text())["rows"]
    failed = [row for row in rows if not row["values"]]
    assert [list(row["states"]) for row in failed] == [[killed]]
    assert failed[0]["states"][killed].startswith("failed: exit status -9")

    # It goes on from its checkpoint, and no other run is touched.
    before = {path: path.stat().st_mtime_ns for path in studies.glob("runs/*/metrics.jsonl")}
    printed = study(corpus, "--print-commands").succeeded().stdout.splitlines()
    assert sum(line.startswith("# finished: ") for line in printed) == 3
    assert printed[2].startswith("python -m megatron_vlmoe pretrain --preset tiny-8e ")
    assert printed[2].endswith(killed)
    done = study(corpus).succeeded().stdout
    assert "4 runs, 3 of them finished before" in done and f"started {killed}" in done
    after = {path: path.stat().st_mtime_ns for path in studies.glob("runs/*/metrics.jsonl")}
    assert [path.parent.name for path in after if after[path] != before[path]] == [killed]
    assert ": starting after step " in (studies / "runs" / killed / "log.txt").read_text()

    check_summary(studies)
    again = study(corpus).succeeded().stdout
    assert "4 runs, 4 of them finished before" in again and "started" not in again
    assert os.path.getsize(studies / "mine" / "figure.png") > 10_000


def check_summary(studies: Path) -> None:
    """Every row against its run's metrics.jsonl, and the table against the rows."""
    content = json.loads((studies / "mine" / "summary.json").read_text())
    rows = {(row["label"], row["seed"]): row for row in content["rows"]}
    assert list(rows) == [("paper", 1), ("first-come", 1), ("paper", 2), ("first-come", 2)]
    for row in rows.values():
        ((folder, state),) = row["states"].items()
        logged = metrics(studies / "runs" / folder)
        held_out = [record for record in logged if "eval/loss/mlm" in record]
        assert state == "finished" and row["curve"]["step"] == [0, 12, STEPS]
        for loss in ("mlm", "mim", "vlm_text", "vlm_image"):
            found = [float(f"{record[f'eval/loss/{loss}']:.6g}") for record in held_out]
            assert row["curve"][loss] == found and row["values"][loss] == found[-1]
        late = [record for record in logged if record["step"] > 0.75 * STEPS]
        dropped = [
            fmean(r[f"moe/{pool}/dropped_fraction"] for r in late) for pool in ("text", "vision")
        ]
        # Weighted by the pools' assignments.
        assert min(dropped) <= row["values"]["dropped"] <= max(dropped)
        assert content["environments"][row["environment"]]["side by side"] in (1, 2)
    table = (studies / "mine" / "table.md").read_text()
    for label in ("paper", "first-come"):
        own = [rows[label, seed]["values"]["mim"] for seed in (1, 2)]
        assert f"| {fmean(own):.3f} ± {stdev(own):.3f} |" in table
    differences = [
        rows["first-come", s]["values"]["mim"] - rows["paper", s]["values"]["mim"] for s in (1, 2)
    ]
    assert (
        f"**undecided**: Priority helps (the author). mim: paper below first-come: {fmean(differences):+.3g} ["
        in table
    )
