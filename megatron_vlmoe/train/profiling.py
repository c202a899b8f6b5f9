"""Torch profiler traces of chosen steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

import torch

from megatron_vlmoe.config.schema import RunConfig


class StepProfiler:
    """Records steps FIRST to LAST of `profile.steps` on the chosen ranks and writes one trace per rank.

    Args:
        config: the run; traces go to `SAVE/profile/` (or `profile/`).
        rank: this rank.
    """

    def __init__(self, config: RunConfig, rank: int) -> None:
        self.steps = config.profile.steps if rank in config.profile.ranks else ()
        self.with_memory = config.profile.with_memory
        self.path = Path(config.checkpoint.save or ".") / "profile" / f"rank{rank}.json.gz"
        self.profiler: Optional[Any] = None

    def before(self, step: int) -> None:
        """Called before step `step` (from 1)."""
        if self.steps and step == self.steps[0]:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self.profiler = torch.profiler.profile(
                activities=activities, profile_memory=self.with_memory, record_shapes=True
            )
            self.profiler.start()

    def after(self, step: int) -> None:
        """Called after step `step`."""
        if self.profiler is not None and step >= self.steps[1]:
            self.close()

    def close(self) -> None:
        """Writes what was recorded, also when the run ends early."""
        if self.profiler is None:
            return
        self.profiler.stop()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.profiler.export_chrome_trace(str(self.path))
        self.profiler = None
