"""Presets: a size times a number of experts. Ablations are options on top, never copies."""

from __future__ import annotations

from dataclasses import replace

from megatron_vlmoe.config.errors import ConfigError, unknown_name
from megatron_vlmoe.config.schema import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    ModelConfig,
    MoEConfig,
    ObjectivesConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)

EXPERTS = {"dense": 0, "8e": 8, "16e": 16, "32e": 32}


SIZES = {
    # A model for the quick start and tests: minutes on two CPU cores.
    "tiny": RunConfig(
        model=ModelConfig(
            num_layers=6,
            hidden_size=128,
            num_attention_heads=4,
            ffn_hidden_size=512,
            num_vl_layers=2,
            image_size=64,
            patch_size=8,
            text_length=64,
            pair_text_length=40,
            # BEiT's 0.02 at width 768, kept at the same std * sqrt(width).
            init_std=0.05,
        ),
        objectives=ObjectivesConfig(min_mask_block=4),
        data=DataConfig(
            micro_texts=16,
            micro_images=16,
            micro_pairs=16,
            global_texts=32,
            global_images=32,
            global_pairs=32,
            eval_fraction=0.1,
            num_workers=1,
            color_jitter=0.0,
            crop_scale_min=0.5,
            pair_flip_probability=0.0,
        ),
        optim=OptimConfig(lr=2e-3, lr_warmup_steps=50, min_lr=1e-5),
        train=TrainConfig(steps=600, eval_interval=200, eval_steps=4),
        checkpoint=CheckpointConfig(save_interval=200),
        log=LogConfig(interval=10),
    ),
    # SMALL of the paper: 8 blocks, 384 wide, VL-FFN in block 8.
    "small": RunConfig(
        model=ModelConfig(
            num_layers=8,
            hidden_size=384,
            num_attention_heads=6,
            ffn_hidden_size=1536,
            num_vl_layers=1,
        )
    ),
    # BASE of the paper: 12 blocks, 768 wide, VL-FFN from block 10.
    "base": RunConfig(),
    # ViT-L widths with VLMo's three VL blocks and BEiT's LayerScale for large models.
    "large": RunConfig(
        model=ModelConfig(
            num_layers=24,
            hidden_size=1024,
            num_attention_heads=16,
            ffn_hidden_size=4096,
            num_vl_layers=3,
            layer_scale_init=1e-5,
        ),
        data=DataConfig(micro_texts=32, micro_images=32, micro_pairs=32),
    ),
}


def preset_names() -> tuple[str, ...]:
    """Every preset, as `SIZE-EXPERTS`."""
    return tuple(f"{size}-{experts}" for size in SIZES for experts in EXPERTS)


def preset(name: str, option: str = "--preset") -> RunConfig:
    """The run configuration of a preset. Raises ConfigError, naming `option`, if there is no such preset."""
    size, _, experts = name.partition("-")
    if size not in SIZES or experts not in EXPERTS:
        raise ConfigError(f"{option} {name}: {unknown_name(name, preset_names())}")
    count = EXPERTS[experts]
    return replace(SIZES[size], moe=MoEConfig(num_vision_experts=count, num_text_experts=count))
