"""From the options of a training command to a finished run: device, processes, teacher, trainer."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from megatron_vlmoe.tokenizers.vqkd.config import VQKDConfig, build_preset
from megatron_vlmoe.tokenizers.vqkd.teachers import build_teacher
from megatron_vlmoe.tokenizers.vqkd.training import (
    CropStream,
    Trainer,
    TrainingOptions,
    published_lr,
)


@dataclass(frozen=True)
class Recipe:
    """What a preset trains with unless told otherwise."""

    steps: int
    batch_size: int
    lr: float
    warmup_share: float
    """Warm-up steps divided by all steps."""
    min_scale: float
    """Smallest crop as a share of the image's area."""


PRESETS: Mapping[str, Recipe] = {
    # 100 epochs of ImageNet-1k (1,281,167 images) at batch 512; warm-up 10 epochs.
    "base": Recipe(250_000, 512, published_lr(512), 0.1, 0.08),
    "tiny": Recipe(300, 32, 1e-3, 0.05, 0.5),
}


@dataclass(frozen=True, kw_only=True)
class TrainingRequest:
    """Options of the command; None takes the preset's value."""

    output: Path
    preset: str = "base"
    teacher: str = "pixels"
    image_size: int | None = None
    patch_size: int | None = None
    num_codes: int | None = None
    code_dim: int | None = None
    restart_threshold: float | None = None
    steps: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    warmup_steps: int | None = None
    min_scale: float | None = None
    bf16: bool = False
    deterministic: bool = False
    seed: int = 0
    log_interval: int = 20
    save_interval: int = 500

    def build_config(self, teacher_dim: int | None = None) -> VQKDConfig:
        """The architecture. Raises ValueError for sizes that do not fit."""
        names = ("image_size", "patch_size", "num_codes", "code_dim", "restart_threshold")
        overrides: dict[str, Any] = {name: getattr(self, name) for name in names}
        return build_preset(self.preset, teacher=self.teacher, teacher_dim=teacher_dim, **overrides)

    def build_options(self) -> TrainingOptions:
        """Steps, batch and rates. Raises ValueError for values that make no sense."""
        recipe = PRESETS[self.preset]
        steps = recipe.steps if self.steps is None else self.steps
        batch_size = recipe.batch_size if self.batch_size is None else self.batch_size
        scaled = published_lr(batch_size) if self.preset == "base" else recipe.lr
        warmup = round(steps * recipe.warmup_share)
        return TrainingOptions(
            steps=steps,
            batch_size=batch_size,
            lr=scaled if self.lr is None else self.lr,
            warmup_steps=warmup if self.warmup_steps is None else self.warmup_steps,
            seed=self.seed,
            bf16=self.bf16,
            log_interval=self.log_interval,
            save_interval=self.save_interval,
        )

    @property
    def smallest_crop(self) -> float:
        """Smallest crop as a share of the image's area."""
        return PRESETS[self.preset].min_scale if self.min_scale is None else self.min_scale


def train_image_tokenizer(request: TrainingRequest, crops: CropStream) -> str:
    """Train, or go on with, the tokenizer in `request.output`; returns its fingerprint.

    Under torchrun every process takes its share of each batch. Raises ValueError (one line).
    """
    config, options = request.build_config(), request.build_options()
    with process_group() as device:
        if request.deterministic and device.type == "cuda":
            use_deterministic_kernels()
        teacher = build_teacher(
            request.teacher, patch_size=config.patch_size, grid=config.grid, device=device
        )
        config = dataclasses.replace(config, teacher_dim=teacher.dim)
        return Trainer(
            config, options, teacher=teacher, crops=crops, folder=request.output, device=device
        ).run()


def use_deterministic_kernels() -> None:
    """On a GPU the same seed then gives the same bits; call before the first matrix product."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


@contextmanager
def process_group() -> Iterator[torch.device]:
    """Join the other processes where torchrun started this one; yields the device to use."""
    launched = distributed.is_torchelastic_launched()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", distributed.get_node_local_rank(fallback_rank=0))
        torch.cuda.set_device(device)
    if launched:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        if launched:
            distributed.destroy_process_group()
