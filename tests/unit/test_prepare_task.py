"""Preparing any task: images are found once, options belong to a task, splits can be looked at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from data_files import tool
from PIL import Image
from raw_tasks import Desk, write_nlvr2

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
