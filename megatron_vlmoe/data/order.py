"""Which sample comes when: keyed random numbers, epoch shuffles and blends of datasets.

Everything is a pure function of (seed, purpose, dataset, epoch, sample index), so that a resumed
run, at any data-parallel size, sees the samples that an unbroken one would.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.data.tables import SharedTables

MAX_TABLE = 1 << 27
"""Up to so many samples (and documents of packed texts, see there) an order is a table. Changing it changes the runs
between the old size and the new one."""

_FEISTEL_ROUNDS = 8
_BLEND_BLOCK = 1024
_MAX_BLEND_BLOCK = 1 << 22
_WORD = (1 << 64) - 1

Value = TypeVar("Value")


class Purpose(enum.IntEnum):
    """What random numbers are drawn for. Changing a value changes every run."""

    SAMPLE_ORDER = 1
    DOCUMENT_ORDER = 2
    BLEND = 3
    TEXT_MASK = 4
    CAPTION_MASK = 5
    IMAGE_MASK = 6
    AUGMENTATION = 7
    CAPTION_CHOICE = 8
    STORED_VIEW = 9
    RAND_AUGMENT = 10
    ERASE = 11
    MIX = 12


def keyed_rng(
    seed: int, purpose: Purpose, dataset: int = 0, epoch: int = 0, index: int = 0
) -> np.random.Generator:
    """A generator that depends on nothing but its key; different keys never share a number.

    Philox is counter-based (Salmon et al., SC 2011): seed and purpose are its key, the rest are the
    upper words of its counter, of which a generator uses up only the lowest.
    """
    key = np.array((seed & _WORD, purpose), dtype=np.uint64)
    counter = np.array((0, index, epoch, dataset), dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def epoch_permutation(
    num_samples: int,
    seed: int,
    epoch: int,
    dataset: int = 0,
    purpose: Purpose = Purpose.SAMPLE_ORDER,
) -> npt.NDArray[np.int32]:
    """The order of samples in an epoch, as a table: a permutation of 0..num_samples-1."""
    order = np.arange(num_samples, dtype=np.int32)
    keyed_rng(seed, purpose, dataset, epoch).shuffle(order)
    return order


class FeistelPermutation:
    """A permutation of 0..size-1 without a table: each entry is computed, in a few microseconds.

    A Feistel network permutes the numbers of as many bits as ``size - 1`` has: in turn each half of the bits is changed
    by a keyed hash of the other half. A number outside 0..size-1 goes through it again until it is inside, less than
    twice on average (cycle walking: Black and Rogaway, CT-RSA 2002).

    Args:
        size: at least 1.
        rng: gives the keys, and so decides which permutation it is.
    """

    def __init__(self, size: int, rng: np.random.Generator) -> None:
        self.size = size
        bits = max(2, (size - 1).bit_length())
        self._shift = bits // 2
        self._low, self._high = (1 << self._shift) - 1, (1 << (bits - self._shift)) - 1
        self._keys = rng.integers(
            _WORD, size=_FEISTEL_ROUNDS, dtype=np.uint64, endpoint=True
        ).tolist()

    def __getitem__(self, place: int) -> int:
        if not 0 <= place < self.size:
            raise IndexError(f"place {place} of {self.size}")
        number = self._permuted(place)
        while number >= self.size:
            number = self._permuted(number)
        return number

    def _permuted(self, number: int) -> int:
        low, high = number & self._low, number >> self._shift
        for key in range(0, _FEISTEL_ROUNDS, 2):
            low ^= _hash(high + self._keys[key]) & self._low
            high ^= _hash(low + self._keys[key + 1]) & self._high
        return high << self._shift | low


def _hash(word: int) -> int:
    """Mixes the bits of a number, modulo 2**64: the finalizer of SplitMix64 (Steele et al., OOPSLA 2014)."""
    word &= _WORD
    word = ((word ^ word >> 30) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ word >> 27) * 0x94D049BB133111EB) & _WORD
    return word ^ word >> 31


class RecentCache(Generic[Value]):
    """Remembers the last few values of a pure function of an integer; pickles empty.

    Two are enough where samples are read ahead across the end of an epoch.
    """

    def __init__(self, size: int = 2) -> None:
        self._size = size
        self._values: dict[int, Value] = {}

    def __getstate__(self) -> dict[str, object]:
        return {"_size": self._size, "_values": {}}

    def get(self, argument: int, compute: Callable[[int], Value]) -> Value:
        """``compute(argument)``, computed once while it is remembered."""
        if argument not in self._values:
            value = compute(argument)
            if len(self._values) >= self._size:
                del self._values[next(iter(self._values))]
            self._values[argument] = value
        return self._values[argument]


class SampleOrder:
    """Endless order over a dataset: every epoch has every sample once.

    Up to `max_table` samples the order of an epoch is a table, which the processes of a machine share; above, it is a
    `FeistelPermutation`, because a table would take minutes to make.

    Args:
        num_samples: samples of an epoch, at least 1.
        seed: seed of the shuffles.
        shuffle: false keeps the stored order in every epoch.
        dataset: number of the dataset, so that equal sizes do not mean equal orders.
        tables: where tables are shared.
        max_table: most samples that have a table.
    """

    def __init__(
        self,
        num_samples: int,
        seed: int,
        shuffle: bool = True,
        dataset: int = 0,
        tables: SharedTables = SharedTables(),  # noqa: B008 (frozen)
        max_table: int = MAX_TABLE,
    ) -> None:
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples}: an order needs at least one sample")
        self.num_samples = num_samples
        self.seed = seed
        self.shuffle = shuffle
        self.dataset = dataset
        self.tables, self.max_table = tables, max_table
        self._recent: RecentCache[npt.NDArray[np.int32] | FeistelPermutation] = RecentCache()

    def locate(self, number: int) -> tuple[int, int]:
        """Epoch and sample index of the sample with this number, counted from 0 over all epochs."""
        epoch, place = divmod(number, self.num_samples)
        if not self.shuffle:
            return epoch, place
        return epoch, int(self._recent.get(epoch, self._permutation)[place])

    def _permutation(self, epoch: int) -> npt.NDArray[np.int32] | FeistelPermutation:
        size, seed, dataset = self.num_samples, self.seed, self.dataset
        if size > self.max_table:
            rng = keyed_rng(seed, Purpose.SAMPLE_ORDER, dataset, epoch)
            return FeistelPermutation(size, rng)

        def build() -> dict[str, npt.NDArray[np.int32]]:
            return {"order": epoch_permutation(size, seed, epoch, dataset)}

        name = table_name("samples", size, seed, dataset)
        return self.tables.get(name, epoch, {"order": size}, build)["order"]


def table_name(kind: str, *key: object) -> str:
    """Name of a table for `SharedTables`, from all that it depends on."""
    return f"{kind}-{hashlib.sha256(repr(key).encode()).hexdigest()[:20]}"


class BlendSpec(NamedTuple):
    """Path prefixes of datasets, and the share of the samples from each, with sum 1 (None: in proportion to sizes)."""

    prefixes: tuple[str, ...]
    weights: tuple[Fraction, ...] | None = None


def parse_blend(values: Sequence[str], option: str) -> BlendSpec:
    """Reads ``A B`` or Megatron's ``0.7 A 0.3 B``, the words of an option that errors name.

    Raises:
        ConfigError: weights and prefixes do not alternate, or a weight is not positive.
    """
    numbers: list[Fraction | None] = []
    for value in values:
        try:
            numbers.append(Fraction(value))
        except (ValueError, ZeroDivisionError):
            numbers.append(None)
    if all(number is None for number in numbers):
        return BlendSpec(tuple(values))
    weights, prefixes = numbers[0::2], tuple(values[1::2])
    if len(values) % 2 or None in weights or any(n is not None for n in numbers[1::2]):
        raise ConfigError(
            f"{option} {' '.join(values)}: give prefixes alone, or a weight before each of them"
        )
    positive = [weight for weight in weights if weight is not None and weight > 0]
    if len(positive) != len(weights):
        raise ConfigError(f"{option} {' '.join(values)}: weights must be positive")
    total = sum(positive, Fraction(0))
    return BlendSpec(prefixes, tuple(weight / total for weight in positive))


class Blend:
    """Interleaves datasets by weight: sample number to (dataset, number inside that dataset).

    Numbers come in blocks. After each block every dataset has had its exact share, less than one
    sample apart (largest remainders, in integers); inside a block the order is shuffled. Nothing
    of the length of the run is stored. Of the weights, one per dataset, only the ratios count.

    Raises:
        ConfigError: no weight, one that is not positive, or one below 2**-22 of the total.
    """

    def __init__(self, weights: Sequence[Fraction | int | float], seed: int) -> None:
        shares = [Fraction(weight) for weight in weights]
        if not shares or min(shares) <= 0:
            raise ConfigError(f"a blend needs positive weights, not {list(map(str, weights))}")
        self._total = sum(shares, Fraction(0))
        self._shares = shares
        self.seed = seed
        # With a whole sample of every dataset per block no count can go down from block to block.
        self.block_size = _BLEND_BLOCK
        while self.block_size * min(shares) < self._total:
            self.block_size *= 2
        if self.block_size > _MAX_BLEND_BLOCK:
            raise ConfigError(f"a blend weight is below 1/{_MAX_BLEND_BLOCK} of the total")
        self._recent: RecentCache[tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]] = (
            RecentCache(size=4)
        )

    def counts_before(self, block: int) -> list[int]:
        """Samples of each dataset in the first ``block`` blocks."""
        size = block * self.block_size
        quotas = [share * size / self._total for share in self._shares]
        counts = [quota.numerator // quota.denominator for quota in quotas]
        by_remainder = sorted(range(len(quotas)), key=lambda d: (counts[d] - quotas[d], d))
        for dataset in by_remainder[: size - sum(counts)]:
            counts[dataset] += 1
        return counts

    def _make_block(self, block: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Dataset, and number inside it, of each place of a block, ``[block_size]``."""
        begins, ends = self.counts_before(block), self.counts_before(block + 1)
        datasets = np.repeat(
            np.arange(len(begins), dtype=np.int32),
            [e - b for b, e in zip(begins, ends, strict=True)],
        )
        keyed_rng(self.seed, Purpose.BLEND, index=block).shuffle(datasets)
        numbers = np.empty(len(datasets), dtype=np.int64)
        for dataset, begin in enumerate(begins):
            places = np.flatnonzero(datasets == dataset)
            numbers[places] = begin + np.arange(len(places))
        return datasets, numbers

    def locate(self, number: int) -> tuple[int, int]:
        """Dataset of the sample with this number, and its number in that dataset's own order."""
        if len(self._shares) == 1:
            return 0, number
        block, place = divmod(number, self.block_size)
        datasets, numbers = self._recent.get(block, self._make_block)
        return int(datasets[place]), int(numbers[place])


@dataclass(frozen=True)
class SampleRef:
    """The sample that a number stands for: dataset of the blend, its epoch, and sample index."""

    dataset: int
    epoch: int
    index: int


@dataclass(frozen=True)
class SampleRngs:
    """Makes the generators of all random numbers of one objective in one split.

    Args:
        seed: seed of the run.
        stream: number of the objective and split, so that no two of them share a number.
        train: false makes every draw the same in each epoch and leaves images unaugmented.
    """

    seed: int
    stream: int
    train: bool

    def dataset_key(self, dataset: int) -> int:
        """Number of a dataset of the blend among those of all objectives."""
        return (self.stream << 32) + dataset

    def rng(self, purpose: Purpose, ref: SampleRef) -> np.random.Generator:
        """The generator of one sample for one purpose."""
        epoch = ref.epoch if self.train else 0
        return keyed_rng(self.seed, purpose, self.dataset_key(ref.dataset), epoch, ref.index)


class BlendedOrder:
    """The order of one objective's samples over all its datasets: sample number to `SampleRef`."""

    def __init__(self, blend: Blend, orders: Sequence[SampleOrder]) -> None:
        self.blend = blend
        self.orders = tuple(orders)

    def locate(self, number: int) -> SampleRef:
        """The sample with this number, counted from 0 over the whole run."""
        dataset, inner = self.blend.locate(number)
        epoch, index = self.orders[dataset].locate(inner)
        return SampleRef(dataset, epoch, index)
