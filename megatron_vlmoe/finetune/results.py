"""What an evaluation leaves: metrics.json, predictions, the file for an evaluation server and the HTML report."""

from __future__ import annotations

import itertools
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Iterator, Mapping, Optional, Sequence

import numpy as np

from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.config.tasks import find_task, load_code
from megatron_vlmoe.data.manifest import DatasetManifest
from megatron_vlmoe.data.task_dataset import Labels, TaskRow
from megatron_vlmoe.finetune.collect import Found
from megatron_vlmoe.finetune.data import SplitData, TaskData
from megatron_vlmoe.finetune.objective import TaskObjective
from megatron_vlmoe.finetune.predictions import (
    MOST_LIKELY,
    write_json,
    write_jsonl,
)
from megatron_vlmoe.finetune.report import Example, write_report
from megatron_vlmoe.prepare.vqa_answers import official_accuracy
from megatron_vlmoe.runtime.distributed import Ranks
from megatron_vlmoe.train.setup import ModelParts
from megatron_vlmoe.train.step import StepRunner

log = logging.getLogger("megatron_vlmoe")

# Samples left out that the log names; predictions.jsonl has them all.
_NAMED = 10


@dataclass(frozen=True)
class Evaluated:
    """Which weights were evaluated.

    Args:
        checkpoint: their folder; empty for weights that were not saved.
        precision: that the model computed in.
    """

    checkpoint: str
    precision: str


def evaluate_all(
    config: FinetuneConfig,
    parts: ModelParts,
    ranks: Ranks,
    data: TaskData,
    objective: TaskObjective,
    what: Evaluated,
) -> dict[str, float]:
    """Evaluates every split and writes the results into `--save`.

    Returns:
        Metrics by `SPLIT/NAME` on every rank.
    """
    runner = StepRunner(config, parts, ranks)
    metrics: dict[str, float] = {}
    tables: list[Predictions] = []
    for split in data.splits:
        own, found = objective.evaluate_split(runner, split)
        metrics |= own
        log.info(objective.evaluation_line(own))
        for line in left_out_lines(config.task.name, split.name, split.dataset.manifest):
            log.warning(line)
        if found is not None:
            tables.append(Predictions(config.task.name, found, split, data.labels))
    if config.checkpoint.save and ranks.rank == 0:
        settings = evaluation_settings(config, ranks, what)
        _write(Path(config.checkpoint.save), config, metrics, settings, tables)
    return metrics


def _write(
    folder: Path,
    config: FinetuneConfig,
    metrics: Mapping[str, float],
    settings: Mapping[str, Any],
    tables: Sequence[Predictions],
) -> None:
    task = config.task
    kept = [Kept() for _ in tables]
    rows = (row for table, own in zip(tables, kept) for row in own.rows(table))
    write_jsonl(folder / "predictions.jsonl", rows)
    for table, own in zip(tables, kept) if task.spec.submission else ():
        submission = load_code(task.spec.submission)(own.answers)
        suffix = "" if len(tables) == 1 else f"_{table.split.name}"
        write_json(folder / f"{task.name}_submission{suffix}.json", submission)
    left_out = {table.split.name: len(table.left_out) for table in tables}
    content = {"task": task.name, "metrics": metrics, "settings": settings, "left_out": left_out}
    write_json(folder / "metrics.json", content)
    share = -(-task.report_examples // len(tables))
    pages = [
        example
        for table, own in zip(tables, kept)
        for example in _examples(table, own.gained, share)
    ]
    if pages:
        facts = [(name, str(value)) for name, value in settings.items()]
        facts += [
            (f"rejected samples of {name}", str(count)) for name, count in left_out.items() if count
        ]
        shown = {k: v for k, v in metrics.items() if not k.endswith("unlabelled")}
        write_report(folder / "report.html", task.name, facts, shown, pages)


def left_out_lines(task: str, split: str, manifest: DatasetManifest) -> Iterator[str]:
    """Lines for the log about samples that were rejected when a split was prepared; none if there are none.

    Args:
        task: name of the task.
        split: name of the split.
        manifest: of the prepared split.
    """
    lost = manifest.left_out
    if lost:
        names = ", ".join(itertools.islice(lost, _NAMED)) + (", ..." if len(lost) > _NAMED else "")
        answer = ""
        if find_task(task).submission:
            answer = f"; the submission answers them with {manifest.fallback_answer or ''!r}"
        yield (
            f"{split}: {len(lost)} samples were rejected when the split was prepared and do not count "
            f"in the metrics{answer}: {names}"
        )
    unnamed = manifest.rejects - len(lost or ())
    if unnamed > 0:
        yield (
            f"{split}: {unnamed} records that were rejected when the split was prepared are not in the "
            "predictions, "
            + (
                "because an older version prepared it: prepare it again to have them named"
                if lost is None
                else "because they have no sample id or one that came before: see its .rejects.jsonl"
            )
        )


def evaluation_settings(config: FinetuneConfig, ranks: Ranks, what: Evaluated) -> dict[str, Any]:
    """What results depend on: with dropped tokens, batch size and layout too."""
    factor = config.moe.eval_capacity_factor
    dropless = factor <= 0.0 or config.moe.dispatcher == "dropless"
    return {
        "data": config.task.data,
        "checkpoint": what.checkpoint,
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
        "precision": what.precision,
        "seed": config.train.seed,
    }


@dataclass(frozen=True)
class Predictions:
    """What was predicted for the samples of a split, and what is true.

    Args:
        task: name of the task.
        found: of all samples, on rank 0.
        split: the samples.
        labels: the classes; None for retrieval.
    """

    task: str
    found: Found
    split: SplitData
    labels: Optional[Labels]

    def __len__(self) -> int:
        return len(self.split.dataset)

    @property
    def left_out(self) -> list[dict[str, Any]]:
        """A line of predictions.jsonl for every sample that was rejected when the split was prepared.

        `left_out` is the reason; `prediction` is what a submission says of it, or null.
        """
        manifest = self.split.dataset.manifest
        answer = (manifest.fallback_answer or "") if find_task(self.task).submission else None
        entry: dict[str, Any] = {"split": self.split.name, "texts": [], "prediction": answer}
        return [
            entry | {"id": name, "left_out": reason}
            for name, reason in (manifest.left_out or {}).items()
        ]

    def row(self, number: int) -> dict[str, Any]:
        """A line of predictions.jsonl; `gained` is what the prediction scores, where the truth is known."""
        row = self.split.dataset.row(number)
        entry: dict[str, Any] = {"split": self.split.name, "id": row.id, "texts": list(row.raw)}
        if self.labels is None:
            return entry | self._retrieved(row)
        return entry | self._classified(number, row)

    def _retrieved(self, row: TaskRow) -> dict[str, Any]:
        """The best images of a caption, as documents of the split's image file."""
        scores = self.found["images"] @ self.found["texts"][row.texts[0]]
        best = np.argsort(-scores, kind="stable")[:MOST_LIKELY]
        return {
            "images": best.tolist(),
            "scores": [float(scores[image]) for image in best],
            "truth": row.images[0],
            "gained": float(best[0] == row.images[0]),
        }

    def _classified(self, number: int, row: TaskRow) -> dict[str, Any]:
        assert self.labels is not None
        labels = self.labels.labels
        classes = self.found["classes"][number].tolist()
        scores = self.found["probabilities"][number].tolist()
        entry: dict[str, Any] = {
            "prediction": labels[classes[0]],
            "most_likely": [
                {"label": labels[index], "score": score} for index, score in zip(classes, scores)
            ],
            "truth": [
                {"label": labels[label], "score": float(score)}
                for label, score in zip(row.labels, row.scores)
            ],
        }
        if row.answers:
            entry["answers"] = list(row.answers)
        if self.labels.names is not None:
            entry["prediction_name"] = self.labels.names[classes[0]]
        if row.answers:
            entry["gained"] = official_accuracy(entry["prediction"], row.answers)
        elif row.labels:
            entry["gained"] = float(dict(zip(row.labels, row.scores)).get(classes[0], 0.0))
        return entry


@dataclass
class Kept:
    """What the submission and the report need of a split's predictions, noted while they are written.

    Args:
        answers: `question_id` and `answer` of every sample of a task with a submission, also of those left out.
        gained: what every prediction scores; 0 where the truth is unknown.
    """

    answers: list[dict[str, Any]] = field(default_factory=list)
    gained: list[float] = field(default_factory=list)

    def rows(self, table: Predictions) -> Iterator[dict[str, Any]]:
        """The lines of a split, each made once; those of the samples left out come last."""
        present = (table.row(number) for number in range(len(table)))
        for number, row in enumerate(itertools.chain(present, table.left_out)):
            if number < len(table):
                self.gained.append(row.get("gained", 0.0))
            if find_task(table.task).submission:
                self.answers.append({"question_id": row["id"], "answer": row["prediction"]})
            yield row


def _examples(table: Predictions, gained: Sequence[float], count: int) -> list[Example]:
    """Samples spread over the split, as many wrong as right ones where there are."""
    wrong = [number for number, score in enumerate(gained) if score <= 0.0]
    right = [number for number, score in enumerate(gained) if score > 0.0]
    half = max(count // 2, count - len(right))
    chosen = _spread(wrong, half)
    chosen += _spread(right, count - len(chosen))
    return [_example(table.row(number), number, table.split) for number in sorted(chosen)]


def _spread(numbers: Sequence[int], count: int) -> list[int]:
    """`count` of the numbers at even distances."""
    if len(numbers) <= count:
        return list(numbers)
    return [numbers[len(numbers) * i // count] for i in range(count)]


def _example(entry: Mapping[str, Any], number: int, split: SplitData) -> Example:
    dataset = split.dataset
    row = dataset.row(number)
    fields = [("split", split.name), ("id", row.id)]
    spec = find_task(dataset.task)
    fields += list(zip(spec.texts if spec.has_labels else ("caption",), row.raw))
    if not spec.has_labels:
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
