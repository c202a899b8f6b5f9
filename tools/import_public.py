"""Make a checkpoint from a public one: the same as `vlmoe import-public`."""

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_vlmoe.commands.main import run

main = functools.partial(run, "import-public")

if __name__ == "__main__":
    sys.exit(main())
