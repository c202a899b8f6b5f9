"""Whole command lines: pretraining with saves and signals, and the tests of this folder."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from checks.report import NotRun, Report

STEPS = 6
RUN = """
pretrain-random --preset tiny-8e --train.precision bf16 --train.deterministic true --log.interval 1
--train.eval_steps 0 --optim.lr_warmup_steps 2 --checkpoint.keep_last 0
""".split()
TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node 1".split()
TRACKER = "checkpoints/latest_checkpointed_iteration.txt"


def _start(folder: Path, words: str, launcher: Sequence[str] = ()) -> subprocess.Popen[bytes]:
    command = [sys.executable, *launcher, "-m", "megatron_vlmoe", *RUN, "--save", str(folder)]
    return subprocess.Popen([*command, *words.split()])


def _metrics(folder: Path) -> dict[int, dict[str, float]]:
    """Logged steps of a run so far; a line that is being written is left out."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return {row["step"]: row for row in rows if "loss/total" in row}


def _until(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Waits; the limit of the check ends what never comes."""
    while not condition():
        if process.poll() is not None:
            raise RuntimeError(f"a run ended with {process.returncode} before its time")
        time.sleep(0.1)


def pretrain(report: Report) -> None:
    """An unbroken run with saves in the background, a run in two parts, and one that gets SIGTERM."""
    whole, parts, stopped = (report.folder / name for name in ("whole", "parts", "stopped"))
    background = f"--train.steps {STEPS} --save-interval 2 --checkpoint.async_save true"
    first = f"--train.steps {STEPS} --save-interval 0 --exit-interval 3"
    running = {
        "whole": _start(whole, background),
        "first part": _start(parts, first),
        "stopped": _start(stopped, "--train.steps 1000000 --save-interval 0"),
    }
    _until(lambda: len(_metrics(stopped)) >= 3, running["stopped"])
    running["stopped"].send_signal(signal.SIGTERM)
    running["first part"].wait()
    # By torchrun, as on a cluster; what is there is the resume.
    resume = f"--train.steps {STEPS} --save-interval 0"
    running["second part"] = _start(parts, resume, TORCHRUN)
    codes = {name: process.wait() for name, process in running.items()}
    report.note(exit_statuses=codes)
    for name, code in codes.items():
        report.expect(code == 0, f"the run '{name}' ended with {code}")
    _compare(report, whole, parts)
    saved = sorted(path.name for path in (whole / "checkpoints").glob("iter_*"))
    report.note(background_saves=saved)
    expected = [f"iter_{step:07d}" for step in range(2, STEPS + 1, 2)]
    report.expect(saved == expected, f"the run saved in the background {saved}")
    last = max(_metrics(stopped))
    tracked = int((stopped / TRACKER).read_text())
    report.note(stopped_at=last, saved_at=tracked)
    report.expect(last == tracked, f"after SIGTERM step {last} was logged and {tracked} saved")


def _compare(report: Report, whole: Path, parts: Path) -> None:
    """Losses, norms and all saved tensors of the unbroken run and of the one in two parts."""
    left, right = _metrics(whole), _metrics(parts)
    same = list(range(1, STEPS + 1))
    report.expect(list(left) == same, f"the unbroken run logged steps {list(left)}")
    report.expect(list(right) == same, f"the run in two parts logged steps {list(right)}")
    losses = {step: row["loss/total"] for step, row in left.items()}
    report.note(losses=losses, seconds_of_step=left[STEPS]["step_seconds"])
    report.expect(all(map(math.isfinite, losses.values())), f"losses {losses}")
    for step in left.keys() & right.keys():
        for key in ("loss/total", "grad_norm"):
            a, b = left[step][key], right[step][key]
            report.expect(a == b, f"step {step}: {key} is {a} unbroken and {b} resumed")
    tensors = [_saved(folder / "checkpoints" / f"iter_{STEPS:07d}") for folder in (whole, parts)]
    names = sorted(tensors[0].keys() & tensors[1].keys())
    report.expect(tensors[0].keys() == tensors[1].keys(), "the checkpoints hold other tensors")
    different = [name for name in names if not torch.equal(tensors[0][name], tensors[1][name])]
    report.expect(len(names) > 100, f"the checkpoints hold {len(names)} tensors")
    report.note(tensors=len(names), tensors_that_differ=len(different))
    report.expect(
        not different, f"{len(different)} of {len(names)} tensors differ: {different[:3]}"
    )


def _saved(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, of the model and of the optimizer, read at once."""
    reader = FileSystemReader(str(folder))
    found = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(found, storage_reader=reader, no_dist=True)
    return found


def gpu_tests(report: Report) -> None:
    """`pytest tests/gpu`."""
    results = report.folder / "junit.xml"
    folder = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "pytest", str(folder), "-q", f"--junitxml={results}"]
    # No files of pytest's in the repository, which may be read-only.
    code = subprocess.run([*command, "-p", "no:cacheprovider"], cwd=folder.parents[1]).returncode
    if not results.exists():
        raise RuntimeError(f"pytest ended with {code} and without results")
    cases: dict[str, Any] = {}
    for case in ElementTree.parse(results).getroot().iter("testcase"):
        outcome = next(
            (child for child in case if child.tag in ("failure", "error", "skipped")), None
        )
        status = "passed" if outcome is None else outcome.tag
        cases[case.get("name", "?")] = f"{status} in {float(case.get('time', 0)):.1f} s"
        if outcome is not None and outcome.tag != "skipped":
            report.expect(False, f"{case.get('name')}: {(outcome.get('message') or '')[:300]}")
    report.note(tests=cases)
    if not report.on_gpu and all(own.startswith("skipped") for own in cases.values()):
        raise NotRun(f"all {len(cases)} tests need a GPU")
    report.expect(code == 0, f"pytest ended with {code}")
    skipped = [name for name, own in cases.items() if own.startswith("skipped")]
    report.expect(not skipped and bool(cases), f"skipped on a GPU: {skipped or 'all'}")
