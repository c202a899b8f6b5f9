"""What an evaluation leaves: metrics.json, predictions, the file for an evaluation server, and a page that shows them.

The page has scores, answers and sample predictions in one HTML file that needs nothing else.
"""

from __future__ import annotations

import base64
import io
import itertools
import logging
import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Iterator, Mapping, NamedTuple, Optional, Sequence

import numpy as np
from PIL import Image

from megatron_vlmoe.config.schema import Precision
from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.config.tasks import find_task, load_code
from megatron_vlmoe.data.augment import decode_image
from megatron_vlmoe.data.manifest import DatasetManifest
from megatron_vlmoe.data.task_dataset import Labels
from megatron_vlmoe.finetune.data import SplitData, TaskData
from megatron_vlmoe.finetune.metrics import Found
from megatron_vlmoe.finetune.objective import TaskObjective
from megatron_vlmoe.finetune.predictions import MOST_LIKELY, write_json, write_jsonl
from megatron_vlmoe.prepare.vqa_answers import official_accuracy
from megatron_vlmoe.runtime.distributed import Ranks
from megatron_vlmoe.runtime.pages import write_page
from megatron_vlmoe.train.setup import ModelParts
from megatron_vlmoe.train.step import StepRunner

log = logging.getLogger("megatron_vlmoe")

# Samples left out that the log names; predictions.jsonl has them all.
_NAMED = 10
# Answers that the report counts one by one.
_COUNTED = 10
_NOT_LISTED = "not in the list of answers"
_PLACES = ("first", f"2 to {MOST_LIKELY}", f"after {MOST_LIKELY}")
_KINDS = {"right": "right", "partly": "partly right", "wrong": "wrong"}
LONGER_SIDE = 320
"""Pixels to which pictures are scaled down."""


class CountRow(NamedTuple):
    """One bar, or a pair of bars, of `Counts`; `true` is None where there is nothing to compare with."""

    name: str
    predicted: int
    true: Optional[int] = None


@dataclass(frozen=True)
class Counts:
    """How often something was said, and how often it is true, as bars.

    `names` are those of `predicted` and `true`; the second may be empty. There is at least one row.
    """

    title: str
    note: str
    names: tuple[str, str]
    rows: Sequence[CountRow]

    def percent(self, value: int) -> str:
        """Length of a bar relative to the longest."""
        longest = max(max(row.predicted, row.true or 0) for row in self.rows)
        return f"{100.0 * value / max(longest, 1):.1f}"


@dataclass(frozen=True)
class Example:
    """One sample and what the model made of it.

    Args:
        images: encoded JPEG, PNG or WebP pictures, shown side by side.
        fields: (name, text) in the order in which they are shown, such as ("question", "What colour ...?").
        gained: what the prediction scores, 0 (wrong) to 1 (right); None: there is no label.
        labels: below the pictures, one for each; empty: none.
    """

    images: tuple[bytes, ...]
    fields: tuple[tuple[str, str], ...]
    gained: Optional[float]
    labels: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """`right`, `partly`, `wrong` or `open`."""
        return kind_of(self.gained)

    @property
    def mark(self) -> str:
        """What the prediction is worth, in words."""
        if self.gained is None:
            return "not scored"
        if self.kind == "partly":
            return f"{self.gained:.2g} of 1"
        return "\N{CHECK MARK} right" if self.kind == "right" else "\N{BALLOT X} wrong"


@dataclass(frozen=True)
class Report:
    """What the page shows, from top to bottom.

    Args:
        title: heading.
        headlines: the main score of every labelled split: its name, such as "val/accuracy, percent", the value, and
            what it compares with, such as "guessing: 50".
        notes: sentences below them: the model, splits without labels.
        counts: what was predicted how often.
        chosen: sentences that say how the examples were chosen.
        examples: in the order in which they are shown.
        metrics: all scores, folded; name -> value; one that is not finite is shown as a dash.
        facts: settings, folded; (name, text), such as ("seed", "1234").
    """

    title: str
    headlines: Sequence[tuple[str, float, str]] = ()
    notes: Sequence[str] = ()
    counts: Sequence[Counts] = ()
    chosen: Sequence[str] = ()
    examples: Sequence[Example] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    facts: Sequence[tuple[str, str]] = ()


def kind_of(gained: Optional[float]) -> str:
    """`right` (1), `partly` (in between), `wrong` (0) or `open` (None)."""
    if gained is None:
        return "open"
    return "right" if gained >= 1.0 else "partly" if gained > 0.0 else "wrong"


def write_report(path: Path, report: Report) -> None:
    """Writes the page; the file appears whole or not at all.

    All texts are escaped.

    Raises:
        DataError: a picture that cannot be read; the message names the example.
        OSError: the file cannot be written; the message names it.
    """
    # Of every picture of every example its name, its data URL and what stands below it.
    pictures = []
    for place, example in enumerate(report.examples, start=1):
        shown = []
        labels = example.labels or ("",) * len(example.images)
        for n, (data, label) in enumerate(zip(example.images, labels, strict=True), start=1):
            name = f"Picture {n} of example {place}"
            picture = decode_image(data, name)
            picture.thumbnail((LONGER_SIDE, LONGER_SIDE), Image.Resampling.LANCZOS)
            stream = io.BytesIO()
            picture.save(stream, "JPEG", quality=85)
            encoded = base64.b64encode(stream.getvalue()).decode("ascii")
            shown.append((name, f"data:image/jpeg;base64,{encoded}", label))
        pictures.append(shown)
    template = Path(__file__).with_name("report.html.j2")
    write_page(path, template, {"number": number}, report=report, pictures=pictures)


def number(value: float) -> str:
    """Counts (int) as they are, scores (float) to two places, a dash where there is none."""
    if not math.isfinite(value):
        return "\N{EN DASH}"
    return str(value) if isinstance(value, int) else f"{value:.2f}"


def evaluate_all(
    config: FinetuneConfig,
    parts: ModelParts,
    ranks: Ranks,
    data: TaskData,
    objective: TaskObjective,
    checkpoint: str,
    precision: Precision,
) -> dict[str, float]:
    """Evaluates every split and writes the results into `--save`.

    ``checkpoint`` is the folder of the weights; empty for weights that were not saved.

    Returns:
        Metrics by `SPLIT/NAME` on every rank.
    """
    runner = StepRunner(config, parts, ranks)
    metrics: dict[str, float] = {}
    tables: list[Predictions] = []
    for split in data.splits:
        own, found = objective.evaluate_split(runner, split)
        metrics |= own
        if _is_labelled(split, own):
            log.info(objective.evaluation_line(own))
        if ranks.rank == 0:
            for line in left_out_lines(config.task.name, split.name, split.dataset.manifest):
                log.warning(line)
        if found is not None:
            tables.append(Predictions(config.task.name, found, split, data.labels))
    if config.checkpoint.save and ranks.rank == 0:
        folder, task = Path(config.checkpoint.save), config.task
        settings = evaluation_settings(config, ranks, checkpoint, precision)
        rows = itertools.chain.from_iterable(table.rows() for table in tables)
        write_jsonl(folder / "predictions.jsonl", rows)
        for table in tables if task.spec.submission else ():
            submission = load_code(task.spec.submission, task.name)(table.answers)
            write_json(_answers_file(config, table.split.name), submission)
        left_out = {table.split.name: len(table.left_out) for table in tables}
        content = {"task": task.name, "metrics": metrics, "settings": settings}
        write_json(folder / "metrics.json", content | {"left_out": left_out})
        if task.report_examples:
            write_report(folder / "report.html", _report(config, metrics, settings, tables))
    for split in data.splits:
        if not _is_labelled(split, metrics):
            written = _answers_file(config, split.name) if config.checkpoint.save else "nothing"
            log.info(f"{split.name}: no labels, {len(split.dataset)} answers written to {written}")
    return metrics


def _is_labelled(split: SplitData, metrics: Mapping[str, float]) -> bool:
    """Whether any sample of a split has a label: otherwise there are no scores."""
    return f"{split.name}/samples" in metrics


def _answers_file(config: FinetuneConfig, split: str) -> Path:
    """Where the answers of a split are that somebody else has the labels of."""
    folder, task = Path(config.checkpoint.save), config.task
    if not task.spec.submission:
        return folder / "predictions.jsonl"
    suffix = "" if len(task.splits) == 1 else f"_{split}"
    return folder / f"{task.name}_submission{suffix}.json"


def _report(
    config: FinetuneConfig,
    metrics: Mapping[str, float],
    settings: Mapping[str, Any],
    tables: Sequence[Predictions],
) -> Report:
    """The page about an evaluation; examples come from splits with labels, if there is one."""
    task = config.task
    labelled = [table for table in tables if _is_labelled(table.split, metrics)]
    notes = [f"Model: {settings['checkpoint'] or 'weights that were not saved'}"]
    headlines, counts, chosen, examples = [], [], [], []
    for table in labelled:
        split = table.split.name
        samples = metrics[f"{split}/samples"]
        guess = number(load_code(task.spec.guess, task.name)(table.split.dataset, table.labels))
        name = f"{split}/{task.spec.best_metric}"
        note = f"guessing: {guess}; {samples:,.0f} samples"
        headlines.append((f"{name}, percent", metrics[name], note))
        if unlabelled := metrics.get(f"{split}/unlabelled"):
            notes.append(f"{split}: {unlabelled:,.0f} samples without labels do not count.")
    for table in tables:
        split, count = table.split.name, len(table)
        if not _is_labelled(table.split, metrics):
            file = _answers_file(config, split).name
            notes.append(f"{split}: no labels; its {count:,} answers are in {file}.")
        if table.left_out:
            notes.append(
                f"{split}: {len(table.left_out):,} samples were rejected when it was made."
            )
    shown = labelled or tables
    for table in shown:
        if table.predicted:
            counts.append(_counts(table))
        own, sentence = _examples(table, -(-task.report_examples // len(shown)))
        examples += own
        chosen.append(sentence)
    return Report(
        title=f"{task.name}: evaluation of {', '.join(table.split.name for table in tables)}",
        headlines=headlines,
        notes=notes,
        counts=counts,
        chosen=chosen,
        examples=examples,
        metrics={
            name: int(value) if name.endswith("/samples") else value
            for name, value in metrics.items()
            if not name.endswith("/unlabelled")
        },
        facts=[(name, str(value)) for name, value in settings.items()],
    )


def _counts(table: Predictions) -> Counts:
    """What was predicted how often; for retrieval, at which place the right pictures were found."""
    split, predicted, true = table.split.name, table.predicted, table.true
    samples = sum(predicted.values())
    if table.labels is None:
        rows = [CountRow(name, predicted[name]) for name in _PLACES]
        note = (
            f"Place of a caption's own picture among the {table.split.dataset.num_images:,} pictures of the "
            f"split, by the similarity of their features; {samples:,} captions."
        )
        return Counts(f"Place of the right picture in {split}", note, ("captions", ""), rows)
    names = sorted(predicted | true, key=lambda name: (-max(predicted[name], true[name]), name))
    rows = [CountRow(name, predicted[name], true[name]) for name in names[:_COUNTED]]
    if rest := names[_COUNTED:]:
        others = (sum(count[name] for name in rest) for count in (predicted, true))
        rows.append(CountRow(f"{len(rest):,} others", *others))
    note = f"How often each answer is predicted, and how often it is the right one: {samples:,} samples."
    return Counts(f"Answers of {split}", note, ("predicted", "true"), rows)


def left_out_lines(task: str, split: str, manifest: DatasetManifest) -> Iterator[str]:
    """Lines for the log about samples that were rejected when a split was prepared; none if there are none."""
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


def evaluation_settings(
    config: FinetuneConfig, ranks: Ranks, checkpoint: str, precision: Precision
) -> dict[str, Any]:
    """What results depend on: with dropped tokens, batch size and layout too."""
    factor = config.moe.eval_capacity_factor
    dropless = factor <= 0.0 or config.moe.dispatcher == "dropless"
    return {
        "data": config.task.data,
        "checkpoint": checkpoint,
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
        "precision": precision,
        "seed": config.train.seed,
    }


class Predictions:
    """What was predicted for the samples of a split, and what is true.

    Args:
        task: name of the task.
        found: of all samples, on rank 0.
        split: the samples.
        labels: the classes; None for retrieval.

    Attributes:
        answers: `question_id` and `answer` of every sample of a task with a submission, also of those left out; as all
            that follows it is there once `rows` has been gone through.
        gained: what every prediction scores; None where the truth is unknown.
        predicted: how often each class was predicted for a labelled sample; for retrieval, how often the right
            picture was found at each of `_PLACES`.
        true: how often each class is the right one (of several the best); nothing for retrieval.
    """

    def __init__(self, task: str, found: Found, split: SplitData, labels: Optional[Labels]) -> None:
        self.task, self.found, self.split, self.labels = task, found, split, labels
        self.answers: list[dict[str, Any]] = []
        self.gained: list[Optional[float]] = []
        self.predicted: Counter[str] = Counter()
        self.true: Counter[str] = Counter()

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

    def name_of(self, label: str) -> str:
        """What a label is called where it has a name besides (classes of ImageNet)."""
        if self.labels is None or self.labels.names is None or label not in self.labels.labels:
            return label
        return self.labels.names[self.labels.labels.index(label)]

    def row(self, number: int) -> dict[str, Any]:
        """A line of predictions.jsonl; `gained` is what the prediction scores, where the truth is known."""
        row = self.split.dataset.row(number)
        entry: dict[str, Any] = {"split": self.split.name, "id": row.id, "texts": list(row.raw)}
        if self.labels is None:
            # The best images of a caption, as documents of the split's image file.
            scores = self.found["images"] @ self.found["texts"][row.texts[0]]
            best = np.argsort(-scores, kind="stable")[:MOST_LIKELY]
            return entry | {
                "images": best.tolist(),
                "scores": [float(scores[image]) for image in best],
                "truth": row.images[0],
                "gained": float(best[0] == row.images[0]),
            }
        labels = self.labels.labels
        classes = self.found["classes"][number].tolist()
        chances = self.found["probabilities"][number].tolist()
        entry |= {
            "prediction": labels[classes[0]],
            "most_likely": [
                {"label": labels[index], "score": chance} for index, chance in zip(classes, chances)
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

    def rows(self) -> Iterator[dict[str, Any]]:
        """The lines of a split, each made once; those of the samples left out come last."""
        present = (self.row(number) for number in range(len(self)))
        for place, row in enumerate(itertools.chain(present, self.left_out)):
            if place < len(self):
                self.gained.append(row.get("gained"))
                if "gained" in row:
                    self._count(row)
            if find_task(self.task).submission:
                self.answers.append({"question_id": row["id"], "answer": row["prediction"]})
            yield row

    def _count(self, row: Mapping[str, Any]) -> None:
        if self.labels is None:
            places = {image: place for place, image in enumerate(row["images"])}
            place = places.get(row["truth"], MOST_LIKELY)
            self.predicted[_PLACES[min(place, 1) + (place >= MOST_LIKELY)]] += 1
            return
        self.predicted[row.get("prediction_name", row["prediction"])] += 1
        best = max(row["truth"], key=lambda item: item["score"], default={"label": _NOT_LISTED})
        self.true[self.name_of(best["label"])] += 1


def _examples(table: Predictions, count: int) -> tuple[list[Example], str]:
    """Samples spread over the split, of every kind as many as its share of the split, and how they were chosen."""
    split, gained = table.split.name, table.gained
    by_kind: dict[str, list[int]] = {"right": [], "partly": [], "wrong": []}
    for place, score in enumerate(gained):
        if score is not None:
            by_kind[kind_of(score)].append(place)
    if not any(by_kind.values()):
        chosen = _spread(range(len(gained)), count)
        sentence = (
            f"{split} has no labels: {len(chosen)} of {len(gained):,} samples, evenly spread."
        )
    else:
        shares = _shares([len(numbers) for numbers in by_kind.values()], count)
        picked = [_spread(numbers, n) for numbers, n in zip(by_kind.values(), shares)]
        chosen = sorted(itertools.chain(*picked))
        parts = [
            f"{len(own)} of {len(numbers):,} {_KINDS[kind]}"
            for (kind, numbers), own in zip(by_kind.items(), picked)
            if numbers
        ]
        sentence = (
            f"{split}: {', '.join(parts)}, evenly spread. "
            "Each kind has its share of the split, but at least one."
        )
    return [_example(table, table.row(place), place) for place in chosen], sentence


def _shares(sizes: Sequence[int], count: int) -> list[int]:
    """How many of `count` examples each kind gets: in proportion to its size, and at least one while there is room."""
    total = sum(sizes)
    count = min(count, total)
    largest_first = sorted(range(len(sizes)), key=lambda kind: -sizes[kind])
    shares = [0] * len(sizes)
    for kind in largest_first[:count]:
        shares[kind] = min(1, sizes[kind])
    while sum(shares) < count:
        open_kinds = [kind for kind in largest_first if shares[kind] < sizes[kind]]
        most_short = max(open_kinds, key=lambda kind: sizes[kind] * count / total - shares[kind])
        shares[most_short] += 1
    return shares


def _spread(numbers: Sequence[int], count: int) -> list[int]:
    """`count` of the numbers at even distances."""
    if len(numbers) <= count:
        return list(numbers)
    return [numbers[len(numbers) * i // count] for i in range(count)]


def _example(table: Predictions, entry: Mapping[str, Any], place: int) -> Example:
    dataset = table.split.dataset
    row = dataset.row(place)
    fields = [("sample", f"{row.id} of {table.split.name}")]
    spec = find_task(dataset.task)
    fields += list(zip(spec.texts if spec.has_labels else ("caption",), row.raw))
    if table.labels is None:
        shown = [entry["images"][0], row.images[0]]
        captions = ["found first", "the right one"]
    else:
        shown = list(row.images)
        captions = list(spec.images) if len(shown) > 1 else [f"picture of {row.id}"] * len(shown)
        best = entry["most_likely"][0]
        answer = f"{table.name_of(best['label'])} (probability {best['score']:.2f})"
        # What the right answers score is said where it is not 1.
        known = [
            table.name_of(item["label"])
            + ("" if item["score"] == 1.0 else f" (scores {item['score']:.2g})")
            for item in entry["truth"]
        ]
        truth = ", ".join(known) or (_NOT_LISTED if entry.get("answers") else "unknown")
        fields += [("answer", answer), ("truth", truth)]
        if row.answers:
            said = Counter(row.answers).most_common()
            fields += [("annotators said", ", ".join(f"{text} x {n}" for text, n in said))]
    images = tuple(bytes(dataset.image_bytes(document)) for document in shown)
    return Example(images, tuple(fields), entry.get("gained"), tuple(captions))
