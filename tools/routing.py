"""Show which expert each patch and word goes to, as files and one page: the same as `vlmoe routing`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_vlmoe.commands.main import run

if __name__ == "__main__":
    sys.exit(run("routing"))
