"""The counts of all runs, in a tracked file: they add up over runs, processes and machines.

Of a reader it has its cases by what came of them, the lines that none of them has run yet, which are counted anew once
the text of the reader's modules has changed, and its findings. A finding is open, and its first case is kept, until
that case is read or refused: then it is mended, and only its kind and number stay.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import importlib
import json
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import engine
from readers import READERS, Reader

from megatron_vlmoe.runtime.files import write_text_atomic

GOAL, GOAL_OF_ALL = 20_000, 1_000_000
LARGEST_CASE = 20_000
"""Bytes, compressed, of a case that is kept."""

Counts = dict[str, Any]
"""By name of the reader."""


def load(path: Path) -> Counts:
    """The counts of a file; none if there is no such file."""
    counts: Counts = json.loads(path.read_bytes()) if path.is_file() else {}
    return counts


@contextlib.contextmanager
def changed(path: Path, lock: Path) -> Iterator[Counts]:
    """The counts of a file, written back at the end; no other process writes them in between.

    Args:
        path: of the counts.
        lock: a file that is locked meanwhile.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        counts = load(path)
        yield counts
        ordered = {r.name: counts[r.name] for r in READERS if r.name in counts}
        write_text_atomic(path, json.dumps(ordered, indent=1, ensure_ascii=False) + "\n")


def open_cases(counts: Counts, reader: Reader) -> dict[str, engine.Case]:
    """The cases of a reader's open findings, by what is wrong."""
    found = counts.get(reader.name, {}).get("open", {})
    return {
        told: engine.Case.unpacked(zlib.decompress(base64.b85decode(one["case"])))
        for told, one in found.items()
        if one["case"]
    }


def add(counts: Counts, reader: Reader, tally: engine.Tally, again: Collection[str]) -> None:
    """Adds what came of a run.

    Args:
        counts: are changed.
        reader: the reader.
        tally: of the run.
        again: findings whose cases were run once more; those that were not found are mended.
    """
    old = counts.get(reader.name, {})
    text, possible = _text(reader), _possible(reader)
    missed: dict[str, set[int]] = {}
    for file, lines in possible.items():
        name = Path(file).name
        missed[name] = lines - {number for path, number in tally.lines if path == file}
        if old.get("text") == text:
            missed[name] &= unpacked(old["missed"].get(name, ""), lines)
    found = {told: dict(one) for told, one in old.get("open", {}).items()}
    mended = Counter(old.get("mended", {}))
    for told in again:
        if told not in tally.found and told in found:
            mended[told] += found.pop(told)["cases"]
    for told, number in tally.found.items():
        one = found.setdefault(told, {"cases": mended.pop(told, 0), "case": ""})
        one["cases"] += number
        one["case"] = one["case"] or _packed_case(tally, told)
    outcomes = Counter(old.get("cases", {})) + tally.outcomes
    counts[reader.name] = {
        "cases": {kind: outcomes[kind] for kind in engine.OUTCOMES},
        "text": text,
        "lines": sum(map(len, possible.values())),
        "missed": {n: packed(missed[Path(f).name], possible[f]) for f, n in _names(possible)},
        **({"open": found} if found else {}),
        **({"mended": dict(mended)} if mended else {}),
    }


def _names(files: Iterable[str]) -> list[tuple[str, str]]:
    return [(file, Path(file).name) for file in files]


def _packed_case(tally: engine.Tally, told: str) -> str:
    content = zlib.compress((Path(tally.findings[told]) / "case.bin").read_bytes(), 9)
    return base64.b85encode(content).decode() if len(content) <= LARGEST_CASE else ""


def _text(reader: Reader) -> str:
    """Stands for the text of the reader's modules."""
    files = [importlib.import_module(module).__file__ for module in reader.modules]
    return hashlib.sha256(b"".join(Path(str(f)).read_bytes() for f in files)).hexdigest()[:12]


def _possible(reader: Reader) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for module in reader.modules:
        found |= engine.code_lines(module)
    return found


def packed(some: Collection[int], of_all: Collection[int]) -> str:
    """Some of several numbers as ranges, `3,7-12`; a range stands for those of `of_all` that lie in it."""
    ranges: list[list[int]] = []
    goes_on = False
    for number in sorted(of_all):
        if number not in some:
            goes_on = False
        elif goes_on:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
            goes_on = True
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)


def unpacked(ranges: str, of_all: Collection[int]) -> set[int]:
    """What `packed` has made."""
    found: set[int] = set()
    for part in ranges.split(",") if ranges else ():
        first, _, last = part.partition("-")
        found |= {n for n in of_all if int(first) <= n <= int(last or first)}
    return found


# ---- for people


def cases_of(counts: Counts, name: str) -> int:
    """How many a reader has had."""
    return sum(counts.get(name, {}).get("cases", {}).values())


def row(name: str, one: Mapping[str, Any]) -> str:
    """A reader's counts in a line of a table."""
    possible = {Path(f).name: lines for f, lines in _possible(_reader(name)).items()}
    missed = sum(len(unpacked(one["missed"].get(f, ""), lines)) for f, lines in possible.items())
    run = 1 - missed / max(one["lines"], 1)
    found = [len(one.get(state, {})) for state in ("open", "mended")]
    counted = [f"{n:,}" for n in (sum(one["cases"].values()), *one["cases"].values())]
    cells = [name, *counted[:3], *map(str, found), f"{run:.0%} of {one['lines']}"]
    return "| " + " | ".join(cells) + " |"


def _reader(name: str) -> Reader:
    return next(reader for reader in READERS if reader.name == name)


HEAD = "| Reader | Cases | Read | Refused | Findings, open | mended | Lines run |\n|---|---|---|---|---|---|---|"


def total(counts: Counts) -> str:
    """What is reached of the goals, in a line."""
    every = {reader.name: cases_of(counts, reader.name) for reader in READERS}
    short = [name for name, number in every.items() if number < GOAL]
    found = sum(len(one.get("open", {})) for one in counts.values())
    return (
        f"{sum(every.values()):,} cases of {GOAL_OF_ALL:,}; {len(every) - len(short)} of {len(every)} readers have had "
        f"{GOAL:,} or more; open findings: {found}{'; below: ' + ', '.join(short) if short else ''}"
    )
