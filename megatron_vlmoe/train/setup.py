"""Builds the model chunks of this rank, wraps them for data parallelism, and makes optimizer and schedule."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import (
    ParamKey,
    ParamPredicate,
    ParamWithNamePredicate,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.config.schema import Precision, RunConfig
from megatron_vlmoe.model.attention import check_attention_backend
from megatron_vlmoe.model.implementation import check_implementation
from megatron_vlmoe.model.task_heads import build_pretraining_heads
from megatron_vlmoe.model.vlmoe import (
    DTYPES,
    BuildHeads,
    VLMoEModel,
    build_transformer_config,
    freeze_unreachable,
    initialize_parameters,
)
from megatron_vlmoe.moe.router import balance_experts
from megatron_vlmoe.runtime.distributed import agree, device
from megatron_vlmoe.train.checkpoint_files import FULLY_RESHARDABLE, content_metadata
from megatron_vlmoe.train.step_graph import stream_of_hooks


@dataclass
class ModelParts:
    """The model of this rank.

    Args:
        transformer_config: megatron-core's configuration; schedules read their hooks from it.
        chunks: the bare model chunks of this rank, one per virtual pipeline stage.
        wrapped: the chunks inside megatron-core's DDP; the bare ones for a forward-only run.
    """

    transformer_config: TransformerConfig
    chunks: list[VLMoEModel]
    wrapped: list[MegatronModule]


@dataclass
class TrainingParts(ModelParts):
    """What a training step works on: also the optimizer, the learning-rate schedule, and what is frozen.

    Args:
        transformer_config: see `ModelParts`, as are `chunks` and `wrapped`.
        frozen: names of modules that the run never reaches.
    """

    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    frozen: list[str]


def checkpoint_metadata(optimizer_format: str = FULLY_RESHARDABLE) -> dict[str, Any]:
    """megatron-core's metadata for sharded state dicts; the weights among them load at any layout."""
    return {
        **content_metadata(optimizer_format),
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def build_chunks(
    config: RunConfig,
    transformer_config: TransformerConfig,
    build_heads: BuildHeads = build_pretraining_heads,
) -> list[VLMoEModel]:
    """The model chunks of this rank, with initial weights, on its device."""
    virtual = config.parallel.virtual_pipeline_model_parallel_size
    chunks = []
    for stage in range(virtual):
        where = {"ignore_virtual": False, "vp_stage": stage if virtual > 1 else None}
        chunks.append(
            VLMoEModel(
                config,
                transformer_config,
                pre_process=parallel_state.is_pipeline_first_stage(**where),
                post_process=parallel_state.is_pipeline_last_stage(**where),
                vp_stage=where["vp_stage"],
                build_heads=build_heads,
            )
        )
    initialize_parameters(chunks, config.model, config.train.seed, checkpoint_metadata())
    return [chunk.to(device()) for chunk in chunks]


def build_training(
    config: RunConfig, precision: Precision, build_heads: BuildHeads = build_pretraining_heads
) -> TrainingParts:
    """Everything that a training run needs on this rank.

    Args:
        config: the run, with vocabulary sizes.
        build_heads: makes the heads of the last stage.

    Raises:
        ConfigError: on every rank, if megatron-core could not save what it is to train, or this machine cannot do what
            an option asks for.
    """
    check_attention_backend(config.model, precision, device())
    check_implementation(config, precision)
    transformer_config = build_transformer_config(config, precision)
    chunks = build_chunks(config, transformer_config, build_heads)
    frozen = freeze_unreachable(chunks, config)
    trained = [p for chunk in chunks for p in chunk.parameters() if p.requires_grad]
    if config.checkpoint.save and not config.parallel.use_distributed_optimizer:
        # megatron-core's optimizer of 16-bit weights without sharding takes the parameters that are fp32 all the same
        # (routers, the temperature of retrieval) for others of the model when it saves.
        if agree(precision != "fp32" and any(p.dtype == torch.float32 for p in trained)):
            raise ConfigError(
                f"parallel.use_distributed_optimizer=false cannot save a {precision} model whose routers or "
                "temperature are fp32: leave it on, or set train.precision=fp32"
            )
    wrapped = _wrap(chunks, config, transformer_config)
    optimizer = get_megatron_optimizer(
        _optimizer_config(config, precision),
        wrapped,
        config_overrides=_group_overrides(chunks, config),
    )
    if config.checkpoint.save and config.checkpoint.optimizer_format != FULLY_RESHARDABLE:
        chained = getattr(optimizer, "chained_optimizers", [optimizer])
        ranges = [r for part in chained for r in getattr(part, "gbuf_ranges", ())]
        shares = [bucket for r in ranges for buckets in r.values() for bucket in buckets]
        if agree(not all(share["param_map"] for share in shares)):
            raise ConfigError(
                f"checkpoint.optimizer_format={config.checkpoint.optimizer_format}: a data-parallel rank has no "
                "parameters in one of the optimizer's buckets, which megatron-core then cannot write; so small a "
                f"model needs {FULLY_RESHARDABLE}"
            )
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        # megatron-core calls it before it loads a state, but has none for SGD.
        part.init_state_fn = part.init_state_fn or _init_momentum
    transformer_config.grad_scale_func = optimizer.scale_loss
    transformer_config.finalize_model_grads_func = finalize_model_grads
    if config.moe.balance_bias_rate > 0.0 and config.moe.train_experts:
        transformer_config.finalize_model_grads_func = functools.partial(
            _finalize_and_balance, chunks, config.moe.balance_bias_rate
        )
    return TrainingParts(
        transformer_config=transformer_config,
        chunks=chunks,
        wrapped=wrapped,
        optimizer=optimizer,
        scheduler=_scheduler(config, optimizer),
        frozen=frozen,
    )


def _finalize_and_balance(
    chunks: list[VLMoEModel], rate: float, *arguments: Any, **options: Any
) -> None:
    """What ends the backward pass of a step, where megatron-core's own bias of experts is updated as well."""
    finalize_model_grads(*arguments, **options)
    modules = (module for chunk in chunks for module in chunk.modules())
    balance_experts(modules, rate, parallel_state.get_tensor_and_data_parallel_group())


def build_forward_only(
    config: RunConfig, precision: Precision, build_heads: BuildHeads
) -> ModelParts:
    """The model alone, for evaluation and prediction: no gradients, no optimizer.

    Raises:
        ConfigError: if this machine cannot do what an option asks for.
    """
    # Only training computes in 8 bits.
    config = replace(config, train=replace(config.train, fp8="none"))
    check_attention_backend(config.model, precision, device())
    check_implementation(config, precision)
    transformer_config = build_transformer_config(config, precision)
    chunks = build_chunks(config, transformer_config, build_heads)
    for chunk in chunks:
        chunk.requires_grad_(False)
        chunk.eval()
    return ModelParts(transformer_config, chunks, list(chunks))


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
    with stream_of_hooks() if config.train.cuda_graph else contextlib.nullcontext():
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
        params_dtype=DTYPES[precision],
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        overlap_param_gather=config.parallel.overlap_param_gather,
        initial_loss_scale=optim.initial_loss_scale,
        min_loss_scale=optim.min_loss_scale,
        loss_scale_window=optim.loss_scale_window,
        hysteresis=optim.hysteresis,
    )


def _init_momentum(optimizer: torch.optim.Optimizer, config: Any = None) -> None:
    """The state of SGD before its first step, for a checkpoint to be loaded into."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))


def has_weight_decay(name: str, shape: torch.Size) -> bool:
    """Matrices decay; vectors, position tables and special embeddings do not (BEiT's rule).

    Biases of experts are matrices ``[E, F]`` but still biases.
    """
    if len(shape) == 1 or name.endswith(("bias", "bias1", "bias2")):
        return False
    special = ("position", "cls_token", "mask_token", "token_type", "logit_scale")
    return not name.endswith(special)


def learning_rate_factor(name: str, layer_number: int, config: RunConfig) -> float:
    """Factor of the learning rate of a parameter (layer-wise decay as in BEiT, head factor as in VLMo).

    The pooler has the full rate without the head's factor (VLMo, BEiT-3).

    Args:
        name: parameter name within its chunk.
        layer_number: number of its block from 1; 0 outside blocks.
    """
    optim = config.optim
    if name.startswith("heads.") and not name.startswith("heads.pooler."):
        return optim.head_lr_multiplier
    if name.startswith("embedding."):
        return optim.layer_decay ** (config.model.num_layers + 1)
    if layer_number:
        return optim.layer_decay ** (config.model.num_layers + 1 - layer_number)
    return 1.0


def _group_overrides(chunks: list[VLMoEModel], config: RunConfig) -> dict[ParamKey, Any]:
    """Parameter groups: matrices, what has no weight decay, routers, and learning rates of their own.

    Routers and the temperature of retrieval are fp32 in a 16-bit model, and megatron-core 0.16.1's distributed
    optimizer saves the wrong state where one group mixes the two. Groups are recognised by megatron-core's own keys, of
    which `is_decoupled_lr` has no other effect.
    """
    no_decay = ParamWithNamePredicate(
        name="no_weight_decay", fn=lambda param, name: not has_weight_decay(name, param.shape)
    )
    router = ParamWithNamePredicate(
        name="router",
        fn=lambda param, name: ".router." in name or name.endswith("logit_scale"),
    )
    overrides: dict[ParamKey, Any] = {
        ParamKey(with_name_predicate=no_decay): {"wd_mult": 0.0},
        ParamKey(with_name_predicate=router): {"is_decoupled_lr": True},
    }
    # Every parameter carries its factor; groups are needed for those of the whole model.
    for chunk in chunks:
        numbers = {
            id(parameter): layer.layer_number
            for layer in chunk.decoder.layers
            for parameter in layer.parameters()
        }
        for name, parameter in chunk.named_parameters():
            factor = learning_rate_factor(name, numbers.get(id(parameter), 0), config)
            parameter.learning_rate_factor = factor  # type: ignore[attr-defined]
    blocks = range(1, config.model.num_layers + 1)
    factors = {learning_rate_factor("decoder.", number, config) for number in blocks}
    factors |= {learning_rate_factor(name, 0, config) for name in ("embedding.", "heads.")}
    for factor in sorted(factors - {1.0}):
        key = ParamPredicate(
            name=f"learning_rate_{factor!r}",
            fn=lambda param, factor=factor: getattr(param, "learning_rate_factor", 1.0) == factor,
        )
        overrides[ParamKey(predicate=key)] = {
            # By this key, which has no other effect, groups are told apart: 0.16.1 does not look at rates.
            "lr_mult": factor,
            "max_lr": config.optim.lr * factor,
            "min_lr": config.optim.min_lr * factor,
        }
    return overrides


def _scheduler(config: RunConfig, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    optim = config.optim
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optim.lr,
        min_lr=optim.min_lr,
        lr_warmup_steps=optim.lr_warmup_steps,
        # A run shorter than its warm-up ends inside it.
        lr_decay_steps=max(optim.lr_decay_steps or config.train.steps, optim.lr_warmup_steps + 1),
        lr_decay_style=optim.lr_decay_style,
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=config.train.steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
