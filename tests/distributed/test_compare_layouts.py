"""tools/compare_layouts.py through the real command line, and its arithmetic."""

from __future__ import annotations

import math

import pytest
from commands import REPOSITORY, Outcome, run
from helpers import SMALL

from megatron_vlmoe.analysis.layouts import largest_difference, parse_layout
from megatron_vlmoe.config.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "world", "options"),
    [
        ("tp1", 1, "tensor 1"),
        ("tp2", 2, "tensor 2"),
        ("ep4", 4, "expert 4"),
        ("dp2", 2, ""),
        ("tp2,ep2", 2, "tensor 2 expert 2"),
        ("tp2,ep4", 4, "tensor 2 expert 4"),
        ("tp2,ep2,dp2", 4, "tensor 2 expert 2"),
        ("pp2,vpp2", 2, "pipeline 2 virtual_pipeline 2"),
        ("pp2,ep2", 4, "pipeline 2 expert 2"),
    ],
)
def test_layout_names(name: str, world: int, options: str) -> None:
    parsed = parse_layout(name)
    assert parsed.world_size == world
    short = [
        word.removeprefix("--parallel.").removesuffix("_model_parallel_size")
        for word in parsed.options
    ]
    assert " ".join(short) == options


@pytest.mark.parametrize("name", ["tp", "tp0", "cp2", "tp2,tp4", "", "tp2 ep2"])
def test_bad_layout_names(name: str) -> None:
    with pytest.raises(ConfigError, match="--layouts"):
        parse_layout(name)


def test_largest_difference() -> None:
    first = {1: {"loss/total": 2.0, "grad_norm": 4.0}, 2: {"loss/total": 1.0, "grad_norm": 5.0}}
    second = {1: {"loss/total": 2.0, "grad_norm": 4.4}, 2: {"loss/total": 1.05, "grad_norm": 5.0}}
    assert largest_difference(first, first) == (0.0, "no difference")
    value, where = largest_difference(second, first)
    assert value == pytest.approx(0.1) and where == "grad_norm at step 1"
    second[2]["grad_norm"] = math.nan
    assert largest_difference(second, first) == (math.inf, "grad_norm at step 2")
    del second[2]
    assert largest_difference(second, first)[0] == math.inf


def compare(*words: str) -> Outcome:
    command = [REPOSITORY / "tools/compare_layouts.py", "--preset", "tiny-8e", *SMALL]
    return run(*command, "--random-data", *words, timeout=400, environ={"CUDA_VISIBLE_DEVICES": ""})


def test_two_layouts_from_one_seed_checkpoint() -> None:
    done = compare("--steps", "2", "--layouts", "tp1", "tp2,ep2").succeeded()
    rows = [line.split() for line in done.stdout.splitlines() if "loss/total" in line]
    assert [row[0] for row in rows[:2]] == ["1", "2"] and len(rows[0]) == 4
    assert float(rows[0][2]) == pytest.approx(float(rows[0][3]), rel=1e-5)
    assert "tp2,ep2: largest relative difference to tp1" in done.stdout


def test_refused_layout_is_one_line() -> None:
    done = compare("--layouts", "pp3")
    assert done.code == 2
    assert done.stderr.splitlines()[-1].startswith("error: layout pp3: ")
    assert "pipeline_model_parallel_size" in done.stderr
