"""Checkpoints to Hugging Face folders and back: `export ...` is `vlmoe export ...`, and so is `import`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_vlmoe.commands.main import run_one_of

if __name__ == "__main__":
    sys.exit(run_one_of(("export", "import")))
