"""Saves and leaves cleanly when a scheduler asks: SIGTERM, Slurm's signal, an interval or a time limit."""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import Any, Optional

from megatron_vlmoe.config.schema import TrainConfig
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
        self.is_leaving = False
        self.previous: dict[signal.Signals, Any] = {}
        for name in config.exit_signals:
            number = signal.Signals[name]
            self.previous[number] = signal.signal(number, self._receive)

    def _receive(self, number: int, frame: Optional[FrameType]) -> None:
        self.received = signal.Signals(number).name

    def reason(self, step: int) -> str:
        """Why to stop after this step, on every rank the same; empty to go on."""
        interval = self.config.exit_interval
        if interval > 0 and step % interval == 0:
            return f"--exit-interval {interval}"
        if self.is_asked():
            return self.received or (
                "train.exit_duration_minutes" if self._is_overdue() else "another rank"
            )
        return ""

    def is_asked(self) -> bool:
        """Whether any rank has got a signal or has run out of time; every rank must call it."""
        self.is_leaving = agree(self.received is not None or self._is_overdue())
        return self.is_leaving

    def close(self) -> None:
        """Puts the former handlers back, unless the process leaves now: a second signal must not end it sooner."""
        if not self.is_leaving:
            for number, handler in self.previous.items():
                signal.signal(number, handler)

    def _is_overdue(self) -> bool:
        minutes = self.config.exit_duration_minutes
        return minutes > 0 and time.monotonic() - self.started > 60.0 * minutes
