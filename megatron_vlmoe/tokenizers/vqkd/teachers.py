"""Teachers: what a VQ-KD decoder regresses for each patch.

Letters: N images, S side in pixels, L = grid^2 patches, F target dimensions.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_vlmoe.config.errors import ConfigError, DataError
from megatron_vlmoe.tokenizers.vqkd.config import pixel_teacher_dim

HF_PREFIX = "hf:"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
CLIP_MODEL_TYPES = ("clip", "clip_vision_model")


class Teacher(Protocol):
    """Maps pixels `[N, 3, S, S]` in [0, 1] to targets `[N, L, F]`, row-major."""

    dim: int
    """F."""

    def __call__(self, pixels: Tensor) -> Tensor:
        """Targets without gradient."""
        ...


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
        hf_config = read_json(folder / "config.json")
        self.is_clip = hf_config.get("model_type") in CLIP_MODEL_TYPES
        vision = hf_config.get("vision_config", hf_config) if self.is_clip else hf_config
        try:
            self.input_size = grid * int(vision["patch_size"])
            self.native_size = int(vision["image_size"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{folder}: config.json names no patch_size and image_size") from error
        mean, std = read_pixel_constants(folder, self.is_clip)
        self.mean = torch.tensor(mean, device=device).view(1, 3, 1, 1)
        self.std = torch.tensor(std, device=device).view(1, 3, 1, 1)
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
        options = {}
        if self.input_size != self.native_size:
            options["interpolate_pos_encoding"] = True
        inputs = (pixels - self.mean) / self.std
        if not self.is_clip:
            hidden = self.model(pixel_values=inputs, **options).last_hidden_state
            return hidden[:, -self.num_patches :]
        vision = self.model.vision_model
        hidden = vision(pixel_values=inputs, **options).last_hidden_state
        return self.model.visual_projection(vision.post_layernorm(hidden[:, -self.num_patches :]))


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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; ValueError (one line) if it is missing or none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: not a JSON object")
    return content


def read_pixel_constants(folder: Path, is_clip: bool) -> tuple[list[float], list[float]]:
    """Mean and standard deviation from `preprocessor_config.json`; for CLIP known without it."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        if is_clip:
            return list(CLIP_MEAN), list(CLIP_STD)
        raise DataError(f"{folder}: no preprocessor_config.json with image_mean and image_std")
    content = read_json(path)
    mean, std = content.get("image_mean"), content.get("image_std")
    if not (isinstance(mean, list) and isinstance(std, list) and len(mean) == len(std) == 3):
        raise DataError(f"{path}: image_mean and image_std are not three numbers each")
    return mean, std
