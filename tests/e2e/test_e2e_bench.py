"""`vlmoe bench` at a size that takes seconds: contenders that are checked, and rows that add up."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from commands import environment, run
from PIL import Image

from megatron_vlmoe.commands.main import TERMINATED


def bench(*words: str | Path) -> list[dict[str, Any]]:
    """The rows that a command leaves."""
    output = Path(words[words.index("--output") + 1])
    run("-m", "megatron_vlmoe", "bench", *words).succeeded()
    rows: list[dict[str, Any]] = json.loads(output.read_text())
    for row in rows:
        if row["median_ms"] is not None:
            assert row["min_ms"] <= row["median_ms"] <= row["max_ms"]
    return rows


def test_layers_of_experts(tmp_path: Path) -> None:
    """Every contender's outputs and gradients are compared with a plain loop before it is timed."""
    words = "--tokens 128 --width 64 --experts 4 --topk 2 --load skewed --rounds 1 --threads 1"
    for gradients in ("new", "main_grad"):
        rows = bench(
            *("moe_layer", *words.split(), "--gradients", gradients),
            *("--output", tmp_path / f"{gradients}.json"),
        )
        names = {row["contender"] for row in rows if row["median_ms"] is not None}
        ours = {f"ours_{name}" for name in ("fixed_capacity", "alltoall", "dropless")}
        assert {"dense", *ours, "megatron_sequential", "transformers_grouped_mm"} <= names
        absent = [row for row in rows if row["contender"] not in names]
        assert all(row["note"].startswith("not run: needs ") for row in absent)


def test_steps_of_presets_and_plain_pytorch(tmp_path: Path) -> None:
    output = tmp_path / "step.json"
    sizes = "--texts 2 --images 2 --pairs 2 --vocab-size 200 --visual-vocab-size 16"
    words = f"--preset tiny-dense tiny-8e {sizes} --rounds 1 --steps 1 --threads 1"
    # Without a name it is the benchmark of steps.
    rows = bench(*words.split(), "--plain", "--transformers", "--profile", "--output", output)
    names = ["tiny-dense", "tiny-8e", "plain_pytorch", "transformers_layers"]
    assert [row["contender"] for row in rows] == names
    for row in rows:
        assert set(row["phases_ms"]) == {"forward + backward", "optimizer"}
    with Image.open(output.with_suffix(".png")) as picture:
        assert picture.width > 500


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("steb", ("steb", "did you mean step")),
        ("moe_layer --width 100", ("--width 100", "multiple of 64")),
        ("moe_layer --tokens 100", ("--tokens 100", "multiple of 128")),
        ("moe_layer --experts 128 --width 64", ("--experts 128", "--width")),
        ("moe_layer --contenders our_dropless", ("our_dropless", "did you mean ours_dropless")),
        ("export --topk 3 --experts 2", ("--topk 3", "--experts 2")),
        ("export --contenders our", ("--contenders", "our")),
        ("export --short-text 200", ("--short-text 200", "up to 128 tokens")),
    ],
)
def test_wrong_options_are_one_line(words: str, names: tuple[str, ...]) -> None:
    run("-m", "megatron_vlmoe", "bench", *words.split()).refused(*names)


def test_ranks_step_together_and_one_reports(tmp_path: Path) -> None:
    output = tmp_path / "step.json"
    sizes = "--texts 2 --images 2 --pairs 2 --vocab-size 200 --visual-vocab-size 16"
    words = f"step --preset tiny-8e {sizes} --rounds 2 --steps 1 --threads 1"
    outcome = run("-m", "megatron_vlmoe", "bench", *words.split(), "--output", output, ranks=2)
    outcome.succeeded()
    assert outcome.stdout.count("rows: ") == 1 and outcome.stdout.count("| tiny-8e |") == 1
    (row,) = json.loads(output.read_text())
    assert len(row["rounds_ms"]) == 2


def test_time_by_number_of_ranks(tmp_path: Path) -> None:
    """The command starts torchrun by itself; experts are spread over its ranks, the dense model is whole on each."""
    output = tmp_path / "scaling.json"
    sizes = "--size tiny --base-samples 2 --vocab-size 200 --visual-vocab-size 16 --rounds 1"
    words = f"scaling --axis ranks --ranks 2 --layout expert {sizes} --threads 1"
    dense, moe = bench(*words.split(), "--output", output)
    assert (dense["contender"], moe["contender"]) == ("dense", "moe")
    assert dense["case"]["ranks"] == moe["case"]["ranks"] == 2 and moe["ratio_to_dense"]
    with Image.open(output.with_suffix(".png")) as picture:
        assert picture.width > 300


def test_a_benchmark_that_is_ended_leaves_no_ranks_and_no_files(tmp_path: Path) -> None:
    sizes = "--size tiny --base-samples 2 --vocab-size 200 --visual-vocab-size 16 --rounds 1000"
    words = f"scaling --axis ranks --ranks 2 {sizes} --threads 1 --output {tmp_path / 'rows.json'}"
    command = [sys.executable, "-m", "megatron_vlmoe", "bench", *words.split()]
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    started = subprocess.Popen(
        command, env=environment(TMPDIR=str(temporary)), stdout=subprocess.DEVNULL
    )
    try:
        below: list[psutil.Process] = []
        deadline = time.monotonic() + 120
        # torchrun and two ranks, which have begun to measure.
        while len(below) < 3 and time.monotonic() < deadline and started.poll() is None:
            time.sleep(0.2)
            below = psutil.Process(started.pid).children(recursive=True)
        assert len(below) >= 3
        started.terminate()
        assert started.wait(60) == TERMINATED
        _, alive = psutil.wait_procs(below, timeout=20)
        assert not alive
        assert not list(temporary.rglob("output.log"))
    finally:
        for process in [*below, started]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
