"""Show what a checkpoint or a Hugging Face export holds and whether it is sound, or how two differ.

python tools/inspect_checkpoint.py runs/quickstart
python tools/inspect_checkpoint.py diff runs/quickstart exports/quickstart
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_vlmoe.config.command_line import to_yaml
from megatron_vlmoe.config.errors import ConvertError
from megatron_vlmoe.convert.compare import compare_checkpoints
from megatron_vlmoe.convert.compare_report import comparison_json, comparison_lines
from megatron_vlmoe.convert.inspect import inspect_checkpoint
from megatron_vlmoe.convert.inspect_report import inspection_json, inspection_lines
from megatron_vlmoe.runtime.files import write_text_atomic

# As diff and grep: 1 says that something was found, 2 that there was no looking.
FOUND, TROUBLE = 1, 2
PATH_HELP = "run, checkpoint or iteration folder of any layout, or Hugging Face folder"


def parse_inspect(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the command line of an inspection."""
    parser = argparse.ArgumentParser(
        description="Print what a checkpoint holds; exit status 1 if a tensor is missing, unexpected or not finite.",
        epilog="`diff A B` in place of PATH compares two; `diff --help` lists its options.",
    )
    parser.add_argument("path", metavar="PATH", help=PATH_HELP)
    parser.add_argument("--config", action="store_true", help="print the whole configuration too")
    _add_json(parser)
    return parser.parse_args(arguments)


def parse_diff(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the command line of a comparison."""
    parser = argparse.ArgumentParser(
        prog=f"{Path(sys.argv[0]).name} diff",
        description="Compare two checkpoints; exit status 0 if all tensors are equal, 1 if not.",
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
    return parser.parse_args(arguments)


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", metavar="FILE", help="write everything as JSON; - prints it instead of the text"
    )


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


def inspect(options: argparse.Namespace) -> int:
    """Inspects; returns the exit status."""
    inspection = inspect_checkpoint(options.path)
    lines = inspection_lines(inspection)
    if options.config:
        lines += ["", *to_yaml(inspection.source.config).rstrip().split("\n")]
    _output(lines, inspection_json(inspection), options.json)
    return FOUND if inspection.problems else 0


def diff(options: argparse.Namespace) -> int:
    """Compares; returns the exit status."""
    comparison = compare_checkpoints(options.left, options.right, options.optimizer)
    lines = comparison_lines(comparison, options.top)
    _output(lines, comparison_json(comparison), options.json)
    return 0 if comparison.equal else FOUND


def _output(lines: Sequence[str], content: str, json_file: str | None) -> None:
    if json_file and json_file != "-":
        write_text_atomic(Path(json_file), content)
    try:
        print(content.rstrip() if json_file == "-" else "\n".join(lines), flush=True)
    except BrokenPipeError:
        # The reader went away (`... | head`); the exit status still tells what was found.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(argv: Sequence[str] | None = None) -> int:
    """Inspects or compares; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words[:1] == ["diff"]:
            return diff(parse_diff(words[1:]))
        return inspect(parse_inspect(words))
    except (ConvertError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return TROUBLE


if __name__ == "__main__":
    sys.exit(main())
