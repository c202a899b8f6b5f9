"""How the time of a step, or of one layer of experts, grows with experts, tokens, length of texts and ranks.

A case is a run of the benchmark `step` or `moe_layer` in which one number is another, beside its own dense model.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from megatron_vlmoe.benchmarks import moe_layer, step
from megatron_vlmoe.benchmarks.compare import Row, device_name, say
from megatron_vlmoe.benchmarks.options import ScalingOptions
from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.config.presets import preset
from megatron_vlmoe.runtime.ranks import environment_world_size, run_on_ranks

VALUES = {"experts": "experts", "tokens": "samples", "sequence": "lengths", "ranks": "ranks"}
"""The option that has the values of an axis."""
LABELS = {
    "experts": "experts of a modality",
    "tokens": "tokens",
    "sequence": "tokens of a text",
    "ranks": "ranks",
}


def run(options: ScalingOptions) -> Iterator[list[Row]]:
    """Two rows of each case, of the dense contender and of ours.

    Started by torchrun, it measures at that number of ranks; else it starts torchrun for each of `ranks`.

    Raises:
        ConfigError: if the options do not go together, or a run on several ranks fails.
    """
    check(options)
    on_ranks = "RANK" in os.environ
    for axis in options.axis:
        values = getattr(options, VALUES[axis])
        for value in (environment_world_size(),) if on_ranks else values:
            say(f"{axis} {value}")
            if axis == "ranks" and not on_ranks:
                yield _under_torchrun(options, value)
            elif rows := _case(options, axis, value):
                yield rows


def check(options: ScalingOptions) -> None:
    """Raises ConfigError if the options do not go together."""
    if "RANK" in os.environ and options.axis != ("ranks",):
        raise ConfigError("under torchrun --axis must be ranks alone")
    if options.work == "layer":
        for axis in options.axis:
            if axis not in ("experts", "tokens"):
                raise ConfigError(f"--axis {axis} needs --work step: a layer does not depend on it")
        width, experts = _width(options), max((*options.experts, options.base_experts))
        if experts > width:
            raise ConfigError(f"--experts {experts}: a layer of {options.size} has at most {width}")
    if options.layout == "expert":
        if "ranks" not in options.axis:
            raise ConfigError("--layout expert needs --axis ranks: it spreads experts over them")
        for ranks in (environment_world_size(),) if "RANK" in os.environ else options.ranks:
            if options.base_experts % ranks:
                raise ConfigError(
                    f"--layout expert: --base-experts {options.base_experts} is no multiple of --ranks {ranks}"
                )
    for length in options.lengths:
        if max(options.lengths) % length:
            raise ConfigError(f"--lengths {length} does not divide the longest of them")


def _width(options: ScalingOptions) -> int:
    return preset(f"{options.size}-dense", "--size").model.hidden_size


def _case(options: ScalingOptions, axis: str, value: int) -> list[Row]:
    """The rows of one case in this process; none on another rank than the first."""
    experts = value if axis == "experts" else options.base_experts
    samples = value if axis == "tokens" else options.base_samples
    length = value if axis == "sequence" else 0
    if options.work == "layer":
        case = moe_layer.Case(
            moe_layer.TEXT_LENGTH * samples, _width(options), experts, 1, "balanced", "main_grad"
        )
        names = ("dense", f"ours_{options.dispatcher}")
        (rows,) = moe_layer.run([case], names, options.rounds, options.precision)
        for row in rows:
            row.items = case.tokens
    else:
        rows = _steps(options, experts, samples, length)
    for row, name in zip(rows, ("dense", "moe")):
        row.contender = name
        row.case = {
            "axis": axis,
            "work": options.work,
            "size": options.size,
            "experts": experts,
            "tokens": row.items,
            **({"length": length} if length else {}),
            "ranks": environment_world_size(),
            "threads": torch.get_num_threads(),
            "precision": options.precision,
        }
    return rows


def _steps(options: ScalingOptions, experts: int, samples: int, length: int) -> list[Row]:
    """Rows of a dense and a sparse preset; with a `length` on texts alone, always as many tokens."""
    texts, others = samples, samples
    extra = ["--moe.dispatcher", options.dispatcher]
    if length:
        texts, others = samples * max(options.lengths) // length, 0
        extra += ["--model.text_length", str(length)]
    if options.layout == "expert":
        extra += ["--parallel.expert_model_parallel_size", str(environment_world_size())]
    steps = step.StepOptions(
        presets=(f"{options.size}-dense", f"{options.size}-8e"),
        plain=False,
        texts=texts,
        images=others,
        pairs=others,
        rounds=options.rounds,
        steps=options.steps,
        warmup=1,
        precision=options.precision,
        vocab_size=options.vocab_size,
        visual_vocab_size=options.visual_vocab_size,
        caption_mask_slots=16,
        experts=experts,
    )
    return [row for rows in step.run(steps, extra) for row in rows]


def _under_torchrun(options: ScalingOptions, ranks: int) -> list[Row]:
    """The rows of this benchmark on so many ranks, each with as many threads as the most ranks leave it."""
    threads = min(torch.get_num_threads(), (os.cpu_count() or 1) // max(options.ranks))
    words = ["bench", "scaling", "--threads", str(max(threads, 1))]
    own = replace(options, axis=("ranks",), ranks=(ranks,))
    for field in dataclasses.fields(own):
        value: Any = getattr(own, field.name)
        values = value if isinstance(value, tuple) else (value,)
        words += [f"--{field.name.replace('_', '-')}", *map(str, values)]
    folder = Path(tempfile.mkdtemp())
    output = folder / "rows.json"
    try:
        reason = run_on_ranks(ranks, [*words, "--output", str(output)], folder / "output.log")
    except BaseException:  # ended by a signal
        shutil.rmtree(folder)
        raise
    if reason:
        # The folder stays: the reason may name the log in it.
        raise ConfigError(f"--ranks {ranks}: {reason}")
    records = json.loads(output.read_text())
    shutil.rmtree(folder)
    return [Row.read(record, record["case"]["tokens"]) for record in records]


def draw(rows: Sequence[Row], path: Path) -> None:
    """A picture of the median time against every axis, with the fastest and slowest round."""
    axes = list(dict.fromkeys(row.case["axis"] for row in rows))
    figure = Figure(figsize=(4.5 * len(axes), 3.5), layout="constrained")
    for axis, panel in zip(axes, figure.subplots(1, len(axes), squeeze=False)[0]):
        for name in ("dense", "moe"):
            own = [row for row in rows if row.case["axis"] == axis and row.contender == name]
            found = [(row.case, row.record()) for row in own if row.rounds_ms]
            middle = [record["median_ms"] for _, record in found]
            below = [record["median_ms"] - record["min_ms"] for _, record in found]
            above = [record["max_ms"] - record["median_ms"] for _, record in found]
            places = [case["length" if axis == "sequence" else axis] for case, _ in found]
            panel.errorbar(places, middle, [below, above], marker="o", capsize=3, label=name)
        panel.set_xlabel(LABELS[axis])
        panel.set_ylim(bottom=0.0)
    first = figure.axes[0]
    first.set_ylabel(f"milliseconds of a {rows[0].case['work']}")
    first.legend(frameon=False)
    figure.suptitle(f"{rows[0].case['size']}, {device_name()}", fontsize=9)
    figure.savefig(path, dpi=120)
