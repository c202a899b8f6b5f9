"""Builds the model chunks of this rank, wraps them for data parallelism, and makes optimizer and schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlmoe.config.schema import Precision, RunConfig
from megatron_vlmoe.model.init import initialize_parameters
from megatron_vlmoe.model.reach import freeze_unreachable
from megatron_vlmoe.model.transformer_config import build_transformer_config
from megatron_vlmoe.model.vlmoe import VLMoEModel
from megatron_vlmoe.runtime.distributed import device


@dataclass
class TrainingParts:
    """What a step works on.

    Args:
        transformer_config: megatron-core's configuration; schedules read their hooks from it.
        chunks: the bare model chunks of this rank, one per virtual pipeline stage.
        wrapped: the chunks inside megatron-core's DDP; the bare ones for a forward-only run.
        optimizer: megatron-core's optimizer; None for a forward-only run.
        scheduler: learning-rate schedule; None for a forward-only run.
        frozen: names of modules that the run never reaches.
    """

    transformer_config: TransformerConfig
    chunks: list[VLMoEModel]
    wrapped: list[Any]
    optimizer: Any
    scheduler: Any
    frozen: list[str]


def checkpoint_metadata() -> dict[str, Any]:
    """megatron-core's metadata for sharded state dicts: any layout may load what another wrote."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "non_homogeneous_layers": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def build_chunks(config: RunConfig, transformer_config: TransformerConfig) -> list[VLMoEModel]:
    """The model chunks of this rank, with initial weights, on its device."""
    virtual = config.parallel.virtual_pipeline_model_parallel_size
    chunks = []
    for stage in range(virtual):
        vp_stage = stage if virtual > 1 else None
        chunks.append(
            VLMoEModel(
                config,
                transformer_config,
                pre_process=parallel_state.is_pipeline_first_stage(
                    ignore_virtual=False, vp_stage=vp_stage
                ),
                post_process=parallel_state.is_pipeline_last_stage(
                    ignore_virtual=False, vp_stage=vp_stage
                ),
                vp_stage=vp_stage,
            )
        )
    initialize_parameters(chunks, config.model, config.train.seed, checkpoint_metadata())
    return [chunk.to(device()) for chunk in chunks]


def build_training(config: RunConfig, precision: Precision) -> TrainingParts:
    """Everything that a training run needs on this rank.

    Args:
        config: the run, with vocabulary sizes.
        precision: resolved precision.
    """
    transformer_config = build_transformer_config(config, precision)
    chunks = build_chunks(config, transformer_config)
    frozen = freeze_unreachable(chunks, config)
    wrapped = _wrap(chunks, config, transformer_config)
    optimizer = get_megatron_optimizer(
        _optimizer_config(config, precision), wrapped, config_overrides=_group_overrides()
    )
    transformer_config.grad_scale_func = optimizer.scale_loss
    transformer_config.finalize_model_grads_func = finalize_model_grads
    return TrainingParts(
        transformer_config=transformer_config,
        chunks=chunks,
        wrapped=wrapped,
        optimizer=optimizer,
        scheduler=_scheduler(config, optimizer),
        frozen=frozen,
    )


def _wrap(
    chunks: list[VLMoEModel], config: RunConfig, transformer_config: TransformerConfig
) -> list[DistributedDataParallel]:
    parallel = config.parallel
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        check_for_nan_in_grad=False,
    )
    wrapped = [
        DistributedDataParallel(
            config=transformer_config,
            ddp_config=ddp_config,
            module=chunk,
            # Only the first chunk's gradients are on the critical path of the interleaved schedule.
            disable_bucketing=index > 0,
        )
        for index, chunk in enumerate(chunks)
    ]
    for chunk in wrapped:
        chunk.broadcast_params()
    if parallel.overlap_grad_reduce:
        hooks = [chunk.no_sync for chunk in wrapped]
        transformer_config.no_sync_func = hooks if len(hooks) > 1 else hooks[0]
    return wrapped


def _optimizer_config(config: RunConfig, precision: Precision) -> OptimizerConfig:
    optim = config.optim
    return OptimizerConfig(
        optimizer=optim.optimizer,
        lr=optim.lr,
        min_lr=optim.min_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.adam_beta1,
        adam_beta2=optim.adam_beta2,
        adam_eps=optim.adam_eps,
        sgd_momentum=optim.sgd_momentum,
        clip_grad=optim.clip_grad,
        fp16=precision == "fp16",
        bf16=precision == "bf16",
        params_dtype=torch.float32
        if precision == "fp32"
        else getattr(torch, _TORCH_NAME[precision]),
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        overlap_param_gather=config.parallel.overlap_param_gather,
        initial_loss_scale=optim.initial_loss_scale,
        min_loss_scale=optim.min_loss_scale,
        loss_scale_window=optim.loss_scale_window,
        hysteresis=optim.hysteresis,
    )


_TORCH_NAME = {"bf16": "bfloat16", "fp16": "float16"}


def has_weight_decay(name: str, shape: torch.Size) -> bool:
    """Matrices decay; vectors, position tables and special embeddings do not (BEiT's rule).

    Args:
        name: parameter name.
        shape: its shape; expert biases are matrices ``[E, F]`` but still biases.
    """
    if len(shape) == 1 or name.endswith(("bias", "bias1", "bias2")):
        return False
    special = ("position", "cls_token", "mask_token", "token_type")
    return not name.endswith(special)


def _group_overrides() -> dict[ParamKey, Any]:
    """Parameter groups: matrices, what has no weight decay, and routers.

    Routers are fp32 in a 16-bit model, and megatron-core 0.16.1's distributed optimizer saves the wrong
    state where one group mixes the two. Groups are recognised by megatron-core's own keys, of which
    `is_decoupled_lr` has no other effect.
    """
    no_decay = ParamWithNamePredicate(
        name="no_weight_decay", fn=lambda param, name: not has_weight_decay(name, param.shape)
    )
    router = ParamWithNamePredicate(name="router", fn=lambda param, name: ".router." in name)
    return {
        ParamKey(with_name_predicate=no_decay): {"wd_mult": 0.0},
        ParamKey(with_name_predicate=router): {"is_decoupled_lr": True},
    }


def _scheduler(config: RunConfig, optimizer: Any) -> OptimizerParamScheduler:
    optim = config.optim
    decay = optim.lr_decay_steps or config.train.steps
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optim.lr,
        min_lr=optim.min_lr,
        lr_warmup_steps=optim.lr_warmup_steps,
        # A run shorter than its warm-up ends inside it.
        lr_decay_steps=max(decay, optim.lr_warmup_steps + 1),
        lr_decay_style="cosine",
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=config.train.steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
