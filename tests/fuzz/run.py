"""Fuzzes every reader of outside bytes: `bash tests/fuzz/run.sh --help`."""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
for below in ("tests", "tests/unit", "tests/fuzz"):
    sys.path.insert(0, str(ROOT / below))

import engine  # noqa: E402
import record  # noqa: E402
from readers import READERS  # noqa: E402

FOLDER = ROOT / "runs" / "fuzz"
COUNTS = ROOT / "tests" / "fuzz" / "counts.json"


def main(words: Sequence[str]) -> int:
    """Exit status 0 if nothing was found, or with --report, nothing is open; else 1."""
    names = [reader.name for reader in READERS]
    parser = argparse.ArgumentParser(prog="bash tests/fuzz/run.sh", description=__doc__)
    parser.add_argument("--cases", type=int, default=1000, help="of every reader (1000)")
    parser.add_argument("--seconds", type=float, default=3600, help="in all, shared evenly (3600)")
    parser.add_argument("--only", nargs="+", choices=names, metavar="READER", help=", ".join(names))
    parser.add_argument("--seed", type=int, help="of the cases; else the time")
    where = COUNTS.relative_to(ROOT)
    parser.add_argument("--append", action="store_true", help=f"adds the counts to {where}")
    parser.add_argument("--report", action="store_true", help=f"prints {where} as a table")
    parser.add_argument("--replay", type=Path, metavar="FOLDER", help="reads a saved case again")
    options = parser.parse_args(words)
    if options.replay:
        return replay(options.replay)
    counts = record.load(COUNTS)
    if options.report:
        print(record.HEAD)
        for name in counts:
            print(record.row(name, counts[name]))
        print(f"\n{record.total(counts)}")
        return any("open" in one for one in counts.values())
    seed = options.seed if options.seed is not None else int(time.time())
    readers = [r for r in READERS if not options.only or r.name in options.only]
    print(f"seed {seed}, {options.cases} cases of each of {len(readers)} readers", flush=True)
    # Imported once, for all processes.
    for module in {"torch", *(module for reader in readers for module in reader.modules)}:
        importlib.import_module(module)
    ends, found = time.monotonic() + options.seconds, 0
    run: record.Counts = {}
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory_folder()) as folder:
        for number, reader in enumerate(readers):
            share = (ends - time.monotonic()) / (len(readers) - number)
            place = Path(folder) / reader.name
            again = record.open_cases(record.load(COUNTS), reader) if options.append else {}
            tally = engine.fuzz(reader, place, seed, options.cases, share, [*again.values()])
            found += len(tally.findings)
            record.add(run, reader, tally, ())
            print(f"{record.row(reader.name, run[reader.name])} {tally.seconds:.0f} s", flush=True)
            if options.append:
                with record.changed(COUNTS, FOLDER / "counts.lock") as counts:
                    record.add(counts, reader, tally, again)
            for finding, saved in tally.findings.items():
                target = FOLDER / "findings" / f"{reader.name}-{Path(saved).name}"
                shutil.rmtree(target, ignore_errors=True)
                shutil.copytree(saved, target)
                told = f"{tally.found[finding]} times: {finding}"
                print(f"  {told}\n    bash tests/fuzz/run.sh --replay {target.relative_to(ROOT)}")
            shutil.rmtree(place)
    if options.append:
        print(record.total(record.load(COUNTS)))
    return bool(found)


def memory_folder() -> str | None:
    """A folder in memory, where there is one: every case writes files."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


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
