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
from megatron_vlmoe.analysis.studies.metrics import SEGMENTS
from megatron_vlmoe.analysis.studies.plan import PlannedRow, PlannedRun
from megatron_vlmoe.analysis.studies.study import Axis, Study
from megatron_vlmoe.config.command_line import merge_file
from megatron_vlmoe.config.errors import DataError, MetricsError, UserError
from megatron_vlmoe.config.schema import ObjectivesConfig, RunConfig
from megatron_vlmoe.planning.estimate import flops_per_step
from megatron_vlmoe.planning.parameters import parameter_counts
from megatron_vlmoe.runtime.files import write_text_atomic
from megatron_vlmoe.runtime.json_files import is_number, read_json, read_versioned
from megatron_vlmoe.stream.block_plan import block_plans
from megatron_vlmoe.stream.layout import StreamLayout
from megatron_vlmoe.stream.sizes import expert_capacity
from megatron_vlmoe.train.checkpoint_files import (
    checkpoint_root,
    is_complete,
    is_tracked,
    iteration_name,
)

FORMAT_VERSION = 1
# What a summary has, and a row of it.
_FIELDS: Mapping[str, type] = {
    **{"format_version": int, "scale": str, "command": str, "study": dict, "labels": list},
    **{"environments": list, "rows": list},
}
_ROW_FIELDS: Mapping[str, type] = {
    **{"label": str, "seed": int, "states": dict},
    **{"values": dict, "curve": dict, "training": dict},
}
RUN_FILE = "study.json"
"""What the runner notes in a run's folder: its command line, machine and versions, and why it failed if it did."""

# Most points of a training curve in the summary.
_CURVE_POINTS = 60
# Logged steps on each side of one whose running median says what the loss would be without noise.
_MEDIAN_REACH = 5
_FEWEST_FOR_NOISE = 8
# A spike is so many robust standard deviations above the running median.
_SPIKE = 4.0
# What every logged step has.
_LOGGED = ("grad_norm", "step_seconds", "memory_gb")


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

    A run whose files cannot be read is a failed row, with the reason as its state.

    Args:
        about: scale, command line and the like.
        failures: why runs of this command failed, by their folders; of former commands the folders say it.
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
        labels = content["labels"]
        if not all(isinstance(label, str) for label in labels) or len(set(labels)) < len(labels):
            raise TypeError("labels: expected different texts")
        if not all(isinstance(noted, dict) for noted in content["environments"]):
            raise TypeError("environments: expected objects")
        known: set[tuple[str, int]] = set()
        for place, row in enumerate(content["rows"], 1):
            where = f"rows[{place}]"
            _check_row(row, where)
            name = row["label"], row["seed"]
            if row["label"] not in labels:
                raise ValueError(f"{where}: label {row['label']} is not among the labels")
            if name in known:
                raise ValueError(f"{where}: {row['label']} with seed {row['seed']} is there twice")
            known.add(name)
        return dict(content)

    return read_versioned(path, FORMAT_VERSION, "the summary of a study", "not found", make)


def _check_row(row: Any, where: str) -> None:
    """Raises TypeError or ValueError for what is no row of a summary."""
    _check_types(row, _ROW_FIELDS, where)
    for folder, state in row["states"].items():
        if not isinstance(state, str):
            raise TypeError(f"{where}: states: {folder}: expected a text")
    for name, value in row["values"].items():
        if not is_number(value):
            raise TypeError(f"{where}: values: {name}: expected a number")
    for curve, axes in (("curve", get_args(Axis)), ("training", ("step", "train"))):
        own = row[curve]
        if not own:
            continue
        _check_types(own, dict.fromkeys((*axes, *own), list), f"{where}: {curve}")
        for name, numbers in own.items():
            here = f"{where}: {curve}: {name}"
            # Held-out losses have gaps, where one was not finite.
            may_lack = curve == "curve" and name not in axes
            if not all(is_number(number) or (may_lack and number is None) for number in numbers):
                raise TypeError(f"{here}: expected numbers")
            if len(numbers) != len(own["step"]):
                raise ValueError(f"{here}: as many as steps are expected")


def _check_types(content: Any, fields: Mapping[str, type], where: str) -> None:
    prefix = f"{where}: " if where else ""
    if not isinstance(content, dict):
        raise TypeError(f"{prefix}expected an object")
    for field, kind in fields.items():
        if field not in content:
            raise ValueError(f"{prefix}{field} is missing")
        if not isinstance(content[field], kind) or isinstance(content[field], bool):
            raise TypeError(f"{prefix}{field}: wrong type")


def _summary_row(
    study: Study, row: PlannedRow, failures: Mapping[Path, str], environments: list[Any]
) -> dict[str, Any]:
    """One run and seed: what became of it, its values, and its curves."""
    pretraining = row.pretraining
    states: dict[str, str] = {}
    measured: dict[str, Any] = {"values": {}, "curve": {}, "training": {}}
    scores_of: dict[str, float] = {}
    tasks = {run.folder: name for name, run in row.tasks.items()}
    for run in row.runs:
        state = _state(run, failures)
        try:
            if state == "finished" and run is pretraining:
                measured = measured_of(run.folder)
                if (step := measured["diverged_at"]) is not None:
                    state = f"diverged: a loss is not finite at step {step}"
            elif state == "finished":
                scores_of |= task_scores(tasks[run.folder], run.folder)
        except UserError as error:
            state = f"failed: {error}"
        states[run.folder.name] = state
    values = measured["values"] | scores_of
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
        **{
            kind: {
                name: own if name == "step" else list(map(_short, own))
                for name, own in measured[kind].items()
            }
            for kind in ("curve", "training")
        },
        "environment": places[0],
    }


def noted_environment(folder: Path) -> dict[str, Any]:
    """Machine and versions that a run was started with; nothing of one that no study has started."""
    environment = _note(folder).get("environment")
    return environment if isinstance(environment, dict) else {}


def _note(folder: Path) -> dict[str, Any]:
    """What the runner has noted of a run; nothing if the file is not as it was written, for no result is in it."""
    try:
        content = read_json(folder / RUN_FILE)
    except DataError:
        return {}
    return content if isinstance(content, dict) else {}


def _state(run: PlannedRun, failures: Mapping[Path, str]) -> str:
    """What became of a run, in a word, and for a failed one the reason after a colon."""
    if is_finished(run):
        return "finished"
    reason = failures.get(run.folder) or _note(run.folder).get("failed")
    if isinstance(reason, str):
        return f"failed: {reason}"
    if run.after is not None and _state(run.after, failures).startswith("failed"):
        return f"failed: {starts_from_failed(run.after)}"
    if not (run.folder / "metrics.jsonl").is_file():
        return "not run"
    try:
        rows = read_metrics(run.folder)
    except UserError as error:
        return f"failed: {error}"
    # Whether it goes on right now, a job of a cluster does not tell.
    return f"unfinished: after step {rows[-1]['step'] if rows else 0}"


def starts_from_failed(run: PlannedRun) -> str:
    """Why a run has failed that starts from this one."""
    return f"{run.folder.name}, which it starts from, failed"


def _short(value: float | None) -> float | None:
    """Six significant digits of what is measured, since a summary is to be small; a count is exact."""
    return value if value is None or isinstance(value, int) else json.loads(f"{value:.6g}")


def task_scores(name: str, folder: Path) -> dict[str, float]:
    """The scores in a fine-tuning's metrics.json by `NAME/SPLIT/METRIC`; of several seeds in one run their means.

    Raises:
        DataError: the file is missing or damaged.
    """
    path = folder / "metrics.json"
    content = read_json(path)
    try:
        found = content.get("metrics") or {
            key: entry["mean"] for key, entry in content["summary"].items()
        }
        items = list(found.items())
    except (AttributeError, KeyError, TypeError):
        raise DataError(f"{path}: damaged: not the scores of a fine-tuning") from None
    counts = ("/samples", "/unlabelled")
    scores = {k: value for k, value in items if not k.endswith(counts) and value is not None}
    for key, value in scores.items():
        if not is_number(value):
            raise DataError(f"{path}: damaged: {key} is not a number")
    return {f"{name}/{key}": float(value) for key, value in scores.items()}


def measured_of(folder: Path) -> dict[str, Any]:
    """Values, held-out curve and training curve of a finished pretraining, from its config.yaml and metrics.jsonl.

    What a loss or another number that is not finite would enter is left out. `diverged_at` is the first step with a
    training loss that is not finite, or the last one if a held-out loss is not finite there; else None.

    Raises:
        UserError: one of the files is missing or damaged, or a logged step lacks a number.
    """
    config = merge_file(RunConfig(), folder / "config.yaml")
    rows = read_metrics(folder)
    logged = [row for row in rows if "loss/total" in row]
    for row in logged:
        for key in _LOGGED:
            if key not in row or (row[key] is None and key != "grad_norm"):
                path = folder / "metrics.jsonl"
                raise MetricsError(f"{path}: step {row['step']} has no {key}")
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
    steps, losses = [row["step"] for row in logged], [masked_training_loss(row) for row in logged]
    broken = [step for step, loss in zip(steps, losses) if loss is None]
    if held_out and None in losses_of[-1].values():
        broken.append(held_out[-1]["step"])
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
        **_balance(config, late),
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
    points = [
        (round(step, 2), loss)
        for step, loss in zip(_thinned(steps), _thinned(losses))
        if step is not None and loss is not None
    ]
    training = {"step": [step for step, _ in points], "train": [loss for _, loss in points]}
    diverged_at = min(broken, default=None)
    return {"values": known, "curve": curve, "training": training, "diverged_at": diverged_at}


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


def masked_training_loss(row: Row) -> float | None:
    """The training loss of a logged step without the auxiliary losses, which differ from run to run.

    None where one of them is not finite.
    """
    auxiliary = [value for key, value in row.items() if key.startswith("loss/aux/")]
    if row["loss/total"] is None or None in auxiliary:
        return None
    return float(row["loss/total"] - sum(auxiliary))


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
    steps: Sequence[int],
    losses: Sequence[float | None],
    norms: Sequence[float | None],
    warmup: int,
) -> dict[str, float]:
    """How unevenly a run trained after its warm-up; nothing where too few steps were logged, or a loss is not finite.

    `roughness` is the standard deviation of the logged training losses from their running median over eleven logged
    steps, `spikes` counts losses more than four robust standard deviations above it, and `gradient_peak` is the 95th
    percentile of the gradient norm over its median.
    """
    after = [loss for step, loss in zip(steps, losses) if step > warmup]
    series = [loss for loss in after if loss is not None]
    # A step that fp16 skips has none.
    ordered = sorted(norm for step, norm in zip(steps, norms) if step > warmup and norm is not None)
    if len(series) < len(after) or min(len(series), len(ordered)) < _FEWEST_FOR_NOISE:
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


def _balance(config: RunConfig, late: Sequence[Row]) -> dict[str, float | None]:
    """Load and dropped tokens of the experts over the last quarter of training; nothing for a dense run."""
    pools = sorted(
        {match[1] for row in late for key in row if (match := re.match(r"moe/(\w+)/load_max", key))}
    )
    if not pools:
        return {}

    def mean(key: str) -> float | None:
        return _mean(row[key] for row in late if key in row)

    values: dict[str, float | None] = {}
    for pool in pools:
        values[f"dropped_{pool}"] = mean(f"moe/{pool}/dropped_fraction")
        values[f"load_max_{pool}"] = mean(f"moe/{pool}/load_max")
        values[f"router_entropy_{pool}"] = mean(f"moe/{pool}/router_entropy")
        values[f"dead_experts_{pool}"] = mean(f"moe/{pool}/dead_experts")
    values["dropped"] = _mean(_dropped_of_all(config, row) for row in late)
    together: Mapping[str, Callable[[Sequence[float]], float]] = {
        "load_max": max,
        "dead_experts": sum,
    }
    for name, function in together.items():
        own = [value for pool in pools if (value := values[f"{name}_{pool}"]) is not None]
        values[name] = function(own) if own else None
    # Pairs pass the VL-FFN's experts too, in blocks of their own; the figure is about the others.
    for segment in SEGMENTS:
        for key in dict.fromkeys(key for row in late for key in row):
            pattern = rf"moe/(?!vl/)\w+(?:/layer_(\d+))?/dropped_fraction/{segment}"
            if match := re.fullmatch(pattern, key):
                block = f"/block_{match[1]}" if match[1] else ""
                values[f"dropped/{segment}{block}"] = mean(key)
    return values


def _dropped_of_all(config: RunConfig, row: Row) -> float | None:
    """Share of the assignments of all pools that found no place in a logged interval; None if that was not logged.

    The log has each pool's share and its expert slots per assignment. What slots a pool has follows from the options,
    so that its assignments are known but for the number of ranks and micro-batches, which is the same for all pools.
    """
    moe, parallel = config.moe, config.parallel
    layout = StreamLayout.of(config).shard(parallel.tensor_model_parallel_size)
    slots: dict[str, int] = {}
    for plan in block_plans(config.model, moe):
        # A pool without tokens in a block counts nothing there.
        for pool in (own for own in plan.pools if own.num_tokens(layout)):
            capacity = 1
            # Else there is a place for every assignment.
            if moe.dispatcher != "dropless" and moe.capacity_factor > 0.0:
                capacity = expert_capacity(
                    *(pool.num_tokens(layout), pool.num_experts, moe.topk, moe.capacity_factor),
                    moe.capacity_multiple_of,
                )
            slots[pool.name] = slots.get(pool.name, 0) + pool.num_experts * capacity
    places = {name: row.get(f"moe/{name}/effective_capacity_factor") for name in slots}
    shares = {name: row.get(f"moe/{name}/dropped_fraction") for name in slots}
    known = [
        (slots[name] / each, share)
        for name, each in places.items()
        if each and (share := shares[name]) is not None
    ]
    if not known or len(known) < len(slots):
        return None
    total = sum(assignments for assignments, _ in known)
    return sum(assignments * share for assignments, share in known) / total


def _mean(numbers: Iterable[float | None]) -> float | None:
    """None if there are no numbers, or one of them is not finite."""
    found = list(numbers)
    known = [number for number in found if number is not None]
    return statistics.fmean(known) if known and len(known) == len(found) else None


def _thinned(numbers: Sequence[float | None]) -> list[float | None]:
    """Means of as many neighbours as make a curve of few enough points; None where one of them is not finite."""
    width = math.ceil(len(numbers) / _CURVE_POINTS) or 1
    return [_mean(numbers[start : start + width]) for start in range(0, len(numbers), width)]


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
