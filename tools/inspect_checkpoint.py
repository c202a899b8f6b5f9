"""Show what a checkpoint holds: `vlmoe inspect-checkpoint`; or `diff A B`: `vlmoe compare-checkpoints A B`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_vlmoe.commands.main import run


def main(words: list[str]) -> int:
    """Inspects or compares; returns the exit status."""
    if words[:1] == ["diff"]:
        return run("compare-checkpoints", words[1:])
    return run("inspect-checkpoint", words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
