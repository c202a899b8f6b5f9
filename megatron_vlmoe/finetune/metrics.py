"""Scores of the downstream tasks, in percent, what guessing would score, and the table of both.

Ties count against the model: a wrong item whose score equals the right one's ranks before it, and so does one
that cannot be compared (not a number). A model that gives every item the same score therefore finds nothing,
and results depend neither on the order of the items nor on a sorting algorithm.

Below are the functions that tasks' rows name as `scores` and `guess`. One of scores takes what
`ClassificationObjective` kept of every sample, the split and the labels; the first of its metrics decides whether a
split is labelled. One of guesses takes a split and the labels; it gives, in percent, what the best prediction that is
the same for all samples scores, or a ranking at random.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import numpy as np
import numpy.typing as npt

from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.config.tasks import TASKS, find_task, load_code
from megatron_vlmoe.data.task_dataset import Labels, TaskDataset, load_labels
from megatron_vlmoe.prepare.vqa_answers import compared_answers, normalize_answer, official_accuracy

if TYPE_CHECKING:
    from megatron_vlmoe.finetune.data import SplitData

Array = npt.NDArray[Any]
Found = dict[str, Array]
"""What an evaluation kept of every item, by name: `[n, ...]`, in the order of the items."""

RECALL_KS = (1, 5, 10)

# Those that VQA v2 has, in the order in which they are reported.
_ANSWER_TYPES = ("yes_no", "number", "other")

# From initial weights, from a pretrained dense and from a pretrained sparse model.
STARTS = ("scratch", "dense", "moe")

RowScores = Callable[[slice], Array]

_BLOCK_ENTRIES = 1 << 22


@dataclass(frozen=True)
class Score:
    """A mean over the `count` labelled samples, in percent; not a number if none is labelled."""

    percent: float
    count: int
    unlabelled: int

    @classmethod
    def of(cls, values: Sequence[float] | Array, unlabelled: int) -> Score:
        """The mean of what each labelled sample scored (0 to 1)."""
        count = len(values)
        percent = 100.0 * math.fsum(values) / count if count else math.nan
        return cls(percent, count, unlabelled)


def label_ranks(logits: Array, labels: Array) -> Array:
    """How many wrong classes of logits ``[N, C]`` are ahead of the label ``[N]``: 0 is the first place.

    A negative label is unknown, and its rank is -1.

    Returns:
        int64 ``[N]``; a class with an equal logit, or with one that is not a number, is ahead.

    Raises:
        ValueError: shapes do not fit, or a label is not one of C classes.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"logits {logits.shape} do not fit labels {labels.shape}")
    known = labels >= 0
    right = np.where(known, labels, 0).astype(np.int64)
    if right.size and right.max() >= logits.shape[1]:
        raise ValueError(f"label {right.max()} of {logits.shape[1]} classes")
    own = np.take_along_axis(logits, right[:, None], axis=1)
    # "Not below" instead of "at least", so that a NaN counts as ahead. The label itself is always among them.
    return np.where(known, (~(logits < own)).sum(axis=1) - 1, -1)


def topk_accuracy(ranks: Array, k: int) -> Score:
    """Share of samples whose label is among the k highest logits, by the `label_ranks` ``[N]``."""
    known = ranks >= 0
    return Score.of(ranks[known] < k, int((~known).sum()))


def vqa_official(predicted: Sequence[str], answers: Sequence[Sequence[str]]) -> Array:
    """The official VQA accuracy of N predictions, 0 to 1 (`vqa_answers.official_accuracy`).

    Returns:
        float64 ``[N]``, not a number where the annotators' answers are empty: unknown.

    Raises:
        ValueError: the lengths differ.
    """
    pairs = zip(predicted, answers, strict=True)
    return np.array([official_accuracy(own, said) if said else math.nan for own, said in pairs])


def recall_at_k(
    scores: Array, image_of_text: Array, ks: Sequence[int] = RECALL_KS
) -> dict[str, float]:
    """Recall of retrieval in both directions, in percent.

    Text retrieval (``TR@k``): an image is found if any of its captions is among the k best captions of all. Image
    retrieval (``IR@k``): a caption is found if its image is among the k best images. Among several captions of an
    image the best one counts; the others neither help nor stand in its way.

    Args:
        scores: similarity ``[I, C]`` of every image and caption, the larger the closer.
        image_of_text: the image ``[C]`` of each caption; -1: none of them (it still competes). An image without a
            caption still competes too, but is not looked for.
        ks: how many of the best are looked at.

    Raises:
        ValueError: shapes do not fit, or a caption belongs to an image that is not there.
    """
    if scores.ndim != 2 or scores.shape[1:] != image_of_text.shape:
        raise ValueError(f"scores {scores.shape} do not fit {image_of_text.shape} captions")
    transposed = scores.T
    return _recall(
        lambda rows: scores[rows],
        lambda rows: transposed[rows],
        image_of_text,
        scores.shape[0],
        ks,
        block=max(1, _BLOCK_ENTRIES // max(scores.shape)) if scores.size else 1,
    )


def recall_at_k_of_features(
    images: Array,
    texts: Array,
    image_of_text: Array,
    ks: Sequence[int] = RECALL_KS,
    block: int = 256,
) -> dict[str, float]:
    """``recall_at_k`` of the scores ``images @ texts.T``, of which only a block is held at a time.

    Products are summed in double precision and rounded to single: otherwise two equal items may differ in the last
    bit, depending on where in a block they stand, and a tie would be decided by chance.

    Args:
        images: features ``[I, D]``.
        texts: features ``[C, D]``.
        image_of_text: as in ``recall_at_k``; so is ``ks``.
        block: images (then captions) that are scored at a time, against all captions (images).

    Raises:
        ValueError: as ``recall_at_k``.
    """
    if images.ndim != 2 or texts.ndim != 2 or images.shape[1] != texts.shape[1]:
        raise ValueError(f"features {images.shape} and {texts.shape} do not fit each other")
    if texts.shape[:1] != image_of_text.shape:
        raise ValueError(f"features {texts.shape} do not fit {image_of_text.shape} captions")
    wide_images, wide_texts = images.astype(np.float64), texts.astype(np.float64)
    return _recall(
        lambda rows: (wide_images[rows] @ wide_texts.T).astype(np.float32),
        lambda rows: (wide_texts[rows] @ wide_images.T).astype(np.float32),
        image_of_text,
        len(images),
        ks,
        block,
    )


def _recall(
    scores_of_images: RowScores,
    scores_of_texts: RowScores,
    image_of_text: Array,
    num_images: int,
    ks: Sequence[int],
    block: int,
) -> dict[str, float]:
    owner = np.asarray(image_of_text, dtype=np.int64)
    if owner.size and not -1 <= owner.min() <= owner.max() < num_images:
        raise ValueError(
            f"captions of images {owner.min()} to {owner.max()}, but {num_images} images"
        )
    every_image = np.arange(num_images)
    image_ranks = _ranks(scores_of_images, every_image, owner, block)
    text_ranks = _ranks(scores_of_texts, owner, every_image, block)
    image_ranks = image_ranks[np.isin(every_image, owner)]
    text_ranks = text_ranks[owner >= 0]
    recalls = {f"TR@{k}": Score.of(image_ranks < k, 0).percent for k in ks}
    return recalls | {f"IR@{k}": Score.of(text_ranks < k, 0).percent for k in ks}


def _ranks(scores_of: RowScores, row_image: Array, item_image: Array, block: int) -> Array:
    """For each row the number of other images' items that are ahead of the best item of its own image.

    Rows and items are about the images ``[R]`` and ``[M]``; ``scores_of`` gives ``[n, M]`` for a slice of n rows.

    Returns:
        int64 ``[R]``; 0 is the first place. Rows without an item of their own have no meaning.
    """
    ranks = [np.zeros(0, dtype=np.int64)]
    for start in range(0, len(row_image), block):
        rows = slice(start, min(start + block, len(row_image)))
        scores = scores_of(rows)
        own = row_image[rows, None] == item_image[None, :]
        best = np.where(own, scores, -np.inf).max(axis=1, keepdims=True, initial=-np.inf)
        ranks.append((~(scores < best) & ~own).sum(axis=1))
    return np.concatenate(ranks)


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1) over runs; of a single run the latter is 0.

    Raises:
        ValueError: no values.
    """
    if not len(values):
        raise ValueError("mean of no values")
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return float(np.mean(values)), spread


def majority_rate(labels: Array) -> float:
    """Accuracy, in percent, of always answering the most frequent label ``[N]``; unknown (negative) ones left out."""
    known = labels[labels >= 0]
    return 100.0 * int(np.bincount(known).max()) / len(known) if len(known) else math.nan


def vqa_majority(vocabulary: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """Official VQA accuracy, in percent, of the best answer of a vocabulary that is the same for all questions."""
    by_form: dict[str, list[int]] = {}
    for label, answer in enumerate(vocabulary):
        for form in {answer, normalize_answer(answer)}:
            by_form.setdefault(form, []).append(label)
    totals = np.zeros(len(vocabulary))
    for said in filter(None, answers):
        # Only answers that are spelled like one of the annotators' can score.
        forms = set(compared_answers(said)[0])
        for label in {label for form in forms for label in by_form.get(form, ())}:
            totals[label] += official_accuracy(vocabulary[label], said)
    count = sum(len(said) > 0 for said in answers)
    return 100.0 * float(totals.max(initial=0.0)) / count if count else math.nan


def random_recall(
    image_of_text: Array, num_images: int, ks: Sequence[int] = RECALL_KS
) -> Mapping[str, float]:
    """Expected ``recall_at_k`` of a ranking at random of I images.

    ``IR@k`` is k / I. An image with m of the C captions is missed if all k drawn are among the C - m others:
    ``TR@k`` is the mean over images of 1 - binom(C - m, k) / binom(C, k).
    """
    owner = np.asarray(image_of_text, dtype=np.int64)
    total = len(owner)
    captions = np.bincount(owner[owner >= 0], minlength=num_images)
    sizes, images = np.unique(captions[captions > 0], return_counts=True)

    def text_recall(k: int) -> float:
        k = min(k, total)
        missed = [
            math.prod((total - m - j) / (total - j) for j in range(k)) if k <= total - m else 0.0
            for m in sizes.tolist()
        ]
        return 100.0 * float(np.average(1.0 - np.asarray(missed), weights=images))

    if not len(sizes):
        return {f"{way}@{k}": math.nan for way in ("TR", "IR") for k in ks}
    recalls = {f"TR@{k}": text_recall(k) for k in ks}
    return recalls | {f"IR@{k}": 100.0 * min(k, num_images) / num_images for k in ks}


def accuracy(found: Found, split: SplitData, labels: Labels) -> Mapping[str, Score]:
    """Share of samples whose class is the most likely one."""
    return {"accuracy": topk_accuracy(found["ranks"], 1)}


def top1_and_top5(found: Found, split: SplitData, labels: Labels) -> Mapping[str, Score]:
    """Shares of samples whose class is the most likely one, and one of the five most likely."""
    return {f"top{k}": topk_accuracy(found["ranks"], k) for k in (1, 5)}


def vqa_scores(found: Found, split: SplitData, labels: Labels) -> Mapping[str, Score]:
    """The official accuracy over all questions, then over those of each type of answer."""
    rows = list(split.dataset.rows())
    predicted = [labels.labels[label] for label in found["classes"][:, 0]]
    gained = vqa_official(predicted, [row.answers for row in rows])
    known = ~np.isnan(gained)
    scores = {"vqa_official": Score.of(gained[known], int((~known).sum()))}
    types = np.array([row.answer_type.replace("/", "_") for row in rows])
    for kind in dict.fromkeys((*_ANSWER_TYPES, *types[known].tolist())):
        chosen = known & (types == kind)
        if kind and chosen.any():
            scores[f"vqa_official/{kind}"] = Score.of(gained[chosen], 0)
    return scores


def guess_class(dataset: TaskDataset, labels: Optional[Labels]) -> float:
    """Accuracy of the most frequent class."""
    return majority_rate(np.array([row.labels[0] if row.labels else -1 for row in dataset.rows()]))


def guess_answer(dataset: TaskDataset, labels: Optional[Labels]) -> float:
    """Official VQA accuracy of the best answer that is the same for all questions."""
    assert labels is not None
    return vqa_majority(labels.labels, [row.answers for row in dataset.rows()])


def guess_match(dataset: TaskDataset, labels: Optional[Labels]) -> float:
    """Expected mean recall of a ranking at random."""
    recalls = random_recall(dataset.image_of_text(), dataset.num_images)
    return float(np.mean(list(recalls.values())))


def guessing_rate(task: str, prefix: str, split: str) -> float:
    """What guessing scores on a split by the metric of the task, in percent; all its splits share the prefix."""
    spec = find_task(task)
    dataset = TaskDataset.open(f"{prefix}_{split}", task, None)
    labels = load_labels(prefix) if spec.has_labels else None
    return float(load_code(spec.guess, task)(dataset, labels))


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
            path = runs / task / start / "metrics.json"
            try:
                result = float(json.loads(path.read_text())["metrics"][entry["metric"]])
            except (OSError, ValueError, KeyError, TypeError):
                raise ConfigError(f"{path}: has no {entry['metric']}; did the run end?") from None
            entry[start] = round(result, 2)
        table[task] = entry
    return table


def table_lines(table: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The table for people, with the means of all tasks."""
    columns = ("guess", *STARTS)
    yield f"{'task':<11}{'metric (%)':<24}" + "".join(f"{name:>10}" for name in columns)
    for task, entry in table.items():
        cells = "".join(f"{entry[name]:>10.1f}" for name in columns)
        yield f"{task:<11}{entry['metric']:<24}{cells}"
    means = [float(np.mean([entry[name] for entry in table.values()])) for name in columns]
    yield f"{'mean':<35}" + "".join(f"{mean:>10.1f}" for mean in means)
