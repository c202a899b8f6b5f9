"""Predictions and scores as files, and the form in which the VQA server takes answers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vlmoe.data.errors import DataError
from megatron_vlmoe.runtime.files import write_text_atomic


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
    lines = (json.dumps(_plain(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    write_text_atomic(path, "".join(lines))


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
