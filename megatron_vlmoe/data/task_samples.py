"""``PREFIX_samples.arrow``: the table of a task's samples, written in batches, read through a map.

An Arrow IPC file with one row per sample: ``id``; ``images``, documents of ``PREFIX_image``;
``texts``, sequences of ``PREFIX_text``, and ``raw``, what they were before tokenization; ``labels``
with ``scores``; for VQA also ``answers``, what the annotators said, and ``answer_type``.
"""

from __future__ import annotations

import bisect
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.config.tasks import find_task, task_names
from megatron_vlmoe.data.manifest import (
    FileRecord,
    file_sha256,
    samples_path,
)
from megatron_vlmoe.runtime.files import StagedFile, naming

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


def _columns(task: str) -> list[str]:
    names = ["id", "images", "texts", "raw", "labels", "scores"]
    return [*names, "answers", "answer_type"] if find_task(task).has_answers else names


def _schema(task: str) -> Any:
    import pyarrow as pa  # type: ignore[import-untyped]

    types = {
        "id": pa.string(),
        "images": pa.list_(pa.int32()),
        "texts": pa.list_(pa.int32()),
        "raw": pa.list_(pa.string()),
        "labels": pa.list_(pa.int32()),
        "scores": pa.list_(pa.float32()),
        "answers": pa.list_(pa.string()),
        "answer_type": pa.string(),
    }
    return pa.schema([pa.field(name, types[name]) for name in _columns(task)])


class SamplesWriter:
    """Writes ``PREFIX_samples.arrow`` under a temporary name until `publish`.

    Raises:
        FileError: the file cannot be written.
    """

    def __init__(self, prefix: str, task: str) -> None:
        import pyarrow as pa

        self._names = _columns(task)
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

        columns = [[getattr(row, name) for row in self._rows] for name in self._names]
        arrays = [
            pa.array(values, field.type)
            for values, field in zip(columns, self._schema, strict=True)
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

    Args:
        prefix: path prefix of the split.
        task: name of the task.

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
                known = [name for name in _columns(self.task) if name != "answer_type"]
                names = reader.schema.names
                schema = pa.schema([f for f in _schema(self.task) if f.name in {*known, *names}])
                if not reader.schema.equals(schema):
                    raise DataError(f"{path}: not the samples of task {self.task}")
                batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
            except FileNotFoundError as error:
                raise DataError(f"{path}: not found") from error
            except (OSError, pa.ArrowException) as error:
                raise _damaged(self.prefix, error) from error
            starts, total = [], 0
            for batch in batches:
                starts.append(total)
                total += batch.num_rows
            self._opened = batches, starts
        return self._opened

    def check(self, num_images: int, num_texts: int) -> None:
        """Checks that every sample fits the task and the indexed files.

        Args:
            num_images: documents of ``PREFIX_image``.
            num_texts: sequences of ``PREFIX_text``.

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
