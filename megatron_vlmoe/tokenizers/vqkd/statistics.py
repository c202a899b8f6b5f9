"""What is measured while a VQ-KD model trains: means of losses, use of the codebook, their log."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, distributed

from megatron_vlmoe.runtime.files import write_parts_atomic
from megatron_vlmoe.runtime.json_files import logged_step
from megatron_vlmoe.tokenizers.vqkd.quantizer import is_distributed


class RunningMeans:
    """Weighted means of named scalars; kept on their device until `values` is asked for."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}

    def add(self, values: dict[str, Tensor], weight: float = 1.0) -> None:
        """Add one observation of each scalar."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value * weight
            self._weights[name] = self._weights.get(name, 0.0) + weight

    def values(self) -> dict[str, float]:
        """The means so far."""
        return {name: float(total) / self._weights[name] for name, total in self._sums.items()}


class CodeStatistics:
    """How a set of codes spreads over the codebook."""

    def __init__(self, num_codes: int) -> None:
        self.num_codes = num_codes
        self._counts: Tensor | None = None

    def add(self, codes: Tensor) -> None:
        """Count codes of any shape."""
        counts = torch.bincount(codes.detach().flatten(), minlength=self.num_codes)
        self._counts = counts if self._counts is None else self._counts + counts

    def values(self) -> dict[str, float]:
        """`codebook/usage`, the share of codes seen, and `codebook/perplexity` = exp(entropy)."""
        counts = self._counts if self._counts is not None else torch.zeros(self.num_codes)
        share = counts.double() / counts.sum().clamp(min=1)
        entropy = -torch.special.xlogy(share, share).sum()
        return {
            "codebook/usage": float((counts > 0).double().mean()),
            "codebook/perplexity": float(entropy.exp()),
        }

    def reduced(self) -> dict[str, float]:
        """`values` over the codes of all ranks."""
        if is_distributed() and self._counts is not None:
            distributed.all_reduce(self._counts)
        return self.values()


class MetricsLog:
    """One JSON object per line, and a progress line; silent where not `active`.

    Lines of steps after `first_step` (written by a run that was interrupted before its save) are
    dropped; so is everything when a run starts at step 0.
    """

    def __init__(self, path: Path, *, first_step: int, active: bool) -> None:
        self.path = path
        self.active = active
        if active:
            lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
            kept = [line for line in lines if 0 < first_step >= logged_step(line)]
            write_parts_atomic(path, [f"{line}\n" for line in kept])

    def write(self, step: int, values: dict[str, float], total: int | None = None) -> None:
        """Append `{"step": step, ...}` and print it in short."""
        if not self.active:
            return
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": step} | values) + "\n")
        shown = " | ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.say(f"step {step}{f'/{total}' if total else ''} | {shown}")

    def say(self, line: str) -> None:
        """Print a line."""
        if self.active:
            print(line, flush=True)
