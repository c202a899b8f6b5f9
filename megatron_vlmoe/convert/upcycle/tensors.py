"""The tensors of an upcycled checkpoint, each made of the source's when it is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Optional

import torch
from torch import Tensor

from megatron_vlmoe.config.errors import ConvertError
from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.convert.checkpoint_reader import CheckpointReader
from megatron_vlmoe.convert.parameters import Shape, checkpoint_shapes
from megatron_vlmoe.convert.tensors import LazyTensor
from megatron_vlmoe.convert.upcycle.optimizer import FIRST, MOMENTS, PARAM, SECOND, state_key
from megatron_vlmoe.convert.upcycle.options import UpcycleOptions
from megatron_vlmoe.convert.upcycle.plan import DENSE_PARTS, OUTPUT_PARTS, PoolPlan, copied_norms
from megatron_vlmoe.convert.upcycle.values import (
    Diversity,
    copy_experts,
    diversify,
    forget_channels,
)


@dataclass(frozen=True)
class GrownPool:
    """A pool with everything that is decided about it before tensors are written.

    Args:
        plan: what it is made of.
        router: rows ``[E, D]`` in fp32.
        norm: weight and bias of the LayerNorm before it.
        scale: factor of the output layer.
    """

    plan: PoolPlan
    router: Tensor
    norm: tuple[Tensor, Tensor]
    scale: float


def weights(
    reader: CheckpointReader,
    config: RunConfig,
    pools: Iterable[GrownPool],
    options: UpcycleOptions,
) -> dict[str, LazyTensor]:
    """The model's tensors."""
    made = _pool_tensors(reader, pools, options, "")
    norms = dict(copied_norms([pool.plan for pool in pools]))
    tensors = {}
    for key, shape in checkpoint_shapes(config).items():
        if key in made:
            tensors[key] = made[key]
        else:
            tensors[key] = _merged(reader.tensors, norms.get(key, (key,)), reader)
        _check_shape(key, tensors[key], shape, reader)
    return tensors


def moments(
    reader: CheckpointReader,
    config: RunConfig,
    pools: Iterable[GrownPool],
    options: UpcycleOptions,
) -> dict[str, LazyTensor]:
    """The optimizer's tensors; what the source never trained has none, and its copies have none either."""
    norms = dict(copied_norms([pool.plan for pool in pools]))
    stored = reader.optimizer_tensors
    tensors = {}
    for name in MOMENTS:
        made = _pool_tensors(reader, pools, options, name)
        for key, shape in checkpoint_shapes(config).items():
            whole = state_key(name, key)
            sources = tuple(state_key(name, source) for source in norms.get(key, (key,)))
            if key in made:
                tensors[whole] = made[key]
            elif all(source in stored for source in sources):
                tensors[whole] = _merged(stored, sources, reader)
            else:
                continue
            _check_shape(whole, tensors[whole], shape, reader)
    return tensors


def _pool_tensors(
    reader: CheckpointReader, pools: Iterable[GrownPool], options: UpcycleOptions, moment: str
) -> dict[str, LazyTensor]:
    """Tensors of the grown pools by parameter key: weights, or with `moment` that part of the optimizer's state."""
    how = Diversity(options.noise, options.drop_fraction, options.seed)
    made = {}
    for pool in pools:
        plan = pool.plan
        for part in DENSE_PARTS:
            keys = plan.source_keys(part)
            if moment and any(
                state_key(moment, key) not in reader.optimizer_tensors for key in keys
            ):
                continue
            shape = tensor_of(reader.tensors, keys[0], reader).shape
            each = shape[1:] if plan.source_experts else shape
            dtype = torch.float32 if moment else reader.tensors[keys[0]].dtype
            read = partial(_experts, reader, pool, part, how, moment)
            made[plan.expert_key(part)] = LazyTensor((plan.num_experts, *each), dtype, read)
        if moment and plan.expert_key("weight1") not in made:
            continue
        read_rows = partial(_router, reader, pool, moment)
        made[plan.router_key] = LazyTensor(tuple(pool.router.shape), torch.float32, read_rows)
    return made


def _experts(
    reader: CheckpointReader, pool: GrownPool, part: str, how: Diversity, moment: str
) -> Tensor:
    """One parameter of all experts of a pool, or one of its moments."""
    plan = pool.plan
    keys = plan.source_keys(part)
    # The fp32 copy of a 16-bit parameter, where there is one: weights and their copy stay equal.
    masters = tuple(state_key(moment or PARAM, key) for key in keys)
    if all(key in reader.optimizer_tensors for key in masters):
        source = mean_of(reader.optimizer_tensors, masters, reader)
    else:
        source = mean_of(reader.tensors, keys, reader)
    experts = copy_experts(source if plan.source_experts else source.unsqueeze(0), plan.copies)
    name = f"{plan.block}{plan.name}"
    factor = pool.scale if part in OUTPUT_PARTS else 1.0
    if moment == FIRST:
        return forget_channels(experts, part, name, how) / factor
    if moment == SECOND:
        return experts / factor**2
    if how.noise or how.drop_fraction:
        experts = diversify(experts, part, name, how)
    return experts * factor


def _router(reader: CheckpointReader, pool: GrownPool, moment: str) -> Tensor:
    """The rows of a pool's router, or their moments: zero for a new router."""
    plan = pool.plan
    if moment in ("", PARAM):
        return pool.router
    if not plan.source_experts:
        return torch.zeros_like(pool.router)
    stored = tensor_of(reader.optimizer_tensors, state_key(moment, plan.router_key), reader)
    return copy_experts(stored.read().float(), plan.copies)


def _merged(
    stored: Mapping[str, LazyTensor], keys: tuple[str, ...], reader: CheckpointReader
) -> LazyTensor:
    """A tensor as it is, or the mean of several."""
    first = tensor_of(stored, keys[0], reader)
    if len(keys) == 1:
        return first
    return replace(first, read=partial(mean_of, stored, keys, reader))


def mean_of(
    stored: Mapping[str, LazyTensor], keys: tuple[str, ...], reader: CheckpointReader
) -> Tensor:
    """The mean of tensors in fp32, or the one tensor."""
    values = [tensor_of(stored, key, reader).read().float() for key in keys]
    return values[0] if len(values) == 1 else torch.stack(values).mean(dim=0)


def tensor_of(stored: Mapping[str, LazyTensor], key: str, reader: CheckpointReader) -> LazyTensor:
    """A tensor of the source.

    Raises:
        ConvertError: naming the checkpoint that lacks it.
    """
    found: Optional[LazyTensor] = stored.get(key)
    if found is None:
        raise ConvertError(f"{reader.path}: has no {key}")
    return found


def _check_shape(key: str, tensor: LazyTensor, shape: Shape, reader: CheckpointReader) -> None:
    if tensor.shape != shape:
        raise ConvertError(
            f"{reader.path}: {key} has shape {list(tensor.shape)}, not {list(shape)}"
        )
