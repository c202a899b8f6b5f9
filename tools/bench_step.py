"""Measure training steps of presets against each other: the same as `vlmoe bench`."""

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_vlmoe.commands.main import run

main = functools.partial(run, "bench")

if __name__ == "__main__":
    sys.exit(main())
