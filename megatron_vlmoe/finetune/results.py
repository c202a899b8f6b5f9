"""What an evaluation leaves: metrics.json, predictions, the VQA submission file and the HTML report."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any, Mapping, Optional, Sequence

import numpy as np

from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.data.task_dataset import Labels
from megatron_vlmoe.finetune.collect import Found
from megatron_vlmoe.finetune.data import SplitData, TaskData
from megatron_vlmoe.finetune.predictions import (
    best_classes,
    class_probabilities,
    vqa_submission,
    write_json,
    write_jsonl,
)
from megatron_vlmoe.finetune.report import Example, write_report
from megatron_vlmoe.runtime.distributed import Ranks
from megatron_vlmoe.train.setup import TrainingParts
from megatron_vlmoe.train.step import StepRunner

log = logging.getLogger("megatron_vlmoe")

# Classes of a prediction that are written out, and captions or images of a retrieval query.
MOST_LIKELY = 5


def evaluate_all(
    config: FinetuneConfig, parts: TrainingParts, ranks: Ranks, data: TaskData, objective: Any
) -> dict[str, float]:
    """Evaluates every split and writes the results into `--save`.

    Returns:
        Metrics by `SPLIT/NAME` on every rank.
    """
    runner = StepRunner(config, parts, ranks)
    metrics: dict[str, float] = {}
    folder = Path(config.checkpoint.save) if config.checkpoint.save else None
    pages: list[Example] = []
    for split in data.splits:
        own, found = objective.evaluate_split(runner, split)
        metrics |= own
        log.info(objective.evaluation_line(own))
        if found is None or folder is None:
            continue
        rows = prediction_rows(config.task.name, found, split, data.labels)
        suffix = "" if len(data.splits) == 1 else f"_{split.name}"
        write_jsonl(folder / f"predictions{suffix}.jsonl", rows)
        if config.task.name == "vqa":
            named = ({"question_id": row["id"], "answer": row["prediction"]} for row in rows)
            write_json(folder / f"vqa_submission{suffix}.json", vqa_submission(named))
        if len(pages) < config.task.report_examples:
            pages += _examples(rows, split, config.task.report_examples - len(pages))
    if folder is not None and ranks.rank == 0:
        settings = evaluation_settings(config, ranks)
        write_json(
            folder / "metrics.json",
            {"task": config.task.name, "metrics": metrics, "settings": settings},
        )
        if pages:
            facts = [(name, str(value)) for name, value in settings.items()]
            shown = {k: v for k, v in metrics.items() if not k.endswith("unlabelled")}
            write_report(folder / "report.html", f"{config.task.name}", facts, shown, pages)
    return metrics


def evaluation_settings(config: FinetuneConfig, ranks: Ranks) -> dict[str, Any]:
    """What results depend on: with dropped tokens, batch size and layout too."""
    factor = config.moe.eval_capacity_factor
    dropless = factor <= 0.0 or config.moe.dispatcher == "dropless"
    return {
        "data": config.task.data,
        "checkpoint": config.checkpoint.load or config.checkpoint.save,
        "image_size": config.model.image_size,
        "capacity": "dropless" if dropless else f"factor {factor}",
        "micro_batch_size": config.task.eval_batch,
        "world_size": ranks.world_size,
        "data_parallel_size": ranks.data_size,
        **{
            name: value
            for name, value in asdict(config.parallel).items()
            if name.endswith("model_parallel_size")
        },
        "precision": config.train.precision,
        "seed": config.train.seed,
    }


def prediction_rows(
    task: str, found: Found, split: SplitData, labels: Optional[Labels]
) -> list[dict[str, Any]]:
    """One row per sample (retrieval: per caption and per image) with what was predicted and what is true."""
    if task == "retrieval":
        return _retrieved(found, split)
    assert labels is not None
    names = labels.names or labels.labels
    logits = found["logits"]
    order = best_classes(logits, MOST_LIKELY)
    scores = class_probabilities(task, logits)
    rows = []
    for number, best in enumerate(order):
        row = split.dataset.row(number)
        entry: dict[str, Any] = {
            "id": row.id,
            "texts": list(row.raw),
            "prediction": labels.labels[best[0]],
            "most_likely": [
                {"label": labels.labels[index], "score": float(scores[number, index])}
                for index in best
            ],
            "truth": [
                {"label": labels.labels[label], "score": float(score)}
                for label, score in zip(row.labels, row.scores)
            ],
        }
        if row.answers:
            entry["answers"] = list(row.answers)
        if labels.names is not None:
            entry["prediction_name"] = names[best[0]]
        if row.labels:
            gained = dict(zip(row.labels, row.scores)).get(int(best[0]), 0.0)
            entry["gained"] = float(gained)
        rows.append(entry)
    return rows


def _retrieved(found: Found, split: SplitData) -> list[dict[str, Any]]:
    """The best images of every caption."""
    images, texts = found["images"], found["texts"]
    owner = split.dataset.image_of_text()
    rows = []
    for number in range(len(split.dataset)):
        row = split.dataset.row(number)
        caption = row.texts[0]
        scores = images @ texts[caption]
        best = np.argsort(-scores, kind="stable")[:MOST_LIKELY]
        rows.append(
            {
                "id": row.id,
                "texts": list(row.raw),
                "images": best.tolist(),
                "scores": [float(scores[image]) for image in best],
                "truth": int(owner[caption]),
                "gained": float(best[0] == owner[caption]),
            }
        )
    return rows


def _examples(rows: Sequence[Mapping[str, Any]], split: SplitData, count: int) -> list[Example]:
    """Samples spread over the split, as many wrong as right ones where there are."""
    wrong = [n for n, row in enumerate(rows) if row.get("gained", 0.0) <= 0.0]
    right = [n for n, row in enumerate(rows) if row.get("gained", 0.0) > 0.0]
    half = max(count // 2, count - len(right))
    chosen = _spread(wrong, half)
    chosen += _spread(right, count - len(chosen))
    return [_example(rows[number], number, split) for number in sorted(chosen)]


def _spread(numbers: Sequence[int], count: int) -> list[int]:
    """`count` of the numbers at even distances."""
    if len(numbers) <= count:
        return list(numbers)
    return [numbers[len(numbers) * i // count] for i in range(count)]


def _example(entry: Mapping[str, Any], number: int, split: SplitData) -> Example:
    dataset = split.dataset
    row = dataset.row(number)
    fields = [("split", split.name), ("id", row.id)]
    text_names = {"vqa": ("question",), "nlvr2": ("sentence",), "mnli": ("premise", "hypothesis")}
    names = text_names.get(dataset.task, ("caption",))
    fields += list(zip(names, row.raw))
    if dataset.task == "retrieval":
        shown = [entry["images"][0], row.images[0]]
        fields += [("pictures", "the one found first, then the right one")]
    else:
        shown = list(row.images)
        best = entry["most_likely"][0]
        fields += [
            ("answer", f"{entry.get('prediction_name', best['label'])} ({best['score']:.2f})")
        ]
        fields += [("truth", _truth(entry))]
    correct = None if "gained" not in entry else entry["gained"] > 0.0
    images = tuple(bytes(dataset.image_bytes(document)) for document in shown)
    return Example(images, tuple(fields), correct)


def _truth(entry: Mapping[str, Any]) -> str:
    """The right answers, with their scores where they are not 1."""
    known = [
        item["label"] if item["score"] == 1.0 else f"{item['label']} ({item['score']:.1f})"
        for item in entry["truth"]
    ]
    return ", ".join(known) or "unknown"
