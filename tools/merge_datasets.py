"""Concatenate indexed datasets of one kind and one tokenizer.

python tools/merge_datasets.py --input data/coco data/vg --output-prefix data/pairs
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_vlmoe.prepare.merge import merge_datasets
from megatron_vlmoe.prepare.tool import run_tool


def main(argv: Sequence[str] | None = None) -> int:
    """Merges; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Concatenate datasets of one kind and one tokenizer, in the given order."
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="PREFIX")
    parser.add_argument("--output-prefix", required=True, metavar="P")
    arguments = sys.argv[1:] if argv is None else list(argv)
    options = parser.parse_args(arguments)
    command = shlex.join(["tools/merge_datasets.py", *arguments])
    source = {"command": command, "inputs": options.input}
    return run_tool(lambda: merge_datasets(options.input, options.output_prefix, source))


if __name__ == "__main__":
    sys.exit(main())
