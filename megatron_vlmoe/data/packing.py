"""Packed texts: documents one after another, cut into samples of equal length."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_vlmoe.data.indexed import IndexedReader
from megatron_vlmoe.data.order import Purpose, RecentCache, epoch_permutation
from megatron_vlmoe.runtime.files import open_atomic


@dataclass(frozen=True)
class PackingIndex:
    """Where each document of an epoch begins in the concatenation of all.

    Args:
        order: ``[D]`` document at each place.
        starts: int64 ``[D + 1]`` first token of each place, and the length of the whole.
    """

    order: npt.NDArray[np.integer]
    starts: npt.NDArray[np.int64]


class PackedTexts:
    """Texts of exactly ``length`` tokens: ``<s>``, ``length - 2`` tokens, ``</s>``.

    The tokens of an epoch are all documents, each followed by ``</s>``, in an order that is
    shuffled anew in every epoch. Sample k has tokens k*(length-2) .. (k+1)*(length-2) of them;
    the last sample is filled up from the beginning.

    Args:
        reader: one sequence per document.
        documents: first document, and the one after the last.
        length: tokens of a packed text.
        bos_id: ``<s>``.
        eos_id: ``</s>``.
        seed: seed of the document shuffles.
        shuffle: false keeps the stored order.
        dataset: number of the dataset within its blend.
        cache_dir: folder in which the processes of a machine share an epoch's index; None keeps it
            in memory.
        identity: names the dataset in the cache, and must change when the dataset does.
    """

    def __init__(
        self,
        reader: IndexedReader,
        documents: range,
        length: int,
        *,
        bos_id: int,
        eos_id: int,
        seed: int,
        shuffle: bool = True,
        dataset: int = 0,
        cache_dir: str | None = None,
        identity: str = "",
    ) -> None:
        if length < 3:
            raise ValueError(f"a packed text of {length} tokens has no place for text")
        self.reader = reader
        self.documents = documents
        self.length = length
        self.bos_id, self.eos_id = bos_id, eos_id
        self.seed, self.shuffle, self.dataset = seed, shuffle, dataset
        self.cache_dir, self.identity = cache_dir, identity
        lengths = reader.sequence_lengths[documents.start : documents.stop]
        self.num_tokens = int(lengths.sum(dtype=np.int64)) + len(lengths)
        """Tokens of an epoch, with one ``</s>`` per document."""
        self.num_samples = -(-self.num_tokens // (length - 2))
        """Samples of an epoch."""
        self._recent: RecentCache[PackingIndex] = RecentCache()

    def index(self, epoch: int) -> PackingIndex:
        """Order and boundaries of the documents in an epoch (the same in all if not shuffled)."""
        return self._recent.get(epoch if self.shuffle else 0, self._load_index)

    def _load_index(self, epoch: int) -> PackingIndex:
        """An index that the processes of a machine share through memory-mapped files, if there is a folder for them."""
        if self.cache_dir is None:
            return self._build_index(epoch)
        key = (self.identity, self.documents.start, self.documents.stop, self.seed, self.dataset)
        digest = hashlib.sha256(repr((*key, self.shuffle, epoch)).encode()).hexdigest()[:20]
        folder = Path(self.cache_dir)
        paths = [folder / f"packing-{digest}-{part}.npy" for part in ("order", "starts")]
        with contextlib.suppress(OSError, ValueError):
            order, starts = (np.load(path, mmap_mode="r", allow_pickle=False) for path in paths)
            if len(starts) == len(order) + 1 == len(self.documents) + 1:
                return PackingIndex(order, starts)
        built = self._build_index(epoch)
        # A cache that cannot be written (read-only folder, full disk) costs memory, nothing else.
        with contextlib.suppress(OSError):
            for path, array in zip(paths, (built.order, built.starts), strict=True):
                with open_atomic(path) as file:
                    np.save(file, array, allow_pickle=False)
        return built

    def _build_index(self, epoch: int) -> PackingIndex:
        size = len(self.documents)
        lengths = self.reader.sequence_lengths[self.documents.start : self.documents.stop]
        order: npt.NDArray[np.integer] = np.arange(size, dtype=np.int32)
        if self.shuffle:
            order = epoch_permutation(size, self.seed, epoch, self.dataset, Purpose.DOCUMENT_ORDER)
        starts = np.zeros(size + 1, dtype=np.int64)
        np.cumsum(lengths[order] + np.int64(1), out=starts[1:])
        return PackingIndex(order, starts)

    def sample(self, epoch: int, k: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Sample k of an epoch.

        Returns:
            ids int64 ``[length]``, and the number of the document within the sample that each
            token belongs to, int64 ``[length]``: 0, 0, ..., 1, 1, ... (``</s>`` ends its document).
        """
        if not 0 <= k < self.num_samples:
            raise IndexError(f"sample {k} of {self.num_samples}")
        index = self.index(epoch)
        ids = np.full(self.length, self.eos_id, dtype=np.int64)
        documents = np.zeros(self.length, dtype=np.int64)
        ids[0] = self.bos_id
        begin, filled, end, number = k * (self.length - 2), 1, self.length - 1, 0
        place = int(np.searchsorted(index.starts, begin, side="right")) - 1
        offset = begin - int(index.starts[place])
        while filled < end:
            span = int(index.starts[place + 1] - index.starts[place])
            taken = min(span - offset, end - filled)
            # The last token of a document's span is its </s>, which is in place already.
            words = min(taken, span - 1 - offset)
            document = self.documents.start + int(index.order[place])
            ids[filled : filled + words] = self.reader.sequence_slice(document, offset, words)
            documents[filled : filled + taken] = number
            filled += taken
            offset = 0
            number += 1
            place = (place + 1) % len(self.documents)
        documents[-1] = number - 1
        return ids, documents
