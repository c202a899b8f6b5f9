"""Whose layers a run has: what `model.transformer_impl` and `train.fp8` mean, and how they are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core import optimizer as chooser
from megatron.core.fusions import fused_layer_norm
from megatron.core.optimizer import clip_grads, distrib_optimizer
from megatron.core.optimizer import optimizer as mixed_precision
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.config.presets import preset
from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.model import implementation
from megatron_vlmoe.model.attention import TransformerEngineAttention
from megatron_vlmoe.model.implementation import check_implementation, layer_parts
from megatron_vlmoe.model.linear import ColumnLinear
from megatron_vlmoe.model.norm import ApexLayerNorm, LayerNorm
from megatron_vlmoe.planning.dry_run import dry_run_text
from megatron_vlmoe.planning.estimate import block_activation_parts
from megatron_vlmoe.planning.validate import validate
from megatron_vlmoe.runtime import optimizer as fallbacks
from megatron_vlmoe.stream.block_plan import block_plans
from megatron_vlmoe.stream.layout import StreamLayout


def change(config: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    changed = {name: replace(getattr(config, name), **own) for name, own in sections.items()}
    return replace(config, **changed)


def in_fp8(recipe: str = "delayed", **sections: dict[str, Any]) -> RunConfig:
    """A base model whose sizes fit 8 bits."""
    config = change(
        preset("base-8e"),
        model={"transformer_impl": "transformer_engine"},
        train={"fp8": recipe},
        moe={"capacity_multiple_of": 32},
    )
    return change(config, **sections)


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
def test_sizes_of_base_fit_8_bits(recipe: str) -> None:
    validate(in_fp8(recipe))
    validate(in_fp8(recipe, model={"transformer_impl": "auto"}))


@pytest.mark.parametrize(
    ("recipe", "sections", "words"),
    [
        (
            "delayed",
            {"model": {"transformer_impl": "local"}},
            ["transformer_impl=transformer_engine"],
        ),
        ("delayed", {"train": {"precision": "fp16", "fp8": "delayed"}}, ["precision=fp16", "bf16"]),
        (
            "delayed",
            {"train": {"cuda_graph": True, "counter_draws": True, "fp8": "delayed"}},
            ["graph"],
        ),
        (
            "delayed",
            {"model": {"hidden_size": 744, "num_attention_heads": 12, "transformer_impl": "auto"}},
            ["model.hidden_size=744", "multiple of 16", "736 or 752 fits"],
        ),
        (
            "mxfp8",
            {"model": {"ffn_hidden_size": 3056, "transformer_impl": "auto"}},
            ["model.ffn_hidden_size=3056", "3040 or 3072 fits"],
        ),
        (
            "delayed",
            {"data": {"micro_images": 63, "global_images": 2016, "global_texts": 2048}},
            ["tokens of a micro-batch", "multiple of 16", "data.micro_images"],
        ),
        ("delayed", {"moe": {"capacity_multiple_of": 1}}, ["--moe.capacity_multiple_of 16 fits"]),
        ("mxfp8", {"moe": {"capacity_multiple_of": 16}}, ["--moe.capacity_multiple_of 32 fits"]),
        ("delayed", {"moe": {"dispatcher": "dropless", "capacity_multiple_of": 16}}, ["dropless"]),
        (
            "delayed",
            {"moe": {"all_to_all_chunks": 2, "capacity_multiple_of": 16}},
            ["all_to_all_chunks=2"],
        ),
        (
            "blockwise",
            {
                "parallel": {"tensor_model_parallel_size": 2},
                "data": {"micro_images": 32, "global_images": 1024},
            },
            ["multiple of 128"],
        ),
    ],
)
def test_what_8_bits_cannot_do_is_one_line(
    recipe: str, sections: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(in_fp8(recipe, **sections))
    message = str(caught.value)
    assert message.startswith(f"train.fp8={recipe} ") and "\n" not in message
    assert all(word in message for word in words), message


def test_what_this_machine_has_not_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    config = in_fp8()
    with pytest.raises(ConfigError, match="not installed; --model.transformer_impl local works"):
        check_implementation(config, "bf16")
    by_itself = change(config, model={"transformer_impl": "auto"})
    message = "^train.fp8=delayed needs [^\n]*auto means local [^\n]*not installed"
    with pytest.raises(ConfigError, match=message):
        check_implementation(by_itself, "bf16")
    check_implementation(change(by_itself, train={"fp8": "none"}), "fp32")
    monkeypatch.setattr(implementation.te_layers, "HAVE_TE", True)
    with pytest.raises(ConfigError, match="transformer_engine: there is no GPU; "):
        check_implementation(config, "bf16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *unused: (9, 0))
    check_implementation(config, "bf16")
    with pytest.raises(ConfigError, match="needs bf16"):
        check_implementation(config, "fp16")
    with pytest.raises(ConfigError, match="capability 10.0; this one has 9.0"):
        check_implementation(in_fp8("mxfp8"), "bf16")


def test_auto_takes_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    config = change(preset("base-8e"), model={"transformer_impl": "auto"})
    local = layer_parts(config, torch.bfloat16)
    assert local.linear_after_norm is ColumnLinear and local.norm_before_linear is LayerNorm
    monkeypatch.setattr(implementation, "transformer_engine_problem", lambda: "")
    engine = layer_parts(config, torch.bfloat16)
    te_layers = implementation.te_layers
    assert engine.linear_after_norm is te_layers.TELayerNormColumnParallelLinear
    assert engine.row_linear is te_layers.TERowParallelLinear and engine.norm is te_layers.TENorm
    assert engine.norm_before_linear is IdentityOp
    assert engine.core_attention is TransformerEngineAttention
    # Its kernels for sequences take 16 bits, padding would reach experts, and a named kernel is what it is.
    others = [
        (config, torch.float32),
        (change(config, moe={"route_padding": True}), torch.bfloat16),
        (change(config, model={"attention_backend": "sdpa"}), torch.bfloat16),
    ]
    for other, dtype in others:
        attention: Any = layer_parts(other, dtype).core_attention
        assert attention.keywords == {"backend": "sdpa"}


def test_a_plan_says_whose_layers_and_counts_the_same() -> None:
    config, engine = (
        preset("base-8e"),
        in_fp8(moe={"capacity_multiple_of": 1}, train={"fp8": "none"}),
    )
    plain, planned = (dry_run_text(own, 1).splitlines() for own in (config, engine))
    assert [line for line in planned if line not in plain][0] == (
        "  layers of transformer_engine; the parameters of local ones"
    )
    parameters = [line for line in plain if line.startswith("  total")]
    assert parameters and parameters == [x for x in planned if x.startswith("  total")]
    plan, layout = block_plans(config.model, config.moe)[0], StreamLayout.of(config)
    kept = [block_activation_parts(own, plan, layout, "bf16") for own in (config, engine)]
    # Pairs are not concatenated apart from the other samples.
    assert kept[1]["attention"] < kept[0]["attention"] and kept[1]["ffn"] == kept[0]["ffn"]


def test_on_a_cpu_kernels_of_installed_packages_are_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With TransformerEngine installed, megatron-core has chosen its optimizers and its norm, which need a GPU."""
    places = {
        chooser: ("Adam", "SGD", "USING_PYTORCH_OPTIMIZER"),
        distrib_optimizer: ("Adam", "HAVE_APEX_OR_TE", "USING_TE_OPTIMIZER"),
        clip_grads: ("l2_norm_impl", "multi_tensor_scale_impl"),
        mixed_precision: ("multi_tensor_scale_impl",),
    }
    for module, names in places.items():
        for name in names:
            monkeypatch.setattr(module, name, "needs a GPU")
    monkeypatch.setattr(chooser, "USING_PYTORCH_OPTIMIZER", False)
    fallbacks.install_fallbacks()
    assert chooser.Adam == clip_grads.l2_norm_impl == "needs a GPU"
    fallbacks.install_fallbacks(on_cpu=True)
    assert chooser.Adam is distrib_optimizer.Adam is fallbacks.GroupStepAdamW
    assert chooser.SGD is torch.optim.SGD
    assert clip_grads.l2_norm_impl is fallbacks.l2_norm
    assert clip_grads.multi_tensor_scale_impl is fallbacks.scale
    source, target = [torch.ones(3)], [torch.zeros(3)]
    overflow = torch.zeros(1)
    mixed_precision._multi_tensor_copy_this_to_that(source, target, overflow)
    assert torch.equal(target[0], source[0])


def test_layer_norm_of_apex(monkeypatch: pytest.MonkeyPatch) -> None:
    config = preset("base-8e")
    assert layer_parts(config, torch.bfloat16).norm is LayerNorm
    monkeypatch.setattr(fused_layer_norm, "HAVE_FUSED_LAYER_NORM", True)
    # A CPU has no kernel of it.
    assert layer_parts(config, torch.bfloat16).norm is LayerNorm
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert layer_parts(config, torch.bfloat16).norm is ApexLayerNorm

    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, x: Any, weight: Any, bias: Any, shape: Any, eps: Any, memory_efficient: Any
        ) -> torch.Tensor:
            return torch.layer_norm(x, tuple(shape), weight, bias, eps)

    monkeypatch.setattr(fused_layer_norm, "FusedLayerNormAffineFunction", Kernel, raising=False)
    own = TransformerConfig(
        num_layers=1,
        hidden_size=24,
        num_attention_heads=2,
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        params_dtype=torch.bfloat16,
        bf16=True,
    )
    norm, plain = ApexLayerNorm(own, 24, eps=1e-3), LayerNorm(own, 24, eps=1e-3)
    assert {name: (value.shape, value.dtype) for name, value in norm.named_parameters()} == {
        name: (value.shape, value.dtype) for name, value in plain.named_parameters()
    }
    assert all(value.sequence_parallel for value in norm.parameters())
    x = torch.randn(5, 1, 24).bfloat16()
    assert torch.equal(norm(x), plain(x))
