"""The tasks of the sample corpus: every answer and label is read off the scene again by other means."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_sample_corpus import PLACES, RELATIONS, check_caption, fits, one_of

from megatron_vlmoe.sample_corpus.nlvr2 import make_nlvr2
from megatron_vlmoe.sample_corpus.questions import FORMS, PLACE_NAMES
from megatron_vlmoe.sample_corpus.render import render_picture
from megatron_vlmoe.sample_corpus.scene import (
    BACKGROUNDS,
    COLORS,
    KINDS,
    Scene,
    Shape,
    draw_object_scene,
    sample_scene,
)
from megatron_vlmoe.sample_corpus.task_files import FreshScenes, TaskFiles, guess_by
from megatron_vlmoe.sample_corpus.tasks import make_tasks
from megatron_vlmoe.sample_corpus.vqa import question_type, soft_score
from megatron_vlmoe.sample_corpus.writer import SampleCorpus, make_sample_corpus

ROOT = Path(__file__).resolve().parents[2]
NUM_IMAGES = 400
SEED = 11
COLOR, KIND, PLACE, RELATION = map(one_of, (COLORS, KINDS, PLACES, RELATIONS))
BACKGROUND = one_of(BACKGROUNDS)
PICTURE = "(?: in the (?:picture|image|drawing))"
THING = rf"(?:an? )?(?:{COLOR} )?(?:{KIND}|shape)(?:e?s)?"
NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4}


@pytest.fixture(scope="module")
def tasks() -> TaskFiles:
    return make_tasks(SEED, NUM_IMAGES, [])


def load(tasks: TaskFiles, *names: str) -> Any:
    text = tasks.texts[Path(*names)]
    if names[-1].endswith(".jsonl") or names[0] == "nlvr2":
        return [json.loads(line) for line in text.splitlines()]
    return json.loads(text)


def scenes(tasks: TaskFiles, task: str) -> dict[str, Scene]:
    """By file name."""
    return {p.file.name: p.scene for p in tasks.pictures if p.file.parts[0] == task}


def having(scene: Scene, color: str | None = None, kind: str | None = None) -> list[Shape]:
    return [s for s in scene.shapes if color in (None, s.color) and kind in (None, s.kind)]


def only(values: Any) -> Any:
    """The one value that all have."""
    (value,) = set(values)
    return value


def at(scene: Scene, place: str) -> Shape:
    (shape,) = (s for s in scene.shapes if [s.cell] == PLACES[place])
    side = place.removeprefix("at the ").removeprefix("on the ").removesuffix(" side")
    if side in ("top", "left", "right", "bottom"):
        axis, value = {"top": (0, 0), "bottom": (0, 2), "left": (1, 0), "right": (1, 2)}[side]
        assert [s.cell for s in scene.shapes if s.cell[axis] == value] == [shape.cell], place
    return shape


def related(scene: Scene, m: re.Match[str]) -> str:
    cells = [[s.cell for s in having(scene, *pair)] for pair in (m.groups()[:2], m.groups()[3:])]
    assert all(cells), m[0]
    if fits(RELATIONS[m[3]], *cells):
        return "yes"
    opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}
    assert fits(opposite[RELATIONS[m[3]]], *cells), "no should be beyond doubt"
    return "no"


Answer = Callable[[Scene, re.Match[str]], object]
QUESTIONS: dict[str, Answer] = {
    rf"what color (?:is|are) the {KIND}(?:e?s)?": lambda s, m: only(
        x.color for x in having(s, kind=m[1])
    ),
    rf"what color is the shape {PLACE}": lambda s, m: at(s, m[1]).color,
    rf"(?:what|which) shape is {COLOR}": lambda s, m: only(x.kind for x in having(s, m[1])),
    rf"what is the {COLOR} shape": lambda s, m: only(x.kind for x in having(s, m[1])),
    rf"what (?:shape )?is {PLACE}": lambda s, m: at(s, m[1]).kind,
    rf"how many (?:{COLOR} )?(?:shapes|{KIND}e?s) are (?:there|{PICTURE[4:-1]})": lambda s, m: len(
        having(s, m[1], m[2])
    ),
    rf"(?:is there|can you see) {THING}{PICTURE}?": lambda s, m: bool(having(s, m[1], m[2])),
    rf"are there any {THING}": lambda s, m: bool(having(s, m[1], m[2])),
    rf"(?:is|are) the {COLOR} {KIND}(?:e?s)? {RELATION} the {COLOR} {KIND}(?:e?s)?": related,
    rf"where is the (?:{COLOR} )?{KIND}": lambda s, m: PLACE_NAMES[
        only(x.cell for x in having(s, m[1], m[2]))
    ],
    r"what (?:color is the|is the color of the) background": lambda s, m: s.background,
    rf"(?:is|are) the (?:{COLOR} )?{KIND}(?:e?s)? large or small": lambda s, m: only(
        x.size for x in having(s, m[1], m[2])
    ),
}


def read_answer(scene: Scene, question: str) -> str:
    """What the picture says; checks the grammar of number on the way."""
    assert re.fullmatch(r"[A-Z].*\?", question)
    text = question[0].lower() + question[1:-1]
    matches = [(m, read) for p, read in QUESTIONS.items() if (m := re.fullmatch(p, text))]
    assert len(matches) == 1, question
    match, read = matches[0]
    if agreed := re.search(rf"\b(is|are) the (?:{COLOR} )?{KIND}(e?s)?\b", text):
        number = len(having(scene, agreed[2], agreed[3]))
        assert (agreed[1] == "are", bool(agreed[4])) == (number > 1, number > 1), question
    answer = read(scene, match)
    return {True: "yes", False: "no"}[answer] if isinstance(answer, bool) else str(answer)


def vqa_questions(tasks: TaskFiles, subset: str) -> list[dict[str, Any]]:
    content = load(tasks, "vqa", f"v2_OpenEnded_mscoco_{subset}_questions.json")
    assert content["data_subtype"] == subset
    return content["questions"]


def test_vqa_answers_are_what_the_pictures_show(tasks: TaskFiles) -> None:
    pictures = scenes(tasks, "vqa")
    asked: set[int] = set()
    for subset, number in (("train2014", 200), ("val2014", 40), ("test2015", 20)):
        questions = vqa_questions(tasks, subset)
        assert len(questions) == 5 * number == 5 * len({q["image_id"] for q in questions})
        if subset == "test2015":
            truths = load(tasks, "vqa", "answers_test2015.json")
            answers = {int(i): {"multiple_choice_answer": a} for i, a in truths.items()}
        else:
            content = load(tasks, "vqa", f"v2_mscoco_{subset}_annotations.json")
            answers = {a["question_id"]: a for a in content["annotations"]}
        assert answers.keys() == {q["question_id"] for q in questions}
        assert not asked & answers.keys()
        asked |= answers.keys()
        for question in questions:
            scene = pictures[f"COCO_{subset}_{question['image_id']:012d}.jpg"]
            truth = read_answer(scene, question["question"])
            annotation = answers[question["question_id"]]
            assert annotation["multiple_choice_answer"] == truth, (question, scene)
            if subset != "test2015":
                check_annotation(question, annotation)
    test, test_dev = (vqa_questions(tasks, s) for s in ("test2015", "test-dev2015"))
    assert test_dev == test[:50]


def check_annotation(question: dict[str, Any], annotation: dict[str, Any]) -> None:
    truth = annotation["multiple_choice_answer"]
    assert annotation["image_id"] == question["image_id"]
    assert question["question"].lower().startswith(annotation["question_type"] + " ")
    expected = "yes/no" if truth in ("yes", "no") else "number" if truth.isdigit() else "other"
    assert annotation["answer_type"] == expected
    assert [a["answer_id"] for a in annotation["answers"]] == list(range(1, 11))
    assert sum(a["answer"] == truth for a in annotation["answers"]) >= 8


def test_vqa_annotators_disagree_now_and_then(tasks: TaskFiles) -> None:
    annotations = load(tasks, "vqa", "v2_mscoco_train2014_annotations.json")["annotations"]
    said = Counter(
        sum(a["answer"] != entry["multiple_choice_answer"] for a in entry["answers"])
        for entry in annotations
    )
    shares = [said[number] / said.total() for number in range(3)]
    assert shares == [pytest.approx(share, abs=0.05) for share in (0.6, 0.3, 0.1)]
    everything = {a["answer"] for entry in annotations for a in entry["answers"]}
    assert {"1", "one", "tan", "upper left"} <= everything


def skeleton(question: str) -> str:
    """The question without what it is about."""
    text = re.sub(rf"\b{RELATION}\b", "R", question)
    text = re.sub(rf"\b{PLACE}", "P", text)
    return re.sub(rf"\b(?:{COLOR} {KIND}|{COLOR}|{KIND})(e?s)?\b", "X", text)


def test_vqa_question_alone_does_not_give_the_answer(tasks: TaskFiles) -> None:
    by_text: dict[str, Counter[str]] = defaultdict(Counter)
    train = load(tasks, "vqa", "v2_mscoco_train2014_annotations.json")["annotations"]
    for question, entry in zip(vqa_questions(tasks, "train2014"), train, strict=True):
        by_text[skeleton(question["question"])][entry["multiple_choice_answer"]] += 1
    overall = Counter(e["multiple_choice_answer"] for e in train)
    assert abs(overall["yes"] - overall["no"]) <= 3
    assert overall.most_common(1)[0][1] < 0.15 * overall.total()
    validation = load(tasks, "vqa", "v2_mscoco_val2014_annotations.json")["annotations"]
    right = sum(
        by_text[skeleton(q["question"])].most_common(1)[0][0] == e["multiple_choice_answer"]
        for q, e in zip(vqa_questions(tasks, "val2014"), validation, strict=True)
    )
    # Chance, if all answers to a form were equally frequent: 0.28.
    assert right / len(validation) < 0.36
    assert tasks.truth["vqa"]["val"]["guess_by_form_percent"] < 36
    for form, answers in forms_of_answers(train, vqa_questions(tasks, "train2014")).items():
        assert max(answers.values()) - min(answers.values()) <= 3, (form, answers)


def forms_of_answers(
    annotations: list[dict[str, Any]], questions: list[dict[str, Any]]
) -> dict[str, Counter[str]]:
    """How often each answer occurs in the forms that a pattern alone recognises."""
    patterns = {
        "background": ("background", FORMS["background"].answers),
        "place": ("^Where is", FORMS["place"].answers),
        "color of kind": (rf"^What color (?:is|are) the {KIND}", COLORS),
        "size": ("large or small", FORMS["size"].answers),
        "existence": ("^(?:Is there|Are there|Can you)", ("yes", "no")),
        "count all": ("^How many shapes", ("1", "2", "3", "4")),
    }
    found = {}
    for form, (pattern, answers) in patterns.items():
        counts = Counter(
            entry["multiple_choice_answer"]
            for entry, question in zip(annotations, questions, strict=True)
            if re.search(pattern, question["question"])
        )
        assert set(counts) == set(answers)
        found[form] = counts
    return found


def shown(m: re.Match[str], *pictures: Scene) -> int:
    return sum(bool(having(scene, m[1], m[2])) for scene in pictures)


def with_background(m: re.Match[str], *pictures: Scene) -> int:
    return sum(scene.background == m[1] for scene in pictures)


def brightness(scene: Scene) -> int:
    """Of the background as drawn."""
    pixel = render_picture(replace(scene, shapes=())).getpixel((0, 0))
    assert isinstance(pixel, tuple)
    return sum(pixel)


TWO = "(?:the )?(?:two )?pictures"
Holds = Callable[[Scene, Scene, re.Match[str]], bool]
STATEMENTS: dict[str, Holds] = {
    rf"(?:Both|Each of the two) pictures shows? {THING}": lambda a, b, m: shown(m, a, b) == 2,
    rf"There is {THING} in both pictures": lambda a, b, m: shown(m, a, b) == 2,
    rf"There is {THING} in exactly one of {TWO}": lambda a, b, m: shown(m, a, b) == 1,
    rf"Only one of {TWO} shows {THING}": lambda a, b, m: shown(m, a, b) == 1,
    rf"One picture shows {THING} and the other one does not": lambda a, b, m: shown(m, a, b) == 1,
    rf"Neither picture shows {THING}": lambda a, b, m: shown(m, a, b) == 0,
    rf"There is no {THING} in {TWO}": lambda a, b, m: shown(m, a, b) == 0,
    rf"No picture has {THING} in it": lambda a, b, m: shown(m, a, b) == 0,
    rf"At least one of {TWO} shows {THING}": lambda a, b, m: shown(m, a, b) >= 1,
    rf"There is {THING} in one picture or in both": lambda a, b, m: shown(m, a, b) >= 1,
    rf"The left picture shows {THING} and the right one shows {THING}": lambda a, b, m: bool(
        having(a, m[1], m[2]) and having(b, m[3], m[4])
    ),
    rf"There is {THING} in the left picture and {THING} in the right one": lambda a, b, m: bool(
        having(a, m[1], m[2]) and having(b, m[3], m[4])
    ),
    r"The (left|right) picture has more shapes than the (?:left|right) one": lambda a, b, m: (
        len(a.shapes) > len(b.shapes) if m[1] == "left" else len(b.shapes) > len(a.shapes)
    ),
    r"There are (more|fewer) shapes in the (left|right) picture than in the (?:left|right) one": (
        lambda a, b, m: (
            len(a.shapes) > len(b.shapes)
            if (m[1] == "more") == (m[2] == "left")
            else len(b.shapes) > len(a.shapes)
        )
    ),
    r"Both pictures have the same number of shapes": lambda a, b, m: len(a.shapes) == len(b.shapes),
    r"There are as many shapes in the left picture as in the right one": lambda a, b, m: (
        len(a.shapes) == len(b.shapes)
    ),
    r"The two pictures have (?:the same background|(different) backgrounds)": (
        lambda a, b, m: (a.background == b.background) == (m[1] is None)
    ),
    r"The (left|right) picture has the (darker|lighter) background": lambda a, b, m: (
        brightness(a) < brightness(b)
        if (m[1] == "left") == (m[2] == "darker")
        else brightness(b) < brightness(a)
    ),
    rf"Both pictures have an? {BACKGROUND} background": lambda a, b, m: (
        with_background(m, a, b) == 2
    ),
    rf"Exactly one picture has an? {BACKGROUND} background": lambda a, b, m: (
        with_background(m, a, b) == 1
    ),
    rf"Neither picture has an? {BACKGROUND} background": lambda a, b, m: (
        with_background(m, a, b) == 0
    ),
    rf"At least one picture has an? {BACKGROUND} background": lambda a, b, m: (
        with_background(m, a, b) >= 1
    ),
    rf"There (?:is|are) exactly (\w+) {THING} in the two pictures together": (
        lambda a, b, m: len(having(a, m[2], m[3]) + having(b, m[2], m[3])) == NUMBERS[m[1]]
    ),
    rf"The two pictures together have exactly (\w+) {THING}": (
        lambda a, b, m: len(having(a, m[2], m[3]) + having(b, m[2], m[3])) == NUMBERS[m[1]]
    ),
}


def test_nlvr2_statements_hold_as_labelled(tasks: TaskFiles) -> None:
    pictures = scenes(tasks, "nlvr2")
    used: Counter[str] = Counter()
    for split, sets in (("train", 100), ("dev", 10), ("test1", 10)):
        records = load(tasks, "nlvr2", "data", f"{split}.json")
        assert len(records) == 8 * sets == len({r["identifier"] for r in records})
        labels = defaultdict(list)
        for record in records:
            kind, number, pair, place = record["identifier"].split("-")
            assert kind == split
            assert record.get("directory") == (int(number) % 10 if split == "train" else None)
            stem = record["identifier"].rpartition("-")[0]
            left, right = (pictures[f"{stem}-img{side}.png"] for side in (0, 1))
            text = record["sentence"].removesuffix(".")
            found = [(m, h, p) for p, h in STATEMENTS.items() if (m := re.fullmatch(p, text))]
            assert len(found) == 1, text
            match, holds, pattern = found[0]
            used[pattern] += 1
            assert record["label"] == str(holds(left, right, match)), (record, left, right)
            labels[number, place].append((record["sentence"], record["label"]))
            if "exactly one " in text and "together" in text:
                assert not re.search(r"exactly one .*(?:circles|stars|shapes)", text)
        for stated in labels.values():
            assert len({sentence for sentence, _ in stated}) == 1
            # So the sentence alone is worth nothing.
            assert Counter(label for _, label in stated) == {"True": 2, "False": 2}
    assert used.keys() == STATEMENTS.keys()
    easy = sum(number for pattern, number in used.items() if "background" in pattern)
    assert 0.6 < easy / used.total() < 0.85


def nlvr2_cues(tasks: TaskFiles, split: str) -> list[tuple[str, tuple[str, str], str, Scene]]:
    """Sentence, backgrounds, label and left picture of every record."""
    pictures = scenes(tasks, "nlvr2")
    found = []
    for record in load(tasks, "nlvr2", "data", f"{split}.json"):
        stem = record["identifier"].rpartition("-")[0]
        left, right = (pictures[f"{stem}-img{side}.png"] for side in (0, 1))
        backgrounds = left.background, right.background
        found.append((record["sentence"], backgrounds, record["label"], left))
    return found


def test_nlvr2_one_picture_is_not_enough() -> None:
    """What the left picture says about a thing, with the form, leaves at least a quarter wrong."""
    # Several samples for every form and view: else the most frequent label is right by chance.
    tasks = make_nlvr2(FreshScenes(SEED), SEED, 1000)
    seen: dict[tuple[str, object], Counter[str]] = defaultdict(Counter)
    for sentence, _, label, left in nlvr2_cues(tasks, "train"):
        names = re.findall(rf"(?:\b{COLOR} )?(?:\b{KIND}|shape)", sentence)
        view: list[object] = [bool(having(left, c or None, k or None)) for c, k in names]
        if "background" in sentence:
            # Of a named background, whether the left picture has it.
            view += [left.background in sentence or left.background]
        elif re.search("more|fewer|as many|same number", sentence):
            view += [len(left.shapes)]
        form = re.sub(BACKGROUND, "X", re.sub(THING, "X", sentence))
        seen[form, tuple(view)][label] += 1
    for easy in (False, True):
        counts = [c for (form, _), c in seen.items() if ("background" in form) == easy]
        right = sum(max(c.values()) for c in counts)
        assert 0.5 < right / sum(c.total() for c in counts) < 0.75


def test_nlvr2_guesses_are_what_the_files_say(tasks: TaskFiles) -> None:
    train = nlvr2_cues(tasks, "train")
    for split in ("dev", "test1"):
        truth = tasks.truth["nlvr2"][split]
        for name, cue in (
            ("backgrounds", lambda r: r[1]),
            ("sentence_and_left_background", lambda r: (r[0], r[1][0])),
            ("sentence_and_right_background", lambda r: (r[0], r[1][1])),
        ):
            held_out = nlvr2_cues(tasks, split)
            right = 0
            for record in held_out:
                # As often True as False, or never seen: "False", the first in the alphabet.
                same = [r[2] for r in train if cue(r) == cue(record)]
                said = "True" if same.count("True") > len(same) / 2 else "False"
                right += said == record[2]
            percent = 100 * right / len(held_out)
            assert truth[f"guess_by_{name}_percent"] == pytest.approx(percent, abs=0.006)
            assert percent < 75


def test_flickr30k_captions_fit_one_picture_only(tasks: TaskFiles) -> None:
    pictures = scenes(tasks, "flickr30k")
    content = load(tasks, "flickr30k", "dataset_flickr30k.json")
    images = content["images"]
    assert Counter(i["split"] for i in images) == {"train": 200, "val": 20, "test": 20}
    assert {i["filename"] for i in images} == pictures.keys()
    ids = [s["sentid"] for i in images for s in i["sentences"]]
    assert len(set(ids)) == len(ids) == 5 * 240
    for image in images:
        scene = pictures[image["filename"]]
        assert image["sentids"] == [s["sentid"] for s in image["sentences"]]
        for sentence in image["sentences"]:
            check_caption(scene, sentence["raw"])
    for split in ("val", "test"):
        # A caption names every (colour, kind) of its picture; no other picture has them all.
        named = [
            {(s.color, s.kind) for s in pictures[image["filename"]].shapes}
            for image in images
            if image["split"] == split
        ]
        assert sum(a <= b for a in named for b in named) == len(named)


def test_imagenet_is_balanced(tasks: TaskFiles) -> None:
    names = tasks.texts[Path("imagenet", "words.txt")].splitlines()
    words = dict(line.split("\t") for line in names)
    counts: Counter[tuple[str, str]] = Counter()
    for picture in tasks.pictures:
        if picture.file.parts[0] == "imagenet":
            _, split, synset, _ = picture.file.parts
            assert picture.split == split
            large = [s for s in picture.scene.shapes if s.size == "large"]
            assert [words[synset]] == [f"{s.color} {s.kind}" for s in large]
            counts[split, synset] += 1
    assert len(counts) == 2 * len(words) == 72
    assert {(split, n) for (split, _), n in counts.items()} == {("train", 5), ("val", 1)}


def test_truth_is_what_the_files_say(tasks: TaskFiles) -> None:
    truth = load(tasks, "truth.json")
    assert truth == json.loads(json.dumps(tasks.truth))
    assert {task: set(splits) for task, splits in truth.items()} == {
        "vqa": {"val", "test", "test-dev"},
        "nlvr2": {"dev", "test1"},
        "flickr30k": {"val", "test"},
        "imagenet": {"val"},
        "mnli": {"dev_matched", "dev_mismatched"},
    }
    train, val = (
        load(tasks, "vqa", f"v2_mscoco_{s}_annotations.json")["annotations"]
        for s in ("train2014", "val2014")
    )
    guess = truth["vqa"]["val"]["guess"]
    counts = Counter(a["multiple_choice_answer"] for a in train)
    assert counts[guess] == max(counts.values())
    scores = {0: 0.0, 1: 0.3, 2: 0.6, 3: 0.9}
    score = sum(scores.get([x["answer"] for x in a["answers"]].count(guess), 1.0) for a in val)
    assert truth["vqa"]["val"]["guess_percent"] == pytest.approx(100 * score / 200, abs=0.006)
    assert truth["vqa"]["val"]["labels"] == Counter(a["multiple_choice_answer"] for a in val)
    assert truth["vqa"]["test-dev"]["samples"] == 50
    nlvr2, mnli = truth["nlvr2"]["dev"], truth["mnli"]["dev_mismatched"]
    assert {name: value for name, value in nlvr2.items() if "guess_by" not in name} == {
        "samples": 80,
        "labels": {"False": 40, "True": 40},
        "guess_percent": 50.0,
    }
    assert truth["flickr30k"]["test"] == {"samples": 100, "images": 20, "guess_percent": 5.0}
    assert truth["imagenet"]["val"]["guess_percent"] == 2.78
    assert {name: value for name, value in mnli.items() if "guess_by" not in name} == {
        "samples": 90,
        "labels": {"contradiction": 30, "entailment": 30, "neutral": 30},
        "guess_percent": 33.33,
    }


def test_guess_by_a_cue() -> None:
    train = [("a", "x"), ("a", "y"), ("a", "y"), ("b", "x"), ("b", "y"), ("c", "y"), ("d", "x")]
    assert guess_by(train, [("a", "y"), ("a", "x")]) == 50.0
    # Two equally frequent ones: the first in the alphabet. An unknown cue: "y", four of seven.
    assert guess_by(train, [("b", "x"), ("e", "y"), ("e", "x")]) == 66.67


def test_soft_score_and_question_type() -> None:
    said = ["red"] * 4 + ["blue"] * 3 + ["tan"] * 2 + ["pink"]
    scores = [soft_score(answer, said) for answer in ("red", "blue", "tan", "pink", "gold")]
    assert scores == pytest.approx([1.0, 0.9, 0.6, 0.3, 0.0])
    assert question_type("What color is the star?") == "what color is the"
    assert question_type("What is the color of the background?") == "what is the color of the"
    assert question_type("Isolate the star?") == "none of the above"


def test_no_scene_is_given_out_twice() -> None:
    known = [sample_scene(3, "pair", index) for index in range(40)]
    moved = [
        replace(s, shapes=tuple(replace(shape, shift=(0.01, 0.0)) for shape in s.shapes))
        for s in known
    ]
    numbers = iter([0, 1, 0, 2])
    fresh = FreshScenes(3, known[5:])
    # Known ones and repetitions are passed over, moved or not.
    order = iter([known[7], moved[0], known[0], moved[9], known[1]])
    taken = [fresh.take("x", lambda rng: next(order)) for _ in range(2)]
    assert taken == [moved[0], known[1]]
    assert fresh.take("y", lambda rng: known[next(numbers)], lambda s: s != known[0]) == known[2]
    a, b = (FreshScenes(3).take("z", lambda rng: draw_object_scene(rng)) for _ in range(2))
    assert a == b
    assert draw_object_scene(random.Random(1), ("red", "star")).shapes[0].kind == "star"


def test_same_arguments_give_same_tasks(tasks: TaskFiles) -> None:
    """Also in a process where sets have another order."""
    code = (
        "import hashlib\nfrom megatron_vlmoe.sample_corpus.tasks import make_tasks\n"
        f"tasks = make_tasks({SEED}, {NUM_IMAGES}, [])\n"
        "print(hashlib.sha256(repr(sorted(tasks.texts.items())).encode()).hexdigest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "5"}
    printed = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=environment)
    expected = hashlib.sha256(repr(sorted(tasks.texts.items())).encode()).hexdigest()
    assert printed.decode().strip() == expected
    other = make_tasks(SEED + 1, 20, [])
    assert not {p.scene for p in other.pictures} & {p.scene for p in tasks.pictures}


def test_files_of_a_small_corpus(tmp_path: Path) -> None:
    """Layouts on disk, and no picture twice in all of the corpus."""
    make_sample_corpus(SampleCorpus(output=tmp_path / "s", num_images=20, seed=2))
    root = tmp_path / "s" / "tasks"
    lines = [json.loads(line) for line in (root / "scenes.jsonl").read_text().splitlines()]
    suffixes = (".jpg", ".png", ".JPEG")
    on_disk = {p.relative_to(root).as_posix() for p in root.rglob("*") if p.suffix in suffixes}
    assert on_disk == {line["file"] for line in lines}
    expected = make_tasks(
        2, 20, [sample_scene(2, stream, i) for stream in ("pair", "image") for i in range(20)]
    )
    assert [line["scene"] for line in lines] == [
        json.loads(json.dumps(asdict(p.scene))) for p in expected.pictures
    ]
    for line in lines[:: len(lines) // 20]:
        with Image.open(root / line["file"]) as picture:
            assert picture.format == ("PNG" if line["task"] == "nlvr2" else "JPEG")
            assert picture.size == (line["scene"]["width"], line["scene"]["height"])
    for example in (
        "vqa/train2014/COCO_train2014_000000000100.jpg",
        "nlvr2/images/train/0/train-0-0-img0.png",
        "nlvr2/images/train/3/train-3-3-img1.png",
        "nlvr2/images/dev/dev-1-3-img1.png",
        "nlvr2/images/test1/test1-0-0-img0.png",
        "flickr30k/flickr30k-images/1000000000.jpg",
    ):
        assert (root / example).exists(), example
    assert {p.name for p in (root / "imagenet" / "train").iterdir()} == {
        p.name for p in (root / "imagenet" / "val").iterdir()
    }
    digests = Counter(
        hashlib.sha256(p.read_bytes()).hexdigest()
        for p in (tmp_path / "s").rglob("*")
        if p.suffix in suffixes
    )
    assert set(digests.values()) == {1} and len(digests) == len(on_disk) + 40
