"""Presets: every one can run, and a row differs in the number of experts only."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.config.presets import EXPERTS, SIZES, preset, preset_names
from megatron_vlmoe.config.schema import MoEConfig
from megatron_vlmoe.planning.validate import validate
from megatron_vlmoe.stream.block_plan import moe_layer_numbers
from megatron_vlmoe.stream.sizes import num_micro_batches


def test_names_are_every_size_times_every_expert_count():
    assert len(preset_names()) == 16
    assert {"tiny-dense", "small-8e", "base-16e", "large-32e"} <= set(preset_names())


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_validates_alone(name):
    validate(preset(name), world_size=1)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_fits_two_ranks(name):
    assert num_micro_batches(preset(name), 2) * 2 == num_micro_batches(preset(name), 1)


@pytest.mark.parametrize("size", SIZES)
def test_a_row_differs_in_expert_counts_only(size):
    dense = preset(f"{size}-dense")
    assert dense.moe == MoEConfig()
    for experts, count in EXPERTS.items():
        config = preset(f"{size}-{experts}")
        assert (config.moe.num_text_experts, config.moe.num_vision_experts) == (count, count)
        assert replace(config, moe=dense.moe) == dense
        own = replace(SIZES[size].moe, num_text_experts=count, num_vision_experts=count)
        assert config.moe == (own if count else dense.moe)


@pytest.mark.parametrize(
    ("size", "shape", "vl_layers", "moe_layers"),
    [
        ("small", (8, 384, 6), 1, (2, 4, 6)),
        ("base", (12, 768, 12), 3, (2, 4, 6, 8)),
    ],
)
def test_the_papers_sizes(size, shape, vl_layers, moe_layers):
    """Section 4.1; VL-FFN "starts at 10th layer" (base) and "is used in 8th layer" (small)."""
    config = preset(f"{size}-32e")
    model = config.model
    assert (model.num_layers, model.hidden_size, model.num_attention_heads) == shape
    assert model.ffn_hidden_size == 4 * model.hidden_size
    assert model.num_vl_layers == vl_layers
    assert moe_layer_numbers(model, config.moe) == moe_layers
    assert (model.image_length, model.text_length, model.pair_text_length) == (197, 128, 128)
    data = config.data
    assert (data.global_texts, data.global_images, data.global_pairs) == (2048, 2048, 2048)


@pytest.mark.parametrize("name", ["base-33e", "huge-dense", "base", ""])
def test_an_unknown_preset_is_named(name):
    with pytest.raises(ConfigError, match=f"--preset {name}: unknown; choose one of tiny-dense"):
        preset(name)
