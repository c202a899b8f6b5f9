"""Indexed files in the format of megatron-core's IndexedDataset.

``PREFIX.bin`` is all sequences one after another. ``PREFIX.idx`` is little-endian: the magic
``MMIDIDX\\0\\0``, version 1 (u64), dtype code (u8), number of sequences N (u64), number of document
boundaries D+1 (u64); then the lengths (i32 [N]), the byte offsets (i64 [N]) and the document
boundaries in sequences (i64 [D+1], from 0 to N).

The format is written and read here rather than through megatron-core, whose builder keeps Python
lists of all lengths and whose import takes seconds; the tests hold the two against each other.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.data.manifest import FileRecord
from megatron_vlmoe.runtime.files import StagedFile, naming
from megatron_vlmoe.runtime.sums import file_sha256

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_VERSION = 1
_DTYPES: Mapping[int, np.dtype] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f8"),
    7: np.dtype("<f4"),
    8: np.dtype("<u2"),
}
_UINT16_VOCABULARY = 65500
_BLOCK_ITEMS = 1 << 20
_BLOCK_BYTES = 1 << 24
_MAX_SEQUENCE = 2**31 - 1


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype of token ids, as megatron-core's ``DType.optimal_dtype``: uint16 or int32."""
    return _DTYPES[8] if vocab_size < _UINT16_VOCABULARY else _DTYPES[4]


class IndexedWriter:
    """Writes ``PATH_PREFIX.bin`` and ``.idx``; memory does not grow with what is written.

    The files have temporary names until `publish`. As a context manager it publishes on a clean
    exit and deletes everything on an error.

    ``may_be_empty``: that nothing was added is no error.

    Raises:
        DataError: the disk is full or the files cannot be written; a sequence does not fit the
            dtype; nothing was added.
    """

    def __init__(self, path_prefix: str, dtype: npt.DTypeLike, may_be_empty: bool = False) -> None:
        self.path_prefix = str(path_prefix)
        self._may_be_empty = may_be_empty
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self._code = next((c for c, known in _DTYPES.items() if known == self.dtype), 0)
        if not self._code:
            raise DataError(f"{self.path_prefix}.idx: dtype {np.dtype(dtype)} cannot be stored")
        self.num_documents = 0
        self.num_sequences = 0
        self.num_items = 0
        self._digest = hashlib.sha256()
        self._records: dict[str, FileRecord] | None = None
        with contextlib.ExitStack() as undo:
            self._files = []
            for suffix in (".bin", ".idx"):
                self._files.append(StagedFile(f"{self.path_prefix}{suffix}", "w+b"))
                undo.callback(self._files[-1].abort)
            self._bin, self._idx = self._files
            # Document boundaries come last in the .idx; until their place is known they wait in a file without a name.
            folder = self._idx.path.parent
            with naming(self._idx.path):
                self._documents = tempfile.TemporaryFile(buffering=1 << 20, dir=folder)
            undo.callback(self._documents.close)
            self._undo = undo.pop_all()
        self._idx.write(bytes(_HEADER.size))
        self._add_boundaries(np.zeros(1, np.int64))

    def _add_boundaries(self, ends: np.ndarray) -> None:
        with naming(self._idx.path):
            self._documents.write(ends.astype("<i8").tobytes())

    def add_document(self, sequences: Sequence[np.ndarray]) -> None:
        """Adds one document of one or more 1-D sequences."""
        arrays = [np.asarray(sequence) for sequence in sequences]
        flat = arrays[0] if len(arrays) == 1 else np.concatenate([*arrays, np.empty(0, self.dtype)])
        lengths = np.array([len(a) for a in arrays], dtype=np.int64)
        self.add_documents(flat, lengths, np.array([len(arrays)]))

    def add_documents(
        self, items: np.ndarray, lengths: np.ndarray, sequences_per_document: np.ndarray
    ) -> None:
        """Adds many documents at once.

        Args:
            items: ``[sum(lengths)]``, all sequences one after another.
            lengths: ``[N]``, items per sequence.
            sequences_per_document: ``[D]``, with sum N.
        """
        lengths = np.asarray(lengths, dtype=np.int64)
        ends = np.cumsum(np.asarray(sequences_per_document, dtype=np.int64))
        if lengths.sum() != len(items) or (ends[-1] if len(ends) else 0) != len(lengths):
            raise DataError(f"{self.path_prefix}.bin: items, lengths and documents do not agree")
        if len(lengths) and lengths.max() > _MAX_SEQUENCE:
            raise DataError(f"{self.path_prefix}.bin: a sequence of {lengths.max()} items")
        converted = np.ascontiguousarray(items, self.dtype)
        if items.dtype != self.dtype and not np.array_equal(converted, items):
            raise DataError(f"{self.path_prefix}.bin: an item does not fit {self.dtype}")
        data = converted.data.cast("B") if len(items) else memoryview(b"")
        self._bin.write(data)
        self._digest.update(data)
        self._idx.write(lengths.astype("<i4").tobytes())
        self._add_boundaries(ends + self.num_sequences)
        self.num_documents += len(ends)
        self.num_sequences += len(lengths)
        self.num_items += len(items)

    def add_dataset(self, reader: IndexedReader) -> None:
        """Appends all documents of an indexed file, streaming its bytes."""
        if reader.dtype != self.dtype:
            raise DataError(f"{reader.path_prefix}.idx: {reader.dtype}, not {self.dtype}")
        if (
            not reader.num_sequences
        ):  # as of a shard without a usable record; nothing of it can be mapped
            return
        with open(f"{reader.path_prefix}.bin", "rb") as file:
            while block := file.read(_BLOCK_BYTES):
                self._bin.write(block)
                self._digest.update(block)
        for lengths in _blocks(reader.sequence_lengths):
            self._idx.write(lengths.tobytes())
        for ends in _blocks(reader.document_indices[1:]):
            self._add_boundaries(ends + self.num_sequences)
        self.num_documents += reader.num_documents
        self.num_sequences += reader.num_sequences
        self.num_items += reader.num_items

    def finish(self) -> dict[str, FileRecord]:
        """Completes and syncs both files under their temporary names.

        Returns:
            The records of the two files, by ``.bin`` and ``.idx``.
        """
        if self._records is None:
            if not self.num_items and not self._may_be_empty:
                raise DataError(f"{self.path_prefix}.bin: nothing to write")
            with naming(self._idx.path):
                # Header, then, after the lengths already written, byte offsets and boundaries.
                file = self._idx.file
                file.flush()
                lengths = self.staged_lengths()
                offset = 0
                file.seek(0, os.SEEK_END)
                for block in _blocks(lengths):
                    sizes = block.astype("<i8") * self.dtype.itemsize
                    ends = offset + np.cumsum(sizes)
                    file.write((ends - sizes).tobytes())
                    offset = int(ends[-1])
                del lengths
                with self._documents as documents:
                    documents.seek(0)
                    shutil.copyfileobj(documents, file, _BLOCK_BYTES)
                file.seek(0)
                counts = (self.num_sequences, self.num_documents + 1)
                file.write(_HEADER.pack(_MAGIC, _VERSION, self._code, *counts))
            for staged in self._files:
                staged.finish()
            idx = self._idx.temporary
            self._records = {
                ".bin": FileRecord(self.num_items * self.dtype.itemsize, self._digest.hexdigest()),
                ".idx": FileRecord(os.path.getsize(idx), file_sha256(idx)),
            }
        return self._records

    def staged_lengths(self) -> np.ndarray:
        """The sequence lengths before `publish`, int32 ``[N]``, mapped from the temporary file."""
        return np.memmap(
            self._idx.temporary,
            dtype="<i4",
            mode="r",
            offset=_HEADER.size,
            shape=self.num_sequences,
        )

    def publish(self) -> None:
        """Gives the finished files their names."""
        self.finish()
        for staged in self._files:
            staged.publish()

    def abort(self) -> None:
        """Deletes the temporary files; published ones stay."""
        # Closing flushes, which fails again on a full disk; the first error is the one told.
        with contextlib.suppress(OSError):
            self._undo.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if kind is None:
                self.publish()
        finally:
            self.abort()


def _blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(array), _BLOCK_ITEMS):
        yield array[start : start + _BLOCK_ITEMS]


class IndexedReader:
    """Reads ``PATH_PREFIX.bin`` and ``.idx`` through memory maps, opened at first use.

    It pickles as its path, so that data loader workers can have it however they are started.
    Returned arrays are read-only views of the file.

    Raises:
        DataError: a file is missing, truncated or not an index, or the two do not belong together.
    """

    def __init__(self, path_prefix: str) -> None:
        self.path_prefix = str(path_prefix)
        self._maps: tuple[mmap.mmap, np.ndarray, np.ndarray, np.ndarray] | None = None
        path = f"{self.path_prefix}.idx"
        try:
            with open(path, "rb") as file:
                raw = file.read(_HEADER.size)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from error
        if len(raw) < _HEADER.size:
            raise DataError(f"{path}: truncated: {len(raw)} bytes")
        magic, version, code, self.num_sequences, self._num_boundaries = _HEADER.unpack(raw)
        known = magic == _MAGIC and version == _VERSION and code in _DTYPES
        if not known or self._num_boundaries < 1:
            raise DataError(f"{path}: not an index of megatron-core's version {_VERSION}")
        self.dtype = _DTYPES[code]
        self._check_sizes()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": None}

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return self._num_boundaries - 1

    @property
    def sequence_lengths(self) -> np.ndarray:
        """Items per sequence, int32 ``[num_sequences]``."""
        return self._open()[1]

    @property
    def document_indices(self) -> np.ndarray:
        """First sequence of each document, and the end: int64 ``[num_documents + 1]``."""
        return self._open()[3]

    def items_before(self, index: int) -> int:
        """Items of all sequences before one, or of all (``index`` is their number); sequences have no gaps."""
        if index == self.num_sequences:
            return self.num_items
        return int(self._open()[2][index]) // self.dtype.itemsize

    def count_longer(self, limit: int, sequences: range) -> int:
        """How many sequences of a range have more than ``limit`` items."""
        lengths = self.sequence_lengths[sequences.start : sequences.stop]
        return sum(int(np.count_nonzero(block > limit)) for block in _blocks(lengths))

    def sequence(self, index: int) -> np.ndarray:
        """All items of a sequence, ``[length]``. Raises DataError where the index is damaged there."""
        data, lengths, offsets, _ = self._maps or self._open()
        self._check_place(index)
        try:
            return np.frombuffer(data, self.dtype, lengths[index], offsets[index])
        except ValueError:
            raise self._damaged(index) from None

    def sequence_slice(self, index: int, offset: int, length: int) -> np.ndarray:
        """``length`` items of a sequence from item ``offset`` on.

        Raises:
            IndexError: outside.
            DataError: the index is damaged there.
        """
        data, lengths, offsets, _ = self._maps or self._open()
        self._check_place(index)
        if offset < 0 or length < 0 or offset + length > lengths[index]:
            raise IndexError(
                f"{self.path_prefix}.bin: items {offset}..{offset + length} of sequence {index}, "
                f"which has {lengths[index]}"
            )
        start = int(offsets[index]) + offset * self.dtype.itemsize
        try:
            return np.frombuffer(data, self.dtype, length, start)
        except ValueError:
            raise self._damaged(index) from None

    def _damaged(self, index: int) -> DataError:
        return DataError(
            f"{self.path_prefix}.idx: damaged: sequence {index} is not within its .bin"
        )

    def document(self, index: int) -> list[np.ndarray]:
        """The sequences of a document.

        Raises:
            IndexError: there is no such document.
            DataError: the index is damaged there.
        """
        if not 0 <= index < self.num_documents:
            raise IndexError(f"{self.path_prefix}.idx: document {index} of {self.num_documents}")
        return [self.sequence(i) for i in self.sequences_of(index)]

    def sequences_of(self, document: int) -> range:
        """The numbers of a document's sequences. Raises DataError where the index is damaged."""
        begin, end = self.document_indices[document : document + 2].tolist()
        if not 0 <= begin <= end <= self.num_sequences:
            raise DataError(
                f"{self.path_prefix}.idx: damaged: document {document} has sequences {begin} to {end} "
                f"of {self.num_sequences}"
            )
        return range(begin, end)

    def _check_place(self, index: int) -> None:
        """Raises DataError if the index contradicts itself at a sequence, which ends where the next one begins."""
        data, lengths, offsets, _ = self._maps or self._open()
        begin, length = int(offsets[index]), int(lengths[index])
        last = index in (-1, self.num_sequences - 1)
        end = len(data) if last else int(offsets[index + 1])
        if begin < 0 or length < 0 or begin + length * self.dtype.itemsize != end:
            raise DataError(
                f"{self.path_prefix}.idx: damaged: sequence {index} is said to be {length} items from byte "
                f"{begin} on, and the next to begin at byte {end}"
            )

    @property
    def num_items(self) -> int:
        """Sum of all sequence lengths."""
        return os.path.getsize(f"{self.path_prefix}.bin") // self.dtype.itemsize

    def _check_sizes(self) -> None:
        idx_path, bin_path = f"{self.path_prefix}.idx", f"{self.path_prefix}.bin"
        wanted = _HEADER.size + self.num_sequences * 12 + self._num_boundaries * 8
        size = os.path.getsize(idx_path)
        # Files of other tools may have one mode byte per sequence at the end.
        if size not in (wanted, wanted + self.num_sequences):
            raise DataError(f"{idx_path}: truncated or damaged: {size} bytes, not {wanted}")
        with open(idx_path, "rb") as file:
            last_length, last_offset = 0, 0
            if self.num_sequences:
                file.seek(_HEADER.size + (self.num_sequences - 1) * 4)
                (last_length,) = struct.unpack("<i", file.read(4))
                file.seek(_HEADER.size + self.num_sequences * 12 - 8)
                (last_offset,) = struct.unpack("<q", file.read(8))
            file.seek(_HEADER.size + self.num_sequences * 12)
            first = struct.unpack("<q", file.read(8))[0]
            file.seek(wanted - 8)
            last = struct.unpack("<q", file.read(8))[0]
        if first != 0 or last != self.num_sequences:
            raise DataError(f"{idx_path}: damaged: its documents do not cover its sequences")
        wanted = last_offset + last_length * self.dtype.itemsize
        try:
            size = os.path.getsize(bin_path)
        except OSError as error:
            raise DataError(f"{bin_path}: {error.strerror}") from error
        if size != wanted:
            raise DataError(f"{bin_path}: {size} bytes, but its index says {wanted}")

    def _open(self) -> tuple[mmap.mmap, np.ndarray, np.ndarray, np.ndarray]:
        if self._maps is None:
            try:
                self._check_sizes()
                maps = []
                for suffix in (".bin", ".idx"):
                    with open(f"{self.path_prefix}{suffix}", "rb") as file:
                        maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
                data, index = maps
            except OSError as error:
                raise DataError(f"{self.path_prefix}: {error.strerror}") from error
            except ValueError as error:  # of an empty file
                raise DataError(f"{self.path_prefix}.bin: {error}") from error
            n, start = self.num_sequences, _HEADER.size
            lengths = np.frombuffer(index, "<i4", n, start)
            offsets = np.frombuffer(index, "<i8", n, start + 4 * n)
            documents = np.frombuffer(index, "<i8", self._num_boundaries, start + 12 * n)
            self._maps = (data, lengths, offsets, documents)
        return self._maps
