"""ImageNet from hand-made raw folders: classes, flat validation images, held-out images, bad folders."""

from __future__ import annotations

import shutil
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from data_files import encoded, picture, rejects_of
from raw_tasks import Desk, ids, put, put_table, rows, stored_images

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


@pytest.mark.process
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
        ("v2.JPEG n01\nval/v1.JPEG\tn02\n", [("v1.JPEG", (1,)), ("v2.JPEG", (0,))]),
    ):  # fmt: skip
        put(table, content)
        assert desk.prepare("imagenet", "--val-labels", str(table), "--splits", "val") == 0
        found = [(row.id, row.labels) for row in rows(desk.opened("val", "imagenet"))]
        assert found == expected
    desk.messages()
    for content, message in (
        ("n02\n", f"{table}: 1 classes for 2 images in {desk.raw / 'val'}"),
        ("490\n361\n", "class numbers of the development kit, which its meta.mat explains"),
        ("n02\nn05\n", f"{desk.raw / 'val'}: v2.JPEG: class n05 is not in {desk.raw / 'train'}"),
        ("ImageId,PredictionString\nv1,n01 1\n", f"v2.JPEG: not in {table}"),
        ("", f"{table}: empty file"),
        (
            "ImageId,PredictionString\nv1,n01 1\nv2,n02 1\nv1,n02 1\n",
            f"{table}: line 4: image v1 comes twice, of n01 and n02",
        ),
        ("v1.JPEG 1\nv2.JPEG 0\n", f"{table}: line 1: class 1 is a number, of which there are"),
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
    put(desk.raw / "other.txt", "n02 bird\nn02 cat\n")
    assert desk.prepare("imagenet", "--words", str(desk.raw / "other.txt")) == 1
    assert desk.error().endswith("other.txt: class n02 comes twice, with other words")
    assert desk.prepare("imagenet", "--class-names", "a", "b", "c") == 1
    assert desk.error().endswith("holds class folders; --class-names is for tables")
    (desk.raw / "train").rename(desk.raw / "old")
    assert desk.prepare("imagenet") == 1
    assert desk.error() == f"{desk.raw / 'train'}: no such folder"


def test_a_table_beside_class_folders_is_not_the_images(
    imagenet: dict[str, bytes], desk: Desk
) -> None:
    put_table(desk.raw / "sizes.parquet", {"file": ["a.JPEG"], "width": [48]})
    assert desk.prepare("imagenet") == 0
    assert ids(desk.opened("val", "imagenet")) == ["n01/v1.JPEG", "n02/v2.JPEG"]


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


def write_meta(path: Path, wnids: dict[int, str]) -> None:
    """The development kit's meta.mat, with the fields that matter and one that does not."""
    scipy_io = pytest.importorskip("scipy.io")
    fields = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object)]
    synsets = np.zeros((len(wnids), 1), dtype=fields)
    for place, (number, wnid) in enumerate(wnids.items()):
        synsets[place, 0] = (np.float64(number), wnid, "words")
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy_io.savemat(path, {"synsets": synsets})


def test_class_numbers_of_the_development_kit(imagenet: dict[str, bytes], desk: Desk) -> None:
    for i in (1, 2):
        (desk.raw / "val" / f"n0{i}" / f"v{i}.JPEG").rename(desk.raw / "val" / f"v{i}.JPEG")
        (desk.raw / "val" / f"n0{i}").rmdir()
    kit = desk.raw / "ILSVRC2012_devkit_t12" / "data"
    truth = kit / "ILSVRC2012_validation_ground_truth.txt"
    put(truth, "7\n490\n")
    # The numbers are no places in the sorted class ids.
    write_meta(kit / "meta.mat", {490: "n01", 7: "n02", 1001: "n00"})
    assert desk.prepare("imagenet", "--splits", "val") == 0
    expected = [("v1.JPEG", (1,)), ("v2.JPEG", (0,))]
    found = [(row.id, row.labels) for row in rows(desk.opened("val", "imagenet"))]
    assert found == expected
    shutil.copy(truth, desk.raw.parent / "numbers.txt")
    shutil.copy(kit / "meta.mat", desk.raw.parent / "meta.mat")
    option = ("--splits", "val", "--val-labels", str(desk.raw.parent / "numbers.txt"))
    assert desk.prepare("imagenet", *option) == 0
    put(truth, "7\n491\n")
    desk.messages()
    assert desk.prepare("imagenet", "--splits", "val") == 1
    assert desk.error() == f"{truth}: line 2: '491' is no class number of {kit / 'meta.mat'}"
    put(kit / "meta.mat", b"no MATLAB file")
    assert desk.prepare("imagenet", "--splits", "val") == 1
    assert desk.error().startswith(f"{kit / 'meta.mat'}: not the development kit's meta.mat")


def test_the_development_kit_without_scipy(
    imagenet: dict[str, bytes], desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    put(desk.raw / "meta.mat", b"")
    put(desk.raw / "labels", "7\n490\n")
    assert desk.prepare("imagenet", "--val-labels", str(desk.raw / "labels")) == 1
    assert desk.error().startswith(f"{desk.raw / 'meta.mat'}: reading it needs scipy (pip install")


def test_a_class_that_is_a_folder_and_a_tar(imagenet: dict[str, bytes], desk: Desk) -> None:
    put(desk.raw / "train" / "n01" / "d.JPEG", imagenet["train/n02/a.JPEG"])
    assert desk.prepare("imagenet", "--splits", "train") == 1
    tar = desk.raw / "train" / "n01.tar"
    assert (
        desk.error() == f"{tar}: class n01 is the folder beside it too, which is read: remove one"
    )
    assert desk.prepare("imagenet", "--splits", "train", "--on-error", "skip") == 0
    assert ids(desk.opened("train", "imagenet")) == ["n01/d.JPEG", "n02/a.JPEG", "n02/b.JPEG"]


def test_tables(desk: Desk) -> None:
    images = [encoded(picture(number)) for number in range(4)]
    cells = [{"bytes": data, "path": None} for data in images]
    told = {"label": ["tench", "cat, tom"]}
    folder = desk.raw / "data"
    put_table(folder / "train-0.parquet", {"image": cells[:3], "label": [1, 0, 2]}, told)
    put_table(folder / "validation-0.arrow", {"image": cells[3:], "label": [1]}, told)
    put_table(folder / "test-0.parquet", {"image": cells[3:], "label": [-1]}, told)
    assert desk.prepare("imagenet", "--on-error", "skip") == 0
    assert load_labels(str(desk.out)) == Labels("imagenet", ("tench", "cat, tom"))
    train = desk.opened("train", "imagenet")
    assert [row.labels for row in rows(train)] == [(1,), (0,)]
    assert stored_images(train) == images[:2]
    reason = "class 2 is none of 0 to 1 (tench, cat, tom)"
    assert rejects_of(f"{desk.out}_train") == [("row 2", reason)]
    assert train.manifest.left_out == {"row 2": reason}
    assert rows(desk.opened("val", "imagenet"))[0].labels == (1,)
    assert rows(desk.opened("test", "imagenet"))[0].labels == ()
    # With the class ids of the same words the labels are those of the folders.
    put(desk.raw / "LOC_synset_mapping.txt", "n01 tench\nn02 cat, tom\nn03 dog\n")
    assert desk.prepare("imagenet", "--on-error", "skip") == 0
    assert load_labels(str(desk.out)) == Labels("imagenet", ("n01", "n02"), ("tench", "cat, tom"))
    for name in ("train-0.parquet", "test-0.parquet", "validation-0.arrow"):
        put_table(folder / name, {"image": cells[3:], "label": [0]})
    desk.messages()
    assert desk.prepare("imagenet") == 1
    assert "no table's schema names the classes: give --class-names" in desk.error()
    assert desk.prepare("imagenet", "--class-names", "a", "b") == 0
    assert load_labels(str(desk.out)).labels == ("a", "b")
