"""Train the VQ-KD image tokenizer: the same as `vlmoe train-image-tokenizer`."""

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_vlmoe.commands.main import run

main = functools.partial(run, "train-image-tokenizer")

if __name__ == "__main__":
    sys.exit(main())
