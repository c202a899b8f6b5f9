"""Runs one configuration at several parallel layouts from one seed checkpoint and compares what they log."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Sequence

from megatron_vlmoe.analysis.plots import read_metrics
from megatron_vlmoe.config.command_line import parse_run
from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.planning.validate import validate
from megatron_vlmoe.runtime.ranks import run_on_ranks

OPTIONS = {
    "tp": "--parallel.tensor_model_parallel_size",
    "pp": "--parallel.pipeline_model_parallel_size",
    "vpp": "--parallel.virtual_pipeline_model_parallel_size",
    "ep": "--parallel.expert_model_parallel_size",
}
Metrics = dict[int, dict[str, float]]


@dataclass(frozen=True)
class NamedLayout:
    """One layout by its name on the command line: processes that it needs, and `pretrain` options that set it."""

    name: str
    world_size: int
    options: tuple[str, ...]


def parse_layout(name: str) -> NamedLayout:
    """Reads `tp2`, `pp2,vpp2`, `tp2,ep2,dp2`; without `dp`, as few processes as the sizes need.

    Raises:
        ConfigError: if a part is not one of tp, pp, vpp, ep, dp with a number, or comes twice.
    """
    sizes: dict[str, int] = {}
    for part in name.split(","):
        match = re.fullmatch(r"(tp|pp|vpp|ep|dp)([1-9]\d*)", part)
        if match is None or match.group(1) in sizes:
            raise ConfigError(
                f"--layouts {name}: {part!r} is not one of tpN, ppN, vppN, epN, dpN, or comes twice"
            )
        sizes[match.group(1)] = int(match.group(2))
    tensor, expert = sizes.get("tp", 1), sizes.get("ep", 1)
    # Expert parallelism spans the tensor- and data-parallel ranks of a pipeline stage.
    data = sizes.pop("dp", expert // math.gcd(expert, tensor))
    options = [word for key, size in sizes.items() for word in (OPTIONS[key], str(size))]
    return NamedLayout(name, tensor * sizes.get("pp", 1) * data, tuple(options))


def compare_layouts(
    names: Sequence[str], steps: int, words: Sequence[str], folder: Path, command: str
) -> float:
    """Trains at every layout, prints losses and gradient norms side by side, and how far each is from the first.

    Every step is logged and no token dropped: capacity is a property of a rank, so dropped tokens differ between
    layouts; a capacity factor of the number of experts has room for all.

    Args:
        names: the layouts; the first is the reference, and starts the others with its seed checkpoint.
        steps: steps to run.
        words: all other options of the user, which win.
        folder: where the runs go; must hold none.
        command: `pretrain`, or `pretrain-random`, which needs no data options.

    Returns:
        The largest relative difference.

    Raises:
        ConfigError: if a layout does not fit, before the first run; if a run fails, with its own error line.
        MetricsError: if what it logged cannot be read.
    """
    layouts = [parse_layout(name) for name in names]
    moe = parse_run("pretrain", [word for word in words if word != "--dry-run"]).config.moe
    fixed = {
        "--train.steps": steps,
        "--log.interval": 1,
        "--train.eval_steps": 0,
        "--checkpoint.save_interval": 0,
        "--optim.lr_warmup_steps": 0,
        "--moe.capacity_factor": max(
            moe.num_vision_experts, moe.num_text_experts, moe.num_vl_experts, 1
        ),
    }
    given = {word.partition("=")[0] for word in words}
    words = [*words, *(str(w) for pair in fixed.items() if pair[0] not in given for w in pair)]
    for layout in layouts:
        try:
            validate(parse_run("pretrain", [*words, *layout.options]).config, layout.world_size)
        except ConfigError as error:
            raise ConfigError(f"layout {layout.name}: {error}") from None
    seed = folder / "0" / "checkpoints" / "iter_0000000"
    runs: dict[str, Metrics] = {}
    for index, layout in enumerate(layouts):
        print(f"running {layout.name} on {layout.world_size} process(es)", flush=True)
        start = ["--load", str(seed)] if index else ["--save-initial"]
        runs[layout.name] = _run(layout, [command, *words, *start], folder / str(index))
    width = max(14, *(len(name) + 2 for name in runs))
    print("step  " + f"{'metric':<12}" + "".join(f"{name:>{width}}" for name in runs))
    reference = runs[layouts[0].name]
    for step in reference:
        for key in ("loss/total", "grad_norm"):
            values = (run.get(step, {}).get(key, math.nan) for run in runs.values())
            cells = "".join(f"{value:>{width}.7f}" for value in values)
            print(f"{step:>4}  {key:<12}{cells}")
    worst = 0.0
    for layout in layouts[1:]:
        difference, where = largest_difference(runs[layout.name], reference)
        worst = max(worst, difference)
        print(
            f"{layout.name}: largest relative difference to {layouts[0].name} {difference:.2e} ({where})"
        )
    return worst


def _run(layout: NamedLayout, words: Sequence[str], folder: Path) -> Metrics:
    """Losses and gradient norm of every training step of a run under torchrun."""
    folder.mkdir(parents=True)
    words = [*words, *layout.options, "--save", str(folder)]
    reason = run_on_ranks(layout.world_size, words, folder / "output.log")
    if reason:
        raise ConfigError(f"layout {layout.name}: {reason}")
    return {
        row["step"]: {
            key: math.nan if value is None else value
            for key, value in row.items()
            if key.startswith("loss/") or key == "grad_norm"
        }
        for row in read_metrics(folder)
        if "grad_norm" in row
    }


def largest_difference(actual: Metrics, reference: Metrics) -> tuple[float, str]:
    """Largest relative difference of any loss or gradient norm at any step, and where it is."""
    if {step: set(row) for step, row in actual.items()} != {
        step: set(row) for step, row in reference.items()
    }:
        return math.inf, "different steps or metrics were logged"
    worst, where = 0.0, "no difference"
    for step, row in reference.items():
        for key, expected in row.items():
            error = abs(actual[step][key] - expected) / max(abs(expected), 1e-12)
            if not error <= worst:
                worst, where = (error if error == error else math.inf), f"{key} at step {step}"
    return worst, where
