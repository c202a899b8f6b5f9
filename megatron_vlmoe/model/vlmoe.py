"""VL-MoE: embed, blocks, heads, in pipeline stages; what their parameters start from, and which are frozen."""

from __future__ import annotations

from typing import Any, Callable, Mapping, Optional, Sequence, Union

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor, nn

from megatron_vlmoe.config.schema import ModelConfig, Precision, RunConfig
from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.model.block import MoMEBlock, MoMEFeedForward, MoMELayer, layer_spec
from megatron_vlmoe.model.embeddings import StreamEmbedding
from megatron_vlmoe.model.heads import Heads, Predicted
from megatron_vlmoe.model.implementation import layer_parts
from megatron_vlmoe.model.initial_values import EXPERT_KEY, full_initial_value, initial_experts
from megatron_vlmoe.model.task_heads import build_pretraining_heads
from megatron_vlmoe.stream.batch import Batch, StreamBatch
from megatron_vlmoe.stream.block_plan import block_plans
from megatron_vlmoe.stream.layout import SegmentName, StreamLayout

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FP8_FORMATS = {"delayed": "hybrid", "tensorwise": "hybrid", "blockwise": "e4m3", "mxfp8": "e4m3"}
"""Numbers of a recipe: `hybrid` has a wider range for gradients, which scales of small blocks make up for."""
NORM_STATE = "norm._extra_state"
"""How megatron-core's name ends for the state of a LayerNorm besides its parameters."""
BuildHeads = Callable[[TransformerConfig, RunConfig], Heads]
"""Makes what the last stage ends with: the heads of pretraining, or of a downstream task."""


def build_transformer_config(config: RunConfig, precision: Precision) -> TransformerConfig:
    """megatron-core's configuration of a run.

    Initialisation is ours, dropout is off (the paper uses stochastic depth only), and
    fusions that need apex or transformer-engine are off.
    """
    model, moe, parallel, fp8 = config.model, config.moe, config.parallel, config.train.fp8
    virtual = parallel.virtual_pipeline_model_parallel_size
    plans = block_plans(model, moe)
    # Of the block with the most, over all its pools; None for a dense model.
    num_experts = max(sum(pool.num_experts for pool in plan.pools) for plan in plans) or None
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        ffn_hidden_size=model.ffn_hidden_size,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        layernorm_epsilon=model.layernorm_epsilon,
        activation_func=F.gelu,
        add_bias_linear=True,
        add_qkv_bias=True,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        perform_initialization=False,
        use_cpu_initialization=True,
        params_dtype=DTYPES[precision],
        pipeline_dtype=DTYPES[precision],
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        fp8=None if fp8 == "none" else FP8_FORMATS[fp8],
        fp8_recipe="delayed" if fp8 == "none" else fp8,
        # Of delayed scaling.
        fp8_amax_history_len=1024,
        fp8_amax_compute_algo="max",
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        sequence_parallel=parallel.tensor_model_parallel_size > 1,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=1,
        batch_p2p_comm=parallel.batch_p2p_comm,
        overlap_p2p_comm=virtual > 1,
        deterministic_mode=False,
        num_moe_experts=num_experts,
        moe_ffn_hidden_size=model.ffn_hidden_size if num_experts else None,
        moe_router_topk=moe.topk,
        moe_router_pre_softmax=True,
        moe_router_load_balancing_type="none",
        # Only says that rows may have fewer than k experts; our router applies the capacity itself.
        moe_expert_capacity_factor=1.0 if num_experts else None,
        moe_token_dispatcher_type="alltoall",
        moe_layer_freq=[int(bool(plan.pools)) for plan in plans],
        recompute_granularity="full" if config.train.recompute == "full" else None,
        recompute_method="uniform" if config.train.recompute == "full" else None,
        recompute_num_layers=1 if config.train.recompute == "full" else None,
    )


class VLMoEModel(MegatronModule):
    """One pipeline stage of the model (paper section 3.2).

    Args:
        config: the run; vocabulary sizes must be known.
        transformer_config: megatron-core's, of `build_transformer_config`.
        pre_process: whether this stage embeds.
        post_process: whether this stage has the final LayerNorm and the heads.
        vp_stage: virtual pipeline stage.
        build_heads: makes the heads of the last stage.
    """

    def __init__(
        self,
        config: RunConfig,
        transformer_config: TransformerConfig,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: Optional[int] = None,
        build_heads: BuildHeads = build_pretraining_heads,
    ) -> None:
        super().__init__(config=transformer_config)
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process = pre_process
        self.post_process = post_process
        self.vp_stage = vp_stage
        self.share_embeddings_and_output_weights = False
        if pre_process:
            self.embedding = StreamEmbedding(transformer_config, config.model, config.data)
        pp_rank = ProcessGroupCollection.use_mpu_process_groups().pp.rank()
        count = get_num_layers_to_build(transformer_config, vp_stage=vp_stage, pp_rank=pp_rank)
        offset = get_transformer_layer_offset(transformer_config, vp_stage, pp_rank)
        plans = block_plans(config.model, config.moe)[offset : offset + count]
        parts = layer_parts(config, transformer_config.params_dtype)
        self.decoder = MoMEBlock(
            config=transformer_config,
            spec=TransformerBlockSubmodules(
                layer_specs=[layer_spec(config, plan, parts) for plan in plans],
                layer_norm=parts.norm,
            ),
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
        )
        if post_process:
            self.heads = build_heads(transformer_config, config)
        self.register_load_state_dict_pre_hook(_fill_extra_states)

    def set_input_tensor(self, input_tensor: Union[Tensor, list[Tensor]]) -> None:
        """Takes the previous stage's output from the pipeline schedule."""
        tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        self.decoder.set_input_tensor(tensor)

    def forward(
        self, batch: Batch, stream: StreamBatch
    ) -> Union[Tensor, Mapping[str, Tensor], Mapping[SegmentName, Predicted]]:
        """Hidden states ``[T, 1, D]`` for the next stage; on the last stage what the heads return."""
        hidden = self.decoder(self.embedding(batch, stream) if self.pre_process else None, stream)
        return self.heads(hidden, batch, stream) if self.post_process else hidden

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: Optional[dict] = None
    ) -> ShardedStateDict:
        """Shards of this stage; blocks are keyed by their number in the whole model.

        Where TransformerEngine's LayerNorm has an empty state besides its parameters, other ones have none.
        """
        metadata = {**(metadata or {}), "non_homogeneous_layers": True}
        shards = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return {key: value for key, value in shards.items() if not key.endswith(NORM_STATE)}


def _fill_extra_states(model: nn.Module, state: dict[str, Any], prefix: str, *unused: Any) -> None:
    """Puts nothing where a checkpoint has no state of a module besides parameters: most implementations have none."""
    for name, module in model.named_modules():
        if type(module).set_extra_state is not nn.Module.set_extra_state:
            state.setdefault(f"{prefix}{name}._extra_state", None)


@torch.no_grad()
def initialize_parameters(
    chunks: Sequence[MegatronModule], model: ModelConfig, seed: int, metadata: dict
) -> None:
    """Fills every parameter of the model chunks of this rank, by `initial_values`.

    The full tensor is drawn on the CPU and each rank takes its shard, so every layout starts from the same
    weights and no two experts are equal.

    Args:
        model: initial standard deviation and LayerScale.
        metadata: megatron-core's sharded-state-dict metadata.

    Raises:
        RuntimeError: if a parameter has no place in the sharded state dict.
    """
    for chunk in chunks:
        shards = {
            id(shard.data): shard
            for shard in chunk.sharded_state_dict(metadata=metadata).values()
            if isinstance(shard, ShardedTensor)
        }
        by_pointer = {
            shard.data.data_ptr(): shard for shard in shards.values() if shard.data.numel()
        }
        for name, parameter in chunk.named_parameters():
            if name.endswith("logit_scale"):
                # A number that its module sets, not a draw.
                continue
            shard = shards.get(id(parameter)) or by_pointer.get(parameter.data_ptr())
            if shard is None:
                raise RuntimeError(f"parameter {name} is not in the sharded state dict")
            shape = tuple(shard.global_shape)[shard.prepend_axis_num :]
            offset = tuple(shard.global_offset)[shard.prepend_axis_num :]
            local = tuple(shard.local_shape)
            if EXPERT_KEY.search(shard.key) and shard.prepend_axis_num:
                # One expert of its pool, whose number is an axis that the parameter does not have.
                expert = shard.global_offset[shard.prepend_axis_num - 1]
                value = initial_experts(shard.key, shape, model, seed, range(expert, expert + 1))
            elif EXPERT_KEY.search(shard.key):
                experts = range(offset[0], offset[0] + local[0])
                value = initial_experts(shard.key, shape[1:], model, seed, experts)
            else:
                own = tuple(slice(start, start + size) for start, size in zip(offset, local))
                value = full_initial_value(shard.key, shape, model, seed)[own]
            parameter.copy_(value.view_as(parameter))
            # As megatron-core's own initialisation would: an unmarked tensor-parallel shard counts as a replica of
            # that of TP rank 0, and the gradient norm would leave it out.
            axes = [axis for axis, size in enumerate(local) if size != shape[axis]]
            if axes and not hasattr(parameter, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(parameter, True, dim=axes[0], stride=1)


def freeze_unreachable(chunks: Sequence[VLMoEModel], config: RunConfig) -> list[str]:
    """Sets `requires_grad=False` on every module that no token of the run's layout reaches.

    An unused parameter would break overlapped gradient reduction (megatron-core waits for its gradient) and be
    eroded by weight decay. Also freezes routers and experts when `moe.train_experts` is false.

    Args:
        chunks: stages of this rank, not yet wrapped.
        config: the run.

    Returns:
        Names of the frozen modules, for the log.
    """
    layout = StreamLayout.of(config)
    # Without it nothing reaches the mask embedding.
    masked = not isinstance(config, FinetuneConfig) and config.objectives.kind == "masked"
    unreached: dict[str, nn.Module | nn.Parameter] = {}
    for chunk in chunks:
        if chunk.pre_process:
            text, image = chunk.embedding.text, chunk.embedding.image
            if text is not None and not layout.texts and not layout.pairs:
                unreached["embedding.text"] = text
            if not layout.images and not layout.pairs:
                unreached["embedding.image"] = image
            elif not masked:
                unreached["embedding.image.mask_token"] = image.mask_token
        for layer in chunk.decoder.layers:
            assert isinstance(layer, MoMELayer) and isinstance(layer.mlp, MoMEFeedForward)
            for branch in layer.mlp.plan.branches:
                name = f"block {layer.layer_number} {branch.name}"
                reached = branch.num_tokens(layout) > 0
                if not reached:
                    unreached[f"{name} norm"] = layer.mlp.norm(branch.name)
                    if not branch.num_experts:
                        unreached[f"{name} ffn"] = layer.mlp.ffn(branch.name)
                if branch.num_experts and not (reached and config.moe.train_experts):
                    assert layer.mlp.moe is not None
                    unreached[f"{name} experts"] = layer.mlp.moe.experts.pool(branch.name)
                    unreached[f"{name} router"] = layer.mlp.moe.router.get_submodule(branch.name)  # type: ignore[attr-defined]
        if chunk.post_process:
            unreached |= chunk.heads.unreached(layout)
    for part in unreached.values():
        part.requires_grad_(False)
    return list(unreached)
