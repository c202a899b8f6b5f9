"""Visual question answering in the layout of VQA v2: balanced questions, ten annotators each.

A form is a way to ask whose answers are all equally good guesses: which of them is right only the
picture tells.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vlmoe.sample_corpus.texts import coco_id
from megatron_vlmoe.sample_corpus.world import (
    BACKGROUNDS,
    CELL_PHRASES,
    COLOR_THINGS,
    COLORS,
    CONVERSE,
    KIND_THINGS,
    KINDS,
    NAMED_THINGS,
    PICTURE_WORDS,
    RELATION_PHRASES,
    SIZES,
    Cell,
    FreshScenes,
    Picture,
    Scene,
    Shape,
    TaskFiles,
    Thing,
    be,
    generator_for,
    inflected,
    json_text,
    most_frequent,
    percent,
)

QUESTIONS_PER_IMAGE = 5
ANNOTATORS = 10
SUBSETS: Mapping[str, str] = {"train": "train2014", "val": "val2014", "test": "test2015"}
TEST_DEV = "test-dev2015"
"""The questions about the first half of the test pictures."""
QUESTION_TYPES = (
    *("what color is the", "what color are the", "what is the color of the", "what is the"),
    *("what is", "what", "which", "how many", "is there a", "is there", "are there any"),
    *("can you", "is the", "are the", "where is the"),
)
"""VQA's own: how a question begins. The first that fits counts."""
PLACE_NAMES: Mapping[Cell, str] = {
    (0, 0): "top left",
    (0, 1): "top",
    (0, 2): "top right",
    (1, 0): "left",
    (1, 1): "center",
    (1, 2): "right",
    (2, 0): "bottom left",
    (2, 1): "bottom",
    (2, 2): "bottom right",
}
YES_NO = ("yes", "no")
NEAR_ANSWERS: Mapping[str, tuple[str, ...]] = {
    "red": ("orange", "dark red"),
    "green": ("dark green", "blue"),
    "blue": ("purple", "dark blue"),
    "yellow": ("orange", "gold"),
    "orange": ("red", "yellow"),
    "purple": ("blue", "violet"),
    "white": ("gray", "off white"),
    "gray": ("grey", "white"),
    "black": ("dark", "dark gray"),
    "beige": ("tan", "cream"),
    "circle": ("round", "ball"),
    "square": ("box", "diamond"),
    "triangle": ("pyramid", "arrow"),
    "diamond": ("square", "rhombus"),
    "star": ("star shape", "5 pointed star"),
    "cross": ("plus", "plus sign"),
    "yes": ("no", "i think so"),
    "no": ("yes", "not sure"),
    "top left": ("upper left", "top"),
    "top": ("top center", "above"),
    "top right": ("upper right", "top"),
    "left": ("left side", "middle left"),
    "center": ("middle", "in middle"),
    "right": ("right side", "middle right"),
    "bottom left": ("lower left", "bottom"),
    "bottom": ("bottom center", "below"),
    "bottom right": ("lower right", "bottom"),
    "large": ("big", "medium"),
    "small": ("little", "tiny"),
    "0": ("none", "1"),
    "1": ("one", "2"),
    "2": ("two", "3"),
    "3": ("three", "4"),
    "4": ("four", "5"),
}
"""What an annotator says who words the answer differently or looks badly."""


def _places(scene: Scene, rng: random.Random) -> Iterator[tuple[str, Shape]]:
    """Places that cannot be mistaken: "at the top" only where both upper corners are empty."""
    filled = {shape.cell for shape in scene.shapes}
    for shape in scene.shapes:
        row, column = shape.cell
        corners: set[Cell] = set()
        if row == 1 != column:
            corners = {(0, column), (2, column)}
        elif column == 1 != row:
            corners = {(row, 0), (row, 2)}
        if not filled & corners:
            yield rng.choice(CELL_PHRASES[shape.cell]), shape


@dataclass(frozen=True)
class Question:
    """A question and its true answer."""

    form: str
    text: str
    answer: str


def _about_colors_and_kinds(scene: Scene, rng: random.Random) -> Iterator[Question]:
    for thing in KIND_THINGS:
        shapes = thing.found_in(scene)
        if len({shape.color for shape in shapes}) == 1:
            asked = f"{be(len(shapes))} the {thing.noun(len(shapes))}"
            yield Question("color of kind", f"What color {asked}?", shapes[0].color)
    for place, shape in _places(scene, rng):
        yield Question("color at place", f"What color is the shape {place}?", shape.color)
    for thing in COLOR_THINGS:
        if len(shapes := thing.found_in(scene)) == 1:
            texts = (
                f"What shape is {thing.color}?",
                f"Which shape is {thing.color}?",
                f"What is the {thing.noun()}?",
            )
            yield Question("kind of color", rng.choice(texts), shapes[0].kind)
    for place, shape in _places(scene, rng):
        text = rng.choice((f"What shape is {place}?", f"What is {place}?"))
        yield Question("kind at place", text, shape.kind)


def _about_numbers(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """Of kind, colour and both, one that is there and one that is not; and how many."""
    for form, things in (
        ("count all", (Thing(None, None),)),
        ("count kind", KIND_THINGS),
        ("count color", COLOR_THINGS),
    ):
        for thing in things:
            count = len(thing.found_in(scene))
            # Four shapes of one colour are too rare to be asked about.
            if count < 4 or thing.color is None:
                where = rng.choice(("there", f"in the {rng.choice(PICTURE_WORDS)}"))
                yield Question(form, f"How many {thing.noun(2)} are {where}?", str(count))
    chosen = []
    for things in (KIND_THINGS, COLOR_THINGS, NAMED_THINGS):
        present = [thing for thing in things if thing.found_in(scene)]
        absent = [thing for thing in things if not thing.found_in(scene)]
        if things is NAMED_THINGS and rng.random() < 0.5:
            # Colour or kind is there, but not together.
            parts = {part for shape in scene.shapes for part in shape.name}
            absent = [thing for thing in absent if parts & {thing.color, thing.kind}]
        chosen += [(rng.choice(present), "yes"), (rng.choice(absent), "no")]
    for thing, answer in chosen:
        picture = rng.choice(PICTURE_WORDS)
        texts = (
            f"Is there {thing.indefinite()}?",
            f"Is there {thing.indefinite()} in the {picture}?",
            f"Are there any {thing.noun(2)}?",
            f"Can you see {thing.indefinite()}?",
        )
        yield Question("existence", rng.choice(texts), answer)


def _about_the_rest(scene: Scene, rng: random.Random) -> Iterator[Question]:
    for a, relation, b in scene.relations():
        # No is the answer where the converse holds.
        for asked, answer in ((relation, "yes"), (CONVERSE[relation], "no")):
            where = f"{rng.choice(RELATION_PHRASES[asked])} {b.definite}"
            text = f"{be(a.count).capitalize()} {a.definite} {where}?"
            yield Question("relation", text, answer)
    for thing in KIND_THINGS + NAMED_THINGS:
        if len(shapes := thing.found_in(scene)) == 1:
            place = PLACE_NAMES[shapes[0].cell]
            yield Question("place", f"Where is the {thing.noun()}?", place)
    texts = ("What color is the background?", "What is the color of the background?")
    yield Question("background", rng.choice(texts), scene.background)
    kinds = Counter(group.kind for group in scene.groups)
    for group in scene.groups:
        unique = kinds[group.kind] == 1
        noun = f"the {inflected(group.kind, group.count)}" if unique else group.definite
        text = f"{be(group.count).capitalize()} {noun} large or small?"
        yield Question("size", text, group.size)


FORMS: Mapping[str, tuple[int, tuple[str, ...]]] = {
    "color of kind": (4, COLORS),
    "color at place": (2, COLORS),
    "kind of color": (4, KINDS),
    "kind at place": (2, KINDS),
    "count all": (2, ("1", "2", "3", "4")),
    "count kind": (2, ("0", "1", "2", "3")),
    "count color": (1, ("0", "1", "2", "3")),
    "existence": (4, YES_NO),
    "relation": (2, YES_NO),
    "place": (3, tuple(PLACE_NAMES.values())),
    "background": (2, BACKGROUNDS),
    "size": (2, SIZES),
}
"""How often a form is asked, and what may be the answer."""


@dataclass(frozen=True)
class Asked(Question):
    """A question as it stands in the files, with what the ten annotators said."""

    question_id: int
    image_id: int
    said: tuple[str, ...]


def _choose(
    candidates: Sequence[Question], forms: Counter[str], answers: Counter[tuple[str, str]]
) -> list[Question]:
    """One question each of as many forms as a picture has questions.

    Keeps the forms in proportion and the answers of each form equally frequent; counts both.
    """
    chosen: dict[str, Question] = {}
    # A form whose rare answers do not occur waits for another picture, if it can.
    for slack in (1, len(candidates) * len(candidates)):
        for form in sorted(FORMS, key=lambda name: forms[name] / FORMS[name][0]):
            if len(chosen) == QUESTIONS_PER_IMAGE:
                break
            limit = slack + min(answers[form, answer] for answer in FORMS[form][1])
            options = [
                question
                for question in candidates
                if question.form == form and answers[form, question.answer] <= limit
            ]
            if options and form not in chosen:
                chosen[form] = min(options, key=lambda q: answers[q.form, q.answer])
    for question in chosen.values():
        forms[question.form] += 1
        answers[question.form, question.answer] += 1
    return list(chosen.values())


def make_vqa(fresh: FreshScenes, seed: int, num_images: int) -> TaskFiles:
    """About half as many pictures as ``num_images`` to train, five questions each."""
    numbers = {
        "train": max(40, num_images // 2),
        "val": max(20, num_images // 10),
        "test": max(10, num_images // 20),
    }
    pictures: list[Picture] = []
    asked: dict[str, list[Asked]] = {}
    for split, number in numbers.items():
        asked_forms: Counter[str] = Counter()
        asked_answers: Counter[tuple[str, str]] = Counter()
        asked[split] = []
        for _ in range(number):
            scene = fresh.take(f"vqa-{split}")
            image_id = coco_id(len(pictures))
            file = Path("vqa", SUBSETS[split], f"COCO_{SUBSETS[split]}_{image_id:012d}.jpg")
            pictures.append(Picture(split=split, file=file, scene=scene))
            rng = generator_for(seed, "vqa-questions", image_id)
            candidates = [
                *_about_colors_and_kinds(scene, rng),
                *_about_numbers(scene, rng),
                *_about_the_rest(scene, rng),
            ]
            rng.shuffle(candidates)
            for place, question in enumerate(_choose(candidates, asked_forms, asked_answers)):
                # As in VQA v2, where three digits count the questions of an image.
                question_id = 1000 * image_id + place
                # Up to two of the annotators say something else.
                people = generator_for(seed, "vqa-annotators", question_id)
                others = people.choices((0, 1, 2), weights=(6, 3, 1))[0]
                said = [people.choice(NEAR_ANSWERS[question.answer]) for _ in range(others)]
                said += [question.answer] * (ANNOTATORS - others)
                people.shuffle(said)
                asked[split].append(
                    Asked(
                        **vars(question),
                        question_id=question_id,
                        image_id=image_id,
                        said=tuple(said),
                    )
                )
    asked["test-dev"] = asked["test"][: len(asked["test"]) // 2]
    truth = {s: _truth(asked[s], asked["train"]) for s in ("val", "test", "test-dev")}
    return TaskFiles(pictures=tuple(pictures), texts=_files(asked), truth=truth)


def _truth(questions: Sequence[Asked], train: Sequence[Asked]) -> dict[str, Any]:
    """Two guesses: one answer to everything, and the most frequent one to each form of question."""
    answers: dict[str | None, Counter[str]] = {None: Counter()}
    for asked in train:
        for form in (None, asked.form):
            answers.setdefault(form, Counter())[asked.answer] += 1
    guesses = {form: most_frequent(counts) for form, counts in answers.items()}

    def score(guess: Callable[[Asked], str]) -> float:
        """VQA's: 0.3 for each annotator who gave the answer, at most 1."""
        return percent(
            sum(min(1.0, 0.3 * a.said.count(guess(a))) for a in questions) / len(questions)
        )

    return {
        "samples": len(questions),
        "labels": dict(sorted(Counter(asked.answer for asked in questions).items())),
        "guess": guesses[None],
        "guess_percent": score(lambda asked: guesses[None]),
        "guess_by_form_percent": score(lambda asked: guesses.get(asked.form, guesses[None])),
    }


def _files(splits: Mapping[str, Sequence[Asked]]) -> dict[Path, str]:
    """Question and annotation files by path; the test splits have questions only."""
    texts: dict[Path, str] = {}
    for split, questions in splits.items():
        subset = SUBSETS.get(split, TEST_DEV)
        header: dict[str, Any] = {
            "info": {"description": "sample corpus", "version": "2.0"},
            "license": {},
            "data_type": "mscoco",
            "data_subtype": subset,
        }
        listed = [
            {"image_id": a.image_id, "question": a.text, "question_id": a.question_id}
            for a in questions
        ]
        texts[Path("vqa", f"v2_OpenEnded_mscoco_{subset}_questions.json")] = json_text(
            header | {"task_type": "Open-Ended", "questions": listed}
        )
        if split in ("train", "val"):
            texts[Path("vqa", f"v2_mscoco_{subset}_annotations.json")] = json_text(
                header | {"annotations": [_annotation(question) for question in questions]}
            )
    # The real data set keeps these secret.
    answers = {str(a.question_id): a.answer for a in splits["test"]}
    texts[Path("vqa", "answers_test2015.json")] = json_text(answers)
    return texts


def _annotation(asked: Asked) -> dict[str, Any]:
    truth = asked.answer
    beginnings = (t for t in QUESTION_TYPES if asked.text.lower().startswith(f"{t} "))
    return {
        "question_type": next(beginnings),
        "multiple_choice_answer": truth,
        "answers": [
            {
                "answer": answer,
                "answer_confidence": "yes" if answer == truth else "maybe",
                "answer_id": number,
            }
            for number, answer in enumerate(asked.said, start=1)
        ],
        "image_id": asked.image_id,
        "answer_type": "yes/no" if truth in YES_NO else "number" if truth.isdigit() else "other",
        "question_id": asked.question_id,
    }
