"""Fill a masked word and masked patches of a captioned picture, as a PNG: the same as `vlmoe fill-masked`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_vlmoe.commands.main import run

if __name__ == "__main__":
    sys.exit(run("fill-masked"))
