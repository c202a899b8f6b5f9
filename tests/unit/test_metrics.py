"""Metrics against a plain reading of their definitions, on random inputs full of ties."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_vlmoe.finetune.metrics import (
    Score,
    label_ranks,
    majority_rate,
    mean_and_std,
    random_recall,
    recall_at_k,
    recall_at_k_of_features,
    topk_accuracy,
    vqa_majority,
    vqa_official,
)

KS = (1, 2, 3, 5, 8)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def place(scores: list[float], right: set[int]) -> int:
    """Place (from 1) of the best right item if every equal wrong item stands before it."""
    best = max(scores[i] for i in right)
    return 1 + sum(score >= best for i, score in enumerate(scores) if i not in right)


def plain_recall(scores: np.ndarray, image_of_text: list[int], k: int) -> tuple[float, float]:
    captions = {i: {c for c, j in enumerate(image_of_text) if j == i} for i in range(len(scores))}
    found = [place(scores[i].tolist(), own) <= k for i, own in captions.items() if own]
    texts = [place(scores[:, c].tolist(), {i}) <= k for c, i in enumerate(image_of_text) if i >= 0]
    return 100 * sum(found) / len(found), 100 * sum(texts) / len(texts)


def test_topk_by_hand() -> None:
    logits = np.asarray([[3.0, 1, 2], [3, 1, 2], [3, 1, 2], [1, 1, 0], [1, 1, 0], [1, 1, 0]])
    labels = np.asarray([0, 2, 1, 0, 1, -1])
    assert topk_accuracy(label_ranks(logits, labels), 1) == Score(20.0, 5, 1)
    assert topk_accuracy(label_ranks(logits, labels), 2) == Score(80.0, 5, 1)
    assert topk_accuracy(label_ranks(logits, labels), 3) == Score(100.0, 5, 1)
    # One wrong class ahead, two, one by a tie, one by a tie, none of a known label.
    assert label_ranks(logits, labels).tolist() == [0, 1, 2, 1, 1, -1]


def test_topk_is_the_plain_reading() -> None:
    logits = rng(1).integers(0, 5, (60, 7)).astype(np.float32)
    labels = rng(2).integers(-1, 7, 60)
    for k in KS:
        hits = [
            place(row.tolist(), {label}) <= k
            for row, label in zip(logits, labels.tolist())
            if label >= 0
        ]
        assert topk_accuracy(label_ranks(logits, labels), k).percent == pytest.approx(
            100 * np.mean(hits)
        )


def test_not_a_number_never_scores() -> None:
    logits = np.full((4, 3), np.nan)
    assert topk_accuracy(label_ranks(logits, np.arange(4) % 3), 1) == Score(0.0, 4, 0)
    logits[:, 1:] = 0.0
    assert topk_accuracy(label_ranks(logits, np.asarray([1, 1, 2, 0])), 1).percent == 0.0
    assert recall_at_k(np.full((3, 3), np.nan), np.arange(3), (1,)) == {"TR@1": 0.0, "IR@1": 0.0}


def test_labels_and_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="label 3 of 3 classes"):
        label_ranks(np.zeros((2, 3)), np.asarray([0, 3]))
    with pytest.raises(ValueError, match="do not fit"):
        label_ranks(np.zeros((2, 3)), np.zeros(3, dtype=int))
    with pytest.raises(ValueError, match="do not fit"):
        recall_at_k(np.zeros((2, 3)), np.zeros(2, dtype=int))
    with pytest.raises(ValueError, match="but 2 images"):
        recall_at_k(np.zeros((2, 3)), np.asarray([0, 1, 2]))
    with pytest.raises(ValueError, match="do not fit"):
        recall_at_k_of_features(np.zeros((2, 3)), np.zeros((2, 4)), np.zeros(2, dtype=int))


def test_nothing_labelled_has_no_score() -> None:
    score = topk_accuracy(label_ranks(np.zeros((2, 3)), np.asarray([-1, -1])), 1)
    assert math.isnan(score.percent) and (score.count, score.unlabelled) == (0, 2)
    assert math.isnan(majority_rate(np.asarray([-1])))
    assert math.isnan(vqa_majority(("a",), [[]]))


def test_vqa_official_by_hand() -> None:
    answers = [["2"] * 10, ["cat"] * 3 + ["A dog"] * 7, [], ["no"] * 2 + ["yes"] * 8]
    found = vqa_official(["two", "a cat", "2", "no"], answers)
    # All ten agree, so nothing is normalised; three of ten; unknown; two of ten.
    assert found[[0, 1, 3]] == pytest.approx([0.0, 0.9, 0.6]) and math.isnan(found[2])
    with pytest.raises(ValueError):
        vqa_official(["2"], answers)


def test_guessing_by_hand() -> None:
    assert majority_rate(np.asarray([1, 1, 0, -1, 2])) == 50.0
    # "2": 1.0 (seven wrote it as a word) + 0.0 + 0.0; "cat": 0.0 + 0.9 + 0.6, over three known questions.
    answers = [
        ["two"] * 7 + ["2"] * 2 + ["3"],
        ["a cat"] * 3 + ["dog"] * 7,
        [],
        ["Cat"] * 2 + ["no"] * 8,
    ]
    vocabulary = ("2", "cat", "3")
    assert vqa_majority(vocabulary, answers) == pytest.approx(50.0)
    constant = [100 * np.nansum(vqa_official([a] * 4, answers)) / 3 for a in vocabulary]
    assert max(constant) == pytest.approx(50.0)


@pytest.mark.parametrize("seed", range(12))
def test_recall_is_the_plain_reading(seed: int) -> None:
    draw = rng(seed)
    num_images, num_texts = int(draw.integers(2, 9)), int(draw.integers(4, 25))
    # Few levels: ties abound. From -1: captions of no image, and images without a caption.
    scores = draw.integers(0, 6, (num_images, num_texts)).astype(np.float32)
    image_of_text = draw.integers(-1 if seed % 2 else 0, num_images, num_texts)
    image_of_text[0] = 0
    recalls = recall_at_k(scores, image_of_text, KS)
    assert list(recalls) == [f"{way}@{k}" for way in ("TR", "IR") for k in KS]
    for k in KS:
        text, image = plain_recall(scores, image_of_text.tolist(), k)
        assert recalls[f"TR@{k}"] == pytest.approx(text)
        assert recalls[f"IR@{k}"] == pytest.approx(image)


def test_recall_by_hand() -> None:
    image_of_text = np.asarray([0, 0, 1, 1])
    scores = np.asarray([[0.1, 0.8, 0.9, 0.2], [0.7, 0.3, 0.4, 0.6]])
    # Image 0: caption 2 (wrong) is first, own caption 1 second. Image 1: caption 0 (wrong), then own caption 3.
    # Captions 0 and 2 prefer the other image.
    assert recall_at_k(scores, image_of_text, (1, 2)) == {
        "TR@1": 0.0,
        "TR@2": 100.0,
        "IR@1": 50.0,
        "IR@2": 100.0,
    }


def test_features_are_scored_blockwise_alike() -> None:
    images, texts = rng(1).normal(size=(2, 50, 16)).astype(np.float32)
    texts = texts[rng(2).permutation(50)[:37]]
    image_of_text = rng(3).integers(0, 50, 37)
    whole = recall_at_k(images @ texts.T, image_of_text, KS)
    assert 0 < whole["IR@8"] < 100
    for block in (1, 7, 64):
        assert recall_at_k_of_features(images, texts, image_of_text, KS, block) == whole


def test_constant_features_find_nothing() -> None:
    feature = rng().normal(size=(1, 129)).astype(np.float32)
    images, texts = np.repeat(feature, 41, 0), np.repeat(feature, 205, 0)
    image_of_text = np.arange(205) // 5
    recalls = recall_at_k_of_features(images, texts, image_of_text, (1, 5, 10, 40), block=16)
    assert set(recalls.values()) == {0.0}
    # Only where k reaches past all others is the own item found.
    recalls = recall_at_k_of_features(images, texts, image_of_text, (200, 201), block=16)
    assert recalls == {"TR@200": 0.0, "TR@201": 100.0, "IR@200": 100.0, "IR@201": 100.0}


def test_random_recall_is_what_random_rankings_give() -> None:
    image_of_text = np.asarray([0, 0, 0, 1, 2, 2, -1, 3])
    expected = random_recall(image_of_text, 5, (1, 2, 3, 7))
    # One of 8 captions: mean of 3/8, 1/8, 2/8, 1/8. Seven of 8 miss only a single caption, once in 8.
    assert expected["TR@1"] == pytest.approx(100 * 7 / 32)
    assert expected["TR@7"] == pytest.approx(100 * (1 + 7 / 8 + 1 + 7 / 8) / 4)
    assert expected["IR@2"] == pytest.approx(40.0)
    assert expected["IR@7"] == 100.0
    draws = [recall_at_k(rng(s).random((5, 8)), image_of_text, (1, 2, 3, 7)) for s in range(3000)]
    for name, value in expected.items():
        assert np.mean([draw[name] for draw in draws]) == pytest.approx(value, abs=1.5)
    assert random_recall(np.arange(3), 3, (9,)) == {"TR@9": 100.0, "IR@9": 100.0}
    assert math.isnan(random_recall(np.asarray([-1]), 3, (1,))["TR@1"])


def test_mean_and_std() -> None:
    assert mean_and_std([2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0]) == (
        5.0,
        pytest.approx(math.sqrt(32 / 7)),
    )
    assert mean_and_std([3.5]) == (3.5, 0.0)
    with pytest.raises(ValueError, match="no values"):
        mean_and_std([])
