"""`bash tests/drills/run.sh`: see there."""

from __future__ import annotations

import argparse
import functools
import json
import random
import shutil
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from drills import files, kills, system
from drills.desk import Desk, Result, Verdict

DRILLS: Mapping[str, Callable[[Desk], Result]] = {
    **{
        f"kill {place}": functools.partial(kills.kill_training, place=place)
        for place in kills.PLACES
    },
    "kill writer": kills.kill_writer,
    **{f"kill {what}": functools.partial(kills.kill_tool, what=what) for what in kills.TOOLS},
    "signal": kills.signal_training,
    "stop": kills.stop_for_a_while,
    "stop for good": kills.stop_for_good,
    "full disk": functools.partial(system.fill_disk, in_background=False),
    "full disk in the background": functools.partial(system.fill_disk, in_background=True),
    "two runs": system.start_twice,
    "cut network": system.cut_network,
    **{
        f"{how} {kind}": functools.partial(files.damage_checkpoint, kind=kind, how=how)
        for kind in files.CHECKPOINT
        for how in files.DAMAGES
    },
    **{
        f"{how} {kind}": functools.partial(files.damage_data, kind=kind, how=how)
        for kind in files.CORPUS
        for how in files.DAMAGES
    },
}
BAD = (Verdict.HANG, Verdict.SILENT, Verdict.UNCLEAR)
ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "tests" / "drills" / "results.jsonl"
MENDED = 5
"""So many drills of a kind without a finding since its last one: what was found counts as mended."""
DETAIL_LENGTH = 120


def main() -> int:
    """Runs drills one after the other; status 1 if any found something."""
    parser = argparse.ArgumentParser(
        "bash tests/drills/run.sh", description="Breaks runs and looks what is lost."
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--count", type=int, default=len(DRILLS), help="drills, each kind in turn (%(default)s)"
    )
    size.add_argument(
        "--each", type=int, metavar="N", help="what each kind lacks of N drills without a finding"
    )
    parser.add_argument(
        "--seed", type=int, help="decides where things break (one after the last of the record)"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="KIND", choices=list(DRILLS), help="these kinds"
    )
    parser.add_argument(
        "--append", action="store_true", help=f"add the results to {RECORD.relative_to(ROOT)}"
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/drills"), help="(%(default)s)")
    parser.add_argument("--list", action="store_true", help="print the kinds")
    options = parser.parse_args()
    if options.list:
        print("\n".join(DRILLS))
        return 0
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    records = RECORD if options.append else folder / "results.jsonl"
    if not options.append:
        records.unlink(missing_ok=True)
    found = read(records)
    first = options.seed or 1 + max((record["seed"] for record in found), default=0)
    kinds = options.only or list(DRILLS)
    if options.each:
        lacks = Counter({kind: options.each - good_since_finding(found, kind) for kind in kinds})
        # Each kind in turn, too, so that what ends early has some of all.
        turns = [[kind for kind in kinds if lacks[kind] > turn] for turn in range(options.each)]
        plan = [kind for turn in turns for kind in turn]
    else:
        plan = [kinds[number % len(kinds)] for number in range(options.count)]
    if not plan:
        return report(found)
    desk = Desk.prepare(folder, first)
    for number, kind in enumerate(plan):
        desk.number = number
        # So that a drill can be repeated alone: --only KIND --seed as printed.
        seed = first + number
        desk.rng = random.Random(f"{seed} {kind}")
        start = time.monotonic()
        try:
            result = DRILLS[kind](desk)
        except Exception:
            traceback.print_exc()
            result = Result(Verdict.UNCLEAR, "the drill itself failed")
        seconds = time.monotonic() - start
        line = f"{number + 1} of {len(plan)}: {kind} (seed {seed}, {seconds:.0f} s): {result.verdict.value}"
        print(f"{line}: {result.detail}", flush=True)
        detail = result.detail
        for place in (desk.own, desk.folder, ROOT):
            detail = detail.replace(f"{place}/", "")
        record = {
            "kind": kind,
            "seed": seed,
            "verdict": result.verdict.value,
            "lost_steps": result.lost_steps,
            "training_kills": result.training_kills,
            "seconds": round(seconds, 1),
            "date": time.strftime("%Y-%m-%d"),
            "detail": detail[:DETAIL_LENGTH],
        }
        with open(records, "a") as file:
            file.write(json.dumps(record, separators=(",", ":")) + "\n")
        found.append(record)
        if not is_finding(record):
            shutil.rmtree(desk.own, ignore_errors=True)
    return report(found)


def read(records: Path) -> list[dict[str, Any]]:
    """The results of earlier runs."""
    return (
        [json.loads(line) for line in records.read_text().splitlines()] if records.exists() else []
    )


def is_finding(record: Mapping[str, Any]) -> bool:
    """Whether something was lost, or not said clearly."""
    return Verdict(record["verdict"]) in BAD or bool(record["lost_steps"])


def good_since_finding(found: Sequence[Mapping[str, Any]], kind: str) -> int:
    """Drills of a kind since its last finding."""
    number = 0
    for record in found:
        if record["kind"] == kind and record["verdict"] != Verdict.NOT_RUN.value:
            number = 0 if is_finding(record) else number + 1
    return number


def report(found: Sequence[Mapping[str, Any]]) -> int:
    """Prints the closing lines; 1 if there is a finding that does not count as mended."""
    ran = [record for record in found if record["verdict"] != Verdict.NOT_RUN.value]
    counts = Counter(record["verdict"] for record in ran)
    findings = [record for record in ran if is_finding(record)]
    good = {kind: good_since_finding(found, kind) for kind in {r["kind"] for r in ran}}
    is_open = [record for record in findings if good[record["kind"]] < MENDED]
    for record in findings:
        state = "open" if good[record["kind"]] < MENDED else "mended"
        print(
            f"{state}: {record['kind']} (seed {record['seed']}): {record['verdict']}: {record['detail']}"
        )
    by_kind = Counter(record["kind"] for record in ran)
    print(", ".join(f"{kind} {by_kind[kind]}" for kind in DRILLS))
    print(
        f"{len(ran)} drills of {len(by_kind)} kinds ({sum(r['training_kills'] for r in ran)} kills of training on "
        f"several processes; {len(found) - len(ran)} not run): "
        f"{counts[Verdict.RECOVERED.value]} recovered, {counts[Verdict.CLEAR.value]} clear errors, "
        f"{counts[Verdict.UNCLEAR.value]} unclear errors, {sum(r['lost_steps'] for r in ran)} lost steps, "
        f"{counts[Verdict.HANG.value]} hangs, {counts[Verdict.SILENT.value]} silent corruptions; "
        f"{len(findings) - len(is_open)} of {len(findings)} findings mended"
    )
    return int(bool(is_open))


if __name__ == "__main__":
    sys.exit(main())
