"""VQAv2: splits, classes and targets, from whichever layout the folder has (`vqa_layouts`).

Training uses train2014 and val2014 but for some images (``rest_val``), which make the split ``val``.
Who published that way of splitting drew these images without a seed; here a hash of the seed and
the image id chooses them.
"""

from __future__ import annotations

from collections import Counter
from functools import cached_property

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.data.task_labels import Labels
from megatron_vlmoe.prepare.readers.records import Reject
from megatron_vlmoe.prepare.readers.tasks.records import (
    Omitted,
    SampleStream,
    TaskInput,
    TaskSample,
    check_split,
    chosen,
)
from megatron_vlmoe.prepare.readers.tasks.vqa_layouts import (
    ANNOTATED,
    TEST_PARTS,
    Question,
    find_layout,
)
from megatron_vlmoe.prepare.vqa_answers import (
    build_answer_vocabulary,
    normalize_answer,
    soft_scores,
)

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
        images = self._layout.images("val2014")
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
            if isinstance(item, Omitted):
                continue  # counted with ``train``
            if image is None or image in self._held_out:
                # Kept without a label too: a question that cannot be answered rightly.
                yield self._sample(item) if isinstance(item, Question) else item

    def _train_samples(self) -> SampleStream:
        seen: set[int] = set()
        for part in ANNOTATED:
            for image, item in self._layout.questions(part):
                if isinstance(item, Omitted):
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
                    yield sample if sample.labels else Omitted("no answer in the vocabulary")

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
