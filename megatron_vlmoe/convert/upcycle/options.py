"""What an upcycling makes of its source: the sparse configuration and how the new experts start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from megatron_vlmoe.config.command_line import normalize_arguments, parse_options
from megatron_vlmoe.config.errors import ConvertError
from megatron_vlmoe.config.presets import preset
from megatron_vlmoe.config.schema import MoEConfig, ParallelConfig, RunConfig
from megatron_vlmoe.planning.validate import validate
from megatron_vlmoe.stream.block_plan import has_experts

RouterStart = Literal["auto", "small", "fresh", "zero"]
SharedFrom = Literal["vision", "text", "mean"]

SIZES = ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "num_vl_layers")


@dataclass(frozen=True)
class UpcycleOptions:
    """How new experts and routers start.

    Args:
        router: `small` rows leave every gate at 1 / E; `fresh` rows are those of a new run; `zero` rows tie;
            `auto` is `fresh` where the gates are normalised, else `small`.
        shared_from: which FFN and LayerNorm the experts of a shared pool start from.
        noise: standard deviation of the noise on every expert's matrices, relative to that of the matrix.
        drop_fraction: share of the inner channels of every expert that start anew (Drop-Upcycling, arXiv 2502.19261).
        seed: of routers, noise and dropped channels.
        carry_optimizer: takes moments, schedule and step along; otherwise weights alone, at step 0.
    """

    router: RouterStart = "auto"
    shared_from: SharedFrom = "vision"
    noise: float = 0.0
    drop_fraction: float = 0.0
    seed: int = 1234
    carry_optimizer: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.noise < float("inf"):
            raise ConvertError(f"--noise {self.noise:g}: must be 0 or more")
        if not 0.0 <= self.drop_fraction <= 1.0:
            raise ConvertError(f"--drop-fraction {self.drop_fraction:g}: must be in 0..1")


def sparse_config(
    source: RunConfig, where: str, preset_name: str, num_experts: int, words: Sequence[str]
) -> RunConfig:
    """The source's configuration with the MoE section of a preset and options.

    Args:
        source: configuration of the checkpoint.
        where: the checkpoint, for messages.
        preset_name: gives the MoE section; empty keeps that of a sparse source, or the defaults.
        num_experts: experts of every pool; 0 leaves them to preset and options.
        words: options `--moe.NAME VALUE`.

    Raises:
        ConvertError: a preset of another size, an option of another section, or no experts.
        ConfigError: options that contradict each other.
    """
    normalized = normalize_arguments(words)
    for name in (word for word in normalized if word.startswith("--")):
        if not name.startswith("--moe."):
            raise ConvertError(
                f"{name}: only --moe options; everything else comes from the checkpoint"
            )
    moe = source.moe if has_experts(source.moe) else MoEConfig()
    if preset_name:
        moe = _preset_moe(source, where, preset_name)
    start = replace(source, moe=moe)
    moe = parse_options("upcycle", normalized, start).config.moe
    if num_experts:
        vl = num_experts if moe.vl else 0
        moe = replace(
            moe,
            num_vision_experts=num_experts,
            num_text_experts=num_experts,
            num_vl_experts=vl,
        )
    if not has_experts(moe):
        raise ConvertError("no experts: give --preset, --num-experts or --moe options")
    made = replace(
        source, moe=moe, checkpoint=replace(source.checkpoint, save="", load="", require=False)
    )
    # The layout is that of the run that loads it.
    validate(replace(made, parallel=ParallelConfig()))
    return made


def _preset_moe(source: RunConfig, where: str, name: str) -> MoEConfig:
    chosen = preset(name)
    different = [
        f"{field} {getattr(source.model, field)}, not {getattr(chosen.model, field)}"
        for field in SIZES
        if getattr(source.model, field) != getattr(chosen.model, field)
    ]
    if different:
        raise ConvertError(f"--preset {name} is of another size than {where}: {different[0]}")
    return chosen.moe
