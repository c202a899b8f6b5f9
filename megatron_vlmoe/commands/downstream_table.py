"""Put fine-tuning results side by side: guessing, from scratch, from pretrained dense, from pretrained experts.

vlmoe downstream-table --runs runs/downstream --data corpora/tasks --output runs/downstream/table.json
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_vlmoe.commands.options import CommandParser
from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.finetune.metrics import downstream_table, table_lines
from megatron_vlmoe.finetune.predictions import write_json


def build_parser() -> CommandParser:
    """The options."""
    parser = CommandParser(
        "downstream-table",
        "Put fine-tuning results side by side: guessing, from scratch, from pretrained dense, from pretrained experts.",
    )
    add = parser.add_argument
    add("--runs", type=Path, required=True, metavar="DIR", help="of TASK/{scratch,dense,moe}")
    add("--data", type=Path, required=True, metavar="DIR", help="folder of the prepared tasks")
    add("--output", type=Path, metavar="FILE", help="JSON file")
    return parser


def main(words: Sequence[str]) -> None:
    """Reads the runs, prints the table, writes the JSON."""
    options = build_parser().parse_args(words)
    table = downstream_table(options.runs, options.data)
    print("\n".join(table_lines(table)))
    if options.output:
        try:
            write_json(options.output, table)
        except OSError as error:
            raise ConfigError(f"--output {options.output}: {error.strerror}") from None
