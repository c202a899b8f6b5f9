"""Opening prepared splits: reading, pickling, and every way in which files can be wrong."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from raw_tasks import Desk, rows, write_nlvr2

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.data.manifest import FileRecord, load_manifest, stage_manifest
from megatron_vlmoe.data.task_dataset import (
    Labels,
    SamplesReader,
    SamplesWriter,
    TaskDataset,
    TaskRow,
    load_labels,
)
from megatron_vlmoe.data.task_labels import write_labels
from megatron_vlmoe.runtime.sums import file_sha256
from megatron_vlmoe.tokenizers.text import TextTokenizer


@pytest.fixture
def split(desk: Desk) -> str:
    """A prepared split."""
    write_nlvr2(desk.raw)
    assert desk.prepare("nlvr2", "--splits", "train") == 0
    return f"{desk.out}_train"


def test_opened_split_pickles_small_and_works_after(split: str) -> None:
    data = TaskDataset.open(split, "nlvr2", None)
    expected = rows(data)
    data.tokens(0), data.image_bytes(0)
    copy = pickle.loads(pickle.dumps(data))
    assert len(pickle.dumps(data)) < 4000
    assert rows(copy) == expected and len(copy) == 3
    assert np.array_equal(copy.image_bytes(3), data.image_bytes(3))
    assert np.array_equal(copy.tokens(2), data.tokens(2))
    for wrong in (-1, 3):
        with pytest.raises(IndexError):
            copy.row(wrong)
        with pytest.raises(IndexError):
            copy.tokens(wrong)


def test_rows_of_several_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_vlmoe.data.task_dataset._BATCH_ROWS", 3)
    written = [TaskRow(str(i), (i,), labels=(i, 7), scores=(0.5, 1.0)) for i in range(8)]
    writer = SamplesWriter(str(tmp_path / "p"), "imagenet")
    for row in written:
        writer.add(row)
    assert writer.finish().size > 0
    writer.publish()
    reader = SamplesReader(str(tmp_path / "p"), "imagenet")
    assert [reader.row(i) for i in range(reader.num_rows)] == written
    assert reader.column("labels").tolist() == [x for i in range(8) for x in (i, 7)]
    reader.check(8, 0)
    with pytest.raises(DataError, match="damaged: images 6 to 7 of 7"):
        reader.check(7, 0)


def test_tables_of_before_there_was_an_answer_type(tmp_path: Path) -> None:
    import pyarrow as pa

    row = TaskRow("1", (0,), (0,), ("who",), (2,), (1.0,), ("he",) * 10, "other")
    writer = SamplesWriter(str(tmp_path / "p"), "vqa")
    writer.add(row)
    writer.finish()
    writer.publish()
    assert SamplesReader(str(tmp_path / "p"), "vqa").row(0) == row
    path = tmp_path / "p_samples.arrow"
    table = pa.ipc.open_file(path.read_bytes()).read_all().drop_columns(["answer_type"])
    with pa.ipc.new_file(path, table.schema) as file:
        file.write_table(table)
    assert SamplesReader(str(tmp_path / "p"), "vqa").row(0) == replace(row, answer_type="")


def test_splits_that_are_not_what_they_should_be(split: str, desk: Desk) -> None:
    def message(task: str = "nlvr2", fingerprint: str | None = None) -> str:
        with pytest.raises(DataError) as error:
            TaskDataset.open(split, task, fingerprint)
        return str(error.value)

    assert message("nlvr") == "unknown task 'nlvr': one of vqa, nlvr2, retrieval, imagenet, mnli"
    assert message("vqa") == f"{split}.json: a dataset of nlvr2, but one of vqa is wanted"
    assert "made with another tokenizer" in message(fingerprint="0" * 64)
    assert len(TaskDataset.open(split, "nlvr2", TextTokenizer(desk.model).fingerprint)) == 3
    for suffix in ("_image.bin", "_text.bin", "_text.idx", "_samples.arrow"):
        path = Path(split + suffix)
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        assert message().startswith(f"{path}: {len(content) - 1} bytes, but its manifest says")
        path.unlink()
        assert message() == f"{path}: No such file or directory"
        path.write_bytes(content)
    manifest = load_manifest(split)
    stage_manifest(split, replace(manifest, samples=2)).publish()
    assert message() == f"{split}.json: 2 samples, but the table has 3"
    files = {k: v for k, v in manifest.files.items() if k != "_samples.arrow"}
    stage_manifest(split, replace(manifest, files=files)).publish()
    assert message().endswith("no record of _samples.arrow)")
    Path(f"{split}.json").unlink()
    assert "preprocessing did not end" in message()


def rewritten(split: str, table: bytes) -> None:
    """Puts another table of samples into a split, as its manifest says."""
    path = Path(f"{split}_samples.arrow")
    path.write_bytes(table)
    manifest = load_manifest(split)
    record = FileRecord(len(table), file_sha256(path))
    stage_manifest(
        split, replace(manifest, files={**manifest.files, "_samples.arrow": record})
    ).publish()


def test_damaged_tables_are_found(split: str, tmp_path: Path) -> None:
    path = Path(f"{split}_samples.arrow")
    content = path.read_bytes()

    def refused(reason: str) -> None:
        with pytest.raises(DataError, match=rf"p_train_samples\.arrow: {reason}"):
            TaskDataset.open(split, "nlvr2", None)

    for place in (0, len(content) // 2, len(content) - 1):
        broken = bytearray(content)
        broken[place] ^= 1
        path.write_bytes(broken)
        refused("damaged: contents differ from the checksum")
    # Tables that are what the manifest says, and wrong nevertheless.
    rewritten(split, content[:-12] + b"\xff" * 12)
    refused("damaged: ")
    rewritten(split, b"")
    refused("damaged: ")
    number = content.index(np.array([0, 1, 0, 1, 2, 3], "<i4").tobytes())  # the images
    broken = bytearray(content)
    broken[number] = 99
    rewritten(split, bytes(broken))
    refused("damaged: images 0 to 99 of 4")
    for name, (task, row) in {
        "another": ("vqa", TaskRow("0", (0,), (0,), ("two",))),
        "one image": ("nlvr2", TaskRow("0", (0,), (0,), ("two",))),
        "one score": ("nlvr2", TaskRow("0", (0, 1), (0,), ("two",), (0, 1), (1.0,))),
    }.items():
        writer = SamplesWriter(str(tmp_path / name), task)
        writer.add(row)
        writer.finish()
        writer.publish()
        rewritten(split, (tmp_path / f"{name}_samples.arrow").read_bytes())
        stage_manifest(split, replace(load_manifest(split), samples=1)).publish()
        refused("not the samples of task nlvr2" if task == "vqa" else "damaged: a sample with")


def test_labels_files(tmp_path: Path) -> None:
    prefix = tmp_path / "p"
    labels = Labels("vqa", ("né", "no"))
    write_labels(prefix, labels)
    assert load_labels(str(prefix)) == labels
    # Words do not change what a label means; another order, or another task, does.
    assert replace(labels, names=("a", "b")).sha256 == labels.sha256
    assert replace(labels, labels=("no", "né")).sha256 != labels.sha256
    assert replace(labels, task="mnli").sha256 != labels.sha256
    path = tmp_path / "p_labels.json"
    for content, message in (
        ("{", "damaged"),
        ('{"labels": ["a"]}', "no task is named"),
        ('{"task": "vqa", "labels": []}', "labels are not a list of different texts"),
        ('{"task": "vqa", "labels": ["a", "a"]}', "labels are not"),
        ('{"task": "vqa", "labels": ["a", 1]}', "labels are not"),
        ('{"task": "vqa", "labels": ["a"], "names": []}', "names are not"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=message):
            load_labels(str(prefix))
    path.unlink()
    with pytest.raises(DataError, match=r"p_labels\.json: not found"):
        load_labels(str(prefix))
