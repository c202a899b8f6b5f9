"""Preparing any task: images are found once, options belong to a task, splits can be looked at."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_files import ROOT, encoded, picture, rejects_of, tool
from PIL import Image
from raw_tasks import Desk, ids, put, write_nlvr2

from megatron_vlmoe.config import tasks
from megatron_vlmoe.prepare.readers.records import ImageFile
from megatron_vlmoe.prepare.readers.tasks.records import TaskSample
from megatron_vlmoe.prepare.tasks import sample_chunks


def test_images_are_found_once_and_memory_stays_small() -> None:
    def sample(number: int, image: int) -> TaskSample:
        file = ImageFile("s", "r", f"{image}.jpg")
        return TaskSample("s", "r", str(number), (file, file))

    items = [sample(i, i // 3) for i in range(9)]
    names = [[image.path for image in c.images] for c in sample_chunks(items, 4, shared=True)]
    assert names == [["0.jpg", "1.jpg"], ["2.jpg"], []]
    names = [[image.path for image in c.images] for c in sample_chunks(items, 4, shared=False)]
    assert names == [["0.jpg", "1.jpg"], ["1.jpg", "2.jpg"], ["2.jpg"]]


def test_options_of_other_tasks_are_refused(desk: Desk) -> None:
    words = ["--raw", str(desk.raw), "--output", str(desk.out)]
    for options, message in (
        (["--task", "vqa"], "--task vqa needs --text-tokenizer"),
        (["--task", "imagenet", "--label", "x"], "--label is no option of --task imagenet"),
        (
            ["--task", "nlvr2", "--text-tokenizer", desk.model, "--seed", "0"],
            "--seed is no option",
        ),
    ):
        assert tool("prepare_task")([*options, *words]) == 2
        assert message in desk.messages()
    words[1] = str(desk.raw / "no")
    assert tool("prepare_task")(["--task", "imagenet", *words]) == 1
    assert desk.error() == f"{desk.raw / 'no'}: not a folder"


def test_inspect_shows_a_split(tmp_path: Path, desk: Desk) -> None:
    write_nlvr2(desk.raw)
    assert desk.prepare("nlvr2") == 0
    inspect, png = tool("inspect_dataset"), tmp_path / "sheet.png"
    shown = [f"{desk.out}_train", "--text-tokenizer", desk.model, "--png", str(png), "--checksums"]
    assert inspect([*shown, "--num-samples", "2"]) == 0
    text = desk.capfd.readouterr().out
    assert "3 samples, 4 images, 3 texts" in text and "2 classes" in text
    assert "[0] train-1-0-0 | PNG 48x32 RGB | PNG 48x32 RGB | two stars | True\n" in text
    pixels = np.asarray(Image.open(png).convert("L"), float)
    assert pixels[10:30, 10:40].std() > 10  # the first picture, which is noise
    assert (pixels[97:112, :150] < 128).any()  # its text, below its number
    inputs = ["--input", f"{desk.out}_dev", f"{desk.out}_test"]
    assert tool("merge_datasets")([*inputs, "--output", f"{desk.out}_both"]) == 1
    assert desk.error() == f"{desk.out}_dev.json: splits of a task (nlvr2) are not merged"


@pytest.fixture
def snli_ve(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module of the plug-in, installed, with two samples of raw data whose ids are numbers."""
    monkeypatch.syspath_prepend(ROOT / "tests" / "plug_ins")
    cached = (tasks.find_task, tasks._plug_ins)
    for each in cached:
        each.cache_clear()
    put(desk.raw / "a.png", encoded(picture(1), "PNG"))
    rows = [{"id": n, "image": "a.png", "sentence": "two", "label": "neutral"} for n in (7, 8)]
    put(desk.raw / "dev.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    yield importlib.import_module("snli_ve")
    for each in cached:
        each.cache_clear()


def test_ids_that_are_numbers(desk: Desk, snli_ve: Any) -> None:
    assert desk.prepare("snli_ve", "--splits", "dev") == 0
    assert ids(desk.opened("dev", "snli_ve")) == ["7", "8"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"labels": (3,)}, "label 3 is none of the 3 classes, which count from 0"),
        ({"labels": (-1,)}, "label -1 is none of the 3 classes, which count from 0"),
        ({"labels": (None,)}, "label None is not a whole number"),
        ({"labels": ("neutral",)}, "label 'neutral' is not a whole number"),
        ({"labels": (1.0,)}, "label 1.0 is not a whole number"),
        ({"labels": None}, "its labels are None, which is no tuple"),
        ({"labels": (0, 1), "scores": (1.0, 1.0)}, "2 labels, but a sample of snli_ve has one"),
        ({"scores": ()}, "1 labels, but 0 scores"),
        ({"scores": (float("nan"),)}, "score nan of its label is not a number from 0 to 1"),
        ({"id": None}, "its id None is neither a text nor a whole number"),
        ({"answers": (1,)}, "its answer 1 is not a text"),
        ({"images": ()}, "0 images, but a sample of snli_ve has 1"),
        ({"texts": ("two", "stars")}, "2 texts, but a sample of snli_ve has 1"),
    ],
)
def test_a_sample_that_does_not_fit_its_task_is_named(
    change: dict[str, Any],
    reason: str,
    desk: Desk,
    snli_ve: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    good = snli_ve.SnliVeSource.sample

    def sample(self: Any, path: str, record: str, row: dict[str, Any]) -> Any:
        found = good(self, path, record, row)
        return replace(found, **change) if row["id"] == 8 else found

    monkeypatch.setattr(snli_ve.SnliVeSource, "sample", sample)
    assert desk.prepare("snli_ve", "--splits", "dev") == 1
    assert desk.error().startswith(f"{desk.raw / 'dev.jsonl'}: line 2: {reason}")
    assert desk.prepare("snli_ve", "--splits", "dev", "--on-error", "skip") == 0
    assert ids(desk.opened("dev", "snli_ve")) == ["7"]
    ((record, why),) = rejects_of(f"{desk.out}_dev")
    assert record == "line 2" and why.startswith(reason)
