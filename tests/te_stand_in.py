"""TransformerEngine's modules in plain torch, under the wrappers that megatron-core has for the real ones.

`install` runs megatron-core's own file of wrappers a second time, on these classes, and puts what it defines in the
place of what it defined without TransformerEngine. So the arguments, names, shards and attributes that tests see are
those of megatron-core; TransformerEngine's are the constructors and calls below.
"""

from __future__ import annotations

import contextlib
import importlib.util
import operator
import sys
from collections.abc import Iterator
from typing import Any, Optional, Sequence
from unittest import mock

import torch
import torch.nn.functional as F
from megatron.core import utils
from megatron.core.extensions import transformer_engine as te_layers
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from packaging.version import Version
from torch import Tensor, nn

VERSION = "2.11.0"
REPLACED = (
    *("HAVE_TE", "TENorm", "TELayerNormColumnParallelLinear", "TERowParallelLinear"),
    *("TEDotProductAttention", "TEColumnParallelGroupedLinear", "TERowParallelGroupedLinear"),
    "te_checkpoint",
)


class Calls:
    """What the modules of this process were asked to compute."""

    in_fp8 = False
    """Whether calls come inside `fp8_context`."""
    seen: list[tuple[str, bool, tuple[int, ...]]] = []
    """Class, whether in 8 bits, and sizes of the input of every call of a linear layer or of attention."""
    checkpointed = 0
    """Calls of `checkpoint`."""

    @classmethod
    def note(cls, module: nn.Module, value: Tensor) -> None:
        """Remembers a call."""
        cls.seen.append((type(module).__name__, cls.in_fp8, tuple(value.shape)))


class _Base(nn.Module):
    """What all of them have: a state beside their parameters, which is empty without 8 bits."""

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Optional[Tensor]) -> None:
        assert state is None or state.numel() == 0


class LayerNorm(_Base):
    def __init__(
        self,
        normalized_shape: Optional[int] = None,
        eps: float = 1e-5,
        *,
        sequence_parallel: bool,
        params_dtype: torch.dtype,
        zero_centered_gamma: bool,
        device: str,
        hidden_size: Optional[int] = None,
    ) -> None:
        """megatron-core 0.16 gives the older name of the size, 0.19 the later one."""
        super().__init__()
        assert not zero_centered_gamma and device == "cpu"
        self.eps = eps
        size = normalized_shape or hidden_size
        assert size is not None
        for name in ("weight", "bias"):
            value = nn.Parameter(torch.empty(size, dtype=params_dtype))
            value.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]
            self.register_parameter(name, value)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)  # type: ignore[arg-type]


class Linear(_Base):
    def __init__(  # noqa: PLR0913
        self,
        in_features: int,
        out_features: int,
        *,
        sequence_parallel: bool,
        fuse_wgrad_accumulation: bool,
        tp_group: Any,
        tp_size: int,
        get_rng_state_tracker: Any,
        init_method: Any,
        bias: bool,
        return_bias: bool,
        parallel_mode: Optional[str],
        params_dtype: torch.dtype,
        device: str,
        rng_tracker_name: Optional[str] = None,
    ) -> None:
        super().__init__()
        assert bias and not fuse_wgrad_accumulation and device == "cpu"
        assert parallel_mode in ("column", "row") and tp_group.size() == tp_size
        self.parallel_mode, self.tp_size, self.tp_group = parallel_mode, tp_size, tp_group
        self.sequence_parallel = sequence_parallel and tp_size > 1
        self.in_features, self.out_features, self.use_bias = in_features, out_features, bias
        self.te_returns_bias = return_bias
        rows, columns = out_features, in_features
        if parallel_mode == "column":
            rows //= tp_size
        else:
            columns //= tp_size
        self.weight = nn.Parameter(torch.empty(rows, columns, dtype=params_dtype))
        axis = 0 if parallel_mode == "column" else 1
        set_tensor_model_parallel_attributes(self.weight, True, axis, 1)
        self.bias = nn.Parameter(torch.empty(rows, dtype=params_dtype))

    def forward(self, x: Tensor, is_first_microbatch: Optional[bool] = None) -> Any:
        Calls.note(self, x)
        if self.parallel_mode == "column" and self.sequence_parallel:
            x = gather_from_sequence_parallel_region(x, group=self.tp_group)
        output = F.linear(x, self.weight)
        if self.parallel_mode == "row" and self.sequence_parallel:
            output = reduce_scatter_to_sequence_parallel_region(output, group=self.tp_group)
        return (output, self.bias) if self.te_returns_bias else output + self.bias


class LayerNormLinear(Linear):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float,
        *,
        normalization: str,
        zero_centered_gamma: bool,
        return_layernorm_output: bool,
        params_dtype: torch.dtype,
        sequence_parallel: bool,
        **options: Any,
    ) -> None:
        assert normalization == "LayerNorm" and not return_layernorm_output
        assert not zero_centered_gamma
        nn.Module.__init__(self)
        self.eps = eps
        own = {}
        for name in ("layer_norm_weight", "layer_norm_bias"):
            own[name] = nn.Parameter(torch.empty(in_features, dtype=params_dtype))
            own[name].sequence_parallel = sequence_parallel  # type: ignore[attr-defined]
        more = {"params_dtype": params_dtype, "sequence_parallel": sequence_parallel}
        super().__init__(in_features, out_features, **options, **more)
        # As TransformerEngine has them: before the others.
        others = dict(self._parameters)
        self._parameters.clear()
        for name, value in (own | others).items():
            self.register_parameter(name, value)

    def forward(self, x: Tensor, is_first_microbatch: Optional[bool] = None) -> Any:
        own = (self.layer_norm_weight, self.layer_norm_bias, self.eps)
        return super().forward(F.layer_norm(x, x.shape[-1:], *own))  # type: ignore[arg-type]


class GroupedLinear(_Base):
    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        *,
        params_dtype: torch.dtype,
        bias: bool,
        return_bias: bool,
        parallel_mode: Optional[str],
        ub_name: Optional[str],
        **options: Any,
    ) -> None:
        super().__init__()
        assert bias and not return_bias
        self.num_gemms, self.use_bias = num_gemms, bias
        shapes = {"weight": (out_features, in_features), "bias": (out_features,)}
        for name, shape in shapes.items():
            for number in range(num_gemms):
                value = nn.Parameter(torch.empty(shape, dtype=params_dtype))
                self.register_parameter(f"{name}{number}", value)

    def init_fp8_metadata(self, num_gemms: int) -> None:
        assert num_gemms == self.num_gemms

    def forward(
        self, x: Tensor, m_splits: Sequence[int], is_first_microbatch: Optional[bool] = None
    ) -> Tensor:
        Calls.note(self, x)
        assert sum(m_splits) == len(x) and len(m_splits) == self.num_gemms
        parts = [
            F.linear(part, getattr(self, f"weight{number}"), getattr(self, f"bias{number}"))
            for number, part in enumerate(x.split(list(m_splits)))
        ]
        return torch.cat(parts)


class DotProductAttention(_Base):
    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        *,
        attention_dropout: float,
        attn_mask_type: str,
        attention_type: str,
        softmax_scale: Optional[float],
        **options: Any,
    ) -> None:
        super().__init__()
        assert attention_dropout == 0.0 and attention_type == "self" and softmax_scale is None
        self.kv_channels = kv_channels

    def forward(  # noqa: PLR0913
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Optional[Tensor],
        *,
        attn_mask_type: str,
        qkv_format: str,
        cu_seqlens_q: Tensor,
        cu_seqlens_kv: Tensor,
        max_seqlen_q: int,
        max_seqlen_kv: int,
        cu_seqlens_q_padded: Optional[Tensor] = None,
        cu_seqlens_kv_padded: Optional[Tensor] = None,
        pad_between_seqs: Optional[bool] = None,
    ) -> Tensor:
        Calls.note(self, query)
        assert attention_mask is None and (qkv_format, attn_mask_type) == ("thd", "padding")
        assert cu_seqlens_q is cu_seqlens_kv and cu_seqlens_q.dtype == torch.int32
        assert cu_seqlens_q_padded is None and not pad_between_seqs
        assert max_seqlen_q == max_seqlen_kv
        ends = cu_seqlens_q.tolist()
        assert ends[0] == 0 and ends[-1] == len(query)
        parts = []
        for begin, end in zip(ends, ends[1:]):
            assert 0 <= end - begin <= max_seqlen_q
            q, k, v = (x[begin:end].transpose(0, 1) for x in (query, key, value))
            weights = torch.softmax(q @ k.transpose(1, 2) * self.kv_channels**-0.5, dim=-1)
            parts.append((weights @ v).transpose(0, 1))
        return torch.cat(parts).flatten(1)


def checkpoint(
    function: Any,
    *inputs: Tensor,
    distribute_saved_activations: bool,
    get_rng_state_tracker: Any,
    tp_group: Any,
) -> Any:
    """TransformerEngine's, which remembers scales of 8 bits."""
    Calls.checkpointed += 1
    assert not distribute_saved_activations and callable(get_rng_state_tracker)
    return torch.utils.checkpoint.checkpoint(function, *inputs, use_reentrant=False)


@contextlib.contextmanager
def fp8_context(config: Any) -> Iterator[None]:
    """In place of megatron-core's `get_fp8_context`."""
    assert config.fp8 in ("hybrid", "e4m3") and not Calls.in_fp8
    Calls.in_fp8 = True
    try:
        yield
    finally:
        Calls.in_fp8 = False


def wrappers() -> Any:
    """megatron-core's wrappers of TransformerEngine's modules, on the classes of this file."""
    engine = mock.MagicMock()
    own = (LayerNorm, Linear, LayerNormLinear, GroupedLinear, DotProductAttention)
    for kind in own:
        setattr(engine.pytorch, kind.__name__, kind)
    engine.pytorch.distributed.checkpoint = checkpoint
    utils._te_version = Version(VERSION)
    # What megatron-core's file imports from, besides these.
    names = (
        *("fp8", "distributed", "router", "cpu_offload", "attention", "attention.rope"),
        *("permutation", "cross_entropy", "cpp_extensions", "module.base", "float8_tensor"),
    )
    modules = {
        f"transformer_engine.pytorch.{name}": operator.attrgetter(name)(engine.pytorch)
        for name in names
    }
    modules |= {"transformer_engine": engine, "transformer_engine.pytorch": engine.pytorch}
    assert te_layers.__file__ is not None
    spec = importlib.util.spec_from_file_location("te_wrappers", te_layers.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # It imports one of them when it is called; its dataclasses look for their own module.
    sys.modules |= {**modules, spec.name: module}
    spec.loader.exec_module(module)
    return module


def install() -> None:
    """Puts the wrappers where megatron-core's are, for the rest of the process, which passes for one with a GPU."""
    from megatron_vlmoe.model import block, implementation

    found = wrappers()
    for name in REPLACED:
        setattr(te_layers, name, getattr(found, name))
    block.get_fp8_context = fp8_context  # type: ignore[assignment]
    implementation.transformer_engine_problem = lambda: ""
    torch.cuda.get_device_capability = lambda *unused: (10, 0)  # type: ignore[assignment]
