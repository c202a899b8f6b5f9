"""Fuzzes every reader of outside bytes: `bash tests/fuzz/run.sh --help`."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
for below in ("tests", "tests/unit", "tests/fuzz"):
    sys.path.insert(0, str(ROOT / below))

import engine  # noqa: E402
from readers import READERS, Reader  # noqa: E402

FOLDER = ROOT / "runs" / "fuzz"
COUNTS = FOLDER / "counts.json"
GOAL, GOAL_OF_ALL = 20_000, 1_000_000


def main(words: Sequence[str]) -> int:
    """Exit status 0 if nothing was found, 1 if something was."""
    names = [reader.name for reader in READERS]
    parser = argparse.ArgumentParser(prog="bash tests/fuzz/run.sh", description=__doc__)
    parser.add_argument("--cases", type=int, default=1000, help="of every reader (1000)")
    parser.add_argument("--seconds", type=float, default=3600, help="in all, shared evenly (3600)")
    parser.add_argument("--only", nargs="+", choices=names, metavar="READER", help=", ".join(names))
    parser.add_argument("--seed", type=int, help="of the cases; else the time")
    parser.add_argument(
        "--append", action="store_true", help=f"adds the counts to {COUNTS.relative_to(ROOT)}"
    )
    parser.add_argument("--replay", type=Path, metavar="FOLDER", help="reads a saved case again")
    options = parser.parse_args(words)
    if options.replay:
        return replay(options.replay)
    seed = options.seed if options.seed is not None else int(time.time())
    readers = [r for r in READERS if not options.only or r.name in options.only]
    print(f"seed {seed}, {options.cases} cases of each of {len(readers)} readers", flush=True)
    # Imported once, for all processes.
    for module in {"torch", *(module for reader in readers for module in reader.modules)}:
        importlib.import_module(module)
    ends, found = time.monotonic() + options.seconds, 0
    counts = json.loads(COUNTS.read_text()) if options.append and COUNTS.is_file() else {}
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory_folder()) as folder:
        for number, reader in enumerate(readers):
            share = (ends - time.monotonic()) / (len(readers) - number)
            place = Path(folder) / reader.name
            tally = engine.fuzz(reader, place, seed, options.cases, share)
            found += len(tally.findings)
            counts[reader.name] = added(counts.get(reader.name), reader, tally)
            print(row(reader.name, counts[reader.name], tally.seconds), flush=True)
            for finding, saved in tally.findings.items():
                target = FOLDER / "findings" / f"{reader.name}-{Path(saved).name}"
                shutil.rmtree(target, ignore_errors=True)
                shutil.copytree(saved, target)
                again = target.relative_to(ROOT)
                print(f"  {finding}\n    bash tests/fuzz/run.sh --replay {again}", flush=True)
            shutil.rmtree(place)
            if options.append:
                FOLDER.mkdir(parents=True, exist_ok=True)
                COUNTS.write_text(json.dumps(counts, indent=1))
    total = sum(sum(one["outcomes"].values()) for one in counts.values())
    below = [n for n in names if sum(counts.get(n, {}).get("outcomes", {}).values()) < GOAL]
    print(f"{total} cases of {GOAL_OF_ALL}; below {GOAL}: {len(below)} of {len(names)} readers")
    return bool(found)


def memory_folder() -> str | None:
    """A folder in memory, where there is one: every case writes files."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def source_of(reader: Reader) -> str:
    """Stands for the text of the reader's modules: lines of another text are counted anew."""
    files = [importlib.import_module(module).__file__ for module in reader.modules]
    return hashlib.sha256(b"".join(Path(str(f)).read_bytes() for f in files)).hexdigest()[:16]


def added(before: Mapping[str, Any] | None, reader: Reader, tally: engine.Tally) -> dict[str, Any]:
    """The counts of earlier runs and this one."""
    source, lines = source_of(reader), {f"{Path(f).name}:{n}" for f, n in tally.lines}
    outcomes = Counter(before["outcomes"] if before else {})
    outcomes.update(tally.outcomes)
    if before and before["source"] == source:
        lines |= set(before["lines"])
    return {
        "outcomes": dict(outcomes),
        "source": source,
        "possible": tally.possible,
        "lines": sorted(lines),
    }


def row(name: str, counts: Mapping[str, Any], seconds: float) -> str:
    """A reader's counts in a line."""
    outcomes = counts["outcomes"]
    total, share = sum(outcomes.values()), len(counts["lines"]) / max(counts["possible"], 1)
    parts = ", ".join(f"{outcomes.get(k, 0)} {k}" for k in ("read", "refused", "finding"))
    return f"{name:18} {total:8} cases: {parts}; {share:4.0%} of {counts['possible']} lines; {seconds:.0f} s"


def replay(folder: Path) -> int:
    """Reads a saved case in this process."""
    reader = next(r for r in READERS if r.name == folder.resolve().name.rpartition("-")[0])
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory_folder()) as place:
        workshop = engine.Workshop(reader, Path(place) / reader.name)
        case = engine.Case.unpacked((folder / "case.bin").read_bytes())
        try:
            print(f"{reader.name}: {workshop.run(case)}")
        except engine.Finding as finding:
            traceback.print_exception(finding)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
