"""What a run measures (MoE statistics, speed, profiles), and where that goes (JSONL, TensorBoard, W&B, the screen)."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import resource
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Iterable, Iterator, Mapping, Optional, Sequence, TextIO

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.config.schema import Precision, RunConfig
from megatron_vlmoe.losses.masked import LOSS_OF
from megatron_vlmoe.model.block import MoMEFeedForward, MoMELayer
from megatron_vlmoe.model.vlmoe import VLMoEModel
from megatron_vlmoe.moe.router import HEADER
from megatron_vlmoe.planning.devices import named_device
from megatron_vlmoe.planning.estimate import flops_per_step
from megatron_vlmoe.runtime.distributed import Ranks, device
from megatron_vlmoe.runtime.files import naming, write_bytes_atomic
from megatron_vlmoe.runtime.json_files import logged_step
from megatron_vlmoe.stream.batch import Batch
from megatron_vlmoe.stream.block_plan import block_plans
from megatron_vlmoe.stream.layout import SEGMENTS, StreamLayout
from megatron_vlmoe.stream.sizes import TERMS
from megatron_vlmoe.train.checkpoint_files import SET_ASIDE

log = logging.getLogger("megatron_vlmoe")


Counters = dict[tuple[int, str], Tensor]
"""Of a pool of a block: the sums of `HEADER`, then assignments by expert."""


def collect(chunks: Sequence[VLMoEModel], config: RunConfig, clear: bool = True) -> Counters:
    """Counters of every pool of every block, summed over all ranks since they were last cleared.

    Every rank must call it: a pipeline stage without experts takes part with zeros.

    Args:
        clear: whether they start again from zero.
    """
    slots = [
        (plan.layer_number, pool)
        for plan in block_plans(config.model, config.moe)
        for pool in plan.pools
    ]
    if not slots:
        return {}
    mine: Counters = {}
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            assert isinstance(layer, MoMELayer) and isinstance(layer.mlp, MoMEFeedForward)
            if layer.mlp.moe is not None:
                recorder = layer.mlp.moe.router.recorder  # type: ignore[attr-defined]
                for name, vector in (recorder.take() if clear else recorder.totals).items():
                    mine[layer.layer_number, name] = vector
    vectors = []
    for number, pool in slots:
        empty = torch.zeros(len(HEADER) + pool.num_experts, device=device())
        vectors.append(mine.get((number, pool.name), empty))
    flat = torch.cat(vectors).double()
    dist.all_reduce(flat)
    parts = flat.cpu().split([len(vector) for vector in vectors])
    return {(number, pool.name): part for (number, pool), part in zip(slots, parts)}


def metrics_from_counters(counters: Counters, per_layer: bool) -> dict[str, float]:
    """Metrics `moe/{pool}/...` and `loss/aux/{pool}` of an interval.

    `dropped_fraction` is the share of assignments without a place; `effective_capacity_factor` is expert
    slots over assignments of real tokens; load is relative to the mean; auxiliary losses are sums over
    layers, coefficient included in `loss/aux/*`.
    """
    metrics: dict[str, float] = {}
    for pool in sorted({name for _, name in counters}):
        active = {
            number: vector
            for (number, name), vector in counters.items()
            if name == pool and _entry(vector, "micro_batches") > 0
        }
        if not active:
            continue
        total = torch.stack([c[: len(HEADER)] for c in active.values()]).sum(0)
        metrics.update(_ratios(f"moe/{pool}", total))
        metrics[f"loss/aux/{pool}"] = sum(
            _entry(c, "aux_total") / _entry(c, "micro_batches") for c in active.values()
        )
        # Assignments of every expert relative to the mean.
        loads = [c[len(HEADER) :] / c[len(HEADER) :].mean().clamp(min=1.0) for c in active.values()]
        metrics[f"moe/{pool}/load_max"] = max(float(load.max()) for load in loads)
        metrics[f"moe/{pool}/load_min"] = min(float(load.min()) for load in loads)
        metrics[f"moe/{pool}/dead_experts"] = float(sum(int((load == 0).sum()) for load in loads))
        for (number, vector), load in zip(active.items(), loads) if per_layer else ():
            prefix = f"moe/{pool}/layer_{number}"
            metrics.update(_ratios(prefix, vector))
            metrics[f"{prefix}/load_min"] = float(load.min())
            metrics[f"{prefix}/load_max"] = float(load.max())
            metrics[f"{prefix}/load_p95"] = float(load.quantile(0.95))
            metrics[f"{prefix}/dead_experts"] = float((load == 0).sum())
            for term in TERMS:
                value = _entry(vector, f"aux_{term}") / _entry(vector, "micro_batches")
                if value != 0.0:
                    metrics[f"{prefix}/aux/{term}"] = value
    return metrics


def _entry(vector: Tensor, name: str) -> float:
    return float(vector[HEADER.index(name)])


def _ratios(prefix: str, vector: Tensor) -> dict[str, float]:
    assignments = max(_entry(vector, "assignments"), 1.0)
    metrics = {
        f"{prefix}/dropped_fraction": 1.0 - _entry(vector, "kept") / assignments,
        f"{prefix}/effective_capacity_factor": _entry(vector, "slots") / assignments,
        f"{prefix}/router_entropy": _entry(vector, "entropy") / max(_entry(vector, "tokens"), 1.0),
    }
    for segment in SEGMENTS:
        count = _entry(vector, f"assignments_{segment}")
        if count > 0:
            kept = _entry(vector, f"kept_{segment}")
            metrics[f"{prefix}/dropped_fraction/{LOSS_OF[segment]}"] = 1.0 - kept / count
    return metrics


class Throughput:
    """Rates over the steps since the last report, and the share of time that they waited for data."""

    def __init__(
        self, config: RunConfig, ranks: Ranks, num_micro_batches: int, precision: Precision
    ) -> None:
        layout = StreamLayout.of(config)
        micro_batches = num_micro_batches * ranks.data_size
        self.tokens = layout.num_tokens * micro_batches
        self.samples = (layout.texts + layout.pairs + layout.images) * micro_batches
        # Of activated experts only.
        self.flops_per_rank = flops_per_step(config) / ranks.world_size
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        known = named_device(name)
        self.peak = known.peaks.get(precision) if known else None
        self.reset()

    def reset(self) -> None:
        """Starts a new interval, for time that is not training (evaluation, saving)."""
        self.start = time.perf_counter()
        self.waited = 0.0
        self.steps = 0

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Passes the loader's batches on and measures how long the step waits for them."""
        iterator = iter(batches)
        while True:
            start = time.perf_counter()
            batch = next(iterator, None)
            self.waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def report(self) -> dict[str, float]:
        """Rates of the interval; starts the next one."""
        elapsed = max(time.perf_counter() - self.start, 1e-9)
        steps = max(self.steps, 1)
        rate = steps / elapsed
        # Largest memory of this process so far: of the GPU if there is one, else resident memory.
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if torch.cuda.is_available():
            memory = torch.cuda.max_memory_allocated()
        metrics = {
            "step_seconds": elapsed / steps,
            "tokens_per_second": self.tokens * rate,
            "samples_per_second": self.samples * rate,
            "tflops_per_second_per_rank": self.flops_per_rank * rate / 1e12,
            "data_wait_fraction": min(self.waited / elapsed, 1.0),
            "memory_gb": memory / 1e9,
        }
        if self.peak:
            metrics["mfu"] = self.flops_per_rank * rate / self.peak
        self.reset()
        return metrics


class StepProfiler:
    """Records steps FIRST to LAST of `profile.steps` on the chosen ranks and writes one trace per rank.

    Traces go to `SAVE/profile/` (or `profile/`).
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


class JsonlWriter:
    """One JSON object per logged step.

    A resumed run moves the lines after the step that it starts from to `metrics.set_aside.jsonl`, so the file reads as
    one unbroken run and nothing is lost.

    Args:
        resume_step: finished steps of the checkpoint that the run starts from.

    Raises:
        FileError: it cannot be read or written.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        self.path = path
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self._continued(resume_step)

    def _continued(self, resume_step: int) -> TextIO:
        path = self.path
        before = path.read_bytes() if path.exists() else b""
        kept: list[bytes] = []
        moved: list[bytes] = []
        for line in before.splitlines():
            (kept if 0 < resume_step and logged_step(line) <= resume_step else moved).append(line)
        if moved:
            aside = path.with_name(f"{path.stem}.{SET_ASIDE}{path.suffix}")
            with aside.open("ab") as file:
                file.writelines(line + b"\n" for line in moved)
            log.info("%s: %d later line(s) are now in %s", path, len(moved), aside.name)
        content = b"".join(line + b"\n" for line in kept)
        if content != before:
            write_bytes_atomic(path, content)
        return path.open("a", encoding="utf-8")

    def rewind(self, step: int) -> None:
        """Goes on after a step that the run has gone back to, as a resumed run does."""
        with naming(self.path):
            self.file.close()
            self.file = self._continued(step)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one line; values that are not finite become null.

        Raises:
            FileError: it cannot be written.
        """
        clean = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        with naming(self.path):
            self.file.write(json.dumps({"step": step, **clean}) + "\n")
            self.file.flush()

    def close(self) -> None:
        """Closes the file; what could not be written has been told already."""
        with contextlib.suppress(OSError):
            self.file.close()


class TensorBoardWriter:
    """TensorBoard scalars."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError("log.tensorboard=true needs the package tensorboard") from None
        self.writer: Any = SummaryWriter(str(folder))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds every metric as a scalar."""
        for key, value in metrics.items():
            self.writer.add_scalar(key, value, step)

    def close(self) -> None:
        """Flushes and closes."""
        self.writer.close()


class WandbWriter:
    """Weights & Biases."""

    def __init__(self, config: RunConfig) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError(
                "log.wandb_project is set, but the package wandb is not installed"
            ) from None
        self.run: Any = wandb.init(
            project=config.log.wandb_project,
            name=config.log.wandb_name or None,
            config=asdict(config),
            dir=config.checkpoint.save or None,
            resume="allow",
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs one step."""
        self.run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Ends the run."""
        self.run.finish()


MetricsWriter = JsonlWriter | TensorBoardWriter | WandbWriter
"""Takes the metrics of steps, `write(step, metrics)`, until `close`."""


def progress_line(step: int, steps: int, metrics: Mapping[str, float], eta_seconds: float) -> str:
    """The line of a logged step."""
    short = {"vlm_text": "vlm-t", "vlm_image": "vlm-i"}
    names = [key.removeprefix("loss/") for key in metrics if key.startswith("loss/")]
    # What is a sum of others, or said elsewhere in the line.
    names = [name for name in names if name not in ("total", "vlm") and "/" not in name]
    losses = " ".join(f"{short.get(name, name)} {metrics[f'loss/{name}']:.3f}" for name in names)
    drops = " ".join(
        f"{pool} {100 * metrics[key]:.1f}"
        for pool in ("text", "vision", "shared", "vl")
        if (key := f"moe/{pool}/dropped_fraction") in metrics
    )
    hours, rest = divmod(int(eta_seconds), 3600)
    return (
        f"step {step:>6}/{steps} | loss {metrics['loss/total']:.4f} | {losses} | "
        f"grad {metrics['grad_norm']:.2f} | lr {metrics['lr']:.2e} | "
        + (f"drop % {drops} | " if drops else "")
        + f"{metrics['tokens_per_second']:,.0f} tok/s | data wait {100 * metrics['data_wait_fraction']:.1f} % | "
        f"left {hours}:{rest // 60:02d}:{rest % 60:02d}"
    )
