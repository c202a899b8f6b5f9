"""Checkpoints of megatron-core 0.16.1 on a later one, and the other way.

`tests/run_python.sh` runs it with the later Python, and names the interpreter of the older one in OLDER_PYTHON.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from megatron_vlmoe.convert.compare import compare_checkpoints

pytestmark = pytest.mark.process
REPOSITORY = Path(__file__).resolve().parents[2]
OLDER = os.environ.get("OLDER_PYTHON", "")
# What differs between two runs of the same steps.
MEASURED = ("second", "data_wait", "memory", "mfu", "flops")


def vlmoe(python: str, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs a command of this repository by an interpreter."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [python, "-m", "megatron_vlmoe", *words]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def metrics(run: Path) -> list[dict[str, Any]]:
    """All records of a run, without what was measured."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not any(m in k for m in MEASURED)} for line in lines]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run whose checkpoint megatron-core 0.16.1 wrote, gone on with by both: `older` and `newer`."""
    where = tmp_path_factory.mktemp("both")
    with tarfile.open(REPOSITORY / "tests/fixtures/old_files.tar.xz") as archive:
        archive.extractall(where, filter="data")
    folder = where / "old_files"
    for name, python in (("older", OLDER), ("newer", sys.executable)):
        shutil.copytree(folder / "pretrain", folder / name)
        words = ("--config", "pretrain/config.yaml", "--save", name, "--train.steps", "8")
        done = vlmoe(python, folder, "pretrain", *words)
        assert done.returncode == 0, done.stdout + done.stderr
        # No remarks about the insides or the plans of megatron-core.
        assert "Warning" not in done.stderr and "deprecated" not in done.stderr, done.stderr
    return folder


def test_both_go_on_from_an_old_checkpoint_bit_by_bit(resumed: Path) -> None:
    newer, older = resumed / "newer", resumed / "older"
    assert (newer / "checkpoints/iter_0000004/common.pt").is_file()
    assert not (newer / "checkpoints/iter_0000008/common.pt").exists()
    assert (older / "checkpoints/iter_0000008/common.pt").is_file()
    found = compare_checkpoints(newer, older, with_optimizer=True)
    assert found.equal
    assert any(pair.name.startswith("optimizer.") for pair in found.pairs)
    assert metrics(newer) == metrics(older) and metrics(newer)[-1]["step"] == 8


def test_the_later_one_goes_on_from_its_own(resumed: Path) -> None:
    shutil.copytree(resumed / "newer", resumed / "on")
    words = ("--config", "pretrain/config.yaml", "--save", "on", "--train.steps", "9")
    done = vlmoe(sys.executable, resumed, "pretrain", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "starting after step 8" in done.stdout


def test_the_older_one_refuses_a_later_checkpoint_in_one_line(resumed: Path) -> None:
    words = ("--config", "pretrain/config.yaml", "--save", "newer", "--train.steps", "9")
    done = vlmoe(OLDER, resumed, "pretrain", *words)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error:"))
    assert "newer/checkpoints/iter_0000008: a later megatron-core wrote it than the 0.16.1" in line


def test_the_older_one_compares_and_exports_a_later_checkpoint(resumed: Path) -> None:
    """Neither needs megatron-core."""
    done = vlmoe(OLDER, resumed, "compare-checkpoints", "newer", "older", "--optimizer")
    assert done.returncode == 0, done.stdout + done.stderr
    done = vlmoe(OLDER, resumed, "export", "--load", "newer", "--output", "exported")
    assert done.returncode == 0, done.stdout + done.stderr
