"""SNLI-VE: does a picture entail a sentence, contradict it, or leave it open (Xie et al., arXiv 1901.06706)?

Raw data: ``train.jsonl``, ``dev.jsonl`` and ``test.jsonl`` with an object per line: ``id``, ``image`` (a path below the
folder), ``sentence`` and ``label``.
"""

from typing import Any

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.config.tasks import PAIR_HEAD, TaskSpec
from megatron_vlmoe.data.task_labels import Labels
from megatron_vlmoe.prepare.readers.files import json_rows
from megatron_vlmoe.prepare.readers.records import Reject
from megatron_vlmoe.prepare.readers.tables import ListedImages
from megatron_vlmoe.prepare.readers.tasks.records import (
    Classes,
    SampleStream,
    TaskInput,
    TaskSample,
    find_file,
)

CLASSES = Classes(("entailment", "neutral", "contradiction"), numbered=None)
SNLI_VE = TaskSpec(
    name="snli_ve",
    images=("image",),
    texts=("sentence",),
    shared_images=True,
    reader="snli_ve:SnliVeSource",
    splits=("dev", "test"),
    head=PAIR_HEAD,
    decides=True,
)


class SnliVeSource:
    labels = Labels("snli_ve", CLASSES.names)
    fallback_answer = None

    def __init__(self, source: TaskInput) -> None:
        self.raw, self.images = source.raw, ListedImages(source.raw)

    def splits(self) -> tuple[str, ...]:
        return ("train", "dev", "test")

    def read(self, split: str) -> SampleStream:
        path = find_file(self.raw, [""], f"{split}.jsonl")
        return (
            row if isinstance(row, Reject) else self.sample(path, *row) for row in json_rows(path)
        )

    def sample(self, path: str, record: str, row: dict[str, Any]) -> TaskSample | Reject:
        try:
            images = (self.images.listed(path, record, row["image"]),)
            label = CLASSES.label(row["label"])
            return TaskSample(path, record, row["id"], images, (row["sentence"],), (label,), (1.0,))
        except (DataError, KeyError) as error:
            return Reject(path, record, f"{type(error).__name__}: {error}")
