"""Visual question answering in the layout of VQA v2: balanced questions, ten annotators each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megatron_vlmoe.sample_corpus.coco import coco_id
from megatron_vlmoe.sample_corpus.language import NUMBERS
from megatron_vlmoe.sample_corpus.questions import FORMS, Question, questions_about
from megatron_vlmoe.sample_corpus.scene import generator_for
from megatron_vlmoe.sample_corpus.task_files import (
    FreshScenes,
    Picture,
    TaskFiles,
    json_text,
    percent,
)

QUESTIONS_PER_IMAGE = 5
ANNOTATORS = 10
SUBSETS: Mapping[str, str] = MappingProxyType(
    {"train": "train2014", "val": "val2014", "test": "test2015"}
)
TEST_DEV = "test-dev2015"
"""The questions about the first half of the test pictures."""
TEST_ANSWERS = Path("vqa", "answers_test2015.json")
"""Question id to true answer; the real data set keeps these secret."""
QUESTION_TYPES = (
    *("what color is the", "what color are the", "what is the color of the", "what is the"),
    *("what is", "what", "which", "how many", "is there a", "is there", "are there any"),
    *("can you", "is the", "are the", "where is the"),
)
"""VQA's own: how a question begins. The first that fits counts."""
NEAR_ANSWERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
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
    }
    | {
        str(number): (NUMBERS[number] if number else "none", str(number + 1))
        for number in range(len(NUMBERS) - 1)
    }
)
"""What an annotator says who words the answer differently or looks badly."""


@dataclass(frozen=True)
class Asked:
    """A question as it stands in the files."""

    question_id: int
    image_id: int
    question: Question
    answers: tuple[str, ...]
    """Of the ten annotators."""


class _Balance:
    """Keeps the forms in proportion and the answers of each form equally frequent."""

    def __init__(self) -> None:
        self._forms: Counter[str] = Counter()
        self._answers: Counter[tuple[str, str]] = Counter()

    def choose(self, candidates: Sequence[Question]) -> list[Question]:
        """One question each of as many forms as a picture has questions."""
        chosen: dict[str, Question] = {}
        # A form whose rare answers do not occur waits for another picture, if it can.
        for slack in (1, len(candidates) * len(candidates)):
            for form in sorted(FORMS, key=lambda name: self._forms[name] / FORMS[name].weight):
                if len(chosen) == QUESTIONS_PER_IMAGE:
                    break
                question = self._rarest(form, candidates, slack)
                if form not in chosen and question is not None:
                    chosen[form] = question
        for question in chosen.values():
            self._forms[question.form] += 1
            self._answers[question.form, question.answer] += 1
        return list(chosen.values())

    def _rarest(self, form: str, candidates: Sequence[Question], slack: int) -> Question | None:
        limit = slack + min(self._answers[form, answer] for answer in FORMS[form].answers)
        options = [
            question
            for question in candidates
            if question.form == form and self._answers[form, question.answer] <= limit
        ]
        return min(options, key=lambda q: self._answers[form, q.answer], default=None)


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
        balance = _Balance()
        asked[split] = []
        for _ in range(number):
            scene = fresh.take(f"vqa-{split}")
            image_id = coco_id(len(pictures))
            file = Path("vqa", SUBSETS[split], f"COCO_{SUBSETS[split]}_{image_id:012d}.jpg")
            pictures.append(Picture(split=split, file=file, scene=scene))
            rng = generator_for(seed, "vqa-questions", image_id)
            candidates = questions_about(scene, rng)
            for place, question in enumerate(balance.choose(candidates)):
                # As in VQA v2, where three digits count the questions of an image.
                question_id = 1000 * image_id + place
                answers = _annotate(question.answer, seed, question_id)
                asked[split].append(Asked(question_id, image_id, question, answers))
    asked["test-dev"] = asked["test"][: len(asked["test"]) // 2]
    train = asked.pop("train")
    truth = {split: _truth(questions, train) for split, questions in asked.items()}
    texts = _files(asked | {"train": train})
    return TaskFiles(pictures=tuple(pictures), texts=texts, truth=truth)


def _annotate(answer: str, seed: int, question_id: int) -> tuple[str, ...]:
    """Up to two of ten say something else."""
    rng = generator_for(seed, "vqa-annotators", question_id)
    others = rng.choices((0, 1, 2), weights=(6, 3, 1))[0]
    said = [rng.choice(NEAR_ANSWERS[answer]) for _ in range(others)]
    said += [answer] * (ANNOTATORS - others)
    rng.shuffle(said)
    return tuple(said)


def question_type(text: str) -> str:
    """How a question begins, in VQA's terms."""
    lower = text.lower()
    return next((t for t in QUESTION_TYPES if lower.startswith(f"{t} ")), "none of the above")


def soft_score(answer: str, said: Sequence[str]) -> float:
    """VQA's accuracy of an answer to a question: 0.3 for each annotator who gave it, at most 1."""
    return min(1.0, 0.3 * said.count(answer))


def _mean_score(guesses: Iterable[str], questions: Sequence[Asked]) -> float:
    scores = [soft_score(g, asked.answers) for g, asked in zip(guesses, questions, strict=True)]
    return percent(sum(scores) / len(scores))


def _truth(questions: Sequence[Asked], train: Sequence[Asked]) -> dict[str, Any]:
    """Two guesses: one answer to everything, and the most frequent one to each form of question."""
    guess = _most_frequent(asked.question.answer for asked in train)
    by_form = {
        form: _most_frequent(a.question.answer for a in train if a.question.form == form)
        for form in {asked.question.form for asked in train}
    }
    labels = Counter(asked.question.answer for asked in questions)
    return {
        "samples": len(questions),
        "labels": dict(sorted(labels.items())),
        "guess": guess,
        "guess_percent": _mean_score([guess] * len(questions), questions),
        "guess_by_form_percent": _mean_score(
            (by_form.get(asked.question.form, guess) for asked in questions), questions
        ),
    }


def _most_frequent(answers: Iterable[str]) -> str:
    counts = Counter(answers)
    return min(counts, key=lambda answer: (-counts[answer], answer))


def _files(asked: Mapping[str, Sequence[Asked]]) -> dict[Path, str]:
    """Question and annotation files by path; the test splits have questions only."""
    texts: dict[Path, str] = {}
    for split, questions in asked.items():
        subset = SUBSETS.get(split, TEST_DEV)
        header: dict[str, Any] = {
            "info": {"description": "sample corpus", "version": "2.0"},
            "license": {},
            "data_type": "mscoco",
            "data_subtype": subset,
        }
        listed = [
            {"image_id": a.image_id, "question": a.question.text, "question_id": a.question_id}
            for a in questions
        ]
        texts[Path("vqa", f"v2_OpenEnded_mscoco_{subset}_questions.json")] = json_text(
            header | {"task_type": "Open-Ended", "questions": listed}
        )
        if split in ("train", "val"):
            texts[Path("vqa", f"v2_mscoco_{subset}_annotations.json")] = json_text(
                header | {"annotations": [_annotation(question) for question in questions]}
            )
    answers = {str(a.question_id): a.question.answer for a in asked["test"]}
    texts[TEST_ANSWERS] = json_text(answers)
    return texts


def _annotation(asked: Asked) -> dict[str, Any]:
    truth = asked.question.answer
    return {
        "question_type": question_type(asked.question.text),
        "multiple_choice_answer": truth,
        "answers": [
            {
                "answer": answer,
                "answer_confidence": "yes" if answer == truth else "maybe",
                "answer_id": number,
            }
            for number, answer in enumerate(asked.answers, start=1)
        ],
        "image_id": asked.image_id,
        "answer_type": FORMS[asked.question.form].answer_type,
        "question_id": asked.question_id,
    }
