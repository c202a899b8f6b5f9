"""Where checkpoints lie and how they are found; needs no megatron-core, so that tools start at once.

``iter_0000100/`` holds one checkpoint, ``latest_checkpointed_iteration.txt`` beside it names the last complete one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Optional

from torch.distributed.checkpoint import CheckpointException

TRACKER = "latest_checkpointed_iteration.txt"
# megatron-core's choices by which any layout may load what another wrote.
CONTENT_METADATA: Mapping[str, Any] = MappingProxyType(
    {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "non_homogeneous_layers": True,
    }
)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message is one line that names it."""


@dataclass(frozen=True)
class TrainState:
    """Where a run stands; data order, masks and noise follow from it.

    Args:
        step: finished optimizer steps.
        skipped_steps: steps without an update (fp16 overflow).
        best_value: best result of the metric that chooses the best checkpoint; None before the first.
        best_step: step of that result.
        worse_evaluations: evaluations since then.
    """

    step: int = 0
    skipped_steps: int = 0
    best_value: Optional[float] = None
    best_step: int = 0
    worse_evaluations: int = 0


def iteration_name(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"iter_{step:07d}"


def checkpoint_root(run: str | Path) -> Path:
    """Folder of the checkpoints of a run folder (or the folder itself if it already is one)."""
    path = Path(run)
    return path if (path / TRACKER).exists() else path / "checkpoints"


def find_checkpoint(location: str | Path) -> Optional[Path]:
    """The checkpoint that a run folder, checkpoint folder or iteration folder names; None if there is none.

    Raises:
        CheckpointError: if the tracker names a checkpoint that is not there.
    """
    path = Path(location)
    if (path / "metadata.json").exists():
        return path
    tracker = checkpoint_root(path) / TRACKER
    if not tracker.exists():
        return None
    text = tracker.read_text().strip()
    if not text.isdigit():
        raise CheckpointError(f"{tracker}: expected a step number, found {text!r}")
    target = tracker.parent / iteration_name(int(text))
    if not (target / "metadata.json").exists():
        raise CheckpointError(f"{target}: named by {tracker.name}, but missing or incomplete")
    return target


def one_line(error: BaseException) -> str:
    """What went wrong; torch wraps the errors of all ranks in one that prints their tracebacks."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    message = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
