"""Put fine-tuning results side by side: guessing, from scratch, from pretrained dense, from pretrained experts.

python tools/downstream_table.py --runs runs/downstream --data corpora/tasks --output runs/downstream/table.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_vlmoe.cli import run_guarded


def main() -> int:
    """Reads the runs, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--runs", type=Path, required=True, help="folder of TASK/{scratch,dense,moe}"
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the prepared tasks")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()

    def run() -> int:
        from megatron_vlmoe.config.errors import ConfigError
        from megatron_vlmoe.finetune.predictions import write_json
        from megatron_vlmoe.finetune.table import downstream_table, table_lines

        table = downstream_table(options.runs, options.data)
        print("\n".join(table_lines(table)))
        if options.output:
            try:
                write_json(options.output, table)
            except OSError as error:
                raise ConfigError(f"--output {options.output}: {error.strerror}") from None
        return 0

    return run_guarded(run)


if __name__ == "__main__":
    raise SystemExit(main())
