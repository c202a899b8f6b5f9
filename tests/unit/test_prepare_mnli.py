"""MNLI from hand-made tables: columns, classes, bad lines, a full disk."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from data_files import files_of, rejects_of, tool
from raw_tasks import Desk, ids, put, put_table, rows

from megatron_vlmoe.data.indexed import IndexedReader
from megatron_vlmoe.data.task_dataset import TaskRow, load_labels


def tsv(*lines: str) -> str:
    return "".join("\t".join(line.split("|")) + "\n" for line in lines)


HEADER = "index|genre|sentence1|sentence2|label1|gold_label"


def test_mnli(desk: Desk) -> None:
    train = [
        "0|g|a red circle|two|x|neutral",
        '1|g|the "star|left|x|-',
        '2|g|the "star|left"|x|contradiction',
        "3|g|under|two|entailment|entailment",
    ]
    put(desk.raw / "train.tsv", tsv(HEADER, *train))
    put(desk.raw / "dev_matched.tsv", tsv(HEADER, train[3]).replace("\n", "\r\n"))
    put(desk.raw / "dev_mismatched.tsv", tsv(HEADER, train[0]))
    put(desk.raw / "test_matched.tsv", tsv("genre|sentence1|sentence2", "g|two|star"))
    put(desk.raw / "diagnostic.tsv", "x")
    assert desk.prepare("mnli") == 0
    assert "mnli train: 1 samples left out: gold_label is -" in desk.messages()
    assert load_labels(str(desk.out)).labels == ("entailment", "neutral", "contradiction")
    data = desk.opened("train", "mnli")
    assert rows(data) == [
        TaskRow("0", (), (0, 1), ("a red circle", "two"), (1,), (1.0,)),
        TaskRow("2", (), (2, 3), ('the "star', 'left"'), (2,), (1.0,)),
        TaskRow("3", (), (4, 5), ("under", "two"), (0,), (1.0,)),
    ]
    texts = IndexedReader(f"{desk.out}_train_text")
    assert (texts.num_documents, texts.num_sequences, data.num_images) == (3, 6, 0)
    assert data.manifest.omitted == {"gold_label is -": 1} and data.manifest.rejects == 0
    assert rows(desk.opened("test_matched", "mnli")) == [
        TaskRow("line 2", (), (0, 1), ("two", "star"))
    ]
    assert rows(desk.opened("dev_matched", "mnli"))[0].labels == (0,)
    assert not Path(f"{desk.out}_diagnostic.json").exists()
    with pytest.raises(IndexError, match="no images"):
        data.image_bytes(0)


def test_other_tables_of_sentence_pairs(desk: Desk) -> None:
    put(desk.raw / "dev.tsv", tsv("index|question|sentence|label", "0|is it|a star|not_entailment"))
    options = ["--splits", "dev", "--sentence1", "question", "--sentence2", "sentence"]
    options += ["--label", "label", "--class-names", "entailment", "not_entailment"]
    assert desk.prepare("mnli", *options) == 0
    assert rows(desk.opened("dev", "mnli"))[0].labels == (1,)


def test_the_publishers_files(desk: Desk) -> None:
    lines = [
        {"gold_label": label, "sentence1": "a red circle", "sentence2": "two", "pairID": name}
        for label, name in (
            ("neutral", "1n"),
            ("-", "1e"),
            ("contradiction", "2c"),
            ("neutral", "1n"),
        )
    ]
    content = "".join(json.dumps(line) + "\n" for line in lines)
    folder = desk.raw / "multinli_1.0"
    put(folder / "multinli_1.0_train.jsonl", content)
    put(folder / "multinli_1.0_train.txt", "the jsonl file is the same")
    header = "gold_label|sentence1_parse|sentence1|sentence2|pairID|label1"
    for kind in ("matched", "mismatched"):
        table = tsv(header, "entailment|()|two|star|3e|neutral", "-|()|two|star|4e|neutral")
        put(folder / f"multinli_1.0_dev_{kind}.txt", table)
    hidden = {"gold_label": "hidden", "sentence1": "two", "sentence2": "star", "pairID": "5"}
    put(folder / "multinli_0.9_test_matched_unlabeled.jsonl", json.dumps(hidden))
    assert desk.prepare("mnli", "--on-error", "skip") == 0
    assert [(row.id, row.labels) for row in rows(desk.opened("train", "mnli"))] == [
        ("1n", (1,)),
        ("2c", (2,)),
    ]
    assert rejects_of(f"{desk.out}_train") == [("line 4", "id 1n came before")]
    dev = desk.opened("dev_mismatched", "mnli")
    assert [(row.id, row.labels, row.raw) for row in rows(dev)] == [("3e", (0,), ("two", "star"))]
    assert dev.manifest.omitted == {"gold_label is -": 1}
    assert [(row.id, row.labels) for row in rows(desk.opened("test_matched", "mnli"))] == [
        ("5", ())
    ]


PAIRS = {"premise": ["a star", "two", "left", "left"], "hypothesis": ["two", "star", "a", "a"]}


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_class_numbers_of_tables_are_named_by_their_schema(desk: Desk, suffix: str) -> None:
    told = {"label": ["contradiction", "entailment", "neutral"]}
    columns = {**PAIRS, "label": [0, 2, -1, 3], "idx": [7, 8, 9, 10]}
    put_table(desk.raw / "mnli" / f"train-00000-of-00001.{suffix}", columns, told)
    for kind in ("matched", "mismatched"):
        for split in ("validation", "test"):
            labels = [1, -1, -1, -1]
            path = desk.raw / "mnli" / f"{split}_{kind}-00000-of-00001.{suffix}"
            put_table(path, {**PAIRS, "label": labels}, told)
    assert desk.prepare("mnli", "--on-error", "skip") == 0
    assert load_labels(str(desk.out)).labels == ("contradiction", "entailment", "neutral")
    train = desk.opened("train", "mnli")
    assert [(row.id, row.labels) for row in rows(train)] == [("7", (0,)), ("8", (2,))]
    assert train.manifest.omitted == {"label is -1": 1}
    known = "contradiction, entailment, neutral"
    reason = f"class 3 is none of 0 to 2 ({known})"
    assert rejects_of(f"{desk.out}_train") == [("row 3", reason)]
    assert train.manifest.left_out == {"10": reason}
    assert len(desk.opened("dev_matched", "mnli")) == 1
    test = rows(desk.opened("test_matched", "mnli"))
    assert [row.labels for row in test] == [(1,), (), (), ()]
    desk.messages()
    # The names that count are those of --class-names, in its order; they must be the same.
    options = ["--splits", "train", "--on-error", "skip", "--class-names", "neutral"]
    assert desk.prepare("mnli", *options, "entailment", "contradiction") == 0
    assert [row.labels for row in rows(desk.opened("train", "mnli"))] == [(2,), (0,)]
    desk.messages()
    assert desk.prepare("mnli", *options, "entailment") == 1
    assert desk.error().endswith(f"name {known}")


def test_class_numbers_that_no_schema_names(desk: Desk) -> None:
    put_table(desk.raw / "train.parquet", {**PAIRS, "label": [0, 1, 2, 2]})
    put_table(desk.raw / "dev-0.arrow", {**PAIRS, "label": [0, 1, 2, 2]})
    assert desk.prepare("mnli") == 0  # SNLI's splits
    expected = "mnli train: class numbers stand for 0 entailment, 1 neutral, 2 contradiction"
    assert expected in desk.messages()
    assert [row.labels[0] for row in rows(desk.opened("dev", "mnli"))] == [0, 1, 2, 2]
    put_table(desk.raw / "train-1.parquet", {**PAIRS, "label": [0, 1, 2, 2]})
    assert desk.prepare("mnli", "--splits", "train") == 0
    # Without a column of ids a sample is named by its place.
    assert ids(desk.opened("train", "mnli"))[3:5] == [
        "train-1.parquet row 3",
        "train.parquet row 0",
    ]
    (desk.raw / "train-1.parquet").unlink()
    desk.messages()
    question = {
        "question": PAIRS["premise"],
        "sentence": PAIRS["hypothesis"],
        "label": [0, 1, 1, 0],
    }
    put_table(desk.raw / "train.parquet", question)
    options = ["--splits", "train", "--sentence1", "question", "--sentence2", "sentence"]
    assert desk.prepare("mnli", *options) == 1
    assert desk.error().endswith("class 0 is a number: name the classes with --class-names")
    assert desk.prepare("mnli", *options, "--class-names", "entailment", "not_entailment") == 0
    assert [row.labels[0] for row in rows(desk.opened("train", "mnli"))] == [0, 1, 1, 0]


def test_bad_tables(desk: Desk) -> None:
    path = desk.raw / "train.tsv"
    lines = [
        HEADER,
        "0|g|two|star|x",
        "1|g|two|star|x|neutral|more",
        "2|g|two|star|x|",
        "3|g|| star|x|neutral",
        "4|g|two|  |x|neutral",
        "5|g|two|star|x|neutral",
        "",
    ]
    path.write_bytes(tsv(*lines).encode() + b"6\tg\t\xff\tstar\tx\tneutral\n")
    assert desk.prepare("mnli", "--splits", "train") == 1
    assert desk.error() == f"{path}: line 2: 5 columns, but 'gold_label' is column 6"
    assert desk.prepare("mnli", "--splits", "train", "--on-error", "skip") == 0
    assert rejects_of(f"{desk.out}_train") == [
        ("line 2", "5 columns, but 'gold_label' is column 6"),
        ("line 3", "7 columns, but the header names 6"),
        ("line 4", "class '' is none of entailment, neutral, contradiction"),
        ("line 5, text 1", "empty text"),
        ("line 6, text 2", "empty text"),
        ("line 9", "invalid UTF-8 at byte 4"),
    ]
    assert ids(desk.opened("train", "mnli")) == ["5"]
    put(path, tsv(HEADER, "5|g|two|star|x|neutral", "5|g|two|star|x", "6|g|two"))
    assert desk.prepare("mnli", "--splits", "train", "--on-error", "skip") == 0
    assert list(desk.opened("train", "mnli").manifest.left_out or {}) == ["6"]  # 5 is there
    desk.messages()
    assert desk.prepare("mnli") == 1
    assert desk.error().startswith(f"{desk.raw / 'dev_matched.tsv'}: no such file (nor ")
    put(path, tsv("sentence1|sentence2", "a|b"))
    assert desk.prepare("mnli", "--splits", "train") == 1
    assert desk.error() == f"{path}: no column gold_label or label; it has sentence1, sentence2"
    put(path, tsv(HEADER))
    assert desk.prepare("mnli", "--splits", "train") == 1
    assert desk.error() == f"no usable record in split train of {desk.raw}"
    put(path, "")
    assert desk.prepare("mnli", "--splits", "train") == 1
    assert desk.error() == f"{path}: empty file"
    assert ids(desk.opened("train", "mnli")) == ["5"]  # failed runs replaced nothing


def test_unknown_texts_are_counted_or_rejected(desk: Desk) -> None:
    lines = [HEADER, "0|g|two 星|star|x|neutral", "1|g|two|星!|x|neutral"]
    put(desk.raw / "train.tsv", tsv(*lines))
    assert desk.prepare("mnli", "--splits", "train", "--on-error", "skip") == 0
    reason = "text without a word that the tokenizer knows"
    assert rejects_of(f"{desk.out}_train") == [("line 3, text 2", reason)]
    manifest = desk.opened("train", "mnli").manifest
    assert manifest.unknown_tokens == 1
    assert f"mnli train: 1 of {manifest.tokens} tokens are unknown" in desk.messages()
    assert tool("inspect_dataset")([f"{desk.out}_train"]) == 0
    assert "1 of" in desk.capfd.readouterr().out


def test_full_disk_leaves_nothing(monkeypatch: pytest.MonkeyPatch, desk: Desk) -> None:
    put(desk.raw / "train.tsv", tsv(HEADER, "0|g|two|star|x|neutral"))
    real = os.fsync
    for place in ("samples.arrow", "labels.json"):

        def full(handle: int, place: str = place) -> None:
            if f"{place}.tmp" in os.readlink(f"/proc/self/fd/{handle}"):
                raise OSError(28, os.strerror(28))
            real(handle)

        monkeypatch.setattr(os, "fsync", full)
        assert desk.prepare("mnli", "--splits", "train") == 1
        line = desk.error()
        assert place in line and line.endswith("No space left on device")
        assert files_of(desk.out.parent) == []
