"""Measure training steps of presets against each other: the same as `vlmoe bench step`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_vlmoe.commands.main import run

if __name__ == "__main__":
    sys.exit(run("bench"))
