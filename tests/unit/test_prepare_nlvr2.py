"""NLVR2 from hand-made raw files: rows, both layouts of the images, bad records."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from data_files import encoded, files_of, picture, rejects_of
from raw_tasks import (
    Desk,
    ids,
    nlvr2_sentence,
    put,
    put_table,
    rows,
    stored_images,
    write_nlvr2,
    write_nlvr2_images,
)

from megatron_vlmoe.data.task_dataset import TaskDataset, TaskRow, load_labels


@pytest.mark.process
def test_nlvr2(desk: Desk) -> None:
    pictures = write_nlvr2(desk.raw)
    assert desk.prepare("nlvr2") == 0
    assert load_labels(str(desk.out)).labels == ("False", "True")
    data = desk.opened("train", "nlvr2")
    first = TaskRow("train-1-0-0", (0, 1), (0,), ("two stars",), (1,), (1.0,))
    second = replace(first, id="train-1-0-1", texts=(1,), labels=(0,))
    third = replace(first, id="train-22-3-1", images=(2, 3), texts=(2,))
    assert rows(data) == [first, second, third]
    assert stored_images(data)[:2] == pictures  # left, right
    assert ids(desk.opened("dev", "nlvr2")) == ["dev-1-0-0"]
    assert ids(desk.opened("test", "nlvr2")) == ["test1-1-0-0"]
    # The layout of the repository, with the images unpacked beside it.
    for name in ("train", "dev", "test1"):
        (desk.raw / "images" / name).rename(desk.raw / name)
    (desk.raw / "nlvr2").mkdir()
    (desk.raw / "data").rename(desk.raw / "nlvr2" / "data")
    before = Path(f"{desk.out}_train_samples.arrow").read_bytes()
    assert desk.prepare("nlvr2", "--splits", "train", "--workers", "2") == 0
    assert Path(f"{desk.out}_train_samples.arrow").read_bytes() == before


@pytest.mark.process
def test_bad_nlvr2_records(desk: Desk) -> None:
    write_nlvr2(desk.raw)
    path, images = desk.raw / "data" / "dev.json", desk.raw / "images" / "dev"
    (images / "dev-1-0-img1.png").rename(images / "dev-2-0-img0.png")
    write_nlvr2_images(images, "dev-3-0")
    lines = [
        nlvr2_sentence("dev-3-0-0", "True"),
        '{"sentence": \n',
        nlvr2_sentence("dev-3-0-1", "maybe"),
        nlvr2_sentence("dev-3-0-2", None),
        nlvr2_sentence("dev-1-0-0", "True"),  # without its right image
        nlvr2_sentence("dev-2-0-0", "True"),
        nlvr2_sentence("dev", "True"),
        nlvr2_sentence("dev-3-0-3", "False"),
    ]
    put(path, "".join(lines))
    assert desk.prepare("nlvr2", "--splits", "dev") == 1
    assert desk.error().startswith(f"{path}: line 2: invalid JSON")
    put(path, "".join([*lines[:1], *lines[2:]]))
    assert desk.prepare("nlvr2", "--splits", "dev", "--workers", "2") == 1
    expected = f"{path}: line 2 (dev-3-0-1): label 'maybe' is neither True nor False"
    assert desk.error() == expected
    assert files_of(desk.out.parent) == []
    assert desk.prepare("nlvr2", "--splits", "dev", "--on-error", "skip") == 0
    assert rejects_of(f"{desk.out}_dev") == [
        ("line 2 (dev-3-0-1)", "label 'maybe' is neither True nor False"),
        ("line 3 (dev-3-0-2)", "label None is neither True nor False"),
        ("line 4 (dev-1-0-0)", f"no such image file: {images / 'dev-1-0-img1.png'}"),
        ("line 5 (dev-2-0-0)", f"no such image file: {images / 'dev-2-0-img1.png'}"),
        ("line 6", "no identifier of the form split-set-pair-sentence"),
    ]
    data = TaskDataset.open(f"{desk.out}_dev", "nlvr2", None)
    assert [(row.id, row.images) for row in rows(data)] == [
        ("dev-3-0-0", (0, 1)),
        ("dev-3-0-3", (0, 1)),
    ]
    assert data.num_images == 2  # the good left image of a bad pair is not stored
    (desk.raw / "images" / "test1").rename(desk.raw / "images" / "test")
    desk.messages()
    assert desk.prepare("nlvr2") == 1
    assert desk.error().startswith(f"{desk.raw / 'images' / 'test1'}: no such folder")


def test_an_identifier_that_comes_twice(desk: Desk) -> None:
    write_nlvr2(desk.raw)
    path = desk.raw / "data" / "dev.json"
    put(path, nlvr2_sentence("dev-1-0-0", "True") * 2)
    assert desk.prepare("nlvr2", "--splits", "dev") == 1
    assert desk.error() == f"{path}: line 2 (dev-1-0-0): identifier dev-1-0-0 came before"


def test_an_unusable_sentence_of_an_id_that_is_there_is_not_left_out(desk: Desk) -> None:
    for name in ("a.png", "b.png"):
        put(desk.raw / name, encoded(picture(1), "PNG"))
    usable = {
        "sentence": "two stars",
        "label": "True",
        "identifier": "x",
        "images": ["a.png", "b.png"],
    }
    put(desk.raw / "nlvr_dev.json", [usable, usable | {"images": []}])
    assert desk.prepare("nlvr2", "--on-error", "skip") == 0
    data = desk.opened("dev", "nlvr2")
    assert (ids(data), data.manifest.rejects, data.manifest.left_out) == (["x"], 1, {})


def test_lists_of_objects(desk: Desk) -> None:
    left, right = write_nlvr2_images(desk.raw / "images" / "dev", "dev-1-0")
    images = [f"/elsewhere/NLVR2/images/dev/dev-1-0-img{side}.png" for side in (0, 1)]
    entries: list[dict[str, Any]] = [
        {"sentence": "two stars", "label": "False", "images": images},
        {"sentence": "a star", "label": "True", "images": images[::-1], "identifier": 12},
        {"sentence": "a star", "label": "True", "images": images[:1]},
        {"sentence": "a star", "label": "True", "images": ["dev/no.png", images[0]]},
    ]
    put(desk.raw / "nlvr_dev.json", entries)
    assert desk.prepare("nlvr2", "--on-error", "skip") == 0  # the only split there is
    data = desk.opened("dev", "nlvr2")
    found = [(row.labels, row.images, row.raw) for row in rows(data)]
    assert found == [((0,), (0, 1), ("two stars",)), ((1,), (1, 0), ("a star",))]
    assert ids(data) == ["entry 0", "12"]
    assert stored_images(data) == [left, right]
    (first, reason), (second, missing) = rejects_of(f"{desk.out}_dev")
    assert (first, reason, second) == ("entry 2", '"images" is no list of two paths', "entry 3")
    assert missing.startswith("no such image file: ")
    # A picture that is missing in its folder is not that of another folder's.
    put(desk.raw / "images" / "other" / "dev" / "x.png", left)
    put(desk.raw / "nlvr_dev.json", [{**entries[0], "images": ["other/dev/dev-1-0-img0.png"] * 2}])
    desk.messages()
    assert desk.prepare("nlvr2") == 1
    assert "entry 0: no such image file: " in desk.error()


@pytest.mark.parametrize(
    ("labels", "told", "expected", "bad"),
    [
        ([True, False, None], None, [1, 0], "label None is neither True nor False"),
        (["true", "False", "maybe"], None, [1, 0], "label 'maybe' is neither True nor False"),
        ([0, 1, 2], None, [0, 1], "label 2 is neither True nor False"),
        ([0, 1, -1], ["True", "False"], [1, 0], "label -1 is neither True nor False"),
    ],
)
def test_tables(
    desk: Desk, labels: list[Any], told: list[str] | None, expected: list[int], bad: str
) -> None:
    pictures = [encoded(picture(number)) for number in (1, 2)]
    columns = {
        "sentence": ["two stars", "a star", "left"],
        "identifier": [f"dev-1-0-{n}" for n in range(3)],
        "label": labels,
        "left_image": [{"bytes": pictures[n], "path": None} for n in (0, 1, 0)],
        "right_image": [{"bytes": pictures[n], "path": None} for n in (1, 0, 1)],
    }
    path = desk.raw / "data" / "validation-00000-of-00001.parquet"
    put_table(path, columns, {"label": told} if told else None)
    both = {k: v for k, v in columns.items() if not k.endswith("_image")}
    both["images"] = [list(pair) for pair in zip(columns["left_image"], columns["right_image"])]
    put_table(desk.raw / "test" / "data-00000-of-00001.arrow", {**both, "label": [None] * 3})
    assert desk.prepare("nlvr2", "--on-error", "skip") == 0
    said = "nlvr2 dev: labels 0 and 1 stand for False and True" in desk.messages()
    assert said == (labels[0] == 0 and told is None)
    dev, test = desk.opened("dev", "nlvr2"), desk.opened("test", "nlvr2")
    assert [(row.labels[0], row.images) for row in rows(dev)] == list(
        zip(expected, ((0, 1), (1, 0)))
    )
    assert stored_images(dev) == stored_images(test) == pictures
    assert rejects_of(f"{desk.out}_dev") == [("row 2", bad)]
    assert [(row.id, row.labels) for row in rows(test)] == [(f"dev-1-0-{n}", ()) for n in range(3)]
    assert desk.prepare("nlvr2", "--splits", "train") == 1
    assert "no table of split train: none has train in its path (" in desk.messages()
