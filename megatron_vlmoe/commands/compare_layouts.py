"""Run one preset at several parallel layouts from one seed checkpoint and compare losses and gradient norms.

vlmoe compare-layouts --preset tiny-8e --layouts tp1 tp2 pp2 ep2 tp2,ep2 --steps 3 --random-data

Other options go to `vlmoe pretrain`, the data options among them.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megatron_vlmoe.analysis.layouts import (
    Metrics,
    comparable_options,
    largest_difference,
    parse_layout,
    run_layout,
    table,
)
from megatron_vlmoe.commands.options import CommandParser
from megatron_vlmoe.config.errors import ConfigError


def build_parser() -> CommandParser:
    """The options; all others go to `pretrain`."""
    parser = CommandParser(
        "compare-layouts",
        "Run one preset at several parallel layouts from one seed checkpoint and compare them.",
        epilog="Every other option goes to `vlmoe pretrain`.",
    )
    parser.add_argument(
        "--layouts",
        nargs="+",
        required=True,
        metavar="L",
        help="such as tp1 tp2 pp2 ep2 tp2,ep2 pp2,vpp2 dp2; the first is the reference",
    )
    parser.add_argument("--steps", type=int, default=3, help="steps of every run")
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, help="largest relative difference (fp32: 1e-4)"
    )
    parser.add_argument("--random-data", action="store_true", help="needs no datasets")
    parser.add_argument("--output", default="", help="keeps the runs in this new folder")
    return parser


def main(words: Sequence[str]) -> int:
    """Compares; returns 1 above the tolerance."""
    options, others = build_parser().parse_known_args(words)
    with tempfile.TemporaryDirectory() as temporary:
        return _compare(options, others, Path(options.output or temporary))


def _compare(options: argparse.Namespace, words: Sequence[str], folder: Path) -> int:
    if options.output and folder.exists():
        raise ConfigError(f"--output {folder} exists; name a new folder")
    layouts = [parse_layout(name) for name in options.layouts]
    words = comparable_options(words, options.steps)
    seed = folder / "0" / "checkpoints" / "iter_0000000"
    runs: dict[str, Metrics] = {}
    for index, layout in enumerate(layouts):
        print(f"running {layout.name} on {layout.world_size} process(es)", flush=True)
        start = ["--load", str(seed)] if index else ["--save-initial"]
        runs[layout.name] = run_layout(
            layout, [*words, *start], folder / str(index), options.random_data
        )
    print(table(runs))
    reference = runs[layouts[0].name]
    worst = 0.0
    for layout in layouts[1:]:
        difference, where = largest_difference(runs[layout.name], reference)
        worst = max(worst, difference)
        print(
            f"{layout.name}: largest relative difference to {layouts[0].name} {difference:.2e} ({where})"
        )
    if worst > options.tolerance:
        print(f"above the tolerance {options.tolerance:g}")
        return 1
    return 0
