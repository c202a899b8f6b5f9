"""One MoME block and the stack of blocks of a pipeline stage."""

from __future__ import annotations

from typing import Any, Optional

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from megatron.core.utils import make_viewless_tensor
from torch import Tensor, nn

from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.model.attention import StreamAttention, StreamSelfAttention
from megatron_vlmoe.model.feed_forward import (
    MoMEFeedForward,
    MoMEFeedForwardSubmodules,
    dense_ffn_spec,
)
from megatron_vlmoe.model.norm import LayerNorm, mark_sequence_parallel
from megatron_vlmoe.moe.layer import ModalityMoELayer, moe_submodules
from megatron_vlmoe.stream.batch import StreamBatch
from megatron_vlmoe.stream.block_plan import BlockPlan, block_plan


class MoMELayer(TransformerLayer):
    """A pre-norm block: shared self-attention, then the modality's feed-forward branch.

    ``x += drop_path(gamma_1 * attention(LN(x)))``, ``x += drop_path(gamma_2 * ffn(LN_m(x)))`` (BEiT, VLMo);
    the two halves of a pair share one stochastic-depth draw.

    Args:
        config: megatron-core configuration.
        submodules: specs of the block.
        layer_number: number within the pipeline stage, from 1.
        layer_scale_init: initial gamma; 0 leaves LayerScale out.
        drop_path: stochastic depth of the last block.
        **kwargs: megatron-core's own arguments.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        layer_number: int = 1,
        layer_scale_init: float = 0.1,
        drop_path: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(config=config, submodules=submodules, layer_number=layer_number, **kwargs)
        # Linear from 0 in the first block to the full rate in the last (BEiT).
        self.drop_rate = drop_path * (self.layer_number - 1) / max(config.num_layers - 1, 1)
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
        if bias is not None:
            attention = attention + bias
        hidden_states = self._residual(
            hidden_states, attention, self.gamma_1, "attention_drop_path", stream
        )
        feed_forward = self.mlp(hidden_states, stream)
        return self._residual(hidden_states, feed_forward, self.gamma_2, "ffn_drop_path", stream)

    def _residual(
        self,
        hidden: Tensor,
        branch: Tensor,
        gamma: Optional[nn.Parameter],
        purpose: str,
        stream: StreamBatch,
    ) -> Tensor:
        if gamma is not None:
            branch = branch * gamma
        scale = None
        if self.training:
            scale = stream.keep_scale(self.layer_number, purpose, self.drop_rate, hidden.device)
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
        recompute = self.config.recompute_granularity == "full" and self.training
        for layer in self.layers:
            if recompute:
                hidden = tensor_parallel.checkpoint(
                    # The closure holds this micro-batch's stream: 1F1B may recompute it much later.
                    lambda tensor, layer=layer: layer(tensor, stream),
                    False,
                    hidden,
                )
            else:
                hidden = layer(hidden, stream)
        if self.final_layernorm is not None:
            hidden = self.final_layernorm(hidden)
            hidden = make_viewless_tensor(inp=hidden, requires_grad=True, keep_graph=True)
        if not self.pre_process and len(self.layers) == 0 and self.final_layernorm is None:
            hidden = hidden.clone()
        return hidden


def layer_spec(config: RunConfig, plan: BlockPlan) -> ModuleSpec:
    """The spec of one block: swap attention, norms, FFNs, routers or experts here."""
    attention = ModuleSpec(
        module=StreamSelfAttention,
        params={"attn_mask_type": AttnMaskType.no_mask},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=_core_attention(config.model.attention_backend),
            linear_proj=RowParallelLinear,
        ),
    )
    feed_forward = ModuleSpec(
        module=MoMEFeedForward,
        params={"plan": plan, "moe": config.moe},
        submodules=MoMEFeedForwardSubmodules(
            norm=LayerNorm,
            dense=dense_ffn_spec(),
            moe=ModuleSpec(module=ModalityMoELayer, submodules=moe_submodules(plan, config.moe)),
        ),
    )
    return ModuleSpec(
        module=MoMELayer,
        params={
            "layer_scale_init": config.model.layer_scale_init,
            "drop_path": config.model.drop_path,
        },
        submodules=TransformerLayerSubmodules(
            input_layernorm=LayerNorm,
            self_attention=attention,
            pre_mlp_layernorm=IdentityOp,
            mlp=feed_forward,
        ),
    )


def _core_attention(backend: str) -> Any:
    def build(**kwargs: Any) -> StreamAttention:
        return StreamAttention(backend=backend, **kwargs)

    return build


def build_block(
    config: RunConfig,
    transformer_config: TransformerConfig,
    pre_process: bool,
    post_process: bool,
    vp_stage: Optional[int],
) -> MoMEBlock:
    """The blocks of this rank's pipeline stage."""
    groups = ProcessGroupCollection.use_mpu_process_groups()
    pp_rank = groups.pp.rank()
    count = get_num_layers_to_build(transformer_config, vp_stage=vp_stage, pp_rank=pp_rank)
    offset = get_transformer_layer_offset(transformer_config, vp_stage, pp_rank)
    plans = [
        block_plan(config.model, config.moe, number)
        for number in range(offset + 1, offset + count + 1)
    ]
    return MoMEBlock(
        config=transformer_config,
        spec=TransformerBlockSubmodules(
            layer_specs=[layer_spec(config, plan) for plan in plans], layer_norm=LayerNorm
        ),
        pre_process=pre_process,
        post_process=post_process,
        vp_stage=vp_stage,
    )
