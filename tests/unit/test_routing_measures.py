"""Measures of a routing trace against hand arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_vlmoe.analysis.routing_measures import (
    COLOR_CLASSES,
    EDGE_CLASSES,
    Labels,
    class_counts,
    coded,
    color_classes,
    consecutive,
    edge_classes,
    entropy,
    load_of,
    normalized_mutual_information,
    specialisation,
    together,
    top_gates,
    word_class,
    word_label,
)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([[2, 0], [0, 2]], 1.0),
        ([[1, 1], [1, 1]], 0.0),
        ([[3, 5]], 0.0),  # one expert for everything tells nothing
        ([[3], [5]], 0.0),
        ([[0, 0], [0, 0]], 0.0),
        # H = 0.562335 and 0.693147, together 1.039721: I = 0.215762.
        ([[2, 1], [0, 1]], 2 * 0.2157615543 / (0.5623351446 + 0.6931471806)),
        # [0, 0, 0, 1, 1, 2] and [0, 0, 1, 1, 2, 2] by scikit-learn 1.9's normalized_mutual_info_score.
        ([[2, 1, 0], [0, 1, 1], [0, 0, 1]], 0.5206652463984818),
    ],
)
def test_normalised_mutual_information(counts, expected):
    table = np.array(counts)
    assert normalized_mutual_information(table) == pytest.approx(expected, abs=1e-9)
    assert normalized_mutual_information(table.T) == pytest.approx(expected, abs=1e-9)


def test_entropy_of_counts():
    assert entropy(np.array([1, 1, 2])) == pytest.approx(1.5 * math.log(2))
    assert entropy(np.array([5, 0])) == 0.0 == entropy(np.zeros(3))


def specialised(experts, codes, items, classes=2):
    label = Labels(tuple(map(str, range(classes))), codes)
    (one,) = specialisation(experts, 2, {"x": label}, items, 100, np.random.default_rng(0))
    return one


def test_baselines_tell_content_of_patches_from_content_of_pictures():
    items = np.repeat(np.arange(20), 50)
    # Content and expert are those of the whole picture: shuffling within it changes nothing.
    whole = items % 2
    one = specialised(whole, whole, items)
    assert one.nmi == pytest.approx(1.0) and one.within.mean == pytest.approx(1.0)
    assert one.chance.p95 < 0.01 and one.p_value == pytest.approx(1 / 101)
    assert one.adjusted == pytest.approx(1.0)
    # Content changes within the picture, and the expert with it.
    patch = np.tile(np.arange(50) % 2, 20)
    one = specialised(patch, patch, items)
    assert one.nmi == pytest.approx(1.0) and one.within.p95 < 0.01
    # The expert has nothing to do with it; tokens without a class do not count.
    drawn = np.random.default_rng(3).integers(0, 2, len(items))
    codes = np.where(np.arange(len(items)) < 200, -1, patch)
    one = specialised(drawn, codes, items)
    assert one.tokens == 800 and one.classes == 2
    assert one.nmi < 0.02 and one.p_value > 0.01 and abs(one.adjusted) < 0.02


def test_many_classes_are_above_zero_by_chance_alone():
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 40, 200)
    one = specialised(rng.integers(0, 2, 200), codes, np.zeros(200, dtype=int), classes=40)
    assert one.nmi > 0.03
    assert one.chance.mean == pytest.approx(one.nmi, abs=0.03)
    # All tokens are of one item: both ways to shuffle are the same.
    assert one.within.mean == pytest.approx(one.chance.mean, abs=0.01)


def test_load_and_drops():
    expert = np.array([[0, 1], [0, 2], [2, 0], [0, 1]])
    kept = np.array([[1, 1], [1, 0], [1, 1], [0, 1]], dtype=bool)
    assert load_of(expert, kept, 4) == {
        "tokens": 4,
        "assignments": 8,
        "kept": 6,
        "dropped": 2,
        "dropped_share": 0.25,
        "load": [4, 2, 2, 0],
        "dropped_load": [1, 0, 1, 0],
        "dead": 1,
        "balance": pytest.approx(1.5 * math.log(2) / math.log(4)),
    }
    assert together(expert, 4).tolist() == [[0, 2, 2, 0], [2, 0, 0, 0], [2, 0, 0, 0], [0, 0, 0, 0]]


def test_consecutive_blocks_meet_in_tokens():
    def part(item, modality, place, expert):
        columns = {"item": item, "modality": modality, "place": place}
        return {k: np.array(v) for k, v in columns.items()} | {"expert": np.array(expert)[:, None]}

    # In another order, with one token that only the first and one that only the second block has.
    first = part([0, 0, 1, 1, 1], [1, 1, 1, 0, 1], [-1, 0, 0, 0, 7], [0, 1, 1, 2, 0])
    second = part([1, 1, 0, 0, 2], [0, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 0, 1, 1, 0])
    assert consecutive(first, second, (3, 2)).tolist() == [[0, 0], [1, 1], [0, 1]]


def test_largest_gates_show_several_pictures():
    expert = np.array([0, 0, 0, 1, 0, 0])
    gate = np.array([0.9, 0.8, 0.7, 0.99, 0.6, 0.65])
    item = np.array([5, 5, 5, 5, 6, 7])
    place = np.arange(6)
    found = top_gates(expert, gate, item, place, number=0, count=4)
    assert [(i, p) for i, p, _ in found] == [(5, 0), (7, 5), (6, 4), (5, 1)]


def test_class_counts_leave_out_what_has_no_class():
    label = coded(["red", "", "blue", "red"])
    assert label.names == ("blue", "red") and label.codes.tolist() == [1, -1, 0, 1]
    assert class_counts(np.array([0, 0, 1, 1]), 2, label) == [[0, 1], [1, 1]]


@pytest.mark.parametrize(
    ("rgb", "name"),
    [
        ((22, 22, 24), "black"),
        ((158, 160, 162), "gray"),
        ((250, 250, 250), "white"),
        ((232, 214, 180), "pale"),
        ((214, 32, 38), "red"),
        ((246, 130, 20), "orange"),
        ((246, 214, 28), "yellow"),
        ((40, 156, 56), "green"),
        ((20, 200, 220), "cyan"),
        ((36, 84, 214), "blue"),
        ((140, 56, 178), "purple"),
        ((220, 30, 60), "red"),
    ],
)
def test_classes_of_colors(rgb, name):
    patch = np.broadcast_to(np.array(rgb, dtype=np.uint8), (1, 4, 4, 3))
    assert COLOR_CLASSES[color_classes(patch)[0]] == name


def test_classes_of_edges():
    down, across = np.indices((8, 8))
    patches = {
        "flat": np.full((8, 8), 90),
        "vertical": 255 * (across > 3),
        "horizontal": 255 * (down > 3),
        # Bright at the lower right: the edge runs from the lower left to the upper right.
        "rising": 255 * (across + down > 7),
        "falling": 255 * (across > down),
        "texture": np.random.default_rng(0).integers(0, 255, (8, 8)),
    }
    stack = np.stack([np.repeat(p[..., None], 3, axis=2) for p in patches.values()])
    found = [EDGE_CLASSES[code] for code in edge_classes(stack.astype(np.uint8))]
    assert found == list(patches)


@pytest.mark.parametrize(
    ("piece", "word", "name"),
    [
        ("▁red", "red", "color"),
        ("▁cross", "crosses.", "shape"),
        ("es", "crosses.", "shape"),
        (".", "crosses.", "punctuation"),
        ("▁Two", "Two", "number"),
        ("▁upper", "upper", "place"),
        ("▁the", "the", "function"),
        ("▁little", "little", "size"),
        ("▁giraffe", "giraffes", "other"),
        ("▁", "", "punctuation"),
        # A tokenizer without the word spells it: its beginning is a piece too.
        ("▁", "pink", "color"),
        ("p", "pink", "color"),
    ],
)
def test_classes_of_words(piece, word, name):
    assert word_class(word_label(piece, word)) == name


@pytest.mark.parametrize(
    ("piece", "word", "label"),
    [
        ("▁Circle", "Circle.", "circle"),
        (".", "Circle.", "."),
        ("▁(", "(Red),", "("),
        ("),", "(Red),", "),"),
        ("Red", "(Red),", "red"),
        ("▁", "it's", "it's"),
        ("▁", "", ""),
        ("▁—", "—", "—"),
    ],
)
def test_labels_of_words(piece, word, label):
    assert word_label(piece, word) == label
