"""Measure parts of this project beside what could take their place: the same as `vlmoe bench`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_vlmoe.commands.main import run

if __name__ == "__main__":
    sys.exit(run("bench"))
