"""Shares of an input: what one shard of a run reads, so that all shards in order read what one run reads.

The input is a row of parts, as files and tars, each with a weight in bytes. A shard has a stretch of the sum of all
weights. Of a part that lies in it whole the records are read as they come; a part that several shards have is cut by
the offsets of its lines, or by the number of its records where these have no offsets that are known beforehand.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from types import TracebackType
from typing import Generic, Self, TypeVar

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.data.manifest import ShardRecord
from megatron_vlmoe.prepare.remote import Mirror, names_in
from megatron_vlmoe.runtime.files import is_remote

Item = TypeVar("Item")


@dataclass(frozen=True)
class Shard:
    """One of the ``count`` shards of a run; ``index`` counts from 0."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def of(self, prefix: str) -> str:
        """The prefix of this shard, given that of the run."""
        return f"{prefix}-{self.index:05d}-of-{self.count:05d}"

    def cut(self, total: int) -> tuple[int, int]:
        """First and end of this shard's stretch of 0 to ``total``."""
        return total * self.index // self.count, total * (self.index + 1) // self.count


def shard_argument(text: str) -> Shard:
    """Argument type: ``i/n``, where i counts from 0 to n - 1."""
    match = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
    if match is None:
        raise argparse.ArgumentTypeError("expected I/N, as 0/16 for the first of 16 shards")
    index, count = map(int, match.groups())
    if index >= count:
        last = f"0 to {count - 1}" if count else "none"
        raise argparse.ArgumentTypeError(f"of {count} shards there is no {index}, only {last}")
    return Shard(index, count)


@dataclass
class Part(Generic[Item]):
    """A stretch of the input that can be read by itself.

    Attributes:
        name: as the user gave it.
        weight: about how many bytes are read for it; at least 1.
        read: its records, all or (where it has offsets) those that begin between two.
        has_offsets: whether records have offsets in bytes that can be gone to; asked when it is to be cut.
        unmet: errors, by what is missing in it; the reader fills it in.
    """

    name: str
    weight: int
    read: Callable[[tuple[int, int] | None], Iterator[Item]]
    has_offsets: Callable[[], bool] = lambda: False
    unmet: dict[str, str] = field(default_factory=dict)


class Share(Generic[Item]):
    """What one run reads: the whole input, or the stretch of one shard. A context, which names remote files in errors.

    Args:
        shard: which; None: all of the input.
        inputs: paths or addresses.
        read: all records, of local inputs.
        parts: the same in parts; makes them anew at each call, fetching what is remote when it is read.
        settings: what else the results depend on.

    Attributes:
        mirror: the copies of remote files.

    Raises:
        DataError: an input is missing.
    """

    def __init__(
        self,
        shard: Shard | None,
        inputs: Sequence[str],
        read: Callable[[], Iterator[Item]],
        parts: Callable[[Mirror], Iterable[Part[Item]]],
        settings: object,
        mirror: Mirror | None = None,
    ) -> None:
        self.shard, self._read = shard, read
        self._unmet: list[Mapping[str, str]] = []
        self._cut = (0, 0)
        self.mirror = mirror or Mirror()
        self._parts = lambda: parts(self.mirror)
        self._in_parts = shard is not None or any(map(is_remote, inputs))
        self._digest = hashlib.sha256(f"{settings}\n".encode("utf-8", "surrogateescape"))
        if self._in_parts:
            total = 0
            with self.mirror.naming():
                for part in self._parts():
                    total += part.weight
                    line = f"{part.name}\0{part.weight}\n"
                    self._digest.update(line.encode("utf-8", "surrogateescape"))
            self._cut = (shard or Shard(0, 1)).cut(total)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.mirror.close()
        if isinstance(error, DataError) and kind is DataError:
            raise DataError(self.mirror.named(str(error))) from error

    def __iter__(self) -> Iterator[Item]:
        if not self._in_parts:
            yield from self._read()
            return
        low, high = self._cut
        begin = 0
        for part in self._parts():
            first, end = max(low - begin, 0), min(high - begin, part.weight)
            begin += part.weight
            if first < end:
                yield from _stretch(part, first, end)
                self._unmet.append(part.unmet)
            if begin >= high:
                break
        if self.shard is None and (unmet := unmet_in_all(self._unmet)):
            raise DataError(next(iter(unmet.values())))

    def record(self) -> ShardRecord | None:
        """For the manifest, once all records are read; None for a whole input."""
        if self.shard is None:
            return None
        unmet = unmet_in_all(self._unmet) if self._unmet else None
        return ShardRecord(self.shard.index, self.shard.count, self.work, unmet)

    @property
    def work(self) -> str:
        """`ShardRecord.work`."""
        return self._digest.hexdigest()


def _stretch(part: Part[Item], first: int, end: int) -> Iterator[Item]:
    """The records of a part whose places, in units of its weight, lie between two."""
    if (first, end) == (0, part.weight):
        return part.read(None)
    if part.has_offsets():
        return part.read((first, end))
    number = sum(1 for _ in part.read(None))
    return itertools.islice(
        part.read(None), number * first // part.weight, number * end // part.weight
    )


def unmet_in_all(unmet: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The errors of the first whose causes all the others have too."""
    if not unmet:
        return {}
    common = reduce(set.intersection, map(set, unmet))
    return {name: message for name, message in unmet[0].items() if name in common}


def check_shards(prefixes: Sequence[str], records: Sequence[ShardRecord | None]) -> bool:
    """Whether datasets are the shards of a run, rather than none of them being a shard.

    Raises:
        DataError: a shard is missing, comes twice or out of order, is of another run, or has a dataset beside it that
            is none; or what all shards lack, the run lacks.
    """
    if not any(records):
        return False
    first = next(record for record in records if record is not None)
    for place, (prefix, record) in enumerate(zip(prefixes, records, strict=True)):
        if record is None:
            raise DataError(f"{prefix}: is no shard, but others are: merge the shards first")
        if record.count != first.count or record.work != first.work:
            raise DataError(
                f"{prefix}: shard {record.index}/{record.count} is of another run than {prefixes[0]}: its input, "
                "its options or its tokenizer differ"
            )
        if record.index != place:
            raise DataError(
                f"{prefix}: is shard {record.index}/{record.count}, where shard {place}/{record.count} is due"
            )
    if len(records) < first.count:
        raise DataError(
            f"shard {len(records)}/{first.count} is missing after {prefixes[-1]}: give all {first.count}, in order"
        )
    unmet = [record.unmet for record in records if record is not None and record.unmet is not None]
    if missing := unmet_in_all(unmet):
        raise DataError(next(iter(missing.values())))
    return True


def find_shards(prefix: str) -> list[str]:
    """Prefixes of the shards that are there of the run that was to write ``prefix``, in order.

    Raises:
        DataError: there are none, one is missing, or they are of runs with different numbers of shards.
    """
    pattern = re.compile(re.escape(os.path.basename(prefix)) + r"-(\d{5,})-of-(\d{5,})\.json")
    names = names_in(os.path.dirname(prefix) or ".")
    found = [(int(m[1]), int(m[2])) for name in names if (m := pattern.fullmatch(name))]
    counts = sorted({count for _, count in found})
    if len(counts) != 1:
        has = " and of ".join(map(str, counts))
        why = f"there are shards of {has}: delete those of other runs" if counts else "no shards"
        raise DataError(f"{prefix}: {why} ({prefix}-00000-of-NNNNN.json)")
    (count,) = counts
    indices = {index for index, _ in found}
    missing = [index for index in range(count) if index not in indices]
    if missing:
        more = f", and {len(missing) - 1} others" if len(missing) > 1 else ""
        one = Shard(missing[0], count)
        raise DataError(f"{one.of(prefix)}.json: shard {one} is missing{more}")
    return [Shard(index, count).of(prefix) for index in range(count)]
