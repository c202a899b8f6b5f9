"""The VQ-KD model (BEiT v2, arXiv 2208.06366, section 2.1) and its folder on disk.

A folder holds `config.json` (format version, architecture, how it was trained) and
`model.safetensors` (encoder, quantiser and, where there is one, decoder).
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.runtime.files import write_bytes_atomic, write_text_atomic
from megatron_vlmoe.tokenizers.vqkd.config import FORMAT_VERSION, VQKDConfig
from megatron_vlmoe.tokenizers.vqkd.quantizer import Quantized, Quantizer
from megatron_vlmoe.tokenizers.vqkd.vit import PatchTransformer, initialize_linear

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
# Fields of the config that change the codes of an image; the others only matter in training.
INFERENCE_FIELDS = (
    "image_size",
    "patch_size",
    "width",
    "depth",
    "num_heads",
    "mlp_ratio",
    "num_codes",
    "code_dim",
    "pixel_mean",
    "pixel_std",
)
INFERENCE_WEIGHTS = ("encoder.", "code_head.", "quantizer.codebook")


class VQKDLosses(NamedTuple):
    """Losses of one batch (scalars) and its codes `[N, L]`."""

    total: Tensor
    """cosine + commitment."""
    cosine: Tensor
    """mean(1 - cos(prediction, target)) over patches."""
    commitment: Tensor
    """Pull of the encoder's vectors to their codes."""
    codes: Tensor
    """int64, row-major."""


class VQKD(nn.Module):
    """Encoder -> quantiser -> decoder; the decoder regresses a teacher's patch features.

    Letters: N images, S side in pixels, L patches, D width, C code dimensions.
    """

    def __init__(self, config: VQKDConfig) -> None:
        super().__init__()
        self.config = config
        shared = {
            "width": config.width,
            "num_heads": config.num_heads,
            "mlp_ratio": config.mlp_ratio,
        }
        self.encoder = PatchTransformer(
            image_size=config.image_size,
            patch_size=config.patch_size,
            in_channels=3,
            depth=config.depth,
            **shared,  # type: ignore[arg-type]
        )
        self.code_head = tanh_head(config.width, config.code_dim)
        self.quantizer = Quantizer(
            config.num_codes,
            config.code_dim,
            commitment=config.commitment,
            decay=config.ema_decay,
            restart_threshold=config.restart_threshold,
        )
        self.decoder: PatchTransformer | None = None
        self.feature_head: nn.Sequential | None = None
        if config.decoder_depth > 0:
            self.decoder = PatchTransformer(
                image_size=config.grid,
                patch_size=1,
                in_channels=config.code_dim,
                depth=config.decoder_depth,
                **shared,  # type: ignore[arg-type]
            )
            self.feature_head = tanh_head(config.width, config.teacher_dim)
        self.register_buffer("pixel_mean", pixel_constant(config.pixel_mean), persistent=False)
        self.register_buffer("pixel_std", pixel_constant(config.pixel_std), persistent=False)

    pixel_mean: Tensor
    pixel_std: Tensor

    def project(self, pixels: Tensor) -> Tensor:
        """Pixels `[N, 3, S, S]` in [0, 1] -> vectors `[N, L, C]` before normalisation, fp32."""
        features = self.encoder((pixels - self.pixel_mean) / self.pixel_std)
        with torch.autocast(features.device.type, enabled=False):
            return self.code_head(features.float())

    def quantize(self, vectors: Tensor) -> Quantized:
        """Quantise `[N, L, C]` in fp32, also under autocast."""
        with torch.autocast(vectors.device.type, enabled=False):
            return self.quantizer(vectors)

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels `[N, 3, S, S]` in [0, 1] -> codes `[N, L]` int64, row-major."""
        return self.quantize(self.project(pixels)).codes

    def decode(self, vectors: Tensor) -> Tensor:
        """Code vectors `[N, L, C]` -> predicted features `[N, L, teacher_dim]`."""
        if self.decoder is None or self.feature_head is None:
            raise ValueError("this image tokenizer was built without a decoder")
        grid = self.config.grid
        code_map = (
            vectors.transpose(1, 2).reshape(-1, self.config.code_dim, grid, grid).contiguous()
        )
        return self.feature_head(self.decoder(code_map))

    def forward(self, pixels: Tensor, target: Tensor) -> VQKDLosses:
        """Losses for pixels `[N, 3, S, S]` in [0, 1] and features `[N, L, teacher_dim]`."""
        quantized = self.quantize(self.project(pixels))
        prediction = self.decode(quantized.vectors)
        cosine = 1.0 - F.cosine_similarity(prediction.float(), target.float(), dim=-1).mean()
        total = cosine + quantized.commitment
        return VQKDLosses(total, cosine, quantized.commitment, quantized.codes)


def tanh_head(width: int, out_features: int) -> nn.Sequential:
    """Linear D -> D, tanh, Linear D -> out."""
    head = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, out_features))
    return head.apply(initialize_linear)


def pixel_constant(values: tuple[float, float, float]) -> Tensor:
    """Per-channel constant, shaped `[1, 3, 1, 1]`."""
    return torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1)


def compute_fingerprint(model: VQKD) -> str:
    """sha256 (hex) over the config fields and weights that decide an image's codes.

    Equal for the same function wherever it was loaded from and whatever device it is on.
    """
    fields = {name: model.config.to_dict()[name] for name in INFERENCE_FIELDS}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(INFERENCE_WEIGHTS):
            values = tensor.detach().to("cpu", torch.float32).contiguous()
            digest.update(name.encode() + struct.pack(f"<{values.dim()}q", *values.shape))
            digest.update(values.numpy().astype("<f4").tobytes())
    return digest.hexdigest()


def save_vqkd(folder: Path, model: VQKD, training: dict[str, Any]) -> None:
    """Write `model.safetensors`, then `config.json`, each under a temporary name first.

    `training` is kept in the config for the reader's information only.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    write_bytes_atomic(folder / WEIGHTS_FILE, save(weights))
    config = {
        "format_version": FORMAT_VERSION,
        "kind": "vqkd",
        "model": model.config.to_dict(),
        "fingerprint": compute_fingerprint(model),
        "training": training,
    }
    write_text_atomic(folder / CONFIG_FILE, json.dumps(config, indent=2) + "\n")


def read_config(folder: Path) -> VQKDConfig:
    """Architecture of a saved tokenizer; ValueError if the folder holds none or another format."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise DataError(f"{folder}: no {CONFIG_FILE}: not an image tokenizer folder")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        kind, version = content.get("kind"), content.get("format_version")
        if (kind, version) != ("vqkd", FORMAT_VERSION):
            raise ValueError(f"kind {kind!r} version {version!r}, expected vqkd {FORMAT_VERSION}")
        return VQKDConfig.from_dict(content["model"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not an image tokenizer config: {error}") from error


def load_vqkd(folder: Path) -> VQKD:
    """Build the saved model, in fp32 on the CPU.

    Raises ValueError (one line) for a folder without a tokenizer, a truncated file, or tensors
    that do not fit the config.
    """
    config = read_config(folder)
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise DataError(f"{folder}: no {WEIGHTS_FILE}: the image tokenizer is incomplete")
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    model = build_without_initialization(config)
    problems = describe_mismatch(weights, model.state_dict())
    if problems:
        raise DataError(f"{path}: does not fit {CONFIG_FILE}: {problems}")
    model.load_state_dict(weights)
    return model


def build_without_initialization(config: VQKDConfig) -> VQKD:
    """A model whose weights are about to be loaded; draws nothing that the caller could notice."""
    with torch.random.fork_rng(devices=[]):
        return VQKD(config)


def describe_mismatch(given: dict[str, Tensor], expected: dict[str, Tensor], limit: int = 4) -> str:
    """Missing, unexpected and wrongly shaped tensors in one line; empty if there are none."""
    problems = [f"missing {name}" for name in expected if name not in given]
    problems += [f"unexpected {name}" for name in given if name not in expected]
    problems += [
        f"{name} has shape {list(given[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in given and given[name].shape != tensor.shape
    ]
    rest = f" and {len(problems) - limit} more" if len(problems) > limit else ""
    return "; ".join(problems[:limit]) + rest
