"""Packed texts against a direct concatenation of the documents."""

from __future__ import annotations

import hashlib
import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from megatron_vlmoe.data.samples import PackedTexts
from megatron_vlmoe.data.tables import SharedTables

BOS, EOS = 0, 1


@dataclass(frozen=True)
class Reader:
    """Documents in memory; every token is unique: 1000 * document + place."""

    lengths: tuple[int, ...]

    @property
    def sequence_lengths(self) -> np.ndarray:
        return np.array(self.lengths, dtype=np.int32)

    def items_before(self, index: int) -> int:
        return sum(self.lengths[:index])

    def sequence_slice(self, index: int, offset: int, length: int) -> np.ndarray:
        assert offset >= 0 and offset + length <= self.lengths[index]
        return 1000 * (index + 1) + np.arange(offset, offset + length)


LENGTHS = (5, 1, 17, 3, 0, 9, 2)


def packed(
    length: int = 8, documents: range = range(len(LENGTHS)), **options: object
) -> PackedTexts:
    return PackedTexts(
        Reader(LENGTHS), documents, length, bos_id=BOS, eos_id=EOS, seed=4, **options
    )


def concatenation(texts: PackedTexts, epoch: int) -> list[tuple[int, int]]:
    """(token, document) of all documents in the epoch's order, each followed by ``</s>``."""
    stream = []
    for place in texts.index(epoch).order:
        document = texts.documents.start + int(place)
        stream += [(1000 * (document + 1) + i, document) for i in range(LENGTHS[document])]
        stream.append((EOS, document))
    return stream


@pytest.mark.parametrize("length", [3, 4, 8, 13, 46, 100])
@pytest.mark.parametrize("documents", [range(7), range(2, 6)])
@pytest.mark.parametrize("epoch", [0, 3])
def test_samples_are_cuts_of_the_concatenation(length: int, documents: range, epoch: int) -> None:
    texts = packed(length, documents)
    stream = concatenation(texts, epoch)
    assert texts.num_tokens == len(stream)
    assert texts.num_samples == -(-len(stream) // (length - 2))
    for k in range(texts.num_samples):
        ids, segments = texts.sample(epoch, k)
        assert ids.shape == segments.shape == (length,) and ids.dtype == np.int64
        places = [(k * (length - 2) + i) % len(stream) for i in range(length - 2)]
        assert ids.tolist() == [BOS, *(stream[p][0] for p in places), EOS]
        # A new segment begins after every </s>, also where the end wraps to the beginning.
        expected, segment = [0], 0
        for place, following in zip(places, [*places[1:], None], strict=True):
            expected.append(segment)
            segment += stream[place][0] == EOS and following is not None
        assert segments.tolist() == [*expected, expected[-1]]


def test_document_order_is_shuffled_per_epoch() -> None:
    orders = [list(packed().index(epoch).order) for epoch in range(4)]
    assert all(sorted(order) == list(range(7)) for order in orders)
    assert len({tuple(order) for order in orders}) > 1
    still = packed(shuffle=False)
    assert list(still.index(3).order) == list(range(7))


def test_samples_outside_the_epoch_are_refused() -> None:
    texts = packed()
    for k in (-1, texts.num_samples):
        with pytest.raises(IndexError):
            texts.sample(0, k)


def test_too_short_a_length_is_refused() -> None:
    with pytest.raises(ValueError, match="2 tokens"):
        packed(2)


def samples(texts: PackedTexts, epoch: int) -> list[list[int]]:
    return [texts.sample(epoch, k)[0].tolist() for k in range(texts.num_samples)]


def digest(texts: PackedTexts, epoch: int) -> str:
    """Of tokens and documents of all samples."""
    made = [np.concatenate(texts.sample(epoch, k)) for k in range(texts.num_samples)]
    return hashlib.sha256(np.concatenate(made).astype("<i8").tobytes()).hexdigest()[:16]


def test_samples_stay_as_they_were() -> None:
    """Runs that were started with an earlier version go on with the same samples."""
    texts = packed(9, dataset=5)
    assert [digest(texts, epoch) for epoch in (0, 3)] == ["fd96c9d1aa957af6", "1b31bb138033b443"]
    texts = packed(9, range(2, 6), dataset=5)
    assert [digest(texts, epoch) for epoch in (0, 3)] == ["01e4bbb4fa45a1a4", "3a80674617517b59"]
    assert digest(packed(9, shuffle=False, dataset=5), 3) == "7cf7ab3417887c9d"
    assert digest(packed(9, range(2, 6), shuffle=False, dataset=5), 3) == "0c2b7b41610101fb"


@pytest.mark.parametrize("length", [3, 8, 46, 100])
@pytest.mark.parametrize("documents", [range(7), range(2, 6)])
def test_above_the_limit_documents_keep_their_order_and_the_cuts_move(
    length: int, documents: range
) -> None:
    texts = packed(length, documents, max_table=3)
    stream = concatenation(texts, 0)
    begins = {texts.index(epoch).begin for epoch in range(40)}
    assert len(begins) > 10 and begins <= set(range(len(stream)))
    for epoch in (0, 3):
        assert list(texts.index(epoch).order) == list(range(len(documents)))
        found = [
            token for k in range(texts.num_samples) for token in texts.sample(epoch, k)[0][1:-1]
        ]
        begin = texts.index(epoch).begin
        assert found == [stream[(begin + i) % len(stream)][0] for i in range(len(found))]
    again = packed(length, documents, max_table=3)
    assert samples(again, 3) == samples(texts, 3)
    assert pickle.loads(pickle.dumps(again)).sample(3, 0)[0].tolist() == samples(texts, 3)[0]


def test_a_shared_index_gives_the_same_samples(tmp_path: Path) -> None:
    expected = samples(packed(), 2)
    tables = SharedTables(str(tmp_path / "tables"), smallest=1)
    assert samples(packed(tables=tables, identity="a"), 2) == expected
    files = sorted((tmp_path / "tables").glob("*.npy"))
    assert len(files) == 2
    times = [file.stat().st_mtime_ns for file in files]
    assert samples(packed(tables=tables, identity="a"), 2) == expected
    assert [file.stat().st_mtime_ns for file in files] == times
    samples(packed(tables=tables, identity="b"), 2)
    assert len(list((tmp_path / "tables").glob("*.npy"))) == 4
    # Without a name of the dataset nothing is shared.
    samples(packed(tables=tables), 2)
    assert len(list((tmp_path / "tables").glob("*.npy"))) == 4
