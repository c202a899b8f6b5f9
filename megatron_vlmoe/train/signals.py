"""Saves and leaves cleanly when a scheduler asks: SIGTERM, Slurm's signal, an interval or a time limit."""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import Any, Optional

from megatron_vlmoe.config.schema import ConfigError, TrainConfig
from megatron_vlmoe.runtime.distributed import agree


class ExitWatch:
    """Collects reasons to stop; all ranks agree on them once per step.

    Args:
        config: signals, interval and time limit.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.started = time.monotonic()
        self.received: Optional[str] = None
        self.previous: dict[signal.Signals, Any] = {}
        for name in config.exit_signals:
            if not hasattr(signal, name):
                raise ConfigError(f"train.exit_signals has {name}, which is not a signal")
            number = signal.Signals[name]
            self.previous[number] = signal.signal(number, self._receive)

    def _receive(self, number: int, frame: Optional[FrameType]) -> None:
        self.received = signal.Signals(number).name

    def reason(self, step: int) -> str:
        """Why to stop after this step, on every rank the same; empty to go on."""
        interval = self.config.exit_interval
        if interval > 0 and step % interval == 0:
            return f"--exit-interval {interval}"
        minutes = self.config.exit_duration_minutes
        overdue = minutes > 0 and time.monotonic() - self.started > 60.0 * minutes
        if agree(self.received is not None or overdue):
            return self.received or ("train.exit_duration_minutes" if overdue else "another rank")
        return ""

    def close(self) -> None:
        """Puts the former handlers back."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)
