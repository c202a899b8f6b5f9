"""Make a sparse checkpoint of a dense one: the same as `vlmoe upcycle`."""

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_vlmoe.commands.main import run

main = functools.partial(run, "upcycle")

if __name__ == "__main__":
    sys.exit(main())
