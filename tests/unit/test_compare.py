"""Contenders in turn: order, ratios within a round, what could not run, and the files that are left."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_vlmoe.benchmarks.compare import Contender, NotRun, Work, compare, table, write_rows


def contender(name: str, seconds: list[float], log: list[str]) -> Contender:
    """One that takes so long in its rounds, a repetition each."""
    turns = iter(seconds)

    @contextlib.contextmanager
    def build() -> Iterator[Work]:
        log.append(name)
        now = next(turns)
        yield lambda: {"forward": now / 4, "backward": 3 * now / 4}

    return Contender(name, build)


def test_ratios_are_taken_within_a_round(tmp_path: Path) -> None:
    log: list[str] = []
    # The machine slows down threefold in the second round; the ratio does not see it.
    contenders = [
        contender("dense", [1.0, 3.0, 1.0], log),
        contender("sparse", [2.0, 6.0, 1.0], log),
    ]

    @contextlib.contextmanager
    def absent() -> Iterator[Work]:
        raise NotRun("needs 9.0 GB, 1.0 GB are free")
        yield

    contenders.append(Contender("large", absent))
    rows = compare({"tokens": 8}, contenders, reference="dense", rounds=3, turn_seconds=0.0)
    # The order moves on, and what cannot run is not tried again.
    assert log == ["dense", "sparse", "sparse", "dense", "dense", "sparse"]
    path = tmp_path / "new" / "rows.json"
    write_rows(path, "Layers", rows)
    dense, sparse, large = json.loads(path.read_text())
    assert (dense["median_ms"], dense["min_ms"], dense["max_ms"]) == (1000.0, 1000.0, 3000.0)
    assert dense["ratio_to_dense"] == 1.0 and sparse["ratio_to_dense"] == 2.0
    assert sparse["phases_ms"] == {"forward": 500.0, "backward": 1500.0}
    assert sparse["case"] == {"tokens": 8} and sparse["rounds_ms"] == [2000.0, 6000.0, 1000.0]
    assert large["median_ms"] is None and large["note"].startswith("not run: needs 9.0 GB")
    lines = list(table(rows))
    assert "large | not run: needs 9.0 GB" in lines[-1]
    assert len({line.count("|") for line in lines}) == 1
    assert all(line in path.with_suffix(".md").read_text() for line in lines)


@pytest.mark.parametrize("wanted", [1, 4])
def test_a_turn_has_so_many_repetitions_after_its_warm_up(wanted: int) -> None:
    calls: list[int] = []

    @contextlib.contextmanager
    def build() -> Iterator[Work]:
        def work() -> dict[str, float]:
            calls.append(1)
            # What is measured first is slow, and does not count.
            return {"all": 50.0 if len(calls) <= 2 else 1.0}

        yield work

    (row,) = compare(
        {},
        [Contender("one", build)],
        reference="one",
        rounds=1,
        turn_seconds=0.0,
        repetitions=wanted,
        warmup=2,
    )
    # One more is for memory.
    assert len(calls) == 2 + wanted + 1 and row.rounds_ms == [1000.0]
