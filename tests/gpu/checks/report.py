"""What a check writes down, and what several checks need: times, differences, commands."""

from __future__ import annotations

import contextlib
import io
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

Size = TypeVar("Size")


class NotRun(Exception):
    """The check cannot be run here; its text says why."""


class Report:
    """Measurements and failures of one check; the file is rewritten with each, so that a killed check leaves them.

    Args:
        path: the file.
        device: `cuda`, or `cpu` for a rehearsal.
        folder: where the check may write; deleted after the run.
    """

    def __init__(self, path: Path, device: str, folder: Path) -> None:
        self.path = path
        self.device = device
        self.folder = folder
        self.measured: dict[str, Any] = {}
        self.failures: list[str] = []
        self.missing: list[str] = []

    @property
    def on_gpu(self) -> bool:
        """Whether this is no rehearsal."""
        return self.device == "cuda"

    def check_device(self) -> None:
        """Raises RuntimeError where there is no GPU to check: the CPU must not pass for one."""
        if self.on_gpu and not torch.cuda.is_available():
            raise RuntimeError("torch sees no CUDA device; --device cpu rehearses without one")

    def size(self, gpu: Size, rehearsal: Size) -> Size:
        """The first on a GPU, the second in a rehearsal."""
        return gpu if self.on_gpu else rehearsal

    def note(self, **values: Any) -> None:
        """Writes measurements down."""
        self.measured.update(values)
        self._write()

    def expect(self, is_so: bool, text: str) -> None:
        """Writes down a failure unless something is so; the check goes on, to measure what else there is."""
        if not is_so:
            self.failures.append(text)
            self._write()

    def left_out(self, what: str) -> None:
        """A part that this machine has not got."""
        self.missing.append(what)
        self._write()

    def not_run(self, reason: str) -> None:
        """The whole check was not run."""
        self._write(not_run=reason)

    def done(self) -> None:
        """The check has come to its end."""
        self._write(done=True)

    def _write(self, **more: Any) -> None:
        content = {"measured": self.measured, "failures": self.failures, "left_out": self.missing}
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps({**content, **more}, default=str))
        os.replace(part, self.path)


def milliseconds(work: Callable[[], object], repetitions: int = 5, warmup: int = 2) -> float:
    """Median time of a call, with all that a GPU was given to do."""
    for _ in range(warmup):
        work()
    taken = []
    for _ in range(repetitions):
        wait()
        start = time.perf_counter()
        work()
        wait()
        taken.append(time.perf_counter() - start)
    return round(1e3 * statistics.median(taken), 4)


def wait() -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def difference(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected entry; infinite for what is not finite."""
    if not bool(torch.isfinite(actual).all()):
        return float("inf")
    scale = float(expected.float().abs().max())
    return float((actual.float() - expected.float()).abs().max()) / max(scale, 1e-30)


def vlmoe(*words: str) -> str:
    """Runs a command of the package in this process; what it printed.

    Raises:
        RuntimeError: if it fails, with the end of what it said.
    """
    from megatron_vlmoe.commands.main import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(words))
    if code:
        said = " ".join(err.getvalue().splitlines()[-3:])
        raise RuntimeError(f"vlmoe {' '.join(words[:3])} ended with {code}: {said}")
    return out.getvalue()


def identical(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether all tensors have the same bits."""
    pairs = zip(actual, expected, strict=True)
    return all(torch.equal(left, right) for left, right in pairs)
