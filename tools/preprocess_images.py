"""Check images and put them into an indexed dataset: the same as `vlmoe index-images`."""

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_vlmoe.commands.main import run

main = functools.partial(run, "index-images")

if __name__ == "__main__":
    sys.exit(main())
