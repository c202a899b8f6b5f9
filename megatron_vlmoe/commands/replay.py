"""Look for the cause of a step that went wrong: its batch again, with the weights of a checkpoint.

vlmoe replay runs/base/health/step_1234.json
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_vlmoe.commands.options import CommandParser
from megatron_vlmoe.runtime.lazy import load


def build_parser() -> CommandParser:
    """The options."""
    parser = CommandParser(
        "replay",
        "Run the batch of a pretraining step whose gradients were not finite, or a spike, again in one process: the "
        "losses of every micro-batch, and the first module with an output that is not finite.",
    )
    parser.add_argument("event", type=Path, metavar="FILE", help="RUN/health/step_N.json")
    parser.add_argument(
        "--load",
        default="",
        metavar="DIR",
        help="run or checkpoint folder whose weights to take (the last checkpoint before the step)",
    )
    return parser


def main(words: Sequence[str]) -> None:
    """Prints what is found."""
    options = build_parser().parse_args(words)
    for line in load("megatron_vlmoe.train.replay").replay(options.event, options.load):
        print(line, flush=True)
