"""One MoME block: self-attention within samples, then a feed-forward branch per modality; and a stage's stack of them.

Letters: T tokens of the stream, D width.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Optional, Union

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.extensions import transformer_engine as te_layers
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)
from megatron.core.utils import make_viewless_tensor
from torch import Tensor, nn

from megatron_vlmoe.config.schema import MoEConfig, RunConfig
from megatron_vlmoe.model.feed_forward import CompiledMLP
from megatron_vlmoe.model.implementation import LayerParts
from megatron_vlmoe.model.norm import mark_sequence_parallel
from megatron_vlmoe.moe.layer import ModalityMoELayer, moe_submodules
from megatron_vlmoe.runtime.compiled import compiled
from megatron_vlmoe.stream.batch import StreamBatch
from megatron_vlmoe.stream.block_plan import BlockPlan
from megatron_vlmoe.stream.sizes import drop_path_rate


class StreamSelfAttention(SelfAttention):
    """Shared self-attention whose key has no bias (BEiT, VLMo).

    The key's part of the fused bias starts at zero and its gradient, which is zero up to rounding, is
    removed: an adaptive optimizer would otherwise turn the rounding into steps.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        bias = self.linear_qkv.bias
        width = self.hidden_size_per_attention_head

        def without_key(grad: Tensor) -> Tensor:
            kept = grad.clone()
            # In place on the device: a mask held on the host would be copied there in every step.
            kept.view(-1, 3, width)[:, 1].zero_()
            return kept

        bias.register_hook(without_key)


@dataclass
class MoMEFeedForwardSubmodules:
    """Specs: LayerNorm of pools and of dense branches, FFN of a dense branch, and the layer that holds all pools of the
    block."""

    norm: Union[ModuleSpec, type]
    dense_norm: Union[ModuleSpec, type]
    dense: ModuleSpec
    moe: ModuleSpec


class MoMEFeedForward(MegatronModule):
    """Routes tokens by modality (paper section 3.2): V-FFN or V-MoE, T-FFN or T-MoE, VL-FFN.

    Of what megatron-core 0.19 says to every feed-forward layer, its groups and name, nothing is needed here.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoMEFeedForwardSubmodules,
        plan: BlockPlan,
        moe: MoEConfig,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        self.plan = plan
        # Direct children: inside a ModuleDict megatron-core would save tensor-parallel shards as replicas.
        for branch in plan.branches:
            norm = build_module(
                submodules.norm if branch.num_experts else submodules.dense_norm,
                config=config,
                hidden_size=config.hidden_size,
                eps=config.layernorm_epsilon,
            )
            self.add_module(f"{branch.name}_norm", norm)
        for branch in plan.dense:
            ffn = build_module(
                submodules.dense,
                config=config,
                tp_group=parallel_state.get_tensor_model_parallel_group(),
            )
            self.add_module(f"{branch.name}_ffn", ffn)
        self.moe: ModalityMoELayer | None = None
        if plan.pools:
            self.moe = build_module(submodules.moe, config=config, plan=plan, moe=moe)

    def set_layer_number(self, layer_number: int) -> None:
        """megatron-core's check that the spec's plan belongs to this block."""
        if layer_number != self.plan.layer_number:
            raise ValueError(f"block {layer_number} was given the plan of {self.plan.layer_number}")

    def norm(self, branch: str) -> nn.Module:
        """The LayerNorm of a branch; it does nothing where the FFN has it."""
        return self.get_submodule(f"{branch}_norm")

    def ffn(self, branch: str) -> nn.Module:
        """The FFN of a dense branch."""
        return self.get_submodule(f"{branch}_ffn")

    def forward(self, hidden: Tensor, stream: StreamBatch) -> Tensor:
        """Branch outputs for the local stream: ``[T, 1, D]`` to ``[T, 1, D]``."""
        layout = stream.layout
        branches = [b for b in self.plan.branches if b.num_tokens(layout)]
        runs = [(part, branch.name) for branch in branches for part in branch.slices(layout)]
        runs.sort(key=lambda run: (run[0].start, run[0].stop))
        # One split: its gradient is one concatenation, where every slice would fill a whole stream.
        pieces = hidden.split([part.stop - part.start for part, _ in runs])
        inputs = {}
        for branch in branches:
            own = [piece for piece, (_, name) in zip(pieces, runs) if name == branch.name]
            tokens = own[0] if len(own) == 1 else torch.cat(own)
            inputs[branch.name] = self.norm(branch.name)(tokens)
        outputs = {}

        def dense() -> None:
            for branch in branches:
                if not branch.num_experts:
                    output, bias = self.ffn(branch.name)(inputs[branch.name])
                    outputs[branch.name] = output if bias is None else output + bias

        if self.moe is None:
            dense()
        else:
            # Every pool takes part in every micro-batch, also without tokens: collectives must match.
            pools = self.plan.pools
            pool_inputs = [inputs.get(pool.name, hidden[:0]) for pool in pools]
            # Dense branches compute while tokens travel to experts.
            for pool, output in zip(pools, self.moe(pool_inputs, stream, dense)):
                outputs[pool.name] = output
        parts = {
            branch.name: iter(
                outputs[branch.name].split([p.stop - p.start for p in branch.slices(layout)])
            )
            for branch in branches
        }
        return torch.cat([next(parts[name]) for _, name in runs])


class MoMELayer(TransformerLayer):
    """A pre-norm block: shared self-attention, then the modality's feed-forward branch.

    ``x += drop_path(gamma_1 * attention(LN(x)))``, ``x += drop_path(gamma_2 * ffn(LN_m(x)))`` (BEiT, VLMo);
    the two halves of a pair share one stochastic-depth draw.

    Args:
        layer_number: number within the pipeline stage, from 1.
        layer_scale_init: initial gamma; 0 leaves LayerScale out.
        drop_path: stochastic depth of the last block.
        compile: what ends a branch is one compiled function.
        **kwargs: megatron-core's own arguments.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        layer_number: int,
        layer_scale_init: float,
        drop_path: float,
        compile: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(config=config, submodules=submodules, layer_number=layer_number, **kwargs)
        self.drop_rate = drop_path_rate(drop_path, self.layer_number, config.num_layers)
        self.add_branch = compiled(add_branch, compile)
        self.gamma_1: Optional[nn.Parameter] = None
        self.gamma_2: Optional[nn.Parameter] = None
        if layer_scale_init > 0.0:
            size, dtype = config.hidden_size, config.params_dtype
            for name in ("gamma_1", "gamma_2"):
                value = nn.Parameter(torch.full((size,), layer_scale_init, dtype=dtype))
                setattr(self, name, mark_sequence_parallel(value, config))

    def forward(self, hidden_states: Tensor, stream: StreamBatch) -> Tensor:  # type: ignore[override]
        """``[T, 1, D]`` to ``[T, 1, D]`` for the local stream."""
        attention, bias = self.self_attention(
            self.input_layernorm(hidden_states), attention_mask=stream
        )
        scale = self._keep_scale("attention_drop_path", hidden_states, stream)
        hidden_states = self.add_branch(hidden_states, attention, bias, self.gamma_1, scale)
        feed_forward = self.mlp(hidden_states, stream)
        scale = self._keep_scale("ffn_drop_path", hidden_states, stream)
        return self.add_branch(hidden_states, feed_forward, None, self.gamma_2, scale)

    def _keep_scale(self, purpose: str, hidden: Tensor, stream: StreamBatch) -> Optional[Tensor]:
        if not self.training:
            return None
        return stream.keep_scale(self.layer_number, purpose, self.drop_rate, hidden.device)


def add_branch(
    hidden: Tensor,
    branch: Tensor,
    bias: Optional[Tensor],
    gamma: Optional[Tensor],
    scale: Optional[Tensor],
) -> Tensor:
    """How a branch of a block ends: ``hidden + scale * gamma * (branch + bias)``, all ``[T, 1, D]``.

    Args:
        bias: of the branch's last product ``[D]``.
        gamma: LayerScale ``[D]``.
        scale: stochastic depth ``[T, 1, 1]``, in fp32.
    """
    if bias is not None:
        branch = branch + bias
    if gamma is not None:
        branch = branch * gamma
    if scale is None:
        return hidden + branch
    return torch.addcmul(hidden, branch, scale.to(branch.dtype))


class MoMEBlock(TransformerBlock):
    """The blocks of one pipeline stage (or virtual stage), and the final LayerNorm on the last."""

    def forward(self, hidden_states: Optional[Tensor], stream: StreamBatch) -> Tensor:  # type: ignore[override]
        """``[T, 1, D]`` to ``[T, 1, D]``; later stages take the tensor that the schedule has set."""
        if not self.pre_process:
            hidden_states = self.input_tensor
        hidden = make_viewless_tensor(inp=hidden_states, requires_grad=True, keep_graph=True)
        # Not in evaluation, nor where training only looks ahead: there the sizes need not fit 8 bits.
        in_fp8 = bool(self.config.fp8) and self.training and torch.is_grad_enabled()
        recompute = self.config.recompute_granularity == "full" and self.training
        with get_fp8_context(self.config) if in_fp8 else nullcontext():
            for layer in self.layers:
                # It holds this micro-batch's stream: 1F1B may recompute it much later.
                def work(tensor: Tensor, layer: Any = layer) -> Tensor:
                    output: Tensor = layer(tensor, stream)
                    return output

                if not recompute:
                    hidden = work(hidden)
                elif in_fp8:
                    # Computes again with the scales of the first time.
                    tracker, group = tensor_parallel.get_cuda_rng_tracker, self.pg_collection.tp
                    hidden = te_layers.te_checkpoint(work, False, tracker, group, hidden)
                else:
                    hidden = tensor_parallel.checkpoint(work, False, hidden)
        if self.final_layernorm is not None:
            hidden = self.final_layernorm(hidden)
            hidden = make_viewless_tensor(inp=hidden, requires_grad=True, keep_graph=True)
        if not self.pre_process and len(self.layers) == 0 and self.final_layernorm is None:
            hidden = hidden.clone()
        return hidden


def layer_spec(config: RunConfig, plan: BlockPlan, parts: LayerParts) -> ModuleSpec:
    """The spec of one block: swap attention, norms, FFNs, routers or experts here.

    Args:
        parts: layers of the implementation that the run has.
    """
    attention = ModuleSpec(
        module=StreamSelfAttention,
        params={"attn_mask_type": AttnMaskType.no_mask},
        submodules=SelfAttentionSubmodules(
            linear_qkv=parts.linear_after_norm,
            core_attention=parts.core_attention,
            linear_proj=parts.row_linear,
        ),
    )
    dense = MLPSubmodules(linear_fc1=parts.linear_after_norm, linear_fc2=parts.row_linear)
    feed_forward = ModuleSpec(
        module=MoMEFeedForward,
        params={"plan": plan, "moe": config.moe},
        submodules=MoMEFeedForwardSubmodules(
            norm=parts.norm,
            dense_norm=parts.norm_before_linear,
            dense=ModuleSpec(module=CompiledMLP if config.train.compile else MLP, submodules=dense),
            moe=ModuleSpec(
                module=ModalityMoELayer,
                submodules=moe_submodules(
                    plan, config.moe, config.train.compile, config.train.fp8 != "none"
                ),
            ),
        ),
    )
    # A LayerNorm has the name of its own place in checkpoints, also where the next layer has it.
    names = {}
    if parts.is_norm_in_linear:
        names["self_attention.linear_qkv.layer_norm_"] = "input_layernorm."
        names |= {
            f"mlp.{branch.name}_ffn.linear_fc1.layer_norm_": f"mlp.{branch.name}_norm."
            for branch in plan.dense
        }
    return ModuleSpec(
        module=MoMELayer,
        params={
            "layer_scale_init": config.model.layer_scale_init,
            "drop_path": config.model.drop_path,
            "compile": config.train.compile,
        },
        submodules=TransformerLayerSubmodules(
            input_layernorm=parts.norm_before_linear,
            self_attention=attention,
            pre_mlp_layernorm=IdentityOp,
            mlp=feed_forward,
            sharded_state_dict_keys_map=names,
        ),
    )
