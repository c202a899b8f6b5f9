"""Concatenate indexed datasets of one kind and one tokenizer: the same as `vlmoe merge-data`."""

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_vlmoe.commands.main import run

main = functools.partial(run, "merge-data")

if __name__ == "__main__":
    sys.exit(main())
