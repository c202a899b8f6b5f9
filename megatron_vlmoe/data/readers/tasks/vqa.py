"""VQAv2 as its authors publish it.

``v2_OpenEnded_mscoco_{train2014,val2014,test2015,test-dev2015}_questions.json`` hold ``questions``
({image_id, question, question_id}), ``v2_mscoco_{train2014,val2014}_annotations.json`` hold
``annotations`` ({question_id, multiple_choice_answer, answers: [{answer}], answer_type}); each is read whole.
Images are ``train2014/COCO_train2014_%012d.jpg`` and so on; both test splits use ``test2015``.

Training uses train2014 and val2014 but for some images (``rest_val``), which make the split ``val``.
Who published that way of splitting drew these images without a seed; here a hash of the seed and
the image id chooses them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from megatron_vlmoe.data.errors import DataError
from megatron_vlmoe.data.readers.pairs import json_list, json_object
from megatron_vlmoe.data.readers.records import ImageFile, Reject
from megatron_vlmoe.data.readers.tasks.records import (
    Omitted,
    SampleStream,
    TaskInput,
    TaskSample,
    check_split,
    chosen,
    find_file,
    find_folder,
)
from megatron_vlmoe.data.task_labels import Labels
from megatron_vlmoe.data.vqa_answers import NUM_ANNOTATORS, build_answer_vocabulary, soft_scores

_TEST = {"test": "test2015", "test-dev": "test-dev2015"}
_SPLITS = ("train", "val", *_TEST)


@dataclass(frozen=True, slots=True)
class _Question:
    id: int
    image: int
    text: object


@dataclass
class _Annotations:
    """One annotation file, without what is not used."""

    path: str
    answers: dict[int, tuple[str, ...]] = field(default_factory=dict)
    """Raw answers by question id."""
    answer_types: dict[int, str] = field(default_factory=dict)
    """``answer_type`` by question id, where the file has one."""
    main_answers: list[str] = field(default_factory=list)
    """``multiple_choice_answer`` of every annotation, in order."""
    rejects: list[Reject] = field(default_factory=list)


class VqaSource:
    """VQAv2 in a folder. Raises DataError if a file of train2014 or val2014 is missing."""

    def __init__(self, source: TaskInput) -> None:
        self._source = source
        self._question_files = {p: self._question_file(p) for p in ("train2014", "val2014")}
        self._annotation_files = {
            part: find_file(source.raw, ("", "annotations"), f"v2_mscoco_{part}_annotations.json")
            for part in ("train2014", "val2014")
        }

    def _question_file(self, part: str) -> str:
        name = f"v2_OpenEnded_mscoco_{part}_questions.json"
        return find_file(self._source.raw, ("", "questions"), name)

    def _image_folder(self, name: str) -> str:
        return find_folder(self._source.raw, (name, os.path.join("images", name)))

    def splits(self) -> tuple[str, ...]:
        """``train`` and ``val``, and the test splits whose questions are there."""
        present = ["train", "val"]
        for split, part in _TEST.items():
            try:
                self._question_file(part)
            except DataError:
                continue
            present.append(split)
        return tuple(present)

    @cached_property
    def labels(self) -> Labels:
        """The answer vocabulary of train2014 and val2014, whatever splits are prepared."""
        main = [a for part in self._annotations.values() for a in part.main_answers]
        least = self._source.min_answer_count
        vocabulary = build_answer_vocabulary(main, least)
        if not vocabulary:
            raise DataError(
                f"{self._annotation_files['train2014']}: no answer occurs {least} times: "
                "lower --min-answer-count"
            )
        return Labels("vqa", tuple(vocabulary))

    @cached_property
    def _label_of(self) -> dict[str, int]:
        return {answer: label for label, answer in enumerate(self.labels.labels)}

    @cached_property
    def _annotations(self) -> dict[str, _Annotations]:
        return {part: _read_annotations(path) for part, path in self._annotation_files.items()}

    @cached_property
    def _held_out(self) -> frozenset[int]:
        """The images of ``rest_val``."""
        questions = _read_questions(self._question_files["val2014"])
        images = {question.image for question in questions if isinstance(question, _Question)}
        count = min(self._source.num_val_images, len(images) // 2)
        return chosen(images, count, self._source.seed)

    def read(self, split: str) -> SampleStream:
        """The samples of a split in the order of its question files. Raises DataError."""
        check_split("vqa", split, _SPLITS)
        if split in _TEST:
            path = self._question_file(_TEST[split])
            return self._test_samples(path, self._image_folder("test2015"))
        if split == "val":
            return self._val_samples(self._image_folder("val2014"))
        folders = [self._image_folder(part) for part in ("train2014", "val2014")]
        return self._train_samples(*folders)

    def _test_samples(self, path: str, folder: str) -> SampleStream:
        for question in _read_questions(path):
            if isinstance(question, Reject):
                yield question
            else:
                yield _sample(path, folder, "test2015", question)

    def _val_samples(self, folder: str) -> SampleStream:
        for image, item in self._annotated("val2014", folder):
            if image is None or image in self._held_out:
                # Kept without a label too: a question that cannot be answered rightly.
                yield item

    def _train_samples(self, train: str, val: str) -> SampleStream:
        for part, folder in (("train2014", train), ("val2014", val)):
            for image, item in self._annotated(part, folder):
                # What no image of val2014 can be held to account for is told with ``val``.
                if part == "val2014" and (image is None or image in self._held_out):
                    continue
                usable = isinstance(item, Reject) or item.labels
                yield item if usable else Omitted("no answer in the vocabulary")

    def _annotated(
        self, part: str, folder: str
    ) -> Iterator[tuple[int | None, TaskSample | Reject]]:
        """Every question of train2014 or val2014 with its image id, which some rejects lack."""
        path, annotations = self._question_files[part], self._annotations[part]
        for reject in annotations.rejects:
            yield None, reject
        without_question = set(annotations.answers)
        for question in _read_questions(path):
            if isinstance(question, Reject):
                yield None, question
                continue
            without_question.discard(question.id)
            answers = annotations.answers.get(question.id)
            if answers is None:
                reason = f"no annotation in {annotations.path}"
                yield question.image, Reject(path, f"question {question.id}", reason)
                continue
            targets = sorted(soft_scores(answers, self._label_of).items())
            labels = tuple(label for label, _ in targets)
            scores = tuple(score for _, score in targets)
            kind = annotations.answer_types.get(question.id, "")
            sample = _sample(path, folder, part, question, labels, scores, answers, kind)
            yield question.image, sample
        for number in sorted(without_question):
            record = f"annotation of question {number}"
            yield None, Reject(annotations.path, record, f"no such question in {path}")


def _sample(
    path: str,
    folder: str,
    part: str,
    question: _Question,
    labels: tuple[int, ...] = (),
    scores: tuple[float, ...] = (),
    answers: tuple[str, ...] = (),
    kind: str = "",
) -> TaskSample:
    record = f"question {question.id}"
    file = os.path.join(folder, f"COCO_{part}_{question.image:012d}.jpg")
    image = ImageFile(path, record, file)
    name, texts = str(question.id), (question.text,)
    return TaskSample(path, record, name, (image,), texts, labels, scores, answers, kind)


def _read_questions(path: str) -> Iterator[_Question | Reject]:
    """Yields the questions of a file. Raises DataError."""
    entries = json_list(path, json_object(path).get("questions"), '"questions"')
    seen: set[int] = set()
    for number, entry in enumerate(entries):
        record = f"question entry {number}"
        if not isinstance(entry, dict) or not all(
            type(entry.get(key)) is int for key in ("question_id", "image_id")
        ):
            yield Reject(path, record, "no whole question_id and image_id")
        elif entry["question_id"] in seen:
            yield Reject(path, record, f"question {entry['question_id']} came before")
        else:
            seen.add(entry["question_id"])
            yield _Question(entry["question_id"], entry["image_id"], entry.get("question"))


def _read_annotations(path: str) -> _Annotations:
    """The annotations of a file. Raises DataError."""
    result = _Annotations(path)
    known: dict[str, str] = {}  # equal answers share one string
    entries = json_list(path, json_object(path).get("annotations"), '"annotations"')
    for number, entry in enumerate(entries):
        try:
            question, main, answers = _annotation(entry)
            if question in result.answers:
                raise DataError(f"question {question} has one already")
        except DataError as error:
            result.rejects.append(Reject(path, f"annotation entry {number}", str(error)))
            continue
        result.main_answers.append(known.setdefault(main, main))
        result.answers[question] = tuple(known.setdefault(a, a) for a in answers)
        if isinstance(kind := entry.get("answer_type"), str):
            result.answer_types[question] = known.setdefault(kind, kind)
    return result


def _annotation(entry: object) -> tuple[int, str, list[str]]:
    """Question id, main answer and raw answers. Raises DataError with the reason."""
    if not isinstance(entry, dict) or type(entry.get("question_id")) is not int:
        raise DataError("no whole question_id")
    main, answers = entry.get("multiple_choice_answer"), entry.get("answers")
    if not isinstance(main, str):
        raise DataError("multiple_choice_answer is not a string")
    entries = answers if isinstance(answers, list) else []
    raw = [a.get("answer") if isinstance(a, dict) else None for a in entries]
    texts = [answer for answer in raw if isinstance(answer, str)]
    if not texts or len(texts) != len(raw):
        raise DataError("answers are not a list of objects with an answer")
    if len(texts) > NUM_ANNOTATORS:
        # Soft scores are those of so many; more would not fit into a batch.
        raise DataError(f"{len(texts)} answers, more than {NUM_ANNOTATORS}")
    return entry["question_id"], main, texts
