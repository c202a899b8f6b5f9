"""The table of downstream results: guessing, from scratch, from a pretrained dense and a pretrained sparse model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.data.task_dataset import Labels, TaskDataset, load_labels
from megatron_vlmoe.data.task_samples import TASK_SHAPES
from megatron_vlmoe.finetune.metrics import majority_rate, random_recall, vqa_majority

STARTS = ("scratch", "dense", "moe")


@dataclass(frozen=True)
class Row:
    """Which number of a task stands in the table: metric `name` of `split`, in percent."""

    task: str
    split: str
    name: str


ROWS = (
    Row("vqa", "val", "vqa_official"),
    Row("nlvr2", "test", "accuracy"),
    Row("retrieval", "test", "mean_recall"),
    Row("imagenet", "val", "top1"),
    Row("mnli", "dev_matched", "accuracy"),
)


def guessing_rate(task: str, prefix: str, split: str) -> float:
    """`guess_of` a split by its files.

    Args:
        task: name of the task.
        prefix: P, which all its prepared splits share.
        split: one of them.
    """
    dataset = TaskDataset.open(f"{prefix}_{split}", task, None)
    return guess_of(dataset, None if dataset.labels_sha256 is None else load_labels(prefix))


def guess_of(dataset: TaskDataset, labels: Labels | None) -> float:
    """What guessing scores on the labelled samples of a split, in percent.

    The best answer that is the same for all samples; for retrieval the expectation of a ranking at random.

    Args:
        dataset: the split.
        labels: the classes; None for retrieval.
    """
    if labels is None:
        recalls = random_recall(dataset.image_of_text(), dataset.num_images)
        return float(np.mean(list(recalls.values())))
    if TASK_SHAPES[dataset.task].has_answers:
        return vqa_majority(labels.labels, [row.answers for row in dataset.rows()])
    return majority_rate(np.array([row.labels[0] if row.labels else -1 for row in dataset.rows()]))


def downstream_table(runs: Path, data: Path) -> dict[str, dict[str, Any]]:
    """The table of runs ``RUNS/TASK/START`` on tasks prepared as ``DATA/TASK``.

    Raises:
        ConfigError: if a run has no results.
    """
    table: dict[str, dict[str, Any]] = {}
    for row in ROWS:
        entry: dict[str, Any] = {
            "metric": f"{row.split}/{row.name}",
            "guess": round(guessing_rate(row.task, str(data / row.task), row.split), 2),
        }
        for start in STARTS:
            entry[start] = round(_result(runs / row.task / start, entry["metric"]), 2)
        table[row.task] = entry
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
