"""VQAv2: splits, classes and targets, from the publishers' files, lists of ALBEF and BLIP, or tables of Hugging Face.

Each layout gives the questions of a part (``train2014``, ``val2014``, ``test2015``, ``test-dev2015``) with
their pictures and what the annotators said.

Training uses train2014 and val2014 but for some images (``rest_val``), which make the split ``val``.
Who published that way of splitting drew these images without a seed; here a hash of the seed and
the image id chooses them.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.data.task_labels import Labels
from megatron_vlmoe.prepare.readers.files import json_list, json_object, load_json
from megatron_vlmoe.prepare.readers.records import ImageFile, LeftOut, Reject
from megatron_vlmoe.prepare.readers.tables import (
    ListedImages,
    TableFiles,
    choose_columns,
    column_names,
    table_rows,
)
from megatron_vlmoe.prepare.readers.tasks.records import (
    SampleStream,
    TaskInput,
    TaskSample,
    check_split,
    chosen,
    find_file,
    find_folder,
    first_file,
)
from megatron_vlmoe.prepare.vqa_answers import (
    NUM_ANNOTATORS,
    build_answer_vocabulary,
    normalize_answer,
    soft_scores,
)

ANNOTATED = ("train2014", "val2014")
TEST_PARTS = {"test": "test2015", "test-dev": "test-dev2015"}
"""Part by split."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its picture; ``answers`` is empty where none are published."""

    source: str
    record: str
    id: int
    image_id: str
    text: object
    image: ImageFile
    answers: tuple[str, ...] = ()
    main_answer: str = ""
    answer_type: str = ""


Questions = Iterator[tuple[str | None, Question | LeftOut | Reject]]
"""Each with the id of its image, which some rejects lack."""


class VqaLayout(ABC):
    """One way in which the parts lie in a folder, with entries that hold question and answers or in two files."""

    def __init__(self, raw: str) -> None:
        self._raw = raw
        self._images = ListedImages(raw)

    @abstractmethod
    def check(self, part: str) -> str:
        """The file or folder that a part is read from. Raises DataError if something of it is missing."""

    @abstractmethod
    def has(self, part: str) -> bool:
        """Whether something of a part is there."""

    @abstractmethod
    def questions(self, part: str, images: bool = True) -> Questions:
        """The questions of a part in order; without ``images`` these need not be looked for."""

    def parts(self) -> tuple[str, ...]:
        """The test parts that are there, besides the annotated ones."""
        return tuple(part for part in TEST_PARTS.values() if self.has(part))

    def main_answers(self, part: str) -> list[str]:
        """``multiple_choice_answer`` of every question of an annotated part, in order. Raises DataError."""
        items = (item for _, item in self.questions(part, images=False))
        return [item.main_answer for item in items if isinstance(item, Question)]

    def image_ids(self, part: str) -> frozenset[str]:
        """Ids of the pictures that a part asks about. Raises DataError."""
        found = self.questions(part, images=False)
        return frozenset(image for image, _ in found if image is not None)


def find_layout(raw: str) -> VqaLayout:
    """The layout of a folder: the first that has any part of VQAv2. Raises DataError if none has."""
    parts = (*ANNOTATED, *TEST_PARTS.values())
    for layout in (PublishedFiles, AnswerLists, AnswerTables):
        opened = layout(raw)
        if any(map(opened.has, parts)):
            return opened
    raise DataError(
        f"{raw}: no VQAv2 in it: no v2_OpenEnded_mscoco_train2014_questions.json, no vqa_train.json and "
        "no parquet or .arrow table of train"
    )


_QUESTIONS = "v2_OpenEnded_mscoco_{}_questions.json"
_ANNOTATIONS = "v2_mscoco_{}_annotations.json"


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
    """Entries that tell of no question, or of one that has an annotation."""
    bad: dict[int, Reject] = field(default_factory=dict)
    """The others that cannot be used, by question id."""


class PublishedFiles(VqaLayout):
    """The files of VQAv2's authors.

    ``v2_OpenEnded_mscoco_{part}_questions.json`` hold ``questions`` ({image_id, question,
    question_id}), ``v2_mscoco_{part}_annotations.json`` hold ``annotations`` ({question_id,
    multiple_choice_answer, answers: [{answer}], answer_type}); each is read whole. Images are
    ``train2014/COCO_train2014_%012d.jpg`` and so on; both test parts use ``test2015``.
    """

    def __init__(self, raw: str) -> None:
        super().__init__(raw)
        self._annotations: dict[str, _Annotations] = {}

    def _question_file(self, part: str) -> str:
        return find_file(self._raw, ("", "questions"), _QUESTIONS.format(part))

    def _annotation_file(self, part: str) -> str:
        return find_file(self._raw, ("", "annotations"), _ANNOTATIONS.format(part))

    def has(self, part: str) -> bool:
        """Whether the questions or the annotations of a part are there."""
        kinds = (("questions", _QUESTIONS), ("annotations", _ANNOTATIONS))
        return any(first_file(self._raw, ("", kind), name.format(part)) for kind, name in kinds)

    def check(self, part: str) -> str:
        """As `VqaLayout`."""
        path = self._question_file(part)
        if part in ANNOTATED:
            self._annotation_file(part)
        self._image_folder(part)
        return path

    def _image_folder(self, part: str) -> str:
        name = part if part in ANNOTATED else "test2015"
        return find_folder(self._raw, (name, os.path.join("images", name)))

    def _read_annotations(self, part: str) -> _Annotations:
        if part not in self._annotations:
            self._annotations[part] = _read_annotations(self._annotation_file(part))
        return self._annotations[part]

    def main_answers(self, part: str) -> list[str]:
        """As `VqaLayout`, in the order of the annotations."""
        self._question_file(part)
        return self._read_annotations(part).main_answers

    def image_ids(self, part: str) -> frozenset[str]:
        """As `VqaLayout`."""
        questions = self._read_questions(part)
        return frozenset(item.image_id for item in questions if isinstance(item, Question))

    def questions(self, part: str, images: bool = True) -> Questions:
        """As `VqaLayout`. Every annotation must have its question, and the other way round."""
        if part not in ANNOTATED:
            for item in self._read_questions(part):
                yield None, item
            return
        annotations = self._read_annotations(part)
        for reject in annotations.rejects:
            yield None, reject
        path, bad = self._question_file(part), dict(annotations.bad)
        left = set(annotations.answers)
        for item in self._read_questions(part):
            if isinstance(item, Reject):
                yield None, item
                continue
            left.discard(item.id)
            answers = annotations.answers.get(item.id)
            if answers is None:
                missing = Reject(path, item.record, f"no annotation in {annotations.path}")
                lost = bad.pop(item.id, missing)
                yield item.image_id, replace(lost, sample=str(item.id))
                continue
            kind = annotations.answer_types.get(item.id, "")
            given = (item.source, item.record, item.id, item.image_id, item.text, item.image)
            yield item.image_id, Question(*given, answers, answer_type=kind)
        for reject in bad.values():
            yield None, reject
        for number in sorted(left):
            record = f"annotation of question {number}"
            yield None, Reject(annotations.path, record, f"no such question in {path}")

    def _read_questions(self, part: str) -> Iterator[Question | Reject]:
        path, folder = self._question_file(part), self._image_folder(part)
        entries = json_list(path, json_object(path).get("questions"), '"questions"')
        seen: set[int] = set()
        for number, entry in enumerate(entries):
            record = f"question entry {number}"
            given = entry if isinstance(entry, dict) else {}
            name, image = given.get("question_id"), given.get("image_id")
            name, image = (one if type(one) is int else None for one in (name, image))
            if (reject := _unusable(path, record, name, image, "image_id", seen)) is not None:
                yield reject
            else:
                assert name is not None
                record = f"question {name}"
                part_name = os.path.basename(folder)
                file = os.path.join(folder, f"COCO_{part_name}_{image:012d}.jpg")
                picture = ImageFile(path, record, file)
                yield Question(path, record, name, str(image), given.get("question"), picture)


def _read_annotations(path: str) -> _Annotations:
    """The annotations of a file. Raises DataError."""
    result = _Annotations(path)
    known: dict[str, str] = {}  # equal answers share one string
    entries = json_list(path, json_object(path).get("annotations"), '"annotations"')
    for number, entry in enumerate(entries):
        record = f"annotation entry {number}"
        question = entry.get("question_id") if isinstance(entry, dict) else None
        if type(question) is not int:
            result.rejects.append(Reject(path, record, "no whole question_id"))
            continue
        if question in result.answers or question in result.bad:
            reason = f"question {question} has one already"
            result.rejects.append(Reject(path, record, reason))
            continue
        try:
            main = entry.get("multiple_choice_answer")
            if not isinstance(main, str):
                raise DataError("multiple_choice_answer is not a string")
            answers = _answers(entry.get("answers"))
        except DataError as error:
            result.bad[question] = Reject(path, record, str(error))
            continue
        result.main_answers.append(known.setdefault(main, main))
        result.answers[question] = tuple(known.setdefault(a, a) for a in answers)
        if isinstance(kind := entry.get("answer_type"), str):
            result.answer_types[question] = known.setdefault(kind, kind)
    return result


def _answers(value: object) -> tuple[str, ...]:
    """Raw answers from a list of objects with an ``answer``, or of texts. Raises DataError."""
    if isinstance(value, dict):  # a table may have a list for each field of the objects
        value = value.get("answer")
    entries = list(value) if isinstance(value, list | tuple) else []
    raw = [entry.get("answer") if isinstance(entry, dict) else entry for entry in entries]
    texts = [answer for answer in raw if isinstance(answer, str)]
    if not texts or len(texts) != len(raw):
        raise DataError("answers are not a list of objects with an answer")
    if len(texts) > NUM_ANNOTATORS:
        # Soft scores are those of so many; more would not fit into a batch.
        raise DataError(f"{len(texts)} answers, more than {NUM_ANNOTATORS}")
    return tuple(texts)


def _number(value: object) -> int | None:
    """A whole number, also as text."""
    if isinstance(value, str) and value.isascii() and value.isdigit():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _unusable(
    path: str, record: str, name: int | None, image: object, what: str, seen: set[int]
) -> Reject | None:
    """Why an entry is no question: an id is missing, or came before; None, and ``seen`` grows: it is one."""
    if name is None or image is None:
        lost = str(name) if name is not None and name not in seen else ""
        return Reject(path, record, f"no whole question_id and {what}", sample=lost)
    if name in seen:
        return Reject(path, record, f"question {name} came before")
    seen.add(name)
    return None


class AnswerLists(VqaLayout):
    """The lists of ALBEF and BLIP: ``vqa_train.json``, ``vqa_val.json``, ``vqa_test.json``.

    An object has ``question_id``, ``question``, ``image`` (a path) and, but for the test list,
    ``answer``: what the annotators said, or shares of them by answer, or answers with a list of
    shares under ``weight``. Objects of another ``dataset`` than "vqa" are left out. There is no
    ``multiple_choice_answer``; the most frequent answer, of several the first, stands for it.
    """

    _NAMES: Mapping[str, tuple[str, ...]] = {
        "train2014": ("vqa_train.json",),
        "val2014": ("vqa_val.json",),
        "test2015": ("vqa_test.json",),
        "test-dev2015": ("vqa_test_dev.json", "vqa_testdev.json", "vqa_test-dev.json"),
    }
    _FOLDERS = ("", "annotation", "annotations", "data")

    def _found(self, part: str) -> str | None:
        found = (first_file(self._raw, self._FOLDERS, name) for name in self._NAMES[part])
        return next(filter(None, found), None)

    def has(self, part: str) -> bool:
        """Whether the list of a part is there."""
        return self._found(part) is not None

    def check(self, part: str) -> str:
        """As `VqaLayout`."""
        return self._found(part) or find_file(self._raw, self._FOLDERS, self._NAMES[part][0])

    def questions(self, part: str, images: bool = True) -> Questions:
        """As `VqaLayout`."""
        path = self.check(part)
        seen: set[int] = set()
        for number, entry in enumerate(json_list(path, load_json(path))):
            record = f"entry {number}"
            given = entry if isinstance(entry, dict) else {}
            if given.get("dataset", "vqa") != "vqa":
                yield None, LeftOut(f"of dataset {given['dataset']}")
                continue
            name, image = _number(given.get("question_id")), given.get("image")
            image = image if isinstance(image, str) and image else None
            reject = _unusable(path, record, name, image, "path of an image", seen)
            if reject is not None:
                yield None, reject
                continue
            assert name is not None and image is not None
            record = f"question {name}"
            digits = re.search(r"(\d+)\.\w+$", image)
            image_id = str(int(digits[1])) if digits else image
            picture = ImageFile(path, record)
            try:
                if images:
                    picture = self._images.listed(path, record, image)
            except DataError as error:
                yield image_id, Reject(path, record, str(error), sample=str(name))
                continue
            fixed = (path, record, name, image_id, given.get("question"), picture)
            if part not in ANNOTATED:
                yield image_id, Question(*fixed)
                continue
            try:
                answers = _listed_answers(given)
            except DataError as error:
                yield image_id, Reject(path, record, str(error), sample=str(name))
                continue
            kind = given.get("answer_type")
            main = Counter(answers).most_common(1)[0][0]
            yield image_id, Question(*fixed, answers, main, kind if isinstance(kind, str) else "")


def _listed_answers(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """What the annotators said, from an object of a list. Raises DataError."""
    value = entry.get("answer", entry.get("answers"))
    weights = next((entry[key] for key in ("weight", "weights") if key in entry), None)
    if isinstance(value, list) and isinstance(weights, list):
        if len(value) != len(weights) or not all(isinstance(text, str) for text in value):
            raise DataError("not one weight for each answer")
        value = dict(zip(value, weights, strict=True))
    if not isinstance(value, dict):
        return _answers(value)
    if not all(isinstance(share, int | float) for share in value.values()):
        raise DataError("weights are not numbers")
    counts = {text: round(NUM_ANNOTATORS * share) for text, share in value.items()}
    exact = all(abs(NUM_ANNOTATORS * value[text] - count) < 0.01 for text, count in counts.items())
    if not exact or sum(counts.values()) != NUM_ANNOTATORS or min(counts.values()) < 0:
        raise DataError(
            f"weights {', '.join(map(str, value.values()))} are no tenths that add up to 1: "
            "give the ten answers, or the share of the annotators who gave each"
        )
    return tuple(text for text, count in counts.items() for _ in range(count))


class AnswerTables(VqaLayout):
    """Tables of Hugging Face, as HuggingFaceM4/VQAv2 and lmms-lab/VQAv2 have them.

    Columns: question_id, question, image_id, image, answers (objects with ``answer``, or texts),
    multiple_choice_answer and answer_type.
    """

    _SPLITS: Mapping[str, tuple[str, ...]] = {
        "train2014": ("train",),
        "val2014": ("validation", "val"),
        "test2015": ("test",),
        "test-dev2015": ("testdev", "test_dev"),
    }
    _COLUMNS: Mapping[str, tuple[str, ...]] = {
        "id": ("question_id",),
        "image_id": ("image_id", "id_image"),
        "text": ("question",),
        "image": ("image",),
        "answers": ("answers",),
        "main": ("multiple_choice_answer",),
        "type": ("answer_type",),
    }

    def __init__(self, raw: str) -> None:
        super().__init__(raw)
        self._tables = TableFiles(raw)

    def has(self, part: str) -> bool:
        """Whether there is a table of a part."""
        return bool(self._tables.of(self._SPLITS[part]))

    def check(self, part: str) -> str:
        """As `VqaLayout`; every table of the part must have the columns."""
        for path in self._tables.found(part, self._SPLITS[part]):
            self._chosen(path, part, True)
        return self._raw

    def _chosen(self, path: str, part: str, images: bool) -> dict[str, str]:
        optional = ("type",) if part in ANNOTATED else ("type", "answers", "main")
        columns = choose_columns(path, column_names(path), self._COLUMNS, optional)
        if not images:
            del columns["image"]
        return columns

    def questions(self, part: str, images: bool = True) -> Questions:
        """As `VqaLayout`."""
        seen: set[int] = set()
        for path in self._tables.found(part, self._SPLITS[part]):
            for item in table_rows(path, self._chosen(path, part, images)):
                if isinstance(item, Reject):
                    yield None, item
                    continue
                record, row = item
                name = _number(row["id"])
                reject = _unusable(path, record, name, row["image_id"], "image_id", seen)
                if reject is not None:
                    yield None, reject
                    continue
                assert name is not None
                record, image_id = f"{record} (question {name})", str(row["image_id"])
                try:
                    yield image_id, self._question(path, record, row, name, image_id, part)
                except DataError as error:
                    yield image_id, Reject(path, record, str(error), sample=str(name))

    def _question(
        self, path: str, record: str, row: Mapping[str, Any], name: int, image_id: str, part: str
    ) -> Question:
        picture = ImageFile(path, record)
        if "image" in row:
            picture = self._images.cell(path, record, row["image"])
        fixed = (path, record, name, image_id, row["text"], picture)
        if part not in ANNOTATED:
            return Question(*fixed)
        if not isinstance(row["main"], str):
            raise DataError("multiple_choice_answer is not a string")
        kind = row.get("type")
        answers = _answers(row["answers"])
        return Question(*fixed, answers, row["main"], kind if isinstance(kind, str) else "")


_SPLITS = ("train", "val", *TEST_PARTS)


class VqaSource:
    """VQAv2 in a folder. Raises DataError if a file of train2014 or val2014 is missing."""

    def __init__(self, source: TaskInput) -> None:
        self._source = source
        self._layout = find_layout(source.raw)

    def splits(self) -> tuple[str, ...]:
        """``train`` and ``val``, and the test splits whose questions are there."""
        present = self._layout.parts()
        return ("train", "val", *(name for name, part in TEST_PARTS.items() if part in present))

    @cached_property
    def _main_answers(self) -> list[str]:
        return [answer for part in ANNOTATED for answer in self._layout.main_answers(part)]

    @cached_property
    def labels(self) -> Labels:
        """The answer vocabulary of train2014 and val2014, whatever splits are prepared."""
        least = self._source.min_answer_count
        vocabulary = build_answer_vocabulary(self._main_answers, least)
        if not vocabulary:
            raise DataError(
                f"{self._layout.check(ANNOTATED[0])}: no answer occurs {least} times: "
                "lower --min-answer-count"
            )
        return Labels("vqa", tuple(vocabulary))

    @cached_property
    def fallback_answer(self) -> str:
        """The class that is most often the main answer of train2014 and val2014, of several the first."""
        counts: Counter[str] = Counter()
        for answer, count in Counter(self._main_answers).items():
            counts[normalize_answer(answer)] += count
        return max(self.labels.labels, key=lambda answer: counts[answer])

    @cached_property
    def _label_of(self) -> dict[str, int]:
        return {answer: label for label, answer in enumerate(self.labels.labels)}

    @cached_property
    def _held_out(self) -> frozenset[str]:
        """The images of ``rest_val``."""
        images = self._layout.image_ids("val2014")
        count = min(self._source.num_val_images, len(images) // 2)
        return chosen(images, count, self._source.seed)

    def read(self, split: str) -> SampleStream:
        """The samples of a split in the order of its question files. Raises DataError."""
        check_split("vqa", split, _SPLITS)
        if split in TEST_PARTS:
            self._layout.check(TEST_PARTS[split])
            return self._test_samples(TEST_PARTS[split])
        for part in ANNOTATED if split == "train" else ("val2014",):
            self._layout.check(part)
        return self._train_samples() if split == "train" else self._val_samples()

    def _test_samples(self, part: str) -> SampleStream:
        for _, item in self._layout.questions(part):
            yield self._sample(item) if isinstance(item, Question) else item

    def _val_samples(self) -> SampleStream:
        for image, item in self._layout.questions("val2014"):
            if isinstance(item, LeftOut):
                continue  # counted with ``train``
            if image is None or image in self._held_out:
                # Kept without a label too: a question that cannot be answered rightly.
                yield self._sample(item) if isinstance(item, Question) else item

    def _train_samples(self) -> SampleStream:
        seen: set[int] = set()
        for part in ANNOTATED:
            for image, item in self._layout.questions(part):
                if isinstance(item, LeftOut):
                    yield item
                    continue
                # What no image of val2014 can be held to account for is told with ``val``.
                if part == "val2014" and (image is None or image in self._held_out):
                    continue
                if isinstance(item, Reject):
                    yield item
                elif item.id in seen:
                    reason = "its id came before in another part"
                    yield Reject(item.source, item.record, reason)
                else:
                    seen.add(item.id)
                    sample = self._sample(item)
                    yield sample if sample.labels else LeftOut("no answer in the vocabulary")

    def _sample(self, question: Question) -> TaskSample:
        targets = sorted(soft_scores(question.answers, self._label_of).items())
        return TaskSample(
            question.source,
            question.record,
            str(question.id),
            (question.image,),
            (question.text,),
            tuple(label for label, _ in targets),
            tuple(score for _, score in targets),
            question.answers,
            question.answer_type,
        )
