"""Show what a checkpoint or a Hugging Face export holds and whether it is sound, or how two differ.

vlmoe inspect-checkpoint runs/quickstart
vlmoe compare-checkpoints runs/quickstart exports/quickstart
"""

from __future__ import annotations

import contextlib
import os
import sys
from argparse import ArgumentTypeError
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_vlmoe.commands.options import CommandParser
from megatron_vlmoe.config.command_line import to_yaml
from megatron_vlmoe.config.errors import UserError, user_files
from megatron_vlmoe.runtime.files import write_text_atomic
from megatron_vlmoe.runtime.lazy import load

# As diff and grep: 1 says that something was found, 2 that there was no looking.
FOUND, TROUBLE = 1, 2
PATH_HELP = "run, checkpoint or iteration folder of any layout, or Hugging Face folder"


def build_parser() -> CommandParser:
    """The options of an inspection."""
    parser = CommandParser(
        "inspect-checkpoint",
        "Print what a checkpoint holds; exit status 1 if a tensor is missing, unexpected or not finite.",
    )
    parser.add_argument("path", metavar="PATH", help=PATH_HELP)
    parser.add_argument("--config", action="store_true", help="print the whole configuration too")
    _add_json(parser)
    return parser


def build_comparison_parser() -> CommandParser:
    """The options of a comparison."""
    parser = CommandParser(
        "compare-checkpoints",
        "Compare two checkpoints; exit status 0 if all tensors are equal, 1 if not.",
    )
    parser.add_argument("left", metavar="A", help=PATH_HELP)
    parser.add_argument("right", metavar="B", help="likewise")
    parser.add_argument(
        "--top",
        type=_count,
        default=20,
        metavar="N",
        help="lines of a list; 0 is all (%(default)s)",
    )
    parser.add_argument("--optimizer", action="store_true", help="compare optimizer states too")
    _add_json(parser)
    return parser


def _add_json(parser: CommandParser) -> None:
    parser.add_argument(
        "--json", metavar="FILE", help="write everything as JSON; - prints it instead of the text"
    )


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ArgumentTypeError(f"{value} is negative")
    return value


def main(words: Sequence[str]) -> int:
    """Inspects; returns the exit status."""
    options = build_parser().parse_args(words)
    with _trouble():
        report = load("megatron_vlmoe.convert.inspect")
        inspection = report.inspect_checkpoint(options.path)
        lines = report.inspection_lines(inspection)
        if options.config:
            lines += ["", *to_yaml(inspection.source.config).rstrip().split("\n")]
        _output(lines, report.inspection_json(inspection), options.json)
    return FOUND if inspection.problems else 0


def compare_main(words: Sequence[str]) -> int:
    """Compares; returns the exit status."""
    options = build_comparison_parser().parse_args(words)
    with _trouble():
        report = load("megatron_vlmoe.convert.compare")
        comparison = report.compare_checkpoints(options.left, options.right, options.optimizer)
        lines = report.comparison_lines(comparison, options.top)
        _output(lines, report.comparison_json(comparison), options.json)
    return 0 if comparison.equal else FOUND


@contextlib.contextmanager
def _trouble() -> Iterator[None]:
    """Gives errors the status of trouble."""
    try:
        with user_files():
            yield
    except UserError as error:
        error.exit_status = TROUBLE
        raise


def _output(lines: Sequence[str], content: str, json_file: str | None) -> None:
    if json_file and json_file != "-":
        write_text_atomic(Path(json_file), content)
    try:
        print(content.rstrip() if json_file == "-" else "\n".join(lines), flush=True)
    except BrokenPipeError:
        # The reader went away (`... | head`); the exit status still tells what was found.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
