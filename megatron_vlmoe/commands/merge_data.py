"""Concatenate indexed datasets of one kind and one tokenizer.

vlmoe merge-data --input data/coco data/vg --output data/pairs
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from megatron_vlmoe.commands.options import OUTPUT_PREFIX, CommandParser
from megatron_vlmoe.config.errors import user_files
from megatron_vlmoe.prepare.corpora import merge_datasets


def build_parser() -> CommandParser:
    """The options."""
    parser = CommandParser(
        "merge-data",
        "Concatenate datasets of one kind and one tokenizer, in the given order.",
        OUTPUT_PREFIX,
    )
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="PREFIX", help="datasets to concatenate"
    )
    parser.add_argument("--output", required=True, metavar="PREFIX", help="dataset to make")
    return parser


@user_files()
def main(words: Sequence[str]) -> None:
    """Merges."""
    options = build_parser().parse_args(words)
    source = {"command": shlex.join(["vlmoe", "merge-data", *words]), "inputs": options.input}
    merge_datasets(options.input, options.output, source)
    print(f"wrote {options.output}: {len(options.input)} datasets, one after the other")
