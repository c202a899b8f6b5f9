"""What the runs of a study left, as the rows of its summary.json: everything that table, figure and claims need."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from megatron_vlmoe.analysis.plots import Row, read_metrics
from megatron_vlmoe.analysis.studies.plan import PlannedRow, PlannedRun
from megatron_vlmoe.analysis.studies.study import Axis, Study
from megatron_vlmoe.config.command_line import merge_file
from megatron_vlmoe.config.errors import UserError
from megatron_vlmoe.config.schema import ObjectivesConfig, RunConfig
from megatron_vlmoe.planning.estimate import flops_per_step
from megatron_vlmoe.planning.parameters import parameter_counts
from megatron_vlmoe.runtime.files import write_text_atomic
from megatron_vlmoe.runtime.json_files import read_json, read_versioned
from megatron_vlmoe.train.checkpoint_files import (
    checkpoint_root,
    is_complete,
    is_tracked,
    iteration_name,
)

FORMAT_VERSION = 1
# What a summary has, and a row of it.
_FIELDS: Mapping[str, type] = {
    **{"scale": str, "command": str, "study": dict, "labels": list},
    **{"environments": list, "rows": list},
}
_ROW_FIELDS: Mapping[str, type] = {
    **{"label": str, "seed": int, "states": dict},
    **{"values": dict, "curve": dict, "training": dict},
}
RUN_FILE = "study.json"
"""What the runner notes in a run's folder: its command line, and machine and versions that it ran on."""

# Most points of a training curve in the summary.
_CURVE_POINTS = 60
# Logged steps on each side of one whose running median says what the loss would be without noise.
_MEDIAN_REACH = 5
_FEWEST_FOR_NOISE = 8
# A spike is so many robust standard deviations above the running median.
_SPIKE = 4.0
_SEGMENTS = ("mlm", "mim", "vlm_text", "vlm_image")


def is_finished(run: PlannedRun) -> bool:
    """Whether the checkpoint of the last step is there and what was measured then; of a fine-tuning, its scores."""
    if run.command == "finetune":
        return (run.folder / "metrics.json").is_file()
    root, steps = checkpoint_root(run.folder), run.config.train.steps
    if not is_tracked(root, steps) or not is_complete(root / iteration_name(steps)):
        return False
    try:
        rows = read_metrics(run.folder)
    except UserError:
        return False
    if not rows or rows[-1]["step"] != steps:
        return False
    return run.config.train.eval_steps == 0 or any(map(_is_held_out_loss, rows[-1]))


def summarize(
    study: Study, rows: Sequence[PlannedRow], about: Mapping[str, Any], failures: Mapping[Path, str]
) -> dict[str, Any]:
    """The content of summary.json, which is all that is needed to draw table and figure again.

    Args:
        about: scale, command line and the like.
        failures: why runs failed, by their folders.
    """
    environments: list[Any] = []
    done = [_summary_row(study, row, failures, environments) for row in rows]
    definition = dataclasses.asdict(dataclasses.replace(study, runs=()))
    labels = list(dict.fromkeys(row.label for row in rows))
    return {
        "format_version": FORMAT_VERSION,
        **about,
        "study": {**definition, "runs": []},
        "labels": labels,
        "environments": environments,
        "rows": done,
    }


def read_summary(path: Path) -> dict[str, Any]:
    """A summary.json. Raises DataError if it is missing, damaged or newer than this program."""

    def make(content: Any) -> dict[str, Any]:
        _check_types(content, _FIELDS, "")
        for place, row in enumerate(content["rows"], 1):
            where = f"rows[{place}]"
            _check_types(row, _ROW_FIELDS, where)
            for name, value in row["values"].items():
                if not isinstance(value, (int, float)):
                    raise TypeError(f"{where}: values: {name}")
            for curve, axes in (("curve", get_args(Axis)), ("training", ("step",))):
                if own := row[curve]:
                    _check_types(own, dict.fromkeys((*axes, *own), list), f"{where}: {curve}")
        return dict(content)

    return read_versioned(path, FORMAT_VERSION, "the summary of a study", "not found", make)


def _check_types(content: Mapping[str, Any], fields: Mapping[str, type], where: str) -> None:
    for field, kind in fields.items():
        if not isinstance(content[field], kind):
            raise TypeError(f"{where}: {field}")


def _summary_row(
    study: Study, row: PlannedRow, failures: Mapping[Path, str], environments: list[Any]
) -> dict[str, Any]:
    """One run and seed: what became of it, its values, and its curves."""
    states = {run.folder.name: _state(run, failures) for run in row.runs}
    pretraining = row.pretraining
    measured: dict[str, Any] = {"values": {}, "curve": {}, "training": {}}
    if states[pretraining.folder.name] == "finished":
        measured = measured_of(pretraining.folder)
    values = measured["values"]
    for name, run in row.tasks.items():
        if states[run.folder.name] == "finished":
            values |= task_scores(name, run.folder)
    scores = [values.get(name) for name in study.scores]
    known = [score for score in scores if score is not None]
    if known and len(known) == len(scores):
        values["average"] = statistics.fmean(known)
    places = []
    for run in row.runs:
        environment = noted_environment(run.folder)
        if environment not in environments:
            environments.append(environment)
        places.append(environments.index(environment))
    return {
        "label": row.label,
        "seed": row.seed,
        "states": states,
        "values": {name: _short(value) for name, value in values.items()},
        "curve": {name: list(map(_short, own)) for name, own in measured["curve"].items()},
        "training": {name: list(map(_short, own)) for name, own in measured["training"].items()},
        "environment": places[0],
    }


def noted_environment(folder: Path) -> dict[str, Any]:
    """Machine and versions that a run was started with; nothing of one that no study has started."""
    noted = folder / RUN_FILE
    return dict(read_json(noted)["environment"]) if noted.is_file() else {}


def _state(run: PlannedRun, failures: Mapping[Path, str]) -> str:
    if is_finished(run):
        return "finished"
    if run.folder in failures:
        return f"failed: {failures[run.folder]}"
    return "interrupted" if (run.folder / "metrics.jsonl").is_file() else "not run"


def _short(value: float | None) -> float | None:
    """Six significant digits: a summary is to be small."""
    return None if value is None else json.loads(f"{value:.6g}")


def task_scores(name: str, folder: Path) -> dict[str, float]:
    """The scores in a fine-tuning's metrics.json by `NAME/SPLIT/METRIC`; of several seeds in one run their means."""
    content = read_json(folder / "metrics.json")
    found = content.get("metrics") or {
        key: entry["mean"] for key, entry in content.get("summary", {}).items()
    }
    counts = ("/samples", "/unlabelled")
    return {
        f"{name}/{key}": float(value)
        for key, value in found.items()
        if not key.endswith(counts) and value is not None
    }


def measured_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Values, held-out curve and training curve of a finished pretraining, from its config.yaml and metrics.jsonl."""
    config = merge_file(RunConfig(), folder / "config.yaml")
    rows = read_metrics(folder)
    flops = flops_per_step(config)
    seconds = training_seconds(rows)
    held_out = [row for row in rows if any(map(_is_held_out_loss, row))]
    curve: dict[str, list[Any]] = {
        "step": [row["step"] for row in held_out],
        "flops": [flops * row["step"] for row in held_out],
        "seconds": [seconds[row["step"]] for row in held_out],
    }
    losses_of = [_held_out_losses(row, config.objectives) for row in held_out]
    for name in dict.fromkeys(name for own in losses_of for name in own):
        curve[name] = [own.get(name) for own in losses_of]
    logged = [row for row in rows if row.get("loss/total") is not None]
    steps, losses = [row["step"] for row in logged], [masked_training_loss(row) for row in logged]
    last = config.train.steps
    late = [row for row in logged if row["step"] > 0.75 * last]
    counts = parameter_counts(config)
    values: dict[str, float | None] = {
        **{name: own[-1] for name, own in curve.items() if own and name != "step"},
        "steps": last,
        "flops": flops * last,
        "seconds": seconds[rows[-1]["step"]],
        # The first steps of a process are slower.
        "seconds_per_step": statistics.median(row["step_seconds"] for row in logged)
        if logged
        else None,
        "parameters": counts.total,
        "parameters_per_token": counts.per_token,
        "memory_gb": max((row["memory_gb"] for row in logged), default=None),
        "train": _mean(masked_training_loss(row) for row in late),
        **_noise(steps, losses, [row["grad_norm"] for row in logged], config.optim.lr_warmup_steps),
        **_balance(late),
    }
    final = held_out[-1] if held_out else {}
    for key, value in final.items():
        if key.startswith(("acc/", "eval/grounding/", "eval/recall_at_1/")):
            values[key.removeprefix("eval/")] = value
        elif match := re.fullmatch(r"eval/moe/(text|vision|shared)/dropped_fraction/(\w+)", key):
            values[f"eval_dropped/{match[2]}"] = value
    if values.get("total") is not None and values["train"] is not None:
        values["overfit"] = values["total"] - values["train"]  # type: ignore[operator]
    known = {name: value for name, value in values.items() if value is not None}
    thinned = {"step": _thinned(steps), "train": _thinned(losses)}
    return {"values": known, "curve": curve, "training": thinned}


def _is_held_out_loss(key: str) -> bool:
    return key.startswith("eval/loss/") and not key.endswith(("_foreground", "_background"))


def _held_out_losses(row: Row, objectives: ObjectivesConfig) -> dict[str, float | None]:
    """Held-out losses of an evaluation: each objective's, `vlm` of both halves of pairs, and `total`, the sum with
    the weights of training. What is not a finite number is None, and so is a sum with it."""
    found = {key.removeprefix("eval/loss/"): row[key] for key in row if _is_held_out_loss(key)}
    weights = {name: getattr(objectives, f"{name}_weight", 1.0) for name in found}
    sums = {"total": _weighted_sum(found, weights)}
    if "vlm_text" in found and "vlm_image" in found:
        sums["vlm"] = _weighted_sum(found, {"vlm_text": 1.0, "vlm_image": 1.0})
    return found | sums


def _weighted_sum(
    numbers: Mapping[str, float | None], weights: Mapping[str, float]
) -> float | None:
    known = [
        weight * value for name, weight in weights.items() if (value := numbers[name]) is not None
    ]
    return sum(known) if len(known) == len(weights) else None


def masked_training_loss(row: Row) -> float:
    """The training loss of a logged step without the auxiliary losses, which differ from run to run."""
    auxiliary = sum(value for key, value in row.items() if key.startswith("loss/aux/"))
    return float(row["loss/total"] - auxiliary)


def training_seconds(rows: Sequence[Row]) -> dict[int, float]:
    """Seconds of training, without evaluation and saving, up to each step with metrics."""
    # A step that was evaluated alone belongs to the interval that was logged next.
    rates, rate = [], 0.0
    for row in reversed(rows):
        rate = row.get("step_seconds") or rate
        rates.append(rate)
    total, last = 0.0, 0
    seconds: dict[int, float] = {}
    for row, rate in zip(rows, reversed(rates)):
        total += rate * (row["step"] - last)
        last = row["step"]
        seconds[last] = total
    return seconds


def _noise(
    steps: Sequence[int], losses: Sequence[float], norms: Sequence[float | None], warmup: int
) -> dict[str, float]:
    """How unevenly a run trained after its warm-up; nothing where too few steps were logged.

    `roughness` is the standard deviation of the logged training losses from their running median over eleven logged
    steps, `spikes` counts losses more than four robust standard deviations above it, and `gradient_peak` is the 95th
    percentile of the gradient norm over its median.
    """
    series = [loss for step, loss in zip(steps, losses) if step > warmup]
    # A step that fp16 skips has none.
    ordered = sorted(norm for step, norm in zip(steps, norms) if step > warmup and norm is not None)
    if min(len(series), len(ordered)) < _FEWEST_FOR_NOISE:
        return {}
    deviations = [
        loss - statistics.median(series[max(0, place - _MEDIAN_REACH) : place + _MEDIAN_REACH + 1])
        for place, loss in enumerate(series)
    ]
    # Of a normal distribution, 1.4826 times the median absolute deviation is the standard deviation.
    robust = 1.4826 * statistics.median(map(abs, deviations))
    peak = ordered[min(math.ceil(0.95 * len(ordered)), len(ordered)) - 1]
    return {
        "roughness": statistics.pstdev(deviations),
        "spikes": float(sum(value > _SPIKE * robust for value in deviations)),
        "gradient_peak": peak / max(statistics.median(ordered), 1e-12),
    }


def _balance(late: Sequence[Row]) -> dict[str, float | None]:
    """Load and dropped tokens of the experts over the last quarter of training; nothing for a dense run."""
    pools = sorted(
        {match[1] for row in late for key in row if (match := re.match(r"moe/(\w+)/load_max", key))}
    )
    if not pools:
        return {}

    def mean(key: str) -> float | None:
        return _mean(row[key] for row in late if row.get(key) is not None)

    values: dict[str, float | None] = {}
    for pool in pools:
        values[f"dropped_{pool}"] = mean(f"moe/{pool}/dropped_fraction")
        values[f"load_max_{pool}"] = mean(f"moe/{pool}/load_max")
        values[f"router_entropy_{pool}"] = mean(f"moe/{pool}/router_entropy")
        values[f"dead_experts_{pool}"] = mean(f"moe/{pool}/dead_experts")
    together: Mapping[str, Callable[[Sequence[float]], float]] = {
        "dropped": statistics.fmean,
        "load_max": max,
        "dead_experts": sum,
    }
    for name, function in together.items():
        own = [value for pool in pools if (value := values[f"{name}_{pool}"]) is not None]
        values[name] = function(own) if own else None
    # Pairs pass the VL-FFN's experts too, in blocks of their own; the figure is about the others.
    for segment in _SEGMENTS:
        for key in dict.fromkeys(key for row in late for key in row):
            pattern = rf"moe/(?!vl/)\w+(?:/layer_(\d+))?/dropped_fraction/{segment}"
            if match := re.fullmatch(pattern, key):
                block = f"/block_{match[1]}" if match[1] else ""
                values[f"dropped/{segment}{block}"] = mean(key)
    return values


def _mean(numbers: Iterable[float]) -> float | None:
    found = list(numbers)
    return statistics.fmean(found) if found else None


def _thinned(numbers: Sequence[float]) -> list[float]:
    """Means of as many neighbours as make a curve of few enough points."""
    width = math.ceil(len(numbers) / _CURVE_POINTS) or 1
    return [
        statistics.fmean(numbers[start : start + width]) for start in range(0, len(numbers), width)
    ]


def write_summary(summary: Mapping[str, Any], path: Path) -> None:
    """Writes summary.json, a row of a run on a line, so that versions of it can be compared."""
    lines = [
        f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}"
        for key, value in summary.items()
        if key != "rows"
    ]
    rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in summary["rows"])
    lines.append(f'"rows": [\n{rows}\n]')
    write_text_atomic(path, "{" + ",\n".join(lines) + "}\n")
