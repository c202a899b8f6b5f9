"""From logits to predictions, and predictions as files, one of them in the form that the VQA server takes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.config.tasks import find_task
from megatron_vlmoe.runtime.files import write_parts_atomic, write_text_atomic

Array = npt.NDArray[Any]

# Classes of a prediction that are kept and written out, and images of a caption in retrieval.
MOST_LIKELY = 5


def best_classes(logits: Array, k: int) -> Array:
    """The k most likely classes of every row ``[N, C]``, best first, of equals the lower number: ``[N, min(k, C)]``."""
    return np.argsort(-logits, axis=1, kind="stable")[:, :k]


def class_probabilities(task: str, logits: Array) -> Array:
    """Of each answer alone (VQA), or of one class among all (the others): ``[N, C]`` in double precision."""
    wide = logits.astype(np.float64)
    if find_task(task).has_answers:
        return 1.0 / (1.0 + np.exp(-np.clip(wide, -60.0, 60.0)))
    shifted = np.exp(wide - wide.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def write_json(path: Path, content: Any) -> None:
    """Writes one JSON document, indented; the file appears whole or not at all.

    Numpy values are written as plain ones, numbers that are not finite as null (JSON has no word for them).

    Raises:
        OSError: the file cannot be written; the message names it.
        TypeError: something that JSON cannot hold.
    """
    text = json.dumps(_plain(content), indent=2, ensure_ascii=False, allow_nan=False)
    write_text_atomic(path, text + "\n")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object per line; otherwise as ``write_json``."""
    write_parts_atomic(path, (json_line(row) + "\n" for row in rows))


def json_line(row: Mapping[str, Any]) -> str:
    """One JSON object without a line break; values as in ``write_json``."""
    return json.dumps(_plain(row), ensure_ascii=False, allow_nan=False)


def vqa_submission(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The answers as the VQA evaluation server takes them, one per question, in order of first appearance.

    A question that was answered twice (evaluation repeats samples to fill a batch) is taken once.

    Args:
        rows: each with ``question_id`` (a whole number, also as digits) and ``answer``; other keys are ignored.

    Returns:
        ``{"question_id": int, "answer": str}`` per question.

    Raises:
        DataError: a question id is no number, or a question has two different answers.
    """
    answers: dict[int, str] = {}
    for number, row in enumerate(rows):
        try:
            question = int(row["question_id"])
        except (TypeError, ValueError) as error:
            raise DataError(
                f"prediction {number}: question id {row['question_id']!r} is not a number"
            ) from error
        answer = str(row["answer"])
        first = answers.setdefault(question, answer)
        if first != answer:
            raise DataError(f"question {question} has two answers: {first!r} and {answer!r}")
    return [{"question_id": question, "answer": answer} for question, answer in answers.items()]


def _plain(value: Any) -> Any:
    """The value in JSON's own types."""
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [_plain(item) for item in value]
    return value
