"""Draws the losses of one or more runs with the entropy of guessing beside them, and prints the last values."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_vlmoe.analysis.experts import draw_experts, experts_of_pools
from megatron_vlmoe.analysis.losses import draw_losses, last_evaluation_table, read_metrics
from megatron_vlmoe.cli import run_guarded


def main(arguments: list[str] | None = None) -> int:
    """Reads RUN/metrics.jsonl of every run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", nargs="+", required=True, help="run folders (with metrics.jsonl)")
    parser.add_argument("--output", required=True, help="PNG file")
    parser.add_argument(
        "--experts", metavar="PNG", help="also draw load, drops and router entropy of the first run"
    )
    options = parser.parse_args(arguments)

    def draw() -> int:
        runs = {path: read_metrics(Path(path)) for path in options.run}
        draw_losses(runs, Path(options.output))
        for path, rows in runs.items():
            print(last_evaluation_table(path, rows))
        print(f"wrote {options.output}")
        if options.experts:
            first = options.run[0]
            draw_experts(first, runs[first], experts_of_pools(Path(first)), Path(options.experts))
            print(f"wrote {options.experts}")
        return 0

    return run_guarded(draw)


if __name__ == "__main__":
    raise SystemExit(main())
