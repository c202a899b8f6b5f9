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
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.data.task_labels import Labels
from megatron_vlmoe.prepare.readers.files import json_entries, json_lists
from megatron_vlmoe.prepare.readers.records import ImageFile, LeftOut, Reject
from megatron_vlmoe.prepare.readers.tables import (
    ListedImages,
    TableFiles,
    choose_columns,
    table_rows,
)
from megatron_vlmoe.prepare.readers.tasks.records import (
    Row,
    Rows,
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


class Asked(NamedTuple):
    """A question, or why there is none."""

    image_id: str | None
    """That of its picture, which some rejects lack."""
    item: TaskSample | LeftOut | Reject
    """As a sample without labels; without answers where none are published."""
    main_answer: str = ""


Questions = Iterator[Asked]


class VqaLayout(ABC):
    """One way in which the parts lie in a folder, with entries that hold question and answers or in two files."""

    _NAMED = "question {1}"
    """How a record is called once its id is known, by its record in the file and the id."""
    _MISSING = "image_id"
    """What names the picture, for errors."""

    def __init__(self, raw: str) -> None:
        self._raw = raw
        self._images = ListedImages(raw)

    def _answers(self, row: Row) -> tuple[tuple[str, ...], str]:
        """What the annotators said, and the main answer. Raises DataError."""
        return (), ""

    @abstractmethod
    def check(self, part: str) -> str:
        """The file or folder that a part is read from. Raises DataError if something of it is missing."""

    @abstractmethod
    def has(self, part: str) -> bool:
        """Whether something of a part is there."""

    @abstractmethod
    def questions(self, part: str, images: bool = True) -> Questions:
        """The questions of a part in order; without ``images`` these need not be looked for."""

    def main_answers(self, part: str) -> list[str]:
        """``multiple_choice_answer`` of every question of an annotated part, in order. Raises DataError."""
        questions = self.questions(part, images=False)
        return [asked.main_answer for asked in questions if isinstance(asked.item, TaskSample)]

    def _read(
        self,
        path: str,
        rows: Iterable[tuple[str, Row] | LeftOut | Reject],
        part: str,
        seen: set[int],
    ) -> Questions:
        """The questions of rows of one file, which come with their records.

        ``id`` and ``image_id`` of a row are None where they are not as they should be; ``image`` is an `ImageFile` or
        what `ListedImages.cell` reads, or is not there if it is not wanted. ``seen`` are ids that came before in the
        part; it grows.
        """
        for item in rows:
            if isinstance(item, LeftOut | Reject):
                yield Asked(None, item)
                continue
            record, row = item
            number, image = row["id"], row["image_id"]
            if number is None or image is None:
                lost = str(number) if number is not None and number not in seen else ""
                reason = f"no whole question_id and {self._MISSING}"
                yield Asked(None, Reject(path, record, reason, sample=lost))
                continue
            if number in seen:
                yield Asked(None, Reject(path, record, f"question {number} came before"))
                continue
            seen.add(number)
            record = self._NAMED.format(record, number)
            try:
                picture = row.get("image", ImageFile(path, record))
                if not isinstance(picture, ImageFile):
                    picture = self._images.cell(path, record, picture)
                answers, main = self._answers(row) if part in ANNOTATED else ((), "")
            except DataError as error:
                yield Asked(image, Reject(path, record, str(error), sample=str(number)))
                continue
            kind = row.get("answer_type") if part in ANNOTATED else ""
            kind = kind if isinstance(kind, str) else ""
            images, texts = (picture,), (row.get("question"),)
            sample = TaskSample(
                path, record, str(number), images, texts, answers=answers, answer_type=kind
            )
            yield Asked(image, sample, main)


_FILES = {
    "questions": "v2_OpenEnded_mscoco_{}_questions.json",
    "annotations": "v2_mscoco_{}_annotations.json",
}


@dataclass
class _Annotations:
    """One annotation file, without what is not used."""

    path: str
    answers: dict[int, tuple[tuple[str, ...], str]] = field(default_factory=dict)
    """Raw answers and ``answer_type``, where the file has one, by question id."""
    main_answers: list[str] = field(default_factory=list)
    """``multiple_choice_answer`` of every annotation, in order."""
    rejects: list[Reject] = field(default_factory=list)
    """Entries that tell of no question, or of one that has an annotation."""
    bad: dict[int, Reject] = field(default_factory=dict)
    """The others that cannot be used, by question id."""


class _PublishedFiles(VqaLayout):
    """The files of VQAv2's authors.

    ``v2_OpenEnded_mscoco_{part}_questions.json`` hold ``questions`` ({image_id, question,
    question_id}), ``v2_mscoco_{part}_annotations.json`` hold ``annotations`` ({question_id,
    multiple_choice_answer, answers: [{answer}], answer_type}); each is read whole. Images are
    ``train2014/COCO_train2014_%012d.jpg`` and so on; both test parts use ``test2015``.
    """

    def __init__(self, raw: str) -> None:
        super().__init__(raw)
        self._annotations: dict[str, _Annotations] = {}

    def _file(self, kind: str, part: str) -> str:
        return find_file(self._raw, ("", kind), _FILES[kind].format(part))

    def has(self, part: str) -> bool:
        names = _FILES.items()
        return any(first_file(self._raw, ("", kind), name.format(part)) for kind, name in names)

    def check(self, part: str) -> str:
        path = self._file("questions", part)
        if part in ANNOTATED:
            self._file("annotations", part)
        self._image_folder(part)
        return path

    def _image_folder(self, part: str) -> str:
        name = part if part in ANNOTATED else "test2015"
        return find_folder(self._raw, (name, os.path.join("images", name)))

    def _read_annotations(self, part: str) -> _Annotations:
        if part not in self._annotations:
            self._annotations[part] = _read_annotations(self._file("annotations", part))
        return self._annotations[part]

    def main_answers(self, part: str) -> list[str]:
        """As `VqaLayout`, in the order of the annotations."""
        self._file("questions", part)
        return self._read_annotations(part).main_answers

    def questions(self, part: str, images: bool = True) -> Questions:
        """As `VqaLayout`. Every annotation must have its question, and the other way round."""
        path = self._file("questions", part)
        questions = self._read(path, self._rows(path, part), part, set())
        if part not in ANNOTATED:
            yield from questions
            return
        annotations = self._read_annotations(part)
        for reject in annotations.rejects:
            yield Asked(None, reject)
        bad, left = dict(annotations.bad), set(annotations.answers)
        for image, item, _ in questions:
            if isinstance(item, TaskSample):
                number = int(item.id)
                left.discard(number)
                if number in annotations.answers:
                    answers, kind = annotations.answers[number]
                    item = replace(item, answers=answers, answer_type=kind)
                else:
                    missing = Reject(path, item.record, f"no annotation in {annotations.path}")
                    item = replace(bad.pop(number, missing), sample=item.id)
            yield Asked(image, item)
        for reject in bad.values():
            yield Asked(None, reject)
        for number in sorted(left):
            record = f"annotation of question {number}"
            yield Asked(None, Reject(annotations.path, record, f"no such question in {path}"))

    def _rows(self, path: str, part: str) -> Rows:
        folder = self._image_folder(part)
        prefix = f"COCO_{os.path.basename(folder)}"
        (entries,) = json_lists(path, "questions")
        for place, entry in enumerate(entries):
            given = entry if isinstance(entry, dict) else {}
            number, image = given.get("question_id"), given.get("image_id")
            name = f"{prefix}_{image:012d}.jpg" if type(image) is int else ""
            yield (
                f"question entry {place}",
                {
                    "id": number if type(number) is int else None,
                    "image_id": str(image) if type(image) is int else None,
                    "question": given.get("question"),
                    "image": ImageFile(path, f"question {number}", os.path.join(folder, name)),
                },
            )


def _read_annotations(path: str) -> _Annotations:
    """The annotations of a file. Raises DataError."""
    result = _Annotations(path)
    known: dict[str, str] = {}  # equal answers share one string
    (entries,) = json_lists(path, "annotations")
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
        kind = entry.get("answer_type")
        kind = kind if isinstance(kind, str) else ""
        shared = tuple(known.setdefault(answer, answer) for answer in answers)
        result.answers[question] = shared, known.setdefault(kind, kind)
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


class _AnswerLists(VqaLayout):
    """The lists of ALBEF and BLIP: ``vqa_train.json``, ``vqa_val.json``, ``vqa_test.json``.

    An object has ``question_id``, ``question``, ``image`` (a path) and, but for the test list,
    ``answer``: what the annotators said, or shares of them by answer, or answers with a list of
    shares under ``weight``. Objects of another ``dataset`` than "vqa" are left out. There is no
    ``multiple_choice_answer``; the most frequent answer, of several the first, stands for it.
    """

    _MISSING = "path of an image"
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
        return self._found(part) is not None

    def check(self, part: str) -> str:
        return self._found(part) or find_file(self._raw, self._FOLDERS, self._NAMES[part][0])

    def questions(self, part: str, images: bool = True) -> Questions:
        path = self.check(part)
        return self._read(path, self._rows(path, images), part, set())

    def _rows(self, path: str, images: bool) -> Iterator[tuple[str, Row] | LeftOut]:
        for record, entry in json_entries(path):
            if entry.get("dataset", "vqa") != "vqa":
                yield LeftOut(f"of dataset {entry['dataset']}")
                continue
            image = entry.get("image")
            image = image if isinstance(image, str) and image else None
            digits = re.search(r"(\d+)\.\w+$", image or "")
            row = {key: value for key, value in entry.items() if key != "image" or images}
            row["image_id"] = str(int(digits[1])) if digits else image
            yield record, row | {"id": _number(entry.get("question_id"))}

    def _answers(self, row: Row) -> tuple[tuple[str, ...], str]:
        value = row.get("answer", row.get("answers"))
        weights = next((row[key] for key in ("weight", "weights") if key in row), None)
        if isinstance(value, list) and isinstance(weights, list):
            if len(value) != len(weights) or not all(isinstance(text, str) for text in value):
                raise DataError("not one weight for each answer")
            value = dict(zip(value, weights, strict=True))
        if isinstance(value, dict):
            shares = value.values()
            if not all(isinstance(share, int | float) for share in shares):
                raise DataError("weights are not numbers")
            counts = {text: round(NUM_ANNOTATORS * share) for text, share in value.items()}
            whole = all(abs(NUM_ANNOTATORS * value[text] - n) < 0.01 for text, n in counts.items())
            if not whole or sum(counts.values()) != NUM_ANNOTATORS or min(counts.values()) < 0:
                raise DataError(
                    f"weights {', '.join(map(str, shares))} are no tenths that add up to 1: "
                    "give the ten answers, or the share of the annotators who gave each"
                )
            answers = tuple(text for text, count in counts.items() for _ in range(count))
        else:
            answers = _answers(value)
        return answers, Counter(answers).most_common(1)[0][0]


class _AnswerTables(VqaLayout):
    """Tables of Hugging Face, as HuggingFaceM4/VQAv2 and lmms-lab/VQAv2 have them.

    Columns: question_id, question, image_id, image, answers (objects with ``answer``, or texts),
    multiple_choice_answer and answer_type.
    """

    _NAMED = "{0} (question {1})"
    _SPLITS: Mapping[str, tuple[str, ...]] = {
        "train2014": ("train",),
        "val2014": ("validation", "val"),
        "test2015": ("test",),
        "test-dev2015": ("testdev", "test_dev"),
    }
    _COLUMNS: Mapping[str, tuple[str, ...]] = {
        "id": ("question_id",),
        "image_id": ("image_id", "id_image"),
        "question": ("question",),
        "image": ("image",),
        "answers": ("answers",),
        "main": ("multiple_choice_answer",),
        "answer_type": ("answer_type",),
    }

    def __init__(self, raw: str) -> None:
        super().__init__(raw)
        self._tables = TableFiles(raw)

    def has(self, part: str) -> bool:
        return bool(self._tables.of(self._SPLITS[part]))

    def check(self, part: str) -> str:
        """As `VqaLayout`; every table of the part must have the columns."""
        for path in self._tables.found(part, self._SPLITS[part]):
            self._columns(path, part)
        return self._raw

    def _columns(self, path: str, part: str) -> dict[str, str]:
        optional = ("answer_type",) if part in ANNOTATED else ("answer_type", "answers", "main")
        return choose_columns(path, self._COLUMNS, optional)

    def questions(self, part: str, images: bool = True) -> Questions:
        seen: set[int] = set()
        for path in self._tables.found(part, self._SPLITS[part]):
            columns = self._columns(path, part)
            if not images:
                del columns["image"]
            yield from self._read(path, self._rows(path, columns), part, seen)

    def _rows(self, path: str, columns: Mapping[str, str]) -> Rows:
        for item in table_rows(path, columns):
            if isinstance(item, Reject):
                yield item
                continue
            record, row = item
            image = None if row["image_id"] is None else str(row["image_id"])
            yield record, {**row, "id": _number(row["id"]), "image_id": image}

    def _answers(self, row: Row) -> tuple[tuple[str, ...], str]:
        if not isinstance(row["main"], str):
            raise DataError("multiple_choice_answer is not a string")
        return _answers(row["answers"]), row["main"]


_SPLITS = ("train", "val", *TEST_PARTS)


class VqaSource:
    """VQAv2 in a folder. Raises DataError if a file of train2014 or val2014 is missing."""

    def __init__(self, source: TaskInput) -> None:
        self._source = source
        parts = (*ANNOTATED, *TEST_PARTS.values())
        layouts = (kind(source.raw) for kind in (_PublishedFiles, _AnswerLists, _AnswerTables))
        # The first that has any part of VQAv2.
        found = next((layout for layout in layouts if any(map(layout.has, parts))), None)
        if found is None:
            raise DataError(
                f"{source.raw}: no VQAv2 in it: no v2_OpenEnded_mscoco_train2014_questions.json, no "
                "vqa_train.json and no parquet or .arrow table of train"
            )
        self._layout: VqaLayout = found

    def splits(self) -> tuple[str, ...]:
        """``train`` and ``val``, and the test splits whose questions are there."""
        tests = (split for split, part in TEST_PARTS.items() if self._layout.has(part))
        return ("train", "val", *tests)

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
        found = self._layout.questions("val2014", images=False)
        images = {asked.image_id for asked in found if asked.image_id is not None}
        count = min(self._source.num_val_images, len(images) // 2)
        return chosen(images, count, self._source.seed)

    def read(self, split: str) -> SampleStream:
        """The samples of a split in the order of its question files. Raises DataError."""
        check_split("vqa", split, _SPLITS)
        parts = ANNOTATED if split == "train" else (TEST_PARTS.get(split, "val2014"),)
        for part in parts:
            self._layout.check(part)
        return self._samples(split, parts)

    def _samples(self, split: str, parts: Iterable[str]) -> SampleStream:
        seen: set[str] = set()
        for part in parts:
            for image, item, _ in self._layout.questions(part):
                if isinstance(item, LeftOut):
                    if split != "val":  # these are counted with ``train``
                        yield item
                    continue
                # What no image of val2014 can be held to account for is told with ``val``.
                held_out = part == "val2014" and (image is None or image in self._held_out)
                if held_out and split == "train" or split == "val" and not held_out:
                    continue
                if isinstance(item, Reject):
                    yield item
                    continue
                if item.id in seen:
                    yield Reject(item.source, item.record, "its id came before in another part")
                    continue
                seen.add(item.id)
                targets = sorted(soft_scores(item.answers, self._label_of).items())
                if split == "train" and not targets:
                    # ``val`` keeps a question that cannot be answered rightly.
                    yield LeftOut("no answer in the vocabulary")
                    continue
                labels, scores = zip(*targets, strict=True) if targets else ((), ())
                yield replace(item, labels=labels, scores=scores)
