"""Whose layers the blocks are made of: megatron-core's and torch's, or TransformerEngine's; and where these can run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Union

import torch
from megatron.core.extensions import transformer_engine as te_layers
from megatron.core.fusions import fused_layer_norm
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.config.schema import ModelConfig, Precision, RunConfig
from megatron_vlmoe.model.attention import StreamAttention, TransformerEngineAttention
from megatron_vlmoe.model.linear import ColumnLinear, RowLinear
from megatron_vlmoe.model.norm import ApexLayerNorm, LayerNorm
from megatron_vlmoe.runtime.distributed import agree
from megatron_vlmoe.stream.sizes import attention_packs

FP8_CAPABILITY = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
"""Compute capability of the first GPU that has a recipe."""


@dataclass(frozen=True)
class LayerParts:
    """The layers of a block, as specs.

    Args:
        norm: LayerNorm where routers and experts share its output, and at the end of the model.
        norm_before_linear: LayerNorm before attention and dense FFNs; nothing where the next layer has it.
        linear_after_norm: first linear layer of attention and dense FFNs.
        row_linear: the last one of both.
        core_attention: attention within samples.
        is_norm_in_linear: whether `linear_after_norm` has the LayerNorm.
    """

    norm: Union[ModuleSpec, type]
    norm_before_linear: Union[ModuleSpec, type]
    linear_after_norm: Union[ModuleSpec, type]
    row_linear: Union[ModuleSpec, type]
    core_attention: Callable[..., Any]
    is_norm_in_linear: bool


def transformer_engine_problem() -> str:
    """Why TransformerEngine's layers cannot be used here; empty if they can."""
    if not te_layers.HAVE_TE:
        return "transformer-engine is not installed"
    return "" if torch.cuda.is_available() else "there is no GPU"


def uses_transformer_engine(model: ModelConfig) -> bool:
    """What `model.transformer_impl` means on this machine."""
    if model.transformer_impl == "auto":
        return not transformer_engine_problem()
    return model.transformer_impl == "transformer_engine"


def check_implementation(config: RunConfig, precision: Precision) -> None:
    """Every rank must call it.

    Raises:
        ConfigError: on every rank, if one of them cannot compute what `model.transformer_impl` and `train.fp8` ask for,
            or `auto` has another meaning on some.
    """
    model, fp8 = config.model, config.train.fp8
    uses = uses_transformer_engine(model)
    # Linear layers of one tensor-parallel group must wait for the same collectives.
    if agree(uses) and agree(not uses):
        raise ConfigError(
            "model.transformer_impl=auto: only some ranks have a GPU and transformer-engine; name one implementation"
        )
    if model.transformer_impl == "transformer_engine" and (problem := transformer_engine_problem()):
        raise ConfigError(
            f"model.transformer_impl=transformer_engine: {problem}; --model.transformer_impl local works here"
        )
    if fp8 == "none":
        return
    if not uses:
        why = f" ({transformer_engine_problem()})" if model.transformer_impl == "auto" else ""
        raise ConfigError(
            f"train.fp8={fp8} needs TransformerEngine's layers, but model.transformer_impl={model.transformer_impl} "
            f"means local{why}"
        )
    if precision != "bf16":
        raise ConfigError(f"train.fp8={fp8} with train.precision={precision}: it needs bf16")
    own, least = torch.cuda.get_device_capability(), FP8_CAPABILITY[fp8]
    if own < least:
        raise ConfigError(
            f"train.fp8={fp8} needs a GPU of compute capability {least[0]}.{least[1]}; this one has {own[0]}.{own[1]}"
        )


def layer_parts(config: RunConfig, dtype: torch.dtype) -> LayerParts:
    """The layers of a run's blocks on this machine, for weights of a number format."""
    backend = config.model.attention_backend
    if not uses_transformer_engine(config.model):
        norm = ApexLayerNorm if apex_has_layer_norm() else LayerNorm
        return LayerParts(
            norm=norm,
            norm_before_linear=norm,
            linear_after_norm=ColumnLinear,
            row_linear=RowLinear,
            core_attention=_torch_attention(backend),
            is_norm_in_linear=False,
        )
    packs = attention_packs(config, True, dtype == torch.float32)
    return LayerParts(
        norm=te_layers.TENorm,
        norm_before_linear=IdentityOp,
        linear_after_norm=te_layers.TELayerNormColumnParallelLinear,
        row_linear=te_layers.TERowParallelLinear,
        core_attention=TransformerEngineAttention
        if packs and backend == "auto"
        else _torch_attention(backend),
        is_norm_in_linear=True,
    )


def apex_has_layer_norm() -> bool:
    """Whether NVIDIA's apex is installed with its LayerNorm, and there is a GPU to run it."""
    return bool(fused_layer_norm.HAVE_FUSED_LAYER_NORM) and torch.cuda.is_available()


def _torch_attention(backend: str) -> Callable[..., Any]:
    return functools.partial(StreamAttention, backend="sdpa" if backend == "auto" else backend)
