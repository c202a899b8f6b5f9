"""MNLI from hand-made tables: columns, classes, bad lines, a full disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from data_files import files_of, rejects_of, tool
from raw_tasks import Desk, ids, put, rows

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
    desk.messages()
    assert desk.prepare("mnli") == 1
    assert desk.error() == f"{desk.raw / 'dev_matched.tsv'}: no such file"
    put(path, tsv("sentence1|sentence2", "a|b"))
    assert desk.prepare("mnli", "--splits", "train") == 1
    assert desk.error() == f"{path}: no column 'gold_label'; it has sentence1, sentence2"
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
