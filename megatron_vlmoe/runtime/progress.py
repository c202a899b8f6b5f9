"""How far a command is: a bar on a terminal, a line now and then in a log file, and one line at the end."""

from __future__ import annotations

import sys
import time
from typing import Self

from tqdm import tqdm

_TERMINAL_SECONDS, _LOG_SECONDS = 0.5, 30.0


class Progress:
    """Counts what is done and shows it on the error stream; leaving its block takes the bar off the screen.

    Args:
        what: what is going on, the first word of every line.
        unit: what is counted, in the plural.
        total: how many there are, where that is known.
    """

    def __init__(self, what: str, unit: str = "records", total: int | None = None) -> None:
        self._what, self._unit, self._total = what, unit, total
        self._count = 0
        self._start = time.monotonic()
        self._next = self._start + _LOG_SECONDS
        # `disable=None` leaves the bar out where the error stream is no terminal.
        self._bar: tqdm[None] = tqdm(
            total=total,
            desc=what,
            unit=f" {unit}",
            mininterval=_TERMINAL_SECONDS,
            leave=False,
            disable=None,
        )

    def add(self, count: int = 1) -> None:
        """Counts some more, and shows it if it is time."""
        self._count += count
        self._bar.update(count)
        if self._bar.disable and time.monotonic() >= self._next:
            self._next = time.monotonic() + _LOG_SECONDS
            self._print(f" of {self._total}" if self._total is not None else "", "...")

    def finish(self, end: str = "") -> None:
        """Shows the last line, with ``end`` at its end."""
        self._bar.close()
        self._print("", end)

    def _print(self, of: str, end: str) -> None:
        seconds = time.monotonic() - self._start
        rate = self._count / max(seconds, 1e-9)
        print(
            f"{self._what}: {self._count}{of} {self._unit} in {seconds:.1f} s, {rate:.1f} {self._unit}/s{end}",
            file=sys.stderr,
            flush=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
