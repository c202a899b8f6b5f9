"""The table of tasks."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.data.task_samples import check_task
from megatron_vlmoe.prepare.readers.tasks.imagenet_tables import open_imagenet
from megatron_vlmoe.prepare.readers.tasks.nlvr2 import Nlvr2Source
from megatron_vlmoe.prepare.readers.tasks.records import TaskInput, TaskSource
from megatron_vlmoe.prepare.readers.tasks.retrieval import RetrievalSource
from megatron_vlmoe.prepare.readers.tasks.sentence_pairs import SentencePairSource
from megatron_vlmoe.prepare.readers.tasks.vqa import VqaSource

TASK_SOURCES: Mapping[str, Callable[[TaskInput], TaskSource]] = {
    "vqa": VqaSource,
    "nlvr2": Nlvr2Source,
    "retrieval": RetrievalSource,
    "imagenet": open_imagenet,
    "mnli": SentencePairSource,
}
"""Sources by the value of ``--task``."""


def open_task(source: TaskInput) -> TaskSource:
    """The raw data of a task.

    Raises:
        DataError: unknown task, no folder of raw data, or files that every split needs are missing.
    """
    check_task(source.task)
    if not os.path.isdir(source.raw):
        raise DataError(f"{source.raw}: not a folder")
    return TASK_SOURCES[source.task](source)
