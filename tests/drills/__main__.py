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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from drills import files, kills, system
from drills.desk import Desk, Result, Verdict

DRILLS: Mapping[str, Callable[[Desk], Result]] = {
    **{
        f"kill {place}": functools.partial(kills.kill_training, place=place)
        for place in ("start", "step", "save", "rotation", "background save")
    },
    "kill writer": kills.kill_writer,
    **{
        f"kill {what}": functools.partial(kills.kill_tool, what=what)
        for what in ("text", "images", "pairs", "export")
    },
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


def main() -> int:
    """Runs drills one after the other; status 1 if any found something."""
    parser = argparse.ArgumentParser(
        "bash tests/drills/run.sh", description="Breaks runs and looks what is lost."
    )
    parser.add_argument(
        "--count", type=int, default=len(DRILLS), help="drills, each kind in turn (%(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=1, help="decides where things break (%(default)s)"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="KIND", choices=list(DRILLS), help="these kinds"
    )
    parser.add_argument("--append", action="store_true", help="add to the results of earlier runs")
    parser.add_argument("--folder", type=Path, default=Path("runs/drills"), help="(%(default)s)")
    parser.add_argument("--list", action="store_true", help="print the kinds")
    options = parser.parse_args()
    if options.list:
        print("\n".join(DRILLS))
        return 0
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "drills", ignore_errors=True)
    records = folder / "results.jsonl"
    if not options.append:
        records.unlink(missing_ok=True)
    desk = Desk.prepare(folder, options.seed)
    kinds = options.only or list(DRILLS)
    for number in range(options.count):
        kind = kinds[number % len(kinds)]
        desk.number = number
        # So that a drill can be repeated alone: --only KIND --seed as printed.
        seed = options.seed + number
        desk.rng = random.Random(f"{seed} {kind}")
        start = time.monotonic()
        try:
            result = DRILLS[kind](desk)
        except Exception:
            traceback.print_exc()
            result = Result(Verdict.UNCLEAR, "the drill itself failed")
        seconds = time.monotonic() - start
        line = f"{number + 1} of {options.count}: {kind} (seed {seed}, {seconds:.0f} s): {result.verdict.value}"
        print(f"{line}: {result.detail}", flush=True)
        record = {
            "kind": kind,
            "seed": seed,
            "verdict": result.verdict.value,
            "lost_steps": result.lost_steps,
            "training_kills": result.training_kills,
            "seconds": round(seconds, 1),
            "detail": result.detail,
        }
        with open(records, "a") as file:
            file.write(json.dumps(record) + "\n")
        if result.verdict not in BAD:
            shutil.rmtree(desk.own, ignore_errors=True)
    found = [json.loads(line) for line in records.read_text().splitlines()]
    return report(found)


def report(found: list[dict[str, Any]]) -> int:
    """Prints the closing lines; 1 if anything was lost or unclear."""
    counts = Counter(record["verdict"] for record in found)
    by_kind = Counter(record["kind"] for record in found)
    bad = [record for record in found if Verdict(record["verdict"]) in BAD or record["lost_steps"]]
    for record in bad:
        print(f"{record['kind']} (seed {record['seed']}): {record['verdict']}: {record['detail']}")
    print(", ".join(f"{kind} {number}" for kind, number in by_kind.items()))
    ran = len(found) - counts[Verdict.NOT_RUN.value]
    kills_ = sum(record["training_kills"] for record in found)
    print(
        f"{ran} drills ({kills_} kills of training on several processes; {counts[Verdict.NOT_RUN.value]} not run): "
        f"{counts[Verdict.RECOVERED.value]} recovered, {counts[Verdict.CLEAR.value]} clear errors, "
        f"{counts[Verdict.UNCLEAR.value]} unclear errors, {sum(r['lost_steps'] for r in found)} lost steps, "
        f"{counts[Verdict.HANG.value]} hangs, {counts[Verdict.SILENT.value]} silent corruptions"
    )
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
