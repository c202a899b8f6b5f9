"""Architecture of the VQ-KD image tokenizer (BEiT v2, arXiv 2208.06366) and its two presets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.runtime.json_files import is_number

FORMAT_VERSION = 1
_LARGEST = {
    **{
        "image_size": 2**14,
        "width": 2**16,
        "mlp_ratio": 2**8,
        "depth": 200,
        "decoder_depth": 200,
    },
    **{"num_codes": 2**24, "code_dim": 2**16, "teacher_dim": 2**30},
}
"""Far beyond any that is trained; others may have written the file."""


@dataclass(frozen=True, kw_only=True)
class VQKDConfig:
    """Everything that fixes the shapes and the function of a VQ-KD model.

    The defaults are the published base model: ViT-B/16 encoder, 8192 codes of 32 dimensions, a
    three-layer decoder and CLIP features of 512 dimensions.
    """

    image_size: int = 224
    """Side of the square input in pixels."""
    patch_size: int = 16
    """Side of a patch in pixels; one code per patch."""
    width: int = 768
    """Hidden size of the encoder and of the decoder."""
    depth: int = 12
    """Encoder blocks; 0 = every patch is coded by itself, without a look at the others."""
    num_heads: int = 12
    """Attention heads of the encoder and of the decoder."""
    mlp_ratio: float = 4.0
    """FFN hidden size divided by `width`."""
    decoder_depth: int = 3
    """Decoder blocks; 0 = no decoder (inference only)."""
    num_codes: int = 8192
    """Codebook entries."""
    code_dim: int = 32
    """Dimensions of a code."""
    teacher: str = "pixels"
    """What the decoder regresses: `pixels`, `hf:DIR`, or the name of an imported teacher."""
    teacher_dim: int = 512
    """Dimensions of one target vector."""
    commitment: float = 1.0
    """Weight beta of the commitment loss."""
    ema_decay: float = 0.99
    """Decay of the codebook's and of the usage statistics' moving averages."""
    restart_threshold: float = 0.0
    """Codes used less than this share of the uniform share are re-seeded; 0 = never (published)."""
    pixel_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Subtracted from RGB in [0, 1]."""
    pixel_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Divides RGB after the mean; 0.5 / 0.5 maps [0, 1] to [-1, 1]."""

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "width", "num_heads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )
        if self.width % self.num_heads:
            raise ConfigError(f"width {self.width} is not a multiple of num_heads {self.num_heads}")
        for name in ("depth", "decoder_depth", "mlp_ratio", "teacher_dim"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, not {getattr(self, name)}")
        if self.num_codes < 2 or self.code_dim < 2:
            raise ConfigError(
                f"num_codes and code_dim must be at least 2, not {self.num_codes}, {self.code_dim}"
            )
        for name, most in _LARGEST.items():
            if getattr(self, name) > most:
                raise ConfigError(f"{name} must be at most {most}, not {getattr(self, name)}")
        for name in ("ema_decay", "restart_threshold"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"{name} must be in [0, 1), not {getattr(self, name)}")

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.image_size // self.patch_size

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, the inverse of `from_dict`."""
        fields = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> VQKDConfig:
        """Build from JSON values; raises ValueError naming a key that is unknown, missing, or of another type."""
        names = {field.name for field in dataclasses.fields(cls)}
        unknown, missing = sorted(set(values) - names), sorted(names - set(values))
        if unknown or missing:
            raise ValueError(f"unknown keys {unknown}, missing keys {missing}")
        fields: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        for name, default in ((f.name, f.default) for f in dataclasses.fields(cls)):
            if not _is_like(default, fields[name]):
                raise ValueError(f"{name} is {values[name]!r}")
            if isinstance(default, float):
                fields[name] = float(fields[name])  # JSON has no points in whole numbers
        return cls(**fields)


def _is_like(default: Any, value: Any) -> bool:
    """Whether a value is of the type that a field's default has."""
    if isinstance(default, float):
        return is_number(value)
    if isinstance(default, tuple):
        is_tuple = isinstance(value, tuple) and len(value) == len(default)
        return is_tuple and all(map(is_number, value))
    return type(value) is type(default)


def pixel_teacher_dim(patch_size: int) -> int:
    """Dimensions of the `pixels` target: three channels of a patch and one constant."""
    return 3 * patch_size**2 + 1


_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "base": {},
    "tiny": {
        "image_size": 96,
        "patch_size": 16,
        "width": 64,
        # A code that also tells of the patches around it can hardly be guessed from them.
        "depth": 0,
        "num_heads": 4,
        "decoder_depth": 1,
        "num_codes": 96,
        "code_dim": 32,
        "ema_decay": 0.95,
        "restart_threshold": 0.05,
    },
}
PRESET_NAMES = tuple(_PRESETS)


def build_preset(name: str, **overrides: Any) -> VQKDConfig:
    """`base` (published) or `tiny` (quick start, tests), with `overrides` that are not None.

    The target is set to pixels unless `teacher` / `teacher_dim` say otherwise.
    """
    if name not in _PRESETS:
        raise ConfigError(f"no image tokenizer preset {name!r}; there are {sorted(_PRESETS)}")
    values = dict(_PRESETS[name]) | {k: v for k, v in overrides.items() if v is not None}
    patch_size = values.get("patch_size", VQKDConfig.patch_size)
    values.setdefault("teacher_dim", pixel_teacher_dim(patch_size))
    return VQKDConfig(**values)
