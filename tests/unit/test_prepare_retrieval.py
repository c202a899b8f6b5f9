"""Retrieval from hand-made raw files in Karpathy's form: captions of images, splits, bad records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from data_files import encoded, picture, rejects_of
from raw_tasks import Desk, ids, put, rows, stored_images

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
    assert train.labels_sha256 is None and not Path(f"{desk.out}_labels.json").exists()


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
