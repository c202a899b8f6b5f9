"""From our configuration to megatron-core's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlmoe.config.schema import Precision, RunConfig
from megatron_vlmoe.stream.block_plan import block_plans

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_transformer_config(config: RunConfig, precision: Precision) -> TransformerConfig:
    """megatron-core's configuration of a run.

    Initialisation is ours (model/init.py), dropout is off (the paper uses stochastic depth only), and
    fusions that need apex or transformer-engine are off.
    """
    model, moe, parallel = config.model, config.moe, config.parallel
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
