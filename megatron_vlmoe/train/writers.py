"""Where metrics go: JSONL always, TensorBoard and Weights & Biases on request, a progress line on screen."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any, Mapping, Protocol

from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.runtime.files import write_bytes_atomic
from megatron_vlmoe.runtime.json_files import logged_step
from megatron_vlmoe.train.checkpoint_files import SET_ASIDE

log = logging.getLogger("megatron_vlmoe")


class MetricsWriter(Protocol):
    """Takes the metrics of one step."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records one step."""
        ...

    def close(self) -> None:
        """Flushes."""
        ...


class JsonlWriter:
    """One JSON object per logged step.

    A resumed run moves the lines after the step that it starts from to `metrics.set_aside.jsonl`, so the file reads as
    one unbroken run and nothing is lost.

    Args:
        path: the file.
        resume_step: finished steps of the checkpoint that the run starts from.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
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
        self.file = path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one line; values that are not finite become null."""
        clean = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        self.file.write(json.dumps({"step": step, **clean}) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Closes the file."""
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

    def __init__(self, config: RunConfig, resolved: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError(
                "log.wandb_project is set, but the package wandb is not installed"
            ) from None
        self.run: Any = wandb.init(
            project=config.log.wandb_project,
            name=config.log.wandb_name or None,
            config=dict(resolved),
            dir=config.checkpoint.save or None,
            resume="allow",
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs one step."""
        self.run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Ends the run."""
        self.run.finish()


def build_writers(
    config: RunConfig, resolved: Mapping[str, Any], resume_step: int
) -> list[MetricsWriter]:
    """The writers of rank 0; none without `--save`, where metrics only go to the screen."""
    writers: list[MetricsWriter] = []
    if config.checkpoint.save:
        folder = Path(config.checkpoint.save)
        writers.append(JsonlWriter(folder / "metrics.jsonl", resume_step))
        if config.log.tensorboard:
            writers.append(TensorBoardWriter(folder / "tensorboard"))
    if config.log.wandb_project:
        writers.append(WandbWriter(config, resolved))
    return writers


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
