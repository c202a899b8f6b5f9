"""A prepared split of a downstream task: the table of its samples, and the whole split with its images and texts.

``PREFIX_samples.arrow`` is an Arrow IPC file with one row per sample: ``id``; ``images``, documents of
``PREFIX_image``; ``texts``, sequences of ``PREFIX_text``, and ``raw``, what they were before tokenization; ``labels``
with ``scores``; for VQA also ``answers``, what the annotators said, and ``answer_type``.
"""

from __future__ import annotations

import bisect
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.config.tasks import find_task, task_names
from megatron_vlmoe.data.indexed import IndexedReader
from megatron_vlmoe.data.manifest import (
    SAMPLES_SUFFIX,
    DatasetManifest,
    FileRecord,
    check_dataset,
    manifest_path,
    part_prefix,
    samples_path,
)
from megatron_vlmoe.data.task_labels import Labels, load_labels
from megatron_vlmoe.runtime.arrow_batches import check_batch
from megatron_vlmoe.runtime.files import StagedFile, naming
from megatron_vlmoe.runtime.sums import file_sha256

__all__ = ["Labels", "TaskDataset", "TaskRow", "load_labels"]

_BATCH_ROWS = 4096


@dataclass(frozen=True, slots=True)
class TaskRow:
    """One sample.

    Attributes:
        id: name of the sample in the raw data.
        images: documents of ``PREFIX_image`` (nlvr2: left, right).
        texts: sequences of ``PREFIX_text`` (mnli: premise, hypothesis).
        raw: the texts before tokenization, one for each of ``texts``.
        labels: class numbers; empty if unknown.
        scores: target of each label, 0 to 1; 1.0 except for VQA.
        answers: for VQA what the annotators said, as written.
        answer_type: for VQA ``yes/no``, ``number`` or ``other``, as published; empty if unknown.
    """

    id: str
    images: tuple[int, ...] = ()
    texts: tuple[int, ...] = ()
    raw: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    answers: tuple[str, ...] = ()
    answer_type: str = ""


def _schema(task: str) -> Any:
    import pyarrow as pa  # type: ignore[import-untyped]

    texts, numbers = pa.list_(pa.string()), pa.list_(pa.int32())
    fields = {"id": pa.string(), "images": numbers, "texts": numbers, "raw": texts}
    fields |= {"labels": numbers, "scores": pa.list_(pa.float32())}
    if find_task(task).has_answers:
        fields |= {"answers": texts, "answer_type": pa.string()}
    return pa.schema(list(fields.items()))


class SamplesWriter:
    """Writes ``PREFIX_samples.arrow`` under a temporary name until `publish`.

    Raises:
        FileError: the file cannot be written.
    """

    def __init__(self, prefix: str, task: str) -> None:
        import pyarrow as pa

        self._schema = _schema(task)
        self._rows: list[TaskRow] = []
        self.num_rows = 0
        self._staged = StagedFile(samples_path(prefix))
        try:
            with naming(self._staged.path):
                self._writer = pa.ipc.new_file(self._staged.file, self._schema)
        except BaseException:
            self.abort()
            raise

    def add(self, row: TaskRow) -> None:
        """Adds one sample."""
        self._rows.append(row)
        self.num_rows += 1
        if len(self._rows) >= _BATCH_ROWS:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        arrays = [
            pa.array([getattr(row, field.name) for row in self._rows], field.type)
            for field in self._schema
        ]
        self._rows.clear()
        with naming(self._staged.path):
            self._writer.write_batch(pa.record_batch(arrays, schema=self._schema))

    def finish(self) -> FileRecord:
        """Completes and syncs the file under its temporary name; returns its record."""
        if self._rows:
            self._flush()
        with naming(self._staged.path):
            self._writer.close()
        self._staged.finish()
        temporary = self._staged.temporary
        return FileRecord(os.path.getsize(temporary), file_sha256(temporary))

    def publish(self) -> None:
        """Gives the finished file its name."""
        self._staged.publish()

    def abort(self) -> None:
        """Deletes the temporary file; a published one stays."""
        self._staged.abort()


class SamplesReader:
    """Reads ``PREFIX_samples.arrow`` through a memory map, opened at first use; pickles as its path.

    Raises:
        DataError: missing, damaged, or the table of another task.
    """

    def __init__(self, prefix: str, task: str) -> None:
        self.prefix = prefix
        self.task = task
        self._opened: tuple[list[Any], list[int]] | None = None
        batches, _ = self._batches()
        self.num_rows = sum(batch.num_rows for batch in batches)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def _batches(self) -> tuple[list[Any], list[int]]:
        """The record batches and the number of the first row of each."""
        if self._opened is None:
            import pyarrow as pa

            path = samples_path(self.prefix)
            try:
                reader = pa.ipc.open_file(pa.memory_map(str(path)))
                # Tables of before there was an answer type end one column earlier.
                optional = {"answer_type"} - set(reader.schema.names)
                known = [field for field in _schema(self.task) if field.name not in optional]
                if not reader.schema.equals(pa.schema(known)):
                    raise DataError(f"{path}: not the samples of task {self.task}")
                batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
                for batch in batches:
                    check_batch(batch, reader.schema.names)
            except FileNotFoundError as error:
                raise DataError(f"{path}: not found") from error
            except (OSError, pa.ArrowException) as error:
                raise _damaged(self.prefix, error) from error
            ends = itertools.accumulate((batch.num_rows for batch in batches), initial=0)
            self._opened = batches, list(ends)[:-1]
        return self._opened

    def check(self, num_images: int, num_texts: int) -> None:
        """Checks that every sample fits the task and the indexed files.

        Raises:
            DataError: a wrong number of images or texts, or one that does not exist.
        """
        spec = find_task(self.task)
        images, texts = len(spec.images), len(spec.texts)
        for batch in self._batches()[0]:
            for name, per_row, limit in (
                ("images", images, num_images),
                ("texts", texts, num_texts),
                ("raw", texts, None),
            ):
                column = batch.column(name)
                lengths = column.value_lengths().to_numpy(zero_copy_only=False)
                if (lengths != per_row).any():
                    raise _damaged(self.prefix, f"a sample without {per_row} {name}")
                if limit is None or not per_row:
                    continue
                numbers = column.flatten().to_numpy(zero_copy_only=False)
                if len(numbers) and not 0 <= numbers.min() <= numbers.max() < limit:
                    raise _damaged(
                        self.prefix, f"{name} {numbers.min()} to {numbers.max()} of {limit}"
                    )
            labels, scores = (batch.column(name).value_lengths() for name in ("labels", "scores"))
            if not labels.equals(scores):
                raise _damaged(self.prefix, "a sample with more labels than scores, or fewer")

    def row(self, index: int) -> TaskRow:
        """One sample. Raises IndexError outside 0..num_rows-1."""
        if not 0 <= index < self.num_rows:
            raise IndexError(f"{samples_path(self.prefix)}: sample {index} of {self.num_rows}")
        batches, starts = self._batches()
        place = bisect.bisect_right(starts, index) - 1
        batch, local = batches[place], index - starts[place]
        values: dict[str, Any] = {
            name: batch.column(name)[local].as_py() for name in batch.schema.names
        }
        for column in values.keys() - {"id", "answer_type"}:
            values[column] = tuple(values[column])
        return TaskRow(**values)

    def column(self, name: str) -> np.ndarray:
        """The numbers of a list column, flat: ``[N]`` over all rows in order."""
        parts = [
            batch.column(name).flatten().to_numpy(zero_copy_only=False)
            for batch in self._batches()[0]
        ]
        return np.concatenate(parts) if parts else np.empty(0, np.int32)


def _damaged(prefix: str, reason: object) -> DataError:
    return DataError(f"{samples_path(prefix)}: damaged: {' '.join(str(reason).split())}")


def check_task(task: str) -> None:
    """Raises DataError unless there is a task of this name."""
    if task not in task_names():
        raise DataError(f"unknown task {task!r}: one of {', '.join(task_names())}")


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
        """Opens ``P_{split}`` and checks it; of a task with text also that it was made with this tokenizer (None: any).

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
        samples.check(images.num_documents if images else 0, texts.num_sequences if texts else 0)
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
