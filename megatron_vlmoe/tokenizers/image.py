"""The image tokenizer as pretraining sees it: frozen, pixels in, visual codes out.

It also reads the published BEiT v2 VQ-KD checkpoints (`vqkd_encoder_base_decoder_*.pth`). Parameter names and shapes:
microsoft/unilm, beit2/modeling_vqkd.py, modeling_finetune.py and norm_ema_quantizer.py. The architecture is read off
the shapes; the number of heads is not visible there: all published models have heads of 64 dimensions.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.tokenizers.vqkd.config import VQKDConfig
from megatron_vlmoe.tokenizers.vqkd.model import (
    CONFIG_FILE,
    VQKD,
    build_model,
    compute_fingerprint,
    describe_mismatch,
    load_vqkd,
    noted_fingerprint,
    read_torch_file,
)


@dataclass(frozen=True)
class ImportReport:
    """What became of each tensor of an imported file."""

    taken: tuple[str, ...]
    """Names in the file whose values are now in the model."""
    left: tuple[str, ...]
    """Names in the file that the model has no use for (teacher, unused statistics)."""

    def summary(self) -> str:
        """Two lines for a log: how many were taken, and the names that were left."""
        left = ", ".join(self.left) or "none"
        return f"took {len(self.taken)} tensors\nleft {len(self.left)} tensors: {left}"


class ImageTokenizer:
    """A frozen VQ-KD encoder and codebook.

    The codes of an image do not depend on the images beside it in a batch (up to the rounding of
    the device's matrix products, which can decide only between codes that are equally near).
    """

    def __init__(
        self, model: VQKD, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"the image tokenizer runs in float32 or bfloat16, not {dtype}")
        self.fingerprint: str = compute_fingerprint(model)
        """sha256 (hex) of all that decides an image's codes."""
        self.device = torch.device(device)
        self.dtype = dtype
        self.import_report: ImportReport | None = None
        """For a published checkpoint: which of its tensors were taken and which left."""
        model.decoder = None
        model.feature_head = None
        self.model = model.requires_grad_(False).eval().to(self.device)
        self.image_size = model.config.image_size
        """Side S of the square input in pixels."""
        self.patch_size = model.config.patch_size
        """Side P of a patch in pixels."""
        self.grid = model.config.grid
        """Patches per side, S / P; an image has grid^2 codes."""
        self.num_codes = model.config.num_codes
        """Size of the visual vocabulary."""

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> ImageTokenizer:
        """Load a folder made by `vlmoe train-image-tokenizer` or a published BEiT v2 `.pth`.

        Weights stay in fp32; with `dtype` bfloat16 the encoder runs under autocast, the code
        projection and the search in fp32. Raises ValueError (one line) naming the path.
        """
        path = Path(path)
        if path.is_dir():
            tokenizer = cls(load_vqkd(path), device=device, dtype=dtype)
            if tokenizer.fingerprint != noted_fingerprint(path, tokenizer.fingerprint):
                raise DataError(
                    f"{path}: damaged: its weights give another fingerprint than {CONFIG_FILE} says"
                )
            return tokenizer
        if not path.is_file():
            raise DataError(f"{path}: no such image tokenizer folder or file")
        model, report = load_official(path)
        tokenizer = cls(model, device=device, dtype=dtype)
        tokenizer.import_report = report
        return tokenizer

    def to(self, device: torch.device | str) -> None:
        """Moves it."""
        self.device = torch.device(device)
        self.model.to(self.device)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """RGB `[N, 3, S, S]` float in [0, 1] -> codes `[N, (S/P)^2]` int64, row-major.

        Raises ValueError for another shape or an integer type.
        """
        expected = (3, self.image_size, self.image_size)
        if pixels.dim() != 4 or tuple(pixels.shape[1:]) != expected:
            raise ValueError(f"expected pixels [N, {expected}], got {list(pixels.shape)}")
        if not pixels.is_floating_point():
            raise ValueError(f"expected float pixels in [0, 1], got {pixels.dtype}")
        pixels = pixels.to(self.device, torch.float32)
        reduced = self.dtype != torch.float32
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=reduced):
            return self.model.encode(pixels)


HEAD_DIM = 64
# Our prefix -> theirs. The final LN is `fc_norm` when the ViT was built with mean pooling (as the
# published models are) and `norm` otherwise; both act on each token alone.
PREFIXES = {
    "encoder.norm.": ("encoder.fc_norm.", "encoder.norm."),
    "encoder.": ("encoder.",),
    "code_head.": ("encode_task_layer.",),
    "quantizer.codebook": ("quantize.embedding.weight",),
    "quantizer.usage": ("quantize.cluster_size",),
    "decoder.norm.": ("decoder.fc_norm.", "decoder.norm."),
    "decoder.": ("decoder.",),
    "feature_head.": ("decode_task_layer.",),
}
# Ours alone: counts training calls.
OURS_ONLY = "quantizer.updates"
# Their usage statistics are absent from files saved without them and do not change a code.
OPTIONAL = "quantizer.usage"
PIXEL_CONSTANTS = {
    "default": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet_norm": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def load_official(path: Path) -> tuple[VQKD, ImportReport]:
    """Build a model from a published checkpoint, in fp32 on the CPU.

    The decoder is taken where the file has a whole one. Raises ValueError (one line) if the file
    cannot be read, is no VQ-KD checkpoint, or lacks a tensor or holds one of another shape.
    """
    content = read_torch_file(path, "cpu", allowed=(argparse.Namespace,))
    if not isinstance(content, dict):
        raise DataError(f"{path}: not a checkpoint: holds a {type(content).__name__}, not a dict")
    weights = content.get("model", content.get("state_dict", content))
    if not isinstance(weights, dict):
        raise DataError(f"{path}: not a checkpoint: its model is a {type(weights).__name__}")
    weights = {k: v for k, v in weights.items() if isinstance(v, Tensor)}
    recorded = content.get("args")  # the command line that made it
    arguments = vars(recorded) if isinstance(recorded, argparse.Namespace) else {}
    try:
        config = infer_config(weights, arguments)
    except (KeyError, ValueError) as error:
        reason = f"no tensor {error}" if isinstance(error, KeyError) else error
        raise DataError(f"{path}: not a BEiT v2 VQ-KD checkpoint: {reason}") from error
    model = build_model(config)
    own = model.state_dict()
    sources: dict[str, str] = {}
    for name in own:
        # Their name of our tensor: the first candidate in the file, else the usual one.
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
        candidates = [theirs + name[len(prefix) :] for theirs in PREFIXES.get(prefix, ())]
        if name != OURS_ONLY:
            sources[name] = next((c for c in candidates if c in weights), candidates[0])
    if sources[OPTIONAL] not in weights:
        del sources[OPTIONAL]
    problems = describe_mismatch(
        {source: weights[source] for source in sources.values() if source in weights},
        {source: own[name] for name, source in sources.items()},
    )
    if problems:
        raise DataError(f"{path}: not a complete BEiT v2 VQ-KD checkpoint: {problems}")
    for name, source in sources.items():
        own[name].copy_(weights[source])
    lengths = model.quantizer.codebook.norm(dim=1)
    if not torch.allclose(lengths, torch.ones_like(lengths), atol=1e-2):
        raise DataError(f"{path}: quantize.embedding.weight has rows that are not of unit length")
    model.quantizer.updates.fill_(1)  # a placed codebook: training goes on from it
    taken = tuple(sorted(sources.values()))
    return model, ImportReport(taken, tuple(sorted(set(weights) - set(taken))))


def infer_config(weights: dict[str, Tensor], arguments: dict[str, Any]) -> VQKDConfig:
    """Architecture by tensor shapes; KeyError names a tensor that is not there."""
    width, in_channels, patch_size, _ = shape_of(weights, "encoder.patch_embed.proj.weight", 4)
    if in_channels != 3:
        raise ValueError(f"the encoder reads {in_channels} channels, not 3")
    positions = shape_of(weights, "encoder.pos_embed", 3)[1] - 1
    grid = round(positions**0.5)
    if grid**2 != positions or grid < 1:
        raise ValueError(f"encoder.pos_embed has {positions} patches: not a square")
    num_codes, code_dim = shape_of(weights, "quantize.embedding.weight", 2)
    has_decoder = "decode_task_layer.2.weight" in weights
    process = str(arguments.get("process_type", "default"))
    if process not in PIXEL_CONSTANTS:
        raise ValueError(f"unknown process_type {process!r}")
    teacher_dim = weights["decode_task_layer.2.weight"].shape[0] if has_decoder else 1
    return VQKDConfig(
        image_size=grid * patch_size,
        patch_size=patch_size,
        width=width,
        depth=count_blocks(weights, "encoder"),
        num_heads=max(1, width // HEAD_DIM),
        mlp_ratio=shape_of(weights, "encoder.blocks.0.mlp.fc1.weight", 2)[0] / width,
        decoder_depth=count_blocks(weights, "decoder") if has_decoder else 0,
        num_codes=num_codes,
        code_dim=code_dim,
        teacher=str(arguments.get("teacher_model_type", "imported")),
        teacher_dim=teacher_dim,
        pixel_mean=PIXEL_CONSTANTS[process][0],
        pixel_std=PIXEL_CONSTANTS[process][1],
    )


def shape_of(weights: dict[str, Tensor], name: str, dims: int) -> tuple[int, ...]:
    """Shape of a tensor that must be there with `dims` axes."""
    shape = tuple(weights[name].shape)
    if len(shape) != dims:
        raise ValueError(f"{name} has {len(shape)} axes, expected {dims}")
    return shape


def count_blocks(weights: dict[str, Tensor], prefix: str) -> int:
    """Largest block number plus one, so that a gap shows up as a missing tensor."""
    pattern = re.compile(rf"{prefix}\.blocks\.(\d+)\.")
    numbers = [int(match[1]) for name in weights if (match := pattern.match(name))]
    if not numbers:
        raise KeyError(f"{prefix}.blocks.0.*")
    return max(numbers) + 1
