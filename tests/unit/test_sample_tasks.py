"""The tasks of the sample corpus: every answer and label is read off the scene again by other means.

Those of MNLI are checked by building pictures of which the premise is true.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from test_sample_corpus import BIG, PLACES, RELATIONS, check_caption, fits, one_of

from megatron_vlmoe.sample_corpus.mnli import Claim, Mention, Premise, judge, make_mnli
from megatron_vlmoe.sample_corpus.nlvr2 import make_nlvr2
from megatron_vlmoe.sample_corpus.vqa import PLACE_NAMES
from megatron_vlmoe.sample_corpus.world import (
    BACKGROUNDS,
    COLORS,
    KINDS,
    Cell,
    FreshScenes,
    Scene,
    Shape,
)
from megatron_vlmoe.sample_corpus.writer import render_picture, task_files

SEED = 11
COLOR, KIND, PLACE, RELATION = map(one_of, (COLORS, KINDS, PLACES, RELATIONS))
BACKGROUND, SIZE = one_of(BACKGROUNDS), one_of(BIG)
PICTURE = "(?: in the (?:picture|image|drawing))"
THING = rf"(?:an? )?(?:{COLOR} )?(?:{KIND}|shape)(?:e?s)?"
NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4}


@dataclass
class Tasks:
    """All files of the tasks, by path below their folder."""

    scenes: dict[Path, Scene]
    texts: dict[Path, str]

    def pictures(self, task: str) -> dict[str, Scene]:
        """By file name."""
        return {file.name: s for file, s in self.scenes.items() if file.parts[0] == task}

    def load(self, *names: str) -> Any:
        """Records of a file."""
        text = self.texts[Path(*names)]
        if names[-1].endswith(".tsv"):
            lines = [line.split("\t") for line in text.splitlines()]
            return [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]
        if names[0] == "nlvr2":
            return [json.loads(line) for line in text.splitlines()]
        return json.loads(text)


@pytest.fixture(scope="module")
def tasks() -> Tasks:
    pictures, texts = task_files(SEED, 400, [])
    return Tasks(
        {file.relative_to("tasks"): scene for scene, file in pictures},
        {file.relative_to("tasks"): text for file, text in texts.items()},
    )


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


def vqa_questions(tasks: Tasks, subset: str) -> list[dict[str, Any]]:
    content = tasks.load("vqa", f"v2_OpenEnded_mscoco_{subset}_questions.json")
    assert content["data_subtype"] == subset
    return content["questions"]


def test_vqa_answers_are_what_the_pictures_show(tasks: Tasks) -> None:
    pictures = tasks.pictures("vqa")
    asked: set[int] = set()
    for subset, number in (("train2014", 200), ("val2014", 40), ("test2015", 20)):
        questions = vqa_questions(tasks, subset)
        assert len(questions) == 5 * number == 5 * len({q["image_id"] for q in questions})
        if subset == "test2015":
            truths = tasks.load("vqa", "answers_test2015.json")
            answers = {int(i): {"multiple_choice_answer": a} for i, a in truths.items()}
        else:
            content = tasks.load("vqa", f"v2_mscoco_{subset}_annotations.json")
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
    kind = annotation["question_type"]
    text = question["question"].lower()
    assert text.startswith(f"{kind} ")
    for longer in ("what is the", "what is the color of the", "what color is the", "is there a"):
        assert len(kind) >= len(longer) or not text.startswith(f"{longer} "), text
    expected = "yes/no" if truth in ("yes", "no") else "number" if truth.isdigit() else "other"
    assert annotation["answer_type"] == expected
    assert [a["answer_id"] for a in annotation["answers"]] == list(range(1, 11))
    assert sum(a["answer"] == truth for a in annotation["answers"]) >= 8


def test_vqa_annotators_disagree_now_and_then(tasks: Tasks) -> None:
    annotations = tasks.load("vqa", "v2_mscoco_train2014_annotations.json")["annotations"]
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


def test_vqa_question_alone_does_not_give_the_answer(tasks: Tasks) -> None:
    by_text: dict[str, Counter[str]] = defaultdict(Counter)
    train = tasks.load("vqa", "v2_mscoco_train2014_annotations.json")["annotations"]
    for question, entry in zip(vqa_questions(tasks, "train2014"), train, strict=True):
        by_text[skeleton(question["question"])][entry["multiple_choice_answer"]] += 1
    overall = Counter(e["multiple_choice_answer"] for e in train)
    assert abs(overall["yes"] - overall["no"]) <= 3
    assert overall.most_common(1)[0][1] < 0.15 * overall.total()
    validation = tasks.load("vqa", "v2_mscoco_val2014_annotations.json")["annotations"]
    right = sum(
        by_text[skeleton(q["question"])].most_common(1)[0][0] == e["multiple_choice_answer"]
        for q, e in zip(vqa_questions(tasks, "val2014"), validation, strict=True)
    )
    # Chance, if all answers to a form were equally frequent: 0.28.
    assert right / len(validation) < 0.36
    assert tasks.load("truth.json")["vqa"]["val"]["guess_by_form_percent"] < 36
    # The forms that a pattern alone recognises: every answer equally often.
    for pattern, answers in (
        ("background", BACKGROUNDS),
        ("^Where is", PLACE_NAMES.values()),
        (rf"^What color (?:is|are) the {KIND}", COLORS),
        ("large or small", ("large", "small")),
        ("^(?:Is there|Are there|Can you)", ("yes", "no")),
        ("^How many shapes", ("1", "2", "3", "4")),
    ):
        counts = Counter(
            entry["multiple_choice_answer"]
            for entry, question in zip(train, vqa_questions(tasks, "train2014"), strict=True)
            if re.search(pattern, question["question"])
        )
        assert set(counts) == set(answers)
        assert max(counts.values()) - min(counts.values()) <= 3, (pattern, counts)


Holds = Callable[[Scene, Scene, re.Match[str]], bool]


def shown(*numbers: int) -> Holds:
    """Of how many of the two pictures it is true that they show the thing."""
    return lambda a, b, m: sum(bool(having(s, m[1], m[2])) for s in (a, b)) in numbers


def each_shown(a: Scene, b: Scene, m: re.Match[str]) -> bool:
    return bool(having(a, m[1], m[2]) and having(b, m[3], m[4]))


def total(a: Scene, b: Scene, m: re.Match[str]) -> bool:
    return len(having(a, m[2], m[3]) + having(b, m[2], m[3])) == NUMBERS[m[1]]


def same_number(a: Scene, b: Scene, m: re.Match[str]) -> bool:
    return len(a.shapes) == len(b.shapes)


def more_shapes(a: Scene, b: Scene, m: re.Match[str]) -> bool:
    """The one picture has more of them, or the other has fewer."""
    words, side = m.groups() if len(m.groups()) == 2 else ("more", m[1])
    difference = len(a.shapes) - len(b.shapes)
    return difference > 0 if (words == "more") == (side == "left") else difference < 0


def with_background(*numbers: int) -> Holds:
    return lambda a, b, m: sum(scene.background == m[1] for scene in (a, b)) in numbers


def same_background(a: Scene, b: Scene, m: re.Match[str]) -> bool:
    return (a.background == b.background) == (m[1] is None)


@cache
def brightness(background: str) -> int:
    """As drawn."""
    scene = Scene(width=96, height=96, background=background, shapes=())
    pixel = render_picture(scene).getpixel((0, 0))
    assert isinstance(pixel, tuple)
    return sum(pixel)


def darker(a: Scene, b: Scene, m: re.Match[str]) -> bool:
    left, right = brightness(a.background), brightness(b.background)
    return left < right if (m[1] == "left") == (m[2] == "darker") else right < left


TWO = "(?:the )?(?:two )?pictures"
STATEMENTS: dict[str, Holds] = {
    rf"(?:Both|Each of the two) pictures shows? {THING}": shown(2),
    rf"There is {THING} in both pictures": shown(2),
    rf"There is {THING} in exactly one of {TWO}": shown(1),
    rf"Only one of {TWO} shows {THING}": shown(1),
    rf"One picture shows {THING} and the other one does not": shown(1),
    rf"Neither picture shows {THING}": shown(0),
    rf"There is no {THING} in {TWO}": shown(0),
    rf"No picture has {THING} in it": shown(0),
    rf"At least one of {TWO} shows {THING}": shown(1, 2),
    rf"There is {THING} in one picture or in both": shown(1, 2),
    rf"The left picture shows {THING} and the right one shows {THING}": each_shown,
    rf"There is {THING} in the left picture and {THING} in the right one": each_shown,
    rf"There (?:is|are) exactly (\w+) {THING} in the two pictures together": total,
    rf"The two pictures together have exactly (\w+) {THING}": total,
    r"Both pictures have the same number of shapes": same_number,
    r"There are as many shapes in the left picture as in the right one": same_number,
    r"The (left|right) picture has more shapes than the (?:left|right) one": more_shapes,
    r"There are (more|fewer) shapes in the (left|right) picture than in .*": more_shapes,
    r"The two pictures have (?:the same background|(different) backgrounds)": same_background,
    r"The (left|right) picture has the (darker|lighter) background": darker,
    rf"Both pictures have an? {BACKGROUND} background": with_background(2),
    rf"Exactly one picture has an? {BACKGROUND} background": with_background(1),
    rf"Neither picture has an? {BACKGROUND} background": with_background(0),
    rf"At least one picture has an? {BACKGROUND} background": with_background(1, 2),
}


def test_nlvr2_statements_hold_as_labelled(tasks: Tasks) -> None:
    pictures = tasks.pictures("nlvr2")
    used: Counter[str] = Counter()
    for split, sets in (("train", 100), ("dev", 10), ("test1", 10)):
        records = tasks.load("nlvr2", "data", f"{split}.json")
        assert len(records) == 8 * sets == len({r["identifier"] for r in records})
        labels = defaultdict(list)
        for record in records:
            kind, number, pair, place = record["identifier"].split("-")
            assert kind == split
            assert record.get("directory") == (int(number) % 10 if split == "train" else None)
            left, right = pair_of(record, pictures)
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


def pair_of(record: dict[str, Any], pictures: dict[str, Scene]) -> tuple[Scene, Scene]:
    stem = record["identifier"].rpartition("-")[0]
    return pictures[f"{stem}-img0.png"], pictures[f"{stem}-img1.png"]


def nlvr2_cues(tasks: Tasks, split: str) -> list[tuple[str, tuple[str, str], str, Scene]]:
    """Sentence, backgrounds, label and left picture of every record."""
    pictures = tasks.pictures("nlvr2")
    found = []
    for record in tasks.load("nlvr2", "data", f"{split}.json"):
        left, right = pair_of(record, pictures)
        backgrounds = left.background, right.background
        found.append((record["sentence"], backgrounds, record["label"], left))
    return found


def test_nlvr2_one_picture_is_not_enough() -> None:
    """What the left picture says about a thing, with the form, leaves at least a quarter wrong."""
    # Several samples for every form and view: else the most frequent label is right by chance.
    made = make_nlvr2(FreshScenes(SEED), SEED, 600)
    tasks = Tasks({picture.file: picture.scene for picture in made.pictures}, {**made.texts})
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


Cue = tuple[object, str]
"""What a reader is told of a sample, and its label."""


def percent_by_cue(train: list[Cue], held_out: list[Cue]) -> float:
    """Who knows one cue only says what is most frequent with it: the first of the alphabet if several."""
    seen: dict[object, Counter[str]] = defaultdict(Counter)
    for cue, label in train:
        for key in (cue, None):
            seen[key][label] += 1
    said = [seen[cue if cue in seen else None] for cue, _ in held_out]
    guesses = [min(counts, key=lambda label: (-counts[label], label)) for counts in said]
    right = sum(guess == label for guess, (_, label) in zip(guesses, held_out, strict=True))
    return 100 * right / len(held_out)


def test_nlvr2_guesses_are_what_the_files_say(tasks: Tasks) -> None:
    records = {split: nlvr2_cues(tasks, split) for split in ("train", "dev", "test1")}
    cues: dict[str, Callable[[str, tuple[str, str]], object]] = {
        "backgrounds": lambda sentence, backgrounds: backgrounds,
        "sentence_and_left_background": lambda sentence, backgrounds: (sentence, backgrounds[0]),
        "sentence_and_right_background": lambda sentence, backgrounds: (sentence, backgrounds[1]),
    }
    for split, (name, cue) in product(("dev", "test1"), cues.items()):
        train, held_out = (
            [(cue(text, backgrounds), label) for text, backgrounds, label, _ in records[part]]
            for part in ("train", split)
        )
        percent = percent_by_cue(train, held_out)
        truth = tasks.load("truth.json")["nlvr2"][split]
        assert truth[f"guess_by_{name}_percent"] == pytest.approx(percent, abs=0.006)
        assert percent < 75


def test_flickr30k_captions_fit_one_picture_only(tasks: Tasks) -> None:
    pictures = tasks.pictures("flickr30k")
    content = tasks.load("flickr30k", "dataset_flickr30k.json")
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


def test_imagenet_is_balanced(tasks: Tasks) -> None:
    lines = tasks.texts[Path("imagenet", "words.txt")].splitlines()
    words = dict(line.split("\t") for line in lines)
    counts: Counter[tuple[str, str]] = Counter()
    for file, scene in tasks.scenes.items():
        if file.parts[0] == "imagenet":
            _, split, synset, _ = file.parts
            large = [s for s in scene.shapes if s.size == "large"]
            assert [words[synset]] == [f"{s.color} {s.kind}" for s in large]
            counts[split, synset] += 1
    assert len(counts) == 2 * len(words) == 72
    assert {(split, n) for (split, _), n in counts.items()} == {("train", 5), ("val", 1)}


def test_truth_is_what_the_files_say(tasks: Tasks) -> None:
    truth = tasks.load("truth.json")
    assert {task: set(splits) for task, splits in truth.items()} == {
        "vqa": {"val", "test", "test-dev"},
        "nlvr2": {"dev", "test1"},
        "flickr30k": {"val", "test"},
        "imagenet": {"val"},
        "mnli": {"dev_matched", "dev_mismatched"},
    }
    train, val = (
        tasks.load("vqa", f"v2_mscoco_{s}_annotations.json")["annotations"]
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


@pytest.fixture(scope="module")
def mnli() -> Tasks:
    made = make_mnli(4, 600)
    return Tasks({}, {**made.texts, Path("truth.json"): json.dumps({"mnli": made.truth})})


COUNTS = {"a": (1,), "an": (1,), "two": (2,), "three": (3,), "some": (2, 3)}
NOUN = re.compile(
    rf"\b(an?|two|three|some) (?:{SIZE} )?(?:(?:striped|dotted) )?(?:{COLOR} )?{KIND}(e?s)?\b"
)
CELLS = [(row, column) for row in range(3) for column in range(3)]
Row = dict[str, str]


@dataclass
class Named:
    """What a premise says of one kind of shape; None and all: anything."""

    counts: tuple[int, ...]
    color: str | None
    size: str | None
    cell: Cell | None = None


@dataclass
class Reading:
    """What a premise says."""

    named: dict[str, Named] = field(default_factory=dict)
    relation: tuple[str, str, str] | None = None
    background: str | None = None
    closed: bool = False


def read_premise(text: str) -> Reading:
    """Every sentence must say something that is understood."""
    reading = Reading()
    for part in re.findall(r"[A-Z][^.]*(?=\.)", text.strip('"')):
        sentence = part[0].lower() + part[1:]
        if match := re.fullmatch(rf"the {KIND} is {PLACE}", sentence):
            (reading.named[match[1]].cell,) = PLACES[match[2]]
        elif match := re.fullmatch(
            rf"the {KIND}(e?s)? (is|are) {RELATION} the {KIND}(e?s)?", sentence
        ):
            many = max(reading.named[match[1]].counts) > 1
            assert (match[3] == "are") == bool(match[2]) == many, text
            assert bool(match[6]) == (max(reading.named[match[5]].counts) > 1), text
            reading.relation = match[1], RELATIONS[match[4]], match[5]
        elif "nothing else" in sentence:
            reading.closed = True
        elif "background" in sentence:
            (reading.background,) = re.findall(rf"\b{BACKGROUND}\b", sentence)
        else:
            read_shapes(sentence, reading)
    assert reading.named
    return reading


def read_shapes(sentence: str, reading: Reading) -> None:
    found = list(NOUN.finditer(sentence))
    assert found and not reading.named, sentence
    for match in found:
        counts = COUNTS[match[1]]
        assert bool(match[5]) == (counts != (1,)), sentence
        assert match[4] not in reading.named
        size = BIG[match[2]] if match[2] else None
        reading.named[match[4]] = Named(counts, match[3], size)
    if match := re.search(rf"{NOUN.pattern} {RELATION} {NOUN.pattern}", sentence):
        reading.relation = match[4], RELATIONS[match[6]], match[10]
    if match := re.search(rf"there (is|are) {NOUN.pattern}", sentence):
        assert (match[1] == "are") == bool(match[6]), sentence


@dataclass
class World:
    """A picture: cells, colour and size by kind of shape."""

    cells: dict[str, list[Cell]]
    colors: dict[str, str]
    sizes: dict[str, str]
    background: str


def build_world(reading: Reading, hypothesis: str, rng: random.Random) -> World | None:
    """One picture of which the premise is true; what it leaves open is often as claimed, or None."""

    def pick(words: tuple[str, ...]) -> str:
        claimed = [word for word in words if re.search(rf"\b{word}\b", hypothesis)]
        return rng.choice(claimed if claimed and rng.random() < 0.5 else words)

    place = re.search(PLACE, hypothesis)
    claimed_cells = PLACES[place[0]] if place else CELLS
    named = dict(reading.named)
    if not reading.closed:
        others = [kind for kind in KINDS if kind not in named and rng.random() < 0.3]
        named |= {kind: Named((1,), None, None) for kind in others}
    world = World({}, {}, {}, reading.background or pick(BACKGROUNDS))
    sizes = ("large", "small")
    for kind, told in named.items():
        count = rng.choice(told.counts)
        if told.cell is not None:
            cells = [told.cell]
        elif count == 1:
            cells = [rng.choice(claimed_cells if rng.random() < 0.4 else CELLS)]
        else:
            axis, fixed = rng.randrange(2), rng.randrange(3)
            cells = rng.sample([c for c in CELLS if c[axis] == fixed], count)
        world.cells[kind] = cells
        world.colors[kind] = told.color or pick(COLORS)
        world.sizes[kind] = told.size or pick(sizes)
    everything = [cell for cells in world.cells.values() for cell in cells]
    if len(set(everything)) < len(everything):
        return None
    if reading.relation is not None:
        a, relation, b = reading.relation
        if not fits(relation, world.cells[a], world.cells[b]):
            return None
    return world


def claim_holds(world: World, hypothesis: str) -> bool:
    text = hypothesis[0].lower() + hypothesis[1:].removesuffix(".")
    frame = r"(?:in the \w+, |you see that |i know that |it is true that |look, )?"
    text = re.sub(f"^{frame}", "", text)
    verb = r"is( not)?"
    if match := re.fullmatch(rf"the (?:color of the )?background {verb} {BACKGROUND}", text):
        return (world.background == match[2]) != bool(match[1])
    if match := re.fullmatch(rf"(?:there is a|one shape is a) {KIND}", text):
        return match[1] in world.cells
    if match := re.fullmatch(rf"(?:there is no|no shape is a) {KIND}", text):
        return match[1] not in world.cells
    if match := re.fullmatch(rf"the number of {KIND}e?s {verb} (two|three)", text):
        return (len(world.cells[match[1]]) == NUMBERS[match[3]]) != bool(match[2])
    match = re.fullmatch(rf"the (?:color of the )?{KIND} {verb} (.*)", text)
    assert match is not None, hypothesis
    kind, negated, rest = match[1], bool(match[2]), match[3]
    assert len(world.cells[kind]) == 1
    if rest in COLORS:
        return (world.colors[kind] == rest) != negated
    if rest in BIG:
        return (world.sizes[kind] == BIG[rest]) != negated
    if rest in PLACES:
        return (world.cells[kind] == PLACES[rest]) != negated
    related = re.fullmatch(rf"{RELATION} the {KIND}", rest)
    assert related is not None, hypothesis
    assert len(world.cells[related[2]]) == 1
    return fits(RELATIONS[related[1]], world.cells[kind], world.cells[related[2]]) != negated


def label_by_worlds(premise: str, hypothesis: str, rng: random.Random) -> str:
    reading = read_premise(premise)
    found: Counter[bool] = Counter()
    tries = 0
    while len(found) < 2 and (found.total() < 40 or (found.total() < 150 and tries < 3000)):
        tries += 1
        assert tries < 20000, premise
        world = build_world(reading, hypothesis, rng)
        if world is not None:
            found[claim_holds(world, hypothesis)] += 1
    if len(found) == 2:
        return "neutral"
    return "entailment" if True in found else "contradiction"


def test_mnli_labels_are_what_all_possible_pictures_say(mnli: Tasks) -> None:
    rng = random.Random(0)
    dev = mnli.load("mnli", "dev_matched.tsv") + mnli.load("mnli", "dev_mismatched.tsv")
    # The rare claims, of which more than one thing that the premise tells may decide.
    about_places = re.compile(rf" (?:not )?(?:{PLACE}|{RELATION} .*)\.$")
    places = [r for r in mnli.load("mnli", "train.tsv") if about_places.search(r["sentence2"])]
    assert len(dev) == 180 and len(places) > 50
    for row in dev + places:
        label = label_by_worlds(row["sentence1"], row["sentence2"], rng)
        assert label == row["gold_label"], (row["sentence1"], row["sentence2"])
    for row in places:
        # "At the top" is neither said nor denied of what is in a corner there.
        if match := re.search(rf"the {KIND} is (?:not )?{PLACE}", row["sentence2"]):
            named = read_premise(row["sentence1"]).named[match[1]]
            ((row_claimed, column_claimed),) = PLACES[match[2]]
            if named.cell not in (None, (1, 1)) and (row_claimed, column_claimed) != (1, 1):
                away = abs(named.cell[0] - row_claimed) + abs(named.cell[1] - column_claimed)
                assert away != 1, row


def test_mnli_worlds_notice_a_wrong_label() -> None:
    rng = random.Random(1)
    premise = "There is a red star above a circle. The circle is in the center."
    for hypothesis, label in (
        ("The star is red.", "entailment"),
        ("The circle is red.", "neutral"),
        ("The circle is not in the middle.", "contradiction"),
        ("The circle is over the star.", "contradiction"),
        ("The star is left of the circle.", "neutral"),
        ("There is no cross.", "neutral"),
    ):
        assert label_by_worlds(premise, hypothesis, rng) == label
    closed = premise + " There is nothing else."
    assert label_by_worlds(closed, "No shape is a cross.", rng) == "entailment"


def test_mnli_columns(mnli: Tasks) -> None:
    header = (
        "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse"
        " sentence2_parse sentence1 sentence2"
    ).split()
    for split, number, genres in (
        ("train", 3600, {"caption", "report"}),
        ("dev_matched", 90, {"caption", "report"}),
        ("dev_mismatched", 90, {"letter", "verbatim"}),
    ):
        people = ["label1"] if split == "train" else [f"label{i}" for i in range(1, 6)]
        found = mnli.load("mnli", f"{split}.tsv")
        assert [*found[0]] == [*header, *people, "gold_label"]
        assert [row["index"] for row in found] == [str(i) for i in range(number)]
        assert len({row["pairID"] for row in found}) == number
        assert {row["genre"] for row in found} == genres
        for row in found:
            assert row["pairID"] == row["promptID"] + row["gold_label"][0]
            assert Counter(row[p] for p in people)[row["gold_label"]] * 2 > len(people)
    quoted = [
        r["sentence1"] for r in mnli.load("mnli", "dev_mismatched.tsv") if r["genre"] == "verbatim"
    ]
    assert all(text.startswith('"') for text in quoted)


def test_mnli_hypothesis_alone_says_nothing(mnli: Tasks) -> None:
    for split in ("train", "dev_matched", "dev_mismatched"):
        labels: dict[str, Counter[str]] = defaultdict(Counter)
        for row in mnli.load("mnli", f"{split}.tsv"):
            labels[row["sentence2"]][row["gold_label"]] += 1
        for counts in labels.values():
            assert len(counts) == 3 and len(set(counts.values())) == 1
        negated = [t for t in labels if re.search(r"\b(not|no)\b", t)]
        assert 0.03 < len(negated) / len(labels) < 0.3


def test_mnli_words_of_the_premise_say_next_to_nothing(mnli: Tasks) -> None:
    """A naive Bayes classifier of the premise's words and word pairs stays near a third."""

    def features(row: Row) -> set[str]:
        words = re.findall(r"\w+", row["sentence1"].lower())
        return {*words, *map(" ".join, zip(words, words[1:]))}

    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for row in mnli.load("mnli", "train.tsv"):
        seen[row["gold_label"]].update(features(row))
    total = len(mnli.load("mnli", "train.tsv")) / 3
    right = number = 0
    for row in mnli.load("mnli", "dev_matched.tsv") + mnli.load("mnli", "dev_mismatched.tsv"):
        scores = {
            label: sum(math.log((counts[f] + 1) / (total + 2)) for f in features(row))
            for label, counts in seen.items()
        }
        right += max(scores, key=lambda label: scores[label]) == row["gold_label"]
        number += 1
    assert right / number < 0.43


def test_mnli_truth_says_what_missing_words_give_away(mnli: Tasks) -> None:
    def cues(split: str) -> list[Cue]:
        found: list[Cue] = []
        for row in mnli.load("mnli", f"{split}.tsv"):
            premise, hypothesis = (
                {*re.findall(r"\w+", row[name].lower())} for name in ("sentence1", "sentence2")
            )
            found.append((len(hypothesis - premise), row["gold_label"]))
        return found

    for split in ("dev_matched", "dev_mismatched"):
        percent = percent_by_cue(cues("train"), cues(split))
        truth = mnli.load("truth.json")["mnli"][split]
        assert truth["guess_by_missing_words_percent"] == pytest.approx(percent, abs=0.006)
        assert percent < 66


def test_mnli_claims_are_judged_by_one_thing_told() -> None:
    def mention(kind: str, **told: Any) -> Mention:
        return Mention(
            **({"color": None, "size": None, "texture": None, "cell": None} | told), kind=kind
        )

    star, circle = mention("star", color="red", count=1), mention("circle", cell=(1, 1), count=1)
    crosses = mention("cross", count=None)
    premise = Premise(
        mentions=(star, circle, crosses), relation="above", background=None, closed=True
    )
    for form, kind, value, expected, denied in (
        ("color", "star", "red", "entailment", "contradiction"),
        ("color", "star", "blue", "contradiction", "entailment"),
        ("color", "circle", "red", "neutral", "neutral"),
        ("color", "square", "red", None, None),
        ("color", "cross", "red", None, None),
        ("background", "star", "white", "neutral", "neutral"),
        ("existence", "square", None, "contradiction", "entailment"),
        ("existence", "star", None, "entailment", "contradiction"),
        ("existence", "cross", None, None, None),
        ("number of shapes", "cross", "two", "neutral", "neutral"),
        ("relation", "star", "above", "entailment", "contradiction"),
        ("relation", "star", "below", "contradiction", "entailment"),
        ("relation", "star", "left", "neutral", "neutral"),
        ("place", "circle", (1, 1), "entailment", "contradiction"),
        ("place", "star", (0, 1), "neutral", "neutral"),
        # Cannot be, but only by place and relation together.
        ("place", "star", (2, 1), None, None),
    ):
        for negated, label in ((False, expected), (True, denied)):
            claim = Claim(form=form, kind=kind, value=value, other="circle", negated=negated)
            assert judge(premise, claim) == label, claim
    below = Claim(form="relation", kind="circle", value="above", other="star", negated=False)
    assert judge(premise, below) == "contradiction"
