"""Training of the VQ-KD image tokenizer, alone or under torchrun (data parallel), and what its decoder regresses.

Published recipe (BEiT v2, TOKENIZER.md and run_vqkd_training.py): ImageNet-1k, 100 epochs, batch
512, AdamW (0.9, 0.99), weight decay 1e-4, crops of 0.08 to 1 of the image, flip; peak learning
rate 5e-5 * batch / 128 after 10 epochs of linear warm-up, then a cosine down to 1e-5.

Letters: N images, S side in pixels, L = grid^2 patches, F target dimensions.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from megatron_vlmoe.config.errors import ConfigError, DataError, TrainingError
from megatron_vlmoe.runtime.files import open_atomic, write_parts_atomic
from megatron_vlmoe.runtime.json_files import logged_step, read_json
from megatron_vlmoe.runtime.ranks import gpu_of_process
from megatron_vlmoe.tokenizers.vqkd.config import VQKDConfig, build_preset, pixel_teacher_dim
from megatron_vlmoe.tokenizers.vqkd.model import (
    VQKD,
    VQKDLosses,
    build_model,
    compute_fingerprint,
    is_distributed,
    pixel_constant,
    read_torch_file,
    save_vqkd,
)

log = logging.getLogger(__name__)

HF_PREFIX = "hf:"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
CLIP_MODEL_TYPES = ("clip", "clip_vision_model")


class PixelTeacher:
    """The patch's own pixels in [-1, 1], and one constant; needs no download.

    The loss is a cosine, blind to the length of a target. The constant, half as long as the
    pixels of a white patch, gives a mid-grey patch a direction and tells bright from dull.
    """

    def __init__(self, patch_size: int) -> None:
        self.patch_size = patch_size
        self.dim = pixel_teacher_dim(patch_size)

    def __call__(self, pixels: Tensor) -> Tensor:
        """`[N, 3, S, S]` in [0, 1] -> `[N, L, 3 P^2 + 1]`."""
        patches = F.unfold(2.0 * pixels - 1.0, self.patch_size, stride=self.patch_size)
        constant = 0.5 * (3 * self.patch_size**2) ** 0.5
        return F.pad(patches.transpose(1, 2), (0, 1), value=constant)


class FeatureTeacher:
    """Patch features of a frozen CLIP or ViT model in HF format.

    CLIP: patch tokens after the final layer norm times the visual projection, as BEiT v2. Others:
    the last hidden state of the patch tokens. Where the teacher's patches are larger or smaller,
    its input is resized so that its grid is the tokenizer's.
    """

    def __init__(self, folder: Path, grid: int, device: torch.device) -> None:
        hf_config = _read_object(folder / "config.json")
        self.is_clip = hf_config.get("model_type") in CLIP_MODEL_TYPES
        vision = hf_config.get("vision_config", hf_config) if self.is_clip else hf_config
        try:
            self.input_size = grid * int(vision["patch_size"])
            self.native_size = int(vision["image_size"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{folder}: config.json names no patch_size and image_size") from error
        path = folder / "preprocessor_config.json"
        mean, std = list(CLIP_MEAN), list(CLIP_STD)  # known without the file
        if path.is_file():
            content = _read_object(path)
            mean, std = content.get("image_mean", 0), content.get("image_std", 0)
        elif not self.is_clip:
            raise DataError(f"{folder}: no preprocessor_config.json with image_mean and image_std")
        if not (isinstance(mean, list) and isinstance(std, list) and len(mean) == len(std) == 3):
            raise DataError(f"{path}: image_mean and image_std are not three numbers each")
        self.mean, self.std = pixel_constant(mean).to(device), pixel_constant(std).to(device)
        self.num_patches = grid**2
        self.model = load_hf_model(folder, self.is_clip).to(device)
        self.model.eval().requires_grad_(False)
        with torch.no_grad():
            blank = torch.zeros(1, 3, self.input_size, self.input_size, device=device)
            self.dim = self(blank).shape[-1]

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """`[N, 3, S, S]` in [0, 1] -> `[N, L, F]`."""
        if pixels.shape[-1] != self.input_size:
            size = (self.input_size, self.input_size)
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0.0, 1.0)
        resized = self.input_size != self.native_size
        options = {"interpolate_pos_encoding": True} if resized else {}
        inputs = (pixels - self.mean) / self.std
        if not self.is_clip:
            hidden = self.model(pixel_values=inputs, **options).last_hidden_state
            return hidden[:, -self.num_patches :]
        vision = self.model.vision_model
        hidden = vision(pixel_values=inputs, **options).last_hidden_state
        return self.model.visual_projection(vision.post_layernorm(hidden[:, -self.num_patches :]))


Teacher = PixelTeacher | FeatureTeacher
"""Maps pixels `[N, 3, S, S]` in [0, 1] to targets `[N, L, F]`, row-major, without gradient; ``dim`` is F."""


def build_teacher(spec: str, *, patch_size: int, grid: int, device: torch.device) -> Teacher:
    """`pixels` or `hf:DIR`; ValueError (one line) for anything else or an unusable folder."""
    if spec == "pixels":
        return PixelTeacher(patch_size)
    if not spec.startswith(HF_PREFIX):
        raise ConfigError(f"unknown teacher {spec!r}: expected pixels or hf:DIR")
    folder = Path(spec[len(HF_PREFIX) :])
    if not folder.is_dir():
        raise DataError(f"teacher {spec}: no such folder")
    return FeatureTeacher(folder, grid, device)


def load_hf_model(folder: Path, is_clip: bool) -> Any:
    """The vision model of a folder, from disk only; every one of its weights must be there."""
    try:
        import transformers  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise DataError(
            f"teacher {HF_PREFIX}{folder} needs the package transformers: pip install transformers"
        ) from error
    factory: Any = transformers.CLIPVisionModelWithProjection if is_clip else transformers.AutoModel
    try:
        model, info = factory.from_pretrained(
            folder, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"teacher {HF_PREFIX}{folder}: cannot be loaded: {reason}") from error
    missing = sorted(name for name in info["missing_keys"] if "pooler" not in name)
    if missing:
        raise DataError(f"teacher {HF_PREFIX}{folder}: weights are missing: {missing[:4]}")
    return model


def _read_object(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path}: not a JSON object")
    return content


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
        self._counts = torch.zeros(num_codes, dtype=torch.int64)

    def add(self, codes: Tensor) -> None:
        """Count codes of any shape."""
        counts = torch.bincount(codes.detach().flatten(), minlength=len(self._counts))
        self._counts = self._counts.to(counts.device) + counts

    def values(self, all_ranks: bool = False) -> dict[str, float]:
        """`codebook/usage`, the share of codes seen, and `codebook/perplexity` = exp(entropy)."""
        counts = self._counts
        if all_ranks and is_distributed():
            distributed.all_reduce(counts)
        share = counts.double() / counts.sum().clamp(min=1)
        entropy = -torch.special.xlogy(share, share).sum()
        return {
            "codebook/usage": float((counts > 0).double().mean()),
            "codebook/perplexity": float(entropy.exp()),
        }


_LOSSES = ("total", "cosine", "commitment")
STATE_FILE = "training_state.pt"
METRICS_FILE = "metrics.jsonl"


class CropStream(Protocol):
    """Where the trainer gets its images; every crop is a pure function of (seed, step, slot)."""

    num_images: int
    """Images in the corpus."""

    def training_batches(self, first_step: int, rank: int, world_size: int) -> Iterator[Tensor]:
        """From a step on, this rank's share of each batch: uint8 `[n, 3, S, S]`."""
        ...

    def evaluation_batches(self) -> Iterator[Tensor]:
        """The same whole images every time, resized: uint8 `[n, 3, S, S]`."""
        ...


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How to train; the architecture is in `VQKDConfig`."""

    steps: int
    """Optimizer steps in total."""
    batch_size: int
    """Images per step over all ranks."""
    lr: float
    """Peak learning rate."""
    min_lr: float = 1e-5
    """Learning rate at the last step."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    unquantized_steps: int = 0
    """Steps before codes are placed, in which the decoder gets the encoder's own vectors; 0 = published."""
    weight_decay: float = 1e-4
    """AdamW's, on matrices only."""
    seed: int = 0
    """Of the initial weights; the crops have their own copy."""
    bf16: bool = False
    """Encoder and decoder under bf16 autocast; quantiser and losses in fp32."""
    log_interval: int = 20
    """Steps between progress lines."""
    save_interval: int = 500
    """Steps between saves."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_interval", "save_interval"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not (0 < self.lr < math.inf and self.min_lr >= 0):
            raise ConfigError(f"lr must be positive, not {self.lr} (min_lr {self.min_lr})")
        if not 0 <= self.warmup_steps <= self.steps:
            raise ConfigError(f"warmup_steps must be in 0..{self.steps}, not {self.warmup_steps}")
        if not 0 <= self.unquantized_steps < self.steps:
            raise ConfigError(
                f"unquantized_steps must be in 0..{self.steps - 1}, not {self.unquantized_steps}"
            )


def published_lr(batch_size: int) -> float:
    """Peak learning rate of the published recipe: 5e-5 * batch / 128."""
    return 5e-5 * batch_size / 128


def learning_rate(step: int, options: TrainingOptions) -> float:
    """Rate of step `step` (0-based): linear warm-up, then a cosine that ends at `min_lr`."""
    if step < options.warmup_steps:
        return options.lr * (step + 1) / options.warmup_steps
    decay_steps = max(1, options.steps - 1 - options.warmup_steps)
    progress = min(1.0, (step - options.warmup_steps) / decay_steps)
    floor = min(options.min_lr, options.lr)
    return floor + 0.5 * (options.lr - floor) * (1.0 + math.cos(math.pi * progress))


def build_optimizer(model: VQKD, options: TrainingOptions) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices, not on biases, norms, cls token and positions."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_table = name.endswith(("cls_token", "pos_embed"))
        (free if parameter.dim() < 2 or is_table else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": options.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.99), eps=1e-8)


class Trainer:
    """One training run in `folder`; continues an interrupted run of the same identity."""

    def __init__(
        self,
        config: VQKDConfig,
        options: TrainingOptions,
        *,
        teacher: Teacher,
        crops: CropStream,
        folder: Path,
        device: torch.device,
    ) -> None:
        if teacher.dim != config.teacher_dim:
            raise DataError(
                f"teacher {config.teacher} gives {teacher.dim} dimensions, the decoder predicts "
                f"{config.teacher_dim}"
            )
        self.rank = distributed.get_rank() if is_distributed() else 0
        self.world_size = distributed.get_world_size() if is_distributed() else 1
        if options.batch_size % self.world_size:
            raise ConfigError(
                f"batch size {options.batch_size} does not divide by {self.world_size} processes"
            )
        self.options, self.teacher, self.crops = options, teacher, crops
        self.folder, self.device = folder, device
        self.model = build_model(config, options.seed).to(device)
        self.optimizer = build_optimizer(self.model, options)
        self.step = 0
        self.identity = {
            "model": config.to_dict(),
            "seed": options.seed,
            "batch_size": options.batch_size,
            "num_images": crops.num_images,
        }

    def run(self) -> str:
        """Train to the last step, save, and return the tokenizer's fingerprint.

        Raises ValueError (one line) if the folder holds another run or the loss is not finite.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.resume()
        path = self.folder / METRICS_FILE
        if self.rank == 0:
            # Lines of a run that was interrupted before its save are dropped; at step 0 all that are there.
            lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
            kept = [line for line in lines if 0 < self.step >= logged_step(line)]
            write_parts_atomic(path, [f"{line}\n" for line in kept])
        if self.step < self.options.steps:
            self._train()
        fingerprint = compute_fingerprint(self.model)
        if self.rank == 0:
            shown = f"{self.step} steps, fingerprint {fingerprint[:16]}"
            log.info("image tokenizer %s: %s", self.folder, shown)
        return fingerprint

    def _log(self, values: dict[str, float], of: str = "") -> None:
        """Writes a line of metrics, one JSON object, and prints it in short."""
        if self.rank != 0:
            return
        with (self.folder / METRICS_FILE).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": self.step} | values) + "\n")
        shown = " | ".join(f"{name} {value:.4g}" for name, value in values.items())
        log.info("step %d%s | %s", self.step, of, shown)

    def _train(self) -> None:
        options = self.options
        batches = self.crops.training_batches(self.step, self.rank, self.world_size)
        wrapped: nn.Module = self.model
        if self.world_size > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            wrapped = DistributedDataParallel(self.model, device_ids=ids)
        means, statistics = RunningMeans(), CodeStatistics(self.model.config.num_codes)
        started, first = time.perf_counter(), self.step
        for images in batches:
            pixels = self._to_pixels(images)
            if self.step == options.unquantized_steps:
                # K-means on a batch, before what it gives is evaluated.
                self.model.train()
                with torch.no_grad(), self._autocast():
                    vectors = self.model.project(pixels).flatten(0, 1)
                unit = nn.functional.normalize(vectors.float(), dim=-1)
                self.model.quantizer.initialize(unit)
                self._log(self.evaluate())
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.step, options)
            with self._autocast():
                losses: VQKDLosses = wrapped(
                    pixels, self.teacher(pixels), self.step >= options.unquantized_steps
                )
            self.optimizer.zero_grad(set_to_none=True)
            losses.total.backward()
            self.optimizer.step()
            self.step += 1
            means.add({f"loss/{name}": getattr(losses, name).detach() for name in _LOSSES})
            if losses.codes is not None:
                statistics.add(losses.codes)
            if self.step % options.log_interval == 0 or self.step == options.steps:
                values = self._reduced(means)
                if self.step > options.unquantized_steps:
                    values |= statistics.values(all_ranks=True)
                values["learning_rate"] = learning_rate(self.step - 1, options)
                rate = (self.step - first) * options.batch_size / (time.perf_counter() - started)
                self._log(values | {"images_per_second": rate}, f"/{options.steps}")
                means, statistics = RunningMeans(), CodeStatistics(self.model.config.num_codes)
                started, first = time.perf_counter(), self.step
            if self.step == options.steps:
                self._log(self.evaluate())
            if self.step % options.save_interval == 0 or self.step == options.steps:
                self.save()
            if self.step == options.steps:
                return
        raise DataError(f"the images ended before step {options.steps}")

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Losses and use of the codebook on the evaluation images (every rank sees all)."""
        self.model.eval()
        means, statistics = RunningMeans(), CodeStatistics(self.model.config.num_codes)
        for images in self.crops.evaluation_batches():
            pixels = self._to_pixels(images)
            with self._autocast():
                losses = self.model(pixels, self.teacher(pixels))
            named = {f"loss/{name}": getattr(losses, name) for name in _LOSSES[1:]}
            means.add(named, pixels.shape[0])
            assert losses.codes is not None
            statistics.add(losses.codes)
        self.model.train()
        return {f"eval/{k}": v for k, v in (means.values() | statistics.values()).items()}

    def resume(self) -> None:
        """Load `training_state.pt` where there is one; ValueError if it is of another run."""
        path = self.folder / STATE_FILE
        if not path.is_file():
            if (self.folder / "config.json").exists():
                raise DataError(f"{self.folder}: holds a tokenizer without {STATE_FILE}")
            return
        state = read_torch_file(path, self.device)
        try:
            saved = json.loads(state["identity"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: not a training state of an image tokenizer") from error
        differing = [key for key in self.identity if saved.get(key) != self.identity[key]]
        if differing:
            raise DataError(
                f"{self.folder}: holds a run with another {', '.join(differing)}; "
                "choose another output folder"
            )
        self.model.load_state_dict(state["model"])
        groups = self.optimizer.param_groups
        own = [{name: group[name] for name in group if name != "params"} for group in groups]
        self.optimizer.load_state_dict(state["optimizer"])
        # Weight decay and the like are options, and those of the command count.
        for group, options in zip(self.optimizer.param_groups, own, strict=True):
            group.update(options)
        self.step = int(state["step"])

    def save(self) -> None:
        """Write the training state (alone enough to go on), then the tokenizer for its users."""
        if self.rank == 0:
            state = {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "identity": json.dumps(self.identity),
            }
            with open_atomic(self.folder / STATE_FILE) as stream:
                torch.save(state, stream)
            training: dict[str, Any] = {k: v for k, v in self.identity.items() if k != "model"}
            save_vqkd(self.folder, self.model, training | {"steps": self.step})
        if is_distributed():
            distributed.barrier()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.options.bf16)

    def _to_pixels(self, images: Tensor) -> Tensor:
        return images.to(self.device, non_blocking=True).float().div_(255.0)

    def _reduced(self, means: RunningMeans) -> dict[str, float]:
        values = means.values()
        if is_distributed():
            tensor = torch.tensor(list(values.values()), device=self.device, dtype=torch.float64)
            distributed.all_reduce(tensor)
            values = dict(zip(values, (tensor / self.world_size).tolist(), strict=True))
        if not all(map(math.isfinite, values.values())):
            raise TrainingError(
                f"step {self.step}: the loss is not finite: lower the learning rate"
            )
        return values


class Recipe(NamedTuple):
    """What a preset trains with unless told otherwise."""

    steps: int
    batch_size: int
    lr: float
    warmup_share: float  # warm-up steps divided by all steps
    min_scale: float  # smallest crop as a share of the image's area
    unquantized_share: float = 0.0  # steps before codes are placed divided by all steps


PRESETS: Mapping[str, Recipe] = {
    # 100 epochs of ImageNet-1k (1,281,167 images) at batch 512; warm-up 10 epochs.
    "base": Recipe(250_000, 512, published_lr(512), 0.1, 0.08),
    # Codes are placed once the vectors tell colours apart; quantised from the start they collapse before.
    "tiny": Recipe(1500, 32, 5e-3, 0.05, 1.0, 0.8),
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
    unquantized_steps: int | None = None
    min_scale: float | None = None
    bf16: bool = False
    deterministic: bool = False
    seed: int = 0
    log_interval: int = 20
    save_interval: int = 500

    def build_config(self) -> VQKDConfig:
        """The architecture. Raises ValueError for sizes that do not fit."""
        names = ("image_size", "patch_size", "num_codes", "code_dim", "restart_threshold")
        overrides: dict[str, Any] = {name: getattr(self, name) for name in names}
        return build_preset(self.preset, teacher=self.teacher, **overrides)

    def build_options(self) -> TrainingOptions:
        """Steps, batch and rates. Raises ValueError for values that make no sense."""
        recipe = PRESETS[self.preset]
        steps = recipe.steps if self.steps is None else self.steps
        batch_size = recipe.batch_size if self.batch_size is None else self.batch_size
        scaled = published_lr(batch_size) if self.preset == "base" else recipe.lr
        warmup = round(steps * recipe.warmup_share)
        unquantized = int(steps * recipe.unquantized_share)
        return TrainingOptions(
            steps=steps,
            batch_size=batch_size,
            lr=scaled if self.lr is None else self.lr,
            warmup_steps=warmup if self.warmup_steps is None else self.warmup_steps,
            unquantized_steps=(
                unquantized if self.unquantized_steps is None else self.unquantized_steps
            ),
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

    Started by a launcher, every process takes its share of each batch. Raises ValueError (one line).
    """
    config, options = request.build_config(), request.build_options()
    device, launched = torch.device("cpu"), "RANK" in os.environ
    if torch.cuda.is_available():
        device = torch.device("cuda", gpu_of_process(torch.cuda.device_count()))
        torch.cuda.set_device(device)
    if launched:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        if request.deterministic and device.type == "cuda":
            # The same seed then gives the same bits; it comes before the first matrix product.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        teacher = build_teacher(
            request.teacher, patch_size=config.patch_size, grid=config.grid, device=device
        )
        config = dataclasses.replace(config, teacher_dim=teacher.dim)
        return Trainer(
            config, options, teacher=teacher, crops=crops, folder=request.output, device=device
        ).run()
    finally:
        if launched:
            distributed.destroy_process_group()
