"""Loader workers on a small corpus of pictures as large as COCO's."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from PIL import Image

from checks.report import Report, vlmoe
from checks.tokenizer import pictures, placed_tokenizer
from megatron_vlmoe.config.command_line import parse_run
from megatron_vlmoe.data.batches import PretrainData
from megatron_vlmoe.data.collate import BatchShare
from megatron_vlmoe.tokenizers.vqkd.model import save_vqkd

PICTURE = (500, 375)
COCO = "raw/coco/annotations/captions_train2014.json"


def loader(report: Report) -> None:
    """Images per second with one worker and with several, and how long training steps wait for them."""
    folder, workers = report.folder, report.size(8, 2)
    words = _corpus(folder, report.size(200, 40)) + _model(report)
    rates = {}
    for number in (1, workers):
        config = parse_run("pretrain", [*words, "--data.num_workers", str(number)]).config
        rates[number] = _rate(report, config, number)
        report.note(images_per_second=rates)
    cores = os.cpu_count() or 1
    if cores >= 2 * workers:
        gain = rates[workers] / rates[1]
        report.expect(
            gain > 0.4 * workers, f"{workers} workers load {gain:.1f} times as much as one"
        )
    else:
        report.left_out(f"whether workers add up: {cores} cores for {workers} workers")
    steps = report.size(12, 2)
    save = folder / "run"
    vlmoe(
        *("pretrain", *words, "--data.num_workers", str(workers), "--train.steps", str(steps)),
        *("--log.interval", str(steps // 2), "--train.eval_steps", "0", "--save-interval", "0"),
        *("--save", str(save)),
    )
    rows = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    # The first interval has the start of the workers in it.
    last = rows[-1]
    kept = ("data_wait_fraction", "samples_per_second", "step_seconds", "loss/total")
    report.note(training={name: last[name] for name in kept})
    report.expect(last["step"] == steps, f"the run ended at step {last['step']} of {steps}")
    share = last["data_wait_fraction"]
    good = not report.on_gpu or share < 0.5
    report.expect(good, f"steps wait {100 * share:.0f} % of their time for {workers} workers")


def _corpus(folder: Path, count: int) -> list[str]:
    """Data options of a corpus with both tokenizers; visual codes are computed on the fly by a small tokenizer."""
    raw, model = folder / "raw", str(folder / "text.model")
    workers = str(min(8, os.cpu_count() or 1))
    vlmoe("sample-corpus", "--output", str(raw), "--num-images", str(count), "--workers", workers)
    for path in [*raw.glob("images/train/**/*.jpg"), *raw.glob("coco/train2014/*.jpg")]:
        with Image.open(path) as picture:
            picture.resize(PICTURE).save(path, quality=90)
    texts = [str(raw / "text/train.jsonl"), str(folder / COCO)]
    vlmoe(
        *("train-text-tokenizer", "--input", *texts),
        *("--vocab-size", "200", "--output", str(folder / "text")),
    )
    vlmoe(
        *("index-text", "--input", texts[0], "--output", str(folder / "text_train")),
        *("--text-tokenizer", model, "--workers", "1"),
    )
    vlmoe(
        *("index-images", "--input", str(raw / "images/train"), "--workers", workers),
        *("--output", str(folder / "images_train")),
    )
    vlmoe(
        *("index-pairs", "--format", "coco", "--annotations", texts[1]),
        *("--images", str(raw / "coco/train2014"), "--output", str(folder / "pairs_train")),
        *("--text-tokenizer", model, "--workers", "1"),
    )
    sizes = {"image_size": 224, "patch_size": 16, "num_codes": 512}
    tokenizer = placed_tokenizer("tiny", pictures(4, 224, 14), **sizes)
    save_vqkd(folder / "image_tokenizer", tokenizer, {})
    return [
        *("--data.text", str(folder / "text_train"), "--data.images", str(folder / "images_train")),
        *("--data.pairs", str(folder / "pairs_train"), "--data.text_tokenizer", model),
        *("--data.image_tokenizer", str(folder / "image_tokenizer")),
    ]


def _model(report: Report) -> list[str]:
    """A preset that takes images of 224 pixels."""
    micro = str(report.size(64, 4))
    words = ["--preset", report.size("small-8e", "tiny-8e"), "--model.image_size", "224"]
    for kind in ("texts", "images", "pairs"):
        words += [f"--data.micro_{kind}", micro, f"--data.global_{kind}", micro]
    return [*words, "--data.eval_fraction", "0", "--optim.lr_warmup_steps", "1"]


def _rate(report: Report, config: Any, workers: int) -> float:
    """Images per second, after every worker has delivered once; each is decoded once and cut into two views."""
    data = PretrainData.open(config, BatchShare())
    batches = iter(data.loader("train", 0, None))
    per_batch = config.data.micro_images + config.data.micro_pairs
    for _ in range(workers):
        batch = next(batches)
    side = config.model.image_size
    wanted = [config.data.micro_images, 3, side, side]
    shape = list(batch["images"]["pixels"].shape)
    report.expect(shape == wanted, f"images of a batch are {shape}, not {wanted}")
    count, start = 0, time.perf_counter()
    seconds = report.size(3.0, 1.0)
    while time.perf_counter() - start < seconds:
        next(batches)
        count += 1
    return count * per_batch / (time.perf_counter() - start)
