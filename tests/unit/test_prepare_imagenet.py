"""ImageNet from hand-made raw folders: classes, flat validation images, held-out images, bad folders."""

from __future__ import annotations

import tarfile
from collections import Counter
from pathlib import Path

import pytest
from data_files import encoded, picture
from raw_tasks import Desk, ids, put, rows, stored_images

from megatron_vlmoe.data.manifest import load_manifest
from megatron_vlmoe.data.task_dataset import Labels, TaskDataset, TaskRow, load_labels


@pytest.fixture
def imagenet(desk: Desk) -> dict[str, bytes]:
    """Raw ImageNet of two classes, one of them a tar; the images by name."""
    names = [f"train/n02/{c}.JPEG" for c in "ba"] + [f"val/n0{i}/v{i}.JPEG" for i in (2, 1)]
    data = {name: encoded(picture(i)) for i, name in enumerate(names)}
    for name, content in data.items():
        put(desk.raw / name, content)
    data["train/n01/c.JPEG"] = encoded(picture(9))
    put(desk.raw / "c.JPEG", data["train/n01/c.JPEG"])
    with tarfile.open(desk.raw / "train" / "n01.tar", "w") as archive:
        archive.add(desk.raw / "c.JPEG", "c.JPEG")
    put(desk.raw / "words.txt", "n02\tcat, tom\nn09\tdog\n")
    return data


def test_imagenet(imagenet: dict[str, bytes], desk: Desk) -> None:
    assert desk.prepare("imagenet", "--workers", "2") == 0
    assert load_labels(str(desk.out)) == Labels("imagenet", ("n01", "n02"), ("n01", "cat, tom"))
    train, val = (desk.opened(split, "imagenet") for split in ("train", "val"))
    assert rows(train) == [
        TaskRow("n01/c.JPEG", (0,), labels=(0,), scores=(1.0,)),
        TaskRow("n02/a.JPEG", (1,), labels=(1,), scores=(1.0,)),
        TaskRow("n02/b.JPEG", (2,), labels=(1,), scores=(1.0,)),
    ]
    assert [(row.id, row.labels) for row in rows(val)] == [
        ("n01/v1.JPEG", (0,)),
        ("n02/v2.JPEG", (1,)),
    ]
    assert stored_images(train) == [imagenet[f"train/{row.id}"] for row in rows(train)]
    assert (train.num_texts, train.manifest.tokens, train.manifest.documents) == (0, 0, 3)
    # Of no account for a task without text.
    assert len(TaskDataset.open(f"{desk.out}_val", "imagenet", "any")) == 2
    assert not Path(f"{desk.out}_val_text.bin").exists()
    with pytest.raises(ValueError, match="no captions"):
        train.image_of_text()


def test_flat_imagenet_val(imagenet: dict[str, bytes], desk: Desk) -> None:
    for i in (1, 2):
        (desk.raw / "val" / f"n0{i}" / f"v{i}.JPEG").rename(desk.raw / "val" / f"v{i}.JPEG")
        (desk.raw / "val" / f"n0{i}").rmdir()
    assert desk.prepare("imagenet") == 1
    assert desk.error().endswith("images without folders need --val-labels")
    table = desk.raw / "labels"
    for content, expected in (
        ("n02\nn01\n", [("v1.JPEG", (1,)), ("v2.JPEG", (0,))]),
        ("ImageId,PredictionString\nv2,n02 1 2 3 4\nv1,n01 1 2 3 4 n01 5 6 7 8\n",
         [("v1.JPEG", (0,)), ("v2.JPEG", (1,))]),
    ):  # fmt: skip
        put(table, content)
        assert desk.prepare("imagenet", "--val-labels", str(table), "--splits", "val") == 0
        found = [(row.id, row.labels) for row in rows(desk.opened("val", "imagenet"))]
        assert found == expected
    desk.messages()
    for content, message in (
        ("n02\n", f"{table}: 1 classes for 2 images in {desk.raw / 'val'}"),
        ("490\n361\n", "class numbers of the development kit"),
        ("n02\nn05\n", f"{desk.raw / 'val'}: v2.JPEG: class n05 is not in {desk.raw / 'train'}"),
        ("ImageId,PredictionString\nv1,n01 1\n", f"v2.JPEG: not in {table}"),
        ("", f"{table}: empty file"),
    ):
        put(table, content)
        assert desk.prepare("imagenet", "--val-labels", str(table), "--splits", "val") == 1
        assert message in desk.error()


def test_bad_imagenet_folders(imagenet: dict[str, bytes], desk: Desk) -> None:
    (desk.raw / "val" / "n03").mkdir()
    assert desk.prepare("imagenet", "--splits", "val") == 1
    assert desk.error() == f"{desk.raw / 'val' / 'n03'}: class n03 is not in {desk.raw / 'train'}"
    assert desk.prepare("imagenet", "--splits", "val", "--on-error", "skip") == 0
    assert load_manifest(f"{desk.out}_val").rejects == 1
    desk.messages()
    (desk.raw / "train" / "n03").mkdir()
    assert desk.prepare("imagenet", "--splits", "train") == 1
    assert desk.error() == f"{desk.raw / 'train' / 'n03'}: no image in it"
    assert desk.prepare("imagenet", "--val-fraction", "0.5") == 1
    assert "must not be given" in desk.error()
    put(desk.raw / "other.txt", "n77 bird\n")
    assert desk.prepare("imagenet", "--words", str(desk.raw / "other.txt")) == 1
    assert "names none of the 3 classes" in desk.error()
    (desk.raw / "train").rename(desk.raw / "old")
    assert desk.prepare("imagenet") == 1
    assert desk.error() == f"{desk.raw / 'train'}: no such folder"


def test_held_out_share_of_each_class(desk: Desk) -> None:
    for wnid, count in (("n1", 10), ("n2", 1), ("n3", 4)):
        for i in range(count):
            put(desk.raw / wnid / f"{i}.JPEG", encoded(picture(i, 8, 8)))
    assert desk.prepare("imagenet") == 1
    assert "--val-fraction holds images of train out" in desk.error()
    assert desk.prepare("imagenet", "--val-fraction", "0.3") == 0
    train, val = (ids(desk.opened(split, "imagenet")) for split in ("train", "val"))
    assert not set(train) & set(val) and len(train) + len(val) == 15
    assert Counter(name[:2] for name in val) == {"n1": 3, "n3": 1}  # 3, 0.3 and 1.2 rounded
    before = val
    assert desk.prepare("imagenet", "--val-fraction", "0.3", "--seed", "5", "--splits", "val") == 0
    assert ids(desk.opened("val", "imagenet")) != before
