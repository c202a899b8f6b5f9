"""Packed texts against a direct concatenation of the documents."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from megatron_vlmoe.data.samples import PackedTexts

BOS, EOS = 0, 1


@dataclass(frozen=True)
class Reader:
    """Documents in memory; every token is unique: 1000 * document + place."""

    lengths: tuple[int, ...]

    @property
    def sequence_lengths(self) -> np.ndarray:
        return np.array(self.lengths, dtype=np.int32)

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
    orders = [packed().index(epoch).order.tolist() for epoch in range(4)]
    assert all(sorted(order) == list(range(7)) for order in orders)
    assert len({tuple(order) for order in orders}) > 1
    still = packed(shuffle=False)
    assert still.index(3).order.tolist() == list(range(7))


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


def test_a_cached_index_gives_the_same_samples(tmp_path: Path) -> None:
    expected = samples(packed(), 2)
    options = {"cache_dir": str(tmp_path / "cache"), "identity": "a"}
    assert samples(packed(**options), 2) == expected
    files = sorted((tmp_path / "cache").iterdir())
    assert len(files) == 2 and all(file.suffix == ".npy" for file in files)
    times = [file.stat().st_mtime_ns for file in files]
    assert samples(packed(**options), 2) == expected
    assert [file.stat().st_mtime_ns for file in files] == times
    samples(packed(cache_dir=options["cache_dir"], identity="b"), 2)
    assert len(list((tmp_path / "cache").iterdir())) == 4


def test_a_damaged_or_unwritable_cache_is_no_obstacle(tmp_path: Path) -> None:
    expected = samples(packed(), 2)
    options = {"cache_dir": str(tmp_path), "identity": "a"}
    samples(packed(**options), 2)
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:100])
    assert samples(packed(**options), 2) == expected
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert samples(packed(cache_dir=str(blocked / "x"), identity="a"), 2) == expected
