"""Draws the losses of one or more runs with the entropy of guessing beside them, and prints the last values.

vlmoe plot-losses --run runs/quickstart --output runs/quickstart/losses.png
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_vlmoe.analysis.experts import draw_experts, experts_of_pools
from megatron_vlmoe.analysis.losses import draw_losses, last_evaluation_table, read_metrics
from megatron_vlmoe.commands.options import CommandParser
from megatron_vlmoe.config.errors import user_files


def build_parser() -> CommandParser:
    """The options."""
    parser = CommandParser(
        "plot-losses",
        "Draws the losses of one or more runs with the entropy of guessing beside them, and prints the last values.",
    )
    parser.add_argument(
        "--run", nargs="+", required=True, metavar="DIR", help="run folders (with metrics.jsonl)"
    )
    parser.add_argument("--output", required=True, metavar="PNG", help="picture to draw")
    parser.add_argument(
        "--experts", metavar="PNG", help="also draw load, drops and router entropy of the first run"
    )
    return parser


@user_files()
def main(words: Sequence[str]) -> None:
    """Reads RUN/metrics.jsonl of every run."""
    options = build_parser().parse_args(words)
    runs = {path: read_metrics(Path(path)) for path in options.run}
    draw_losses(runs, Path(options.output))
    for path, rows in runs.items():
        print(last_evaluation_table(path, rows))
    print(f"wrote {options.output}")
    if options.experts:
        first = options.run[0]
        draw_experts(first, runs[first], experts_of_pools(Path(first)), Path(options.experts))
        print(f"wrote {options.experts}")
