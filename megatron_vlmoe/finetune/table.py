"""The table of downstream results: guessing, from scratch, from a pretrained dense and a pretrained sparse model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.config.tasks import TASKS, find_task, load_code
from megatron_vlmoe.data.task_dataset import Labels, TaskDataset, load_labels

STARTS = ("scratch", "dense", "moe")


def guessing_rate(task: str, prefix: str, split: str) -> float:
    """What guessing scores on a split by the metric of the task, in percent.

    Args:
        task: name of the task.
        prefix: P, which all its prepared splits share.
        split: one of them.
    """
    spec = find_task(task)
    dataset = TaskDataset.open(f"{prefix}_{split}", task, None)
    guess: Callable[[TaskDataset, Labels | None], float] = load_code(spec.guess)
    return guess(dataset, load_labels(prefix) if spec.has_labels else None)


def downstream_table(runs: Path, data: Path) -> dict[str, dict[str, Any]]:
    """The table of runs ``RUNS/TASK/START`` on the paper's tasks, prepared as ``DATA/TASK``.

    Raises:
        ConfigError: if a run has no results.
    """
    table: dict[str, dict[str, Any]] = {}
    for task, spec in TASKS.items():
        split = spec.table_split or spec.splits[0]
        entry: dict[str, Any] = {
            "metric": f"{split}/{spec.best_metric}",
            "guess": round(guessing_rate(task, str(data / task), split), 2),
        }
        for start in STARTS:
            entry[start] = round(_result(runs / task / start, entry["metric"]), 2)
        table[task] = entry
    return table


def _result(run: Path, metric: str) -> float:
    path = run / "metrics.json"
    try:
        return float(json.loads(path.read_text())["metrics"][metric])
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"{path}: has no {metric}; did the run end?") from None


def table_lines(table: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The table for people, with the means of all tasks."""
    columns = ("guess", *STARTS)
    yield f"{'task':<11}{'metric (%)':<24}" + "".join(f"{name:>10}" for name in columns)
    for task, entry in table.items():
        cells = "".join(f"{entry[name]:>10.1f}" for name in columns)
        yield f"{task:<11}{entry['metric']:<24}{cells}"
    means = [float(np.mean([entry[name] for entry in table.values()])) for name in columns]
    yield f"{'mean':<35}" + "".join(f"{mean:>10.1f}" for mean in means)
