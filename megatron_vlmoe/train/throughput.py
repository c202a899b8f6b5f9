"""Speed of an interval (tokens, samples, FLOP/s, waiting for data), and torch profiler traces of chosen steps."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Iterable, Iterator, Optional

import torch

from megatron_vlmoe.config.schema import Precision, RunConfig
from megatron_vlmoe.stream.batch import Batch
from megatron_vlmoe.stream.layout import StreamLayout

# Dense peak of one device in FLOP/s by a part of its name and the precision (vendors' data sheets).
PEAK_FLOPS = {
    "H200": {"bf16": 989e12, "fp16": 989e12, "fp32": 67e12},
    "H100": {"bf16": 989e12, "fp16": 989e12, "fp32": 67e12},
    "A100": {"bf16": 312e12, "fp16": 312e12, "fp32": 19.5e12},
    "V100": {"fp16": 125e12, "fp32": 15.7e12},
    "L40": {"bf16": 181e12, "fp16": 181e12, "fp32": 90.5e12},
}


def peak_flops(precision: Precision) -> Optional[float]:
    """Peak of this process's GPU; None on CPU and unknown GPUs."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    for part, peaks in PEAK_FLOPS.items():
        if part in name:
            return peaks.get(precision)
    return None


class DataClock:
    """Passes batches on and measures how long the step waited for them.

    Args:
        batches: the loader's batches.
    """

    def __init__(self, batches: Iterable[Batch]) -> None:
        self.iterator = iter(batches)
        self.waited = 0.0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        start = time.perf_counter()
        try:
            return next(self.iterator)
        finally:
            self.waited += time.perf_counter() - start

    def take(self) -> float:
        """Seconds waited since the last call."""
        waited, self.waited = self.waited, 0.0
        return waited


class Throughput:
    """Rates over the steps since the last report.

    Args:
        config: the run.
        world_size: ranks.
        num_micro_batches: per step and data-parallel rank.
        data_size: data-parallel size.
        model_flops: FLOPs of a step, activated experts only.
        precision: for the peak.
    """

    def __init__(
        self,
        config: RunConfig,
        world_size: int,
        num_micro_batches: int,
        data_size: int,
        model_flops: float,
        precision: Precision,
    ) -> None:
        layout = StreamLayout.from_config(config.model, config.data)
        micro_batches = num_micro_batches * data_size
        self.tokens = layout.num_tokens * micro_batches
        self.samples = (layout.texts + layout.pairs + layout.images) * micro_batches
        self.model_flops = model_flops
        self.world_size = world_size
        self.peak = peak_flops(precision)
        self.start = time.perf_counter()
        self.steps = 0

    def step(self) -> None:
        """Counts a finished step."""
        self.steps += 1

    def reset(self) -> None:
        """Starts a new interval, for time that is not training (evaluation, saving)."""
        self.start = time.perf_counter()
        self.steps = 0

    def report(self, data_wait_seconds: float) -> dict[str, float]:
        """Rates of the interval; starts the next one."""
        elapsed = max(time.perf_counter() - self.start, 1e-9)
        steps = max(self.steps, 1)
        rate = steps / elapsed
        metrics = {
            "step_seconds": elapsed / steps,
            "tokens_per_second": self.tokens * rate,
            "samples_per_second": self.samples * rate,
            "tflops_per_second_per_rank": self.model_flops * rate / self.world_size / 1e12,
            "data_wait_fraction": min(data_wait_seconds / elapsed, 1.0),
            "memory_gb": peak_memory_gb(),
        }
        if self.peak:
            metrics["mfu"] = self.model_flops * rate / self.world_size / self.peak
        self.reset()
        return metrics


def peak_memory_gb() -> float:
    """Largest memory of this process so far: of the GPU if there is one, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


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
