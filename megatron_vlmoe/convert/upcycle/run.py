"""From a dense checkpoint to a sparse one that computes the same, or from E experts to a multiple."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import torch

from megatron_vlmoe.config.errors import ConvertError
from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.convert.checkpoint_reader import CheckpointReader
from megatron_vlmoe.convert.checkpoint_writer import write_checkpoint
from megatron_vlmoe.convert.parameters import extra_state_keys
from megatron_vlmoe.convert.tensors import LazyTensor, counted
from megatron_vlmoe.convert.upcycle.optimizer import sparse_optimizer
from megatron_vlmoe.convert.upcycle.options import UpcycleOptions
from megatron_vlmoe.convert.upcycle.plan import PoolPlan, grown_pools
from megatron_vlmoe.convert.upcycle.tensors import GrownPool, mean_of, moments, tensor_of, weights
from megatron_vlmoe.convert.upcycle.values import grown_router, sampled_gates, small_router
from megatron_vlmoe.model.initial_values import full_initial_value
from megatron_vlmoe.train.run_files import TOKENIZER_FILE, keep_file, run_file


@dataclass(frozen=True)
class Upcycled:
    """What was made.

    Args:
        path: the iteration folder.
        source: the checkpoint that it was made of.
        before: its configuration.
        after: the new one.
        pools: the new and grown pools.
        step: step of the new checkpoint.
    """

    path: Path
    source: Path
    before: RunConfig
    after: RunConfig
    pools: tuple[GrownPool, ...]
    step: int


def read_source(location: str | Path) -> CheckpointReader:
    """The checkpoint to start from.

    Raises:
        ConvertError: there is none, or it is of a downstream task.
    """
    reader = CheckpointReader(location)
    if isinstance(reader.config, FinetuneConfig):
        raise ConvertError(
            f"{reader.path}: is of the task {reader.config.task.name}; upcycle the pretrained model, then fine-tune"
        )
    return reader


def upcycle_checkpoint(
    reader: CheckpointReader,
    config: RunConfig,
    output: Path,
    options: Optional[UpcycleOptions] = None,
    overwrite: bool = False,
) -> Upcycled:
    """Writes the sparse checkpoint, tensor by tensor, whole or not at all; the run's tokenizer goes beside it.

    Args:
        reader: the source.
        config: configuration of the result; differs from the source's in `moe` alone.
        output: folder of the checkpoint.
        options: how experts, routers and optimizer start.
        overwrite: replaces a checkpoint that is there.

    Raises:
        ConvertError: the configurations do not fit each other, a tensor is missing or damaged, or there is a
            checkpoint already.
    """
    options = options or UpcycleOptions()
    pools, tensors = upcycled_tensors(reader, config, options)
    optimizer = None
    if options.carry_optimizer:
        optimizer = sparse_optimizer(reader.common, str(reader.path))
    state = reader.train_state if options.carry_optimizer else None
    with counted(tensors, "upcycle") as read:
        path = write_checkpoint(
            output, read, extra_state_keys(config), config, state, optimizer, overwrite
        )
    tokenizer = run_file(reader.path, TOKENIZER_FILE)
    if tokenizer is not None:
        keep_file(tokenizer, output, TOKENIZER_FILE)
    step = state.step if state else 0
    return Upcycled(path, reader.path, reader.config, config, pools, step)


def upcycled_tensors(
    reader: CheckpointReader, config: RunConfig, options: UpcycleOptions
) -> tuple[tuple[GrownPool, ...], dict[str, LazyTensor]]:
    """What the sparse checkpoint will hold, without writing it.

    Returns:
        The new and grown pools, and all tensors by checkpoint key.

    Raises:
        ConvertError: the configurations do not fit each other, or a tensor is missing.
    """
    plans = grown_pools(reader.config, config, options.shared_from)
    pools = tuple(_grown_pool(plan, reader, config, options) for plan in plans)
    tensors = weights(reader, config, pools, options)
    if options.carry_optimizer:
        tensors |= moments(reader, config, pools, options)
    return pools, tensors


def _grown_pool(
    plan: PoolPlan, reader: CheckpointReader, config: RunConfig, options: UpcycleOptions
) -> GrownPool:
    weight, bias = (
        mean_of(reader.tensors, plan.norm_keys(part), reader) for part in ("weight", "bias")
    )
    norm = (weight, bias)
    key, scale = plan.router_key, plan.scale(config.moe)
    if plan.source_experts:
        rows = tensor_of(reader.tensors, key, reader).read().float()
        router = grown_router(rows, plan.copies, norm, options.seed, key)
        return GrownPool(plan, router, norm, scale)
    shape = (plan.num_experts, config.model.hidden_size)
    start = router_start(options, config)
    if start == "zero":
        router = torch.zeros(shape)
    elif start == "small":
        router = small_router(plan.num_experts, norm, options.seed, key)
    else:
        router = full_initial_value(key, shape, config.model, options.seed)
        if not config.moe.normalize_gate:
            scale = 1.0 / sampled_gates(router, norm, config.moe.topk).mean
    return GrownPool(plan, router, norm, scale)


def router_start(options: UpcycleOptions, config: RunConfig) -> str:
    """How new routers start, `auto` resolved."""
    if options.router == "auto":
        return "fresh" if config.moe.normalize_gate else "small"
    return options.router
