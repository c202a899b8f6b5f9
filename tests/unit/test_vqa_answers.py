"""VQA answers: the normaliser by hand, the vocabulary's order, and both ways to score."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_vlmoe.prepare import vqa_answers
from megatron_vlmoe.prepare.vqa_answers import (
    build_answer_vocabulary,
    leave_one_out_score,
    normalize_answer,
    official_accuracy,
    soft_scores,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", "yes"),
        ("  two   dogs ", "2 dogs"),
        ("None", "0"),
        ("zero", "0"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("A man on the boat", "man on boat"),
        ("the", ""),
        # A mark that touches a space anywhere vanishes, also where it stands between letters.
        ("black-white", "black white"),
        ("black - white", "black white"),
        ("t-shirt -", "tshirt"),
        ("red, blue", "red blue"),
        ("red,blue", "red blue"),
        ("up/down", "up down"),
        ("what?!", "what"),
        # A comma between digits makes every mark vanish.
        ("1,000", "1000"),
        ("1,000-lb", "1000lb"),
        ("a,1", "1"),
        # Each mark is judged by itself, in the text as it was.
        ("left-right / up", "left right up"),
        # Periods: kept only before a digit.
        ("5.30", "5.30"),
        (".5", ".5"),
        ("u.s.a.", "usa"),
        ("st. james", "st james"),
        # Other signs stay.
        ("$5", "$5"),
        ("rock'n'roll", "rock'n'roll"),
        ("3:30 pm", "3:30 pm"),
        ("100%", "100%"),
        # Contractions; the number words come first, then articles.
        ("dont walk", "don't walk"),
        ("don't walk", "don't walk"),
        ("oclock", "o'clock"),
        ("5 oclock", "5 o'clock"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("couldntve", "couldntve"),
        ("yall'd've", "y'all'd've"),
        ("Im", "im"),
        ("shed", "shed"),
        ("well", "well"),
        ("its", "its"),
        ("somebody'd", "somebodyd"),
        ("", ""),
    ],
)
def test_normalize_answer(text: str, expected: str) -> None:
    assert normalize_answer(text) == expected


@pytest.mark.parametrize("mark", ';/[]"{}()=+\\_-><@`,?!')
def test_all_marks_follow_the_same_rule(mark: str) -> None:
    assert normalize_answer(f"x{mark}y") == "x y"
    assert normalize_answer(f"x{mark}y {mark}z") == "xy z"


def test_contraction_table_has_every_spelling_of_the_evaluator() -> None:
    # 120 entries, less four with capitals (never reached after lower-casing) and two that change nothing.
    assert len(vqa_answers._CONTRACTIONS) == 114
    for wrong, right in vqa_answers._CONTRACTIONS.items():
        if right != "somebodyd":
            assert wrong == wrong.lower() and wrong.count("'") == right.count("'") - 1
            assert wrong.replace("'", "") == right.replace("'", "")


def test_vocabulary_is_in_order_of_first_appearance() -> None:
    answers = ["Dog", "yes", "two", "yes", "2", "the dog", "once", "YES", "dog."]
    assert build_answer_vocabulary(answers, 2) == ["dog", "yes", "2"]
    assert build_answer_vocabulary(answers, 3) == ["dog", "yes"]
    assert build_answer_vocabulary(iter(answers), 1) == ["dog", "yes", "2", "once"]
    assert build_answer_vocabulary([], 1) == []


def test_soft_scores_count_answers_as_written() -> None:
    answers = ["yes"] * 4 + ["no"] * 3 + ["maybe"] * 2 + ["Yes"]
    vocabulary = {"no": 7, "yes": 3, "maybe": 9, "never": 1}
    scores = soft_scores(answers, vocabulary)
    assert scores == {3: 1.0, 7: 0.9, 9: 0.6}
    assert list(scores) == [3, 7, 9]
    assert soft_scores(["no", "Yes"], vocabulary) == {7: 0.3}
    assert soft_scores(["no"] * 10, vocabulary) == {7: 1.0}
    assert soft_scores(["unknown"] * 10, vocabulary) == {}


def test_soft_score_of_ten_answers_is_the_official_score() -> None:
    rng = np.random.default_rng(5)
    seen = set()
    for _ in range(200):
        words = [f"w{i}" for i in rng.integers(0, rng.integers(1, 8), 10)]
        for label, score in soft_scores(words, {f"w{i}": i for i in range(8)}).items():
            assert leave_one_out_score(f"w{label}", words) == pytest.approx(score, abs=1e-12)
            seen.add(score)
    assert seen == {0.3, 0.6, 0.9, 1.0}


def test_leave_one_out_by_hand() -> None:
    assert leave_one_out_score("a", ["b"] * 10) == 0.0
    assert leave_one_out_score("a", ["a"]) == 0.0  # nobody else said so
    # Five people, two say "a": three see both (2/3), two see one (1/3).
    assert leave_one_out_score("a", ["a", "a", "b", "c", "d"]) == pytest.approx(8 / 15)
    with pytest.raises(ValueError, match="no annotator"):
        leave_one_out_score("a", [])


@pytest.mark.parametrize(
    ("answers", "prediction", "expected"),
    [
        # The ten differ: all are normalised, the prediction too.
        (["two"] * 7 + ["2"] * 2 + ["3"], "2", 1.0),
        (["two"] * 2 + ["2"] + ["3"] * 7, "two", 0.9),
        (["the cat"] * 2 + ["dog"] * 8, "a Cat", 0.6),
        # They agree: nothing is.
        (["two"] * 10, "2", 0.0),
        (["two"] * 10, "two", 1.0),
        (["Yes"] * 10, "yes", 0.0),
        # White space at the ends, line ends and tabs do not make them differ.
        (["Two\n"] * 5 + [" Two"] * 5, "2", 0.0),
        (["hot\tdog"] * 10, " hot dog ", 1.0),
        # Fewer annotators than ten.
        (["cat", "dog"], "dog", 1 / 6),  # 1/3 where the other one is left out
        (["left"] * 4 + ["right"], "left", 1.0),
    ],
)
def test_official_accuracy(answers: list[str], prediction: str, expected: float) -> None:
    assert official_accuracy(prediction, answers) == pytest.approx(expected, abs=1e-12)
