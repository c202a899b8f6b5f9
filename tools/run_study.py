"""Repeat a figure or table of the paper: the same as `vlmoe study`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_vlmoe.commands.main import run

if __name__ == "__main__":
    sys.exit(run("study"))
