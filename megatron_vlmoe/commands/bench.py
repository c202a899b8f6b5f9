"""Measures training steps of presets against each other on random data, in turn within one run.

vlmoe bench --preset base-dense base-32e --texts 16 --images 16 --pairs 16
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_vlmoe.commands.options import CommandParser
from megatron_vlmoe.runtime.lazy import load


def build_parser() -> CommandParser:
    """The options; all others (`--section.option VALUE`) go to every preset."""
    parser = CommandParser(
        "bench",
        "Measures training steps of presets against each other on random data, in turn within one run. Unknown "
        "options (`--section.option VALUE`) go to every preset. Under torchrun, ranks step together.",
        {"--presets": "--preset"},
    )
    add = parser.add_argument
    add(
        "--preset",
        dest="presets",
        nargs="+",
        required=True,
        metavar="NAME",
        help="presets to measure; the first is the reference",
    )
    add("--texts", type=int, default=64, help="texts of a step (%(default)s)")
    add("--images", type=int, default=64, help="images of a step (%(default)s)")
    add("--pairs", type=int, default=64, help="pairs of a step (%(default)s)")
    add("--rounds", type=int, default=3, help="turns of every preset (%(default)s)")
    add("--steps", type=int, default=2, help="measured steps of a turn (%(default)s)")
    add("--warmup", type=int, default=1, help="steps of a turn before them (%(default)s)")
    add("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's (%(default)s)")
    add(
        "--precision",
        default="auto",
        choices=["auto", "fp32", "bf16", "fp16"],
        help="of the model's arithmetic (%(default)s)",
    )
    add("--vocab-size", type=int, default=64_000, help="rows of the text head (%(default)s)")
    add("--visual-vocab-size", type=int, default=8_192, help="rows of the image head (%(default)s)")
    add(
        "--caption-mask-slots",
        type=int,
        default=16,
        help="predicted tokens of a caption (%(default)s)",
    )
    add(
        "--dispatcher",
        choices=["fixed_capacity", "alltoall", "dropless"],
        help="short for --moe.dispatcher",
    )
    add("--output", type=Path, metavar="FILE", help="JSON file, rewritten after every round")
    return parser


def main(words: Sequence[str]) -> None:
    """Runs, prints the table, writes the JSON."""
    parser = build_parser()
    options, others = parser.parse_known_args(words)
    if options.rounds < 1 or options.steps < 1 or options.warmup < 0:
        parser.error("--rounds and --steps must be at least 1 and --warmup at least 0")
    if len(set(options.presets)) != len(options.presets):
        parser.error("--preset names a preset twice")
    if options.dispatcher:
        others += ["--moe.dispatcher", options.dispatcher]
    values = vars(options)
    threads, output, _ = (values.pop(name) for name in ("threads", "output", "dispatcher"))
    module = load("megatron_vlmoe.analysis.bench")
    module.bench(module.BenchOptions(**values), others, threads, output)
