"""Retrieval from hand-made raw files in Karpathy's form: captions of images, splits, bad records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_files import encoded, picture, rejects_of
from raw_tasks import Desk, ids, put, put_table, rows, stored_images

from megatron_vlmoe.data.indexed import IndexedReader
from megatron_vlmoe.data.task_dataset import TaskRow


def karpathy(split: str, name: str, captions: list[str], **more: str) -> dict[str, Any]:
    entry = {"filename": name, "split": split, "sentences": [{"raw": c} for c in captions]}
    return entry | more


def test_retrieval(desk: Desk) -> None:
    images = [
        karpathy("test", "c.jpg", ["a star"]),
        karpathy("train", "a.jpg", ["a red circle", "two", " ", "a square "]),
        karpathy("val", "d.jpg", ["the left"]),
        karpathy("restval", "b.jpg", ["two"]),
    ]
    put(desk.raw / "dataset_flickr30k.json", {"images": images})
    data = {n: encoded(picture(i)) for i, n in enumerate("abcd")}
    for name, content in data.items():
        put(desk.raw / "flickr30k-images" / f"{name}.jpg", content)
    assert desk.prepare("retrieval") == 1  # the blank caption
    assert desk.prepare("retrieval", "--on-error", "skip") == 0
    expected = [("image 1 (a.jpg), caption 2", "empty caption")]
    assert rejects_of(f"{desk.out}_train") == expected
    train = desk.opened("train", "retrieval")
    assert rows(train) == [
        TaskRow("a.jpg#0", (0,), (0,), ("a red circle",)),
        TaskRow("a.jpg#1", (0,), (1,), ("two",)),
        TaskRow("a.jpg#3", (0,), (2,), ("a square",)),
        TaskRow("b.jpg#0", (1,), (3,), ("two",)),
    ]
    assert train.image_of_text().tolist() == [0, 0, 0, 1]
    assert train.image_of_text().dtype == np.int64
    assert stored_images(train) == [data["a"], data["b"]]
    captions = IndexedReader(f"{desk.out}_train_text")
    assert captions.num_documents == 2 and len(captions.document(0)) == 3
    assert ids(desk.opened("test", "retrieval")) == ["c.jpg#0"]
    assert ids(desk.opened("val", "retrieval")) == ["d.jpg#0"]
    assert train.manifest.labels_sha256 is None and not Path(f"{desk.out}_labels.json").exists()


def test_retrieval_on_coco(desk: Desk) -> None:
    images = [
        karpathy("test", "x.jpg", ["a star"], filepath="val2014"),
        karpathy("test", "y.jpg", [" ", ""], filepath="val2014"),
    ]
    put(desk.raw / "dataset_coco.json", {"images": images})
    put(desk.raw / "val2014" / "x.jpg", encoded(picture(0)))
    put(desk.raw / "val2014" / "y.jpg", encoded(picture(1)))
    assert desk.prepare("retrieval", "--splits", "test", "--on-error", "skip") == 0
    data = desk.opened("test", "retrieval")
    assert (data.num_images, data.num_texts) == (1, 1)  # y.jpg has no usable caption
    desk.messages()
    assert desk.prepare("retrieval") == 1
    where = desk.raw / "dataset_coco.json"
    assert desk.error() == f"{where}: no image of split train, restval; it has test"
    put(desk.raw / "dataset_flickr30k.json", {"images": []})
    assert desk.prepare("retrieval") == 1
    assert "choose one with --annotations" in desk.error()
    option = ("--annotations", str(where), "--splits", "test", "--on-error", "skip")
    assert desk.prepare("retrieval", *option) == 0
    where.unlink()
    (desk.raw / "dataset_flickr30k.json").unlink()
    desk.messages()
    assert desk.prepare("retrieval") == 1
    assert "no dataset_coco.json or dataset_flickr30k.json in it" in desk.error()


def test_a_picture_that_comes_twice(desk: Desk) -> None:
    images = [
        karpathy("test", "1.jpg", ["a star"], filepath="a"),
        karpathy("test", "1.jpg", ["two"], filepath="b"),
        karpathy("test", "1.jpg", ["left"], filepath="a"),
    ]
    put(desk.raw / "dataset_coco.json", {"images": images})
    for number, name in enumerate("ab"):
        put(desk.raw / name / "1.jpg", encoded(picture(number)))
    assert desk.prepare("retrieval", "--splits", "test", "--on-error", "skip") == 0
    assert ids(desk.opened("test", "retrieval")) == ["a/1.jpg#0", "b/1.jpg#0"]
    assert [record for record, _ in rejects_of(f"{desk.out}_test")] == ["image 2 (a/1.jpg)"]


def test_lists_of_objects(desk: Desk) -> None:
    data = {name: encoded(picture(number)) for number, name in enumerate("abc")}
    for name, content in data.items():
        put(desk.raw / "images" / "val2014" / f"{name}.jpg", content)
    train = [
        {"image": "val2014/a.jpg", "caption": "a star", "image_id": "coco_1"},
        {"image": "val2014/b.jpg", "caption": "two", "image_id": "coco_2"},
        {"image": "val2014/a.jpg", "caption": "left", "image_id": "coco_1"},
        {"image": "val2014/c.jpg", "caption": "under", "image_id": "coco_2"},
        {"caption": "under"},
    ]
    put(desk.raw / "annotation" / "coco_karpathy_train.json", train)
    test = [{"image": "/else/val2014/c.jpg", "caption": ["a star", "two"]}]
    put(desk.raw / "annotation" / "coco_karpathy_test.json", test)
    assert desk.prepare("retrieval", "--on-error", "skip") == 0
    found = desk.opened("train", "retrieval")
    assert ids(found) == ["val2014/a.jpg#0", "val2014/a.jpg#1", "val2014/b.jpg#0"]
    assert [row.raw for row in rows(found)] == [("a star",), ("left",), ("two",)]
    assert stored_images(found) == [data["a"], data["b"]]
    assert rejects_of(f"{desk.out}_train") == [
        ("entry 3 (val2014/c.jpg)", "image_id coco_2 is that of val2014/b.jpg too"),
        ("entry 4", "no image or no caption"),
    ]
    assert stored_images(desk.opened("test", "retrieval")) == [data["c"]]
    desk.messages()
    assert desk.prepare("retrieval", "--splits", "val") == 1
    assert desk.error().endswith("coco_karpathy_train.json: no list of split val beside it")
    other = desk.raw / "annotation" / "flickr30k_test.json"
    put(other, [{"image": "val2014/b.jpg", "caption": ["left"]}])
    assert desk.prepare("retrieval") == 1
    assert "choose one with --annotations" in desk.error()
    assert desk.prepare("retrieval", "--annotations", str(other)) == 0
    assert stored_images(desk.opened("test", "retrieval")) == [data["b"]]


@pytest.mark.parametrize("inside", [True, False])
def test_tables(desk: Desk, inside: bool) -> None:
    data = [encoded(picture(number)) for number in range(4)]
    columns: dict[str, list[Any]] = {
        "image": [{"bytes": content, "path": None} for content in data],
        "caption": [["a star", "two"], ["left"], ["under"], ["over"]],
        "filename": ["1.jpg", "2.jpg", "3.jpg", "3.jpg"],
    }
    if inside:  # the column says it, not the name of the file
        columns["split"] = ["train", "val", "test", "test"]
        put_table(desk.raw / "test-00000-of-00001.parquet", columns)
    else:
        for name, own in (
            ("train", slice(0, 1)),
            ("validation", slice(1, 2)),
            ("test", slice(2, 4)),
        ):
            path = desk.raw / name / "data-00000-of-00001.arrow"
            put_table(path, {key: values[own] for key, values in columns.items()})
    assert desk.prepare("retrieval", "--on-error", "skip") == 0
    found = {split: desk.opened(split, "retrieval") for split in ("train", "val", "test")}
    assert {split: ids(one) for split, one in found.items()} == {
        "train": ["1.jpg#0", "1.jpg#1"],
        "val": ["2.jpg#0"],
        "test": ["3.jpg#0"],
    }
    assert stored_images(found["test"]) == [data[2]]
    (reject,) = rejects_of(f"{desk.out}_test")
    assert reject[1] == "image 3.jpg came before: a row must have all captions of its image"
