"""A prepared split of a downstream task, opened for fine-tuning or evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.config.tasks import find_task
from megatron_vlmoe.data.indexed import IndexedReader
from megatron_vlmoe.data.manifest import (
    SAMPLES_SUFFIX,
    DatasetManifest,
    check_dataset,
    file_sha256,
    manifest_path,
    part_prefix,
    samples_path,
)
from megatron_vlmoe.data.task_labels import Labels, load_labels
from megatron_vlmoe.data.task_samples import SamplesReader, TaskRow, check_task

__all__ = ["Labels", "TaskDataset", "TaskRow", "load_labels"]


@dataclass(frozen=True)
class TaskDataset:
    """The samples of one split with their images and tokens; made by `open`.

    It pickles as its paths, so that data loader workers can have it however they are started.

    Attributes:
        prefix: ``P_{split}``.
        task: its name.
        manifest: contents of ``P_{split}.json``.
    """

    prefix: str
    task: str
    manifest: DatasetManifest
    _samples: SamplesReader
    _images: IndexedReader | None
    _texts: IndexedReader | None

    @classmethod
    def open(cls, prefix: str, task: str, tokenizer_fingerprint: str | None) -> TaskDataset:
        """Opens a split and checks it.

        Args:
            prefix: ``P_{split}``.
            task: the task that is wanted.
            tokenizer_fingerprint: of the tokenizer in use (of no account where the task has no
                text); None: any.

        Raises:
            DataError: not prepared to the end, another task, another tokenizer, or a file that is
                missing, truncated or damaged.
        """
        check_task(task)
        spec = find_task(task)
        manifest = check_dataset(prefix, task, tokenizer_fingerprint if spec.texts else None)
        # Labels and numbers have no decoder that would notice a flipped bit; the table is small.
        path = samples_path(prefix)
        if file_sha256(path) != manifest.files[SAMPLES_SUFFIX].sha256:
            raise DataError(f"{path}: damaged: contents differ from the checksum in its manifest")
        samples = SamplesReader(prefix, task)
        images = IndexedReader(part_prefix(prefix, "image")) if spec.images else None
        texts = IndexedReader(part_prefix(prefix, "text")) if spec.texts else None
        if samples.num_rows != manifest.samples:
            raise DataError(
                f"{manifest_path(prefix)}: {manifest.samples} samples, but the table has "
                f"{samples.num_rows}"
            )
        samples.check(
            images.num_documents if images else 0,
            texts.num_sequences if texts else 0,
        )
        return cls(prefix, task, manifest, samples, images, texts)

    def __len__(self) -> int:
        return self._samples.num_rows

    @property
    def num_images(self) -> int:
        """Distinct images; 0 for a task without."""
        return self._images.num_documents if self._images else 0

    @property
    def num_texts(self) -> int:
        """Token sequences; 0 for a task without."""
        return self._texts.num_sequences if self._texts else 0

    @property
    def labels_sha256(self) -> str | None:
        """`Labels.sha256` of the class names that the labels count; None for retrieval."""
        return self.manifest.labels_sha256

    def row(self, index: int) -> TaskRow:
        """Sample ``index``. Raises IndexError outside 0..len-1."""
        return self._samples.row(index)

    def rows(self) -> Iterator[TaskRow]:
        """All samples, in order."""
        return (self.row(index) for index in range(len(self)))

    def image_bytes(self, document: int) -> np.ndarray:
        """An encoded image (JPEG, PNG or WebP), uint8 ``[bytes]``, a view of the file.

        Raises:
            IndexError: there is no such image.
        """
        if self._images is None:
            raise IndexError(f"{self.prefix}: task {self.task} has no images")
        return self._images.document(document)[0]

    def tokens(self, sequence: int) -> np.ndarray:
        """The token ids of a text without special ones, uint16 or int32 ``[length]``, a view.

        Raises:
            IndexError: there is no such text.
        """
        if self._texts is None or not 0 <= sequence < self._texts.num_sequences:
            raise IndexError(f"{self.prefix}: text {sequence} of {self.num_texts}")
        return self._texts.sequence(sequence)

    def text_lengths(self) -> np.ndarray:
        """Tokens of every text, int32 ``[num_texts]``, a view of the file."""
        return self._texts.sequence_lengths if self._texts else np.empty(0, np.int32)

    def image_of_text(self) -> np.ndarray:
        """For retrieval the image document of each caption, int64 ``[num_texts]``.

        Raises:
            ValueError: texts of this task do not belong to one image each.
        """
        if find_task(self.task).target != "match":
            raise ValueError(f"{self.prefix}: texts of task {self.task} are no captions")
        result = np.full(self.num_texts, -1, dtype=np.int64)
        result[self._samples.column("texts")] = self._samples.column("images")
        if (result < 0).any():
            raise DataError(f"{self.prefix}_samples.arrow: damaged: a caption without an image")
        return result
