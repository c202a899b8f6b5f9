"""Evaluation of masked prediction: foreground and background apart, and what a pair's other half is worth."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megatron_vlmoe.data.samples import exchange_distance, foreground
from megatron_vlmoe.losses.masked import (
    LOSSES,
    evaluation_metrics,
    evaluation_sums,
    exchange_captions,
)
from megatron_vlmoe.model.heads import Predicted
from megatron_vlmoe.stream.batch import Batch


def test_foreground_is_more_than_a_tenth_of_a_patch_that_differs_from_the_median() -> None:
    pixels = np.full((3, 20, 20), 200, np.uint8)
    pixels[2, 0:5, 0:3] = 170  # one channel by more than 0.1, 15 of 100 pixels
    pixels[:, 0, 10:20] = 0  # 10 of 100: not more than a tenth
    pixels[:, 10:20, 0:10] = 180  # by 0.08
    pixels[:, 10:20, 10:14] = 255
    assert foreground(pixels, 2).tolist() == [True, False, False, True]


@pytest.mark.parametrize(
    "images,distance",
    [
        ("abcd", 1),
        ("aabb", 2),
        ("aaabbb", 3),
        ("aab", 0),  # two of three cannot both meet another one
        ("aabcdd", 2),
        ("a", 0),
        ("", 0),
    ],
)
def test_captions_move_as_little_as_needed(images: str, distance: int) -> None:
    assert exchange_distance(images) == distance
    if distance:
        moved = torch.tensor([ord(image) for image in images]).roll(distance).tolist()
        assert all(chr(a) != b for a, b in zip(moved, images))


def test_exchanged_captions_keep_all_that_is_theirs_and_leave_the_rest() -> None:
    captions = {
        "ids": torch.arange(6).view(3, 2),
        "lengths": torch.tensor([1, 2, 1]),
        "labels": torch.tensor([[5], [6], [-100]]),
    }
    images = {"mask": torch.eye(3, dtype=torch.bool)}
    batch: Batch = {
        "pair_texts": captions,  # type: ignore[typeddict-item]
        "pair_images": images,  # type: ignore[typeddict-item]
        "exchange_distance": torch.tensor(1),
    }
    exchanged = exchange_captions(batch)
    assert exchanged["pair_texts"]["ids"].tolist() == [[4, 5], [0, 1], [2, 3]]
    assert exchanged["pair_texts"]["lengths"].tolist() == [1, 1, 2]
    assert exchanged["pair_texts"]["labels"].tolist() == [[-100], [5], [6]]
    assert exchanged["pair_images"] is images
    assert batch["pair_texts"]["lengths"].tolist() == [1, 2, 1], "the batch itself stays"
    batch["exchange_distance"] = torch.tensor(0)
    assert exchange_captions(batch)["pair_texts"] is captions


def test_sums_tell_the_foreground_apart() -> None:
    labels = torch.tensor([[3, 4], [5, -100]])
    batch: Batch = {
        "images": {"labels": labels, "foreground": torch.tensor([[True, False], [True, False]])},
        "texts": {"labels": labels},
    }
    losses = torch.tensor([1.0, 2.0, 4.0, 0.0])
    correct = torch.tensor([True, True, False, False])
    predicted = Predicted(losses, correct)
    sums = evaluation_sums(batch, {"images": predicted, "texts": predicted})
    assert sums["mim"].counts.tolist() == sums["mlm"].counts.tolist() == [7.0, 2.0, 3.0]
    shown = sums["mim"].foreground
    assert shown is not None and shown.tolist() == [5.0, 1.0, 2.0]
    assert sums["mlm"].foreground is None


def test_metrics_by_hand() -> None:
    sums = {kind: torch.zeros(4, 3, dtype=torch.float64) for kind in ("all", "foreground")}
    sums |= {kind: torch.zeros(4, 3, dtype=torch.float64) for kind in ("paired", "exchanged")}
    text, image = LOSSES.index("vlm_text"), LOSSES.index("vlm_image")
    sums["all"][text] = torch.tensor([8.0, 2.0, 4.0])
    sums["all"][image] = torch.tensor([30.0, 6.0, 10.0])
    sums["foreground"][image] = torch.tensor([24.0, 4.0, 6.0])
    # Of one of two micro-batches no caption could be moved.
    sums["paired"][image] = torch.tensor([12.0, 3.0, 5.0])
    sums["exchanged"][image] = torch.tensor([17.0, 1.0, 5.0])
    histograms = [torch.zeros(4, dtype=torch.float64) for _ in LOSSES]
    histograms[text] = torch.tensor([2.0, 2.0, 0.0, 0.0], dtype=torch.float64)
    histograms[image] = torch.tensor([5.0, 5.0, 0.0, 0.0], dtype=torch.float64)
    assert evaluation_metrics(sums, histograms) == pytest.approx(
        {
            "eval/loss/vlm_text": 2.0,
            "acc/vlm_text": 0.5,
            "unigram/vlm_text": math.log(2),
            "eval/loss/vlm_image": 3.0,
            "acc/vlm_image": 0.6,
            "unigram/vlm_image": math.log(2),
            "eval/loss/vlm_image_foreground": 4.0,
            "acc/vlm_image_foreground": 2 / 3,
            "eval/loss/vlm_image_background": 1.5,
            "acc/vlm_image_background": 0.5,
            "eval/grounding/vlm_image": 1.0,
        }
    )
