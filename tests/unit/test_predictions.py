"""Prediction files: plain JSON, whole or absent, and one answer per question."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.finetune.predictions import vqa_submission, write_json, write_jsonl
from megatron_vlmoe.runtime.files import write_text_atomic


def test_json_has_plain_values(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "scores.json"
    content = {
        "accuracy": np.float32(0.5),
        "count": np.int64(3),
        "none": float("nan"),
        "far": [np.float64("inf"), 1.5],
        "table": np.asarray([[1, 2], [3, 4]]),
        "name": "straße",
        "pair": (1, "b"),
        "right": np.bool_(True),
    }
    write_json(path, content)
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "accuracy": 0.5,
        "count": 3,
        "none": None,
        "far": [None, 1.5],
        "table": [[1, 2], [3, 4]],
        "name": "straße",
        "pair": [1, "b"],
        "right": True,
    }
    assert "straße" in path.read_text(encoding="utf-8")


def test_jsonl_is_one_object_per_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, ({"id": i, "text": "a\nb"} for i in range(3)))
    lines = path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"id": i, "text": "a\nb"} for i in range(3)]
    write_jsonl(path, [])
    assert path.read_text() == ""


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"id": 1}])
    with pytest.raises(TypeError):
        write_jsonl(path, [{"id": 2}, {"id": object()}])
    with pytest.raises(
        UnicodeEncodeError
    ):  # fails while writing, after the temporary file was opened
        write_text_atomic(path, "\ud800")
    assert path.read_text() == '{"id": 1}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file/scores.json"):
        write_text_atomic(tmp_path / "file" / "scores.json", "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder: Is a directory$"):
        write_text_atomic(tmp_path / "folder", "x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_submission_has_one_answer_per_question() -> None:
    rows = [
        {"question_id": "262148000", "answer": "down", "score": 0.3},
        {"question_id": 7, "answer": "yes"},
        {"question_id": 262148000, "answer": "down"},
    ]
    assert vqa_submission(rows) == [
        {"question_id": 262148000, "answer": "down"},
        {"question_id": 7, "answer": "yes"},
    ]


def test_submission_refuses_contradictions_and_odd_ids() -> None:
    with pytest.raises(DataError, match="question 7 has two answers: 'yes' and 'no'"):
        vqa_submission([{"question_id": 7, "answer": "yes"}, {"question_id": "7", "answer": "no"}])
    with pytest.raises(DataError, match="prediction 1: question id 'x7' is not a number"):
        vqa_submission([{"question_id": 1, "answer": ""}, {"question_id": "x7", "answer": ""}])
