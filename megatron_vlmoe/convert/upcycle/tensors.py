"""The tensors of an upcycled checkpoint, each made of the source's when it is written, and its optimizer's state.

Adam's moments of copies: the gradient of ``c W`` is that of W divided by c, so an output layer that was multiplied by c
has its first moment divided by c and its second by c^2. A copy sees a share of the tokens that its source saw; its
second moment is too large at first (its steps too small) and settles within 1 / (1 - beta2) steps.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Optional

import torch
from torch import Tensor

from megatron_vlmoe.config.errors import ConvertError
from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.convert.checkpoints import CheckpointReader
from megatron_vlmoe.convert.tensors import LazyTensor
from megatron_vlmoe.convert.upcycle.plan import (
    DENSE_PARTS,
    OUTPUT_PARTS,
    PoolPlan,
    UpcycleOptions,
    copied_norms,
)
from megatron_vlmoe.convert.upcycle.values import (
    Diversity,
    copy_experts,
    diversify,
    forget_channels,
)
from megatron_vlmoe.planning.parameters import checkpoint_shapes

PARAM, FIRST, SECOND = "param", "exp_avg", "exp_avg_sq"
MOMENTS = (PARAM, FIRST, SECOND)


def state_key(moment: str, key: str) -> str:
    """Checkpoint key of one of a parameter's moments; of the parameter itself without one."""
    return f"optimizer.state.{moment}.{key}" if moment else key


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


def grown_tensors(
    reader: CheckpointReader,
    config: RunConfig,
    pools: Iterable[GrownPool],
    options: UpcycleOptions,
    moment: str = "",
) -> dict[str, LazyTensor]:
    """The model's tensors, or with `moment` that part of the optimizer's state, by checkpoint key.

    What the source never trained has no moments, and its copies have none either.

    Raises:
        ConvertError: a tensor is missing or of another shape.
    """
    stored = reader.optimizer_tensors if moment else reader.tensors
    made = _pool_tensors(reader, pools, options, moment)
    norms = dict(copied_norms([pool.plan for pool in pools]))
    tensors = {}
    for key, shape in checkpoint_shapes(config).items():
        whole = state_key(moment, key)
        sources = tuple(state_key(moment, source) for source in norms.get(key, (key,)))
        if key in made:
            tensors[whole] = made[key]
        elif not moment or all(source in stored for source in sources):
            first = tensor_of(stored, sources[0], reader)
            if len(sources) > 1:
                first = replace(first, read=partial(mean_of, stored, sources, reader))
            tensors[whole] = first
        else:
            continue
        if (found := tensors[whole].shape) != shape:
            raise ConvertError(f"{reader.path}: {whole} has shape {list(found)}, not {list(shape)}")
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


def sparse_optimizer(common: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a sparse run's checkpoint holds of optimizer and schedule besides tensors.

    A dense run has one optimizer with two parameter groups (with weight decay and without); a sparse run chains two,
    `0` with a further group of routers and `1` with the experts. Groups are recognised by their factors and by
    `is_expert_parallel` and `is_decoupled_lr` (which marks routers).

    Args:
        common: the source's, as stored.
        where: the checkpoint, for messages.

    Raises:
        ConvertError: it holds no optimizer, or one of another kind.
    """
    if "optimizer" not in common or "scheduler" not in common:
        raise ConvertError(f"{where}: holds weights only, no optimizer to carry")
    stored = copy.deepcopy(common["optimizer"])
    if set(stored) == {0, 1}:
        _check_kind(stored[0], where)
        return {"optimizer": stored, "scheduler": copy.deepcopy(common["scheduler"])}
    _check_kind(stored, where)
    groups = stored["optimizer"]["param_groups"]
    # The temperature of retrieval shares the routers' group.
    plain = [group for group in groups if not group["is_decoupled_lr"]]
    decays = [group for group in plain if group["wd_mult"]]
    routers = [{**group, "is_decoupled_lr": True, "default_config": False} for group in decays]
    experts = [{**group, "is_expert_parallel": True} for group in plain]
    made = {
        0: _with_groups(stored, [*decays, *routers, *(g for g in plain if not g["wd_mult"])]),
        1: _with_groups(stored, experts),
    }
    return {"optimizer": made, "scheduler": copy.deepcopy(common["scheduler"])}


def _with_groups(stored: Mapping[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    inner = {**stored["optimizer"], "param_groups": copy.deepcopy(groups)}
    return {**copy.deepcopy(dict(stored)), "optimizer": inner}


def _check_kind(stored: Any, where: str) -> None:
    if not isinstance(stored, dict) or "param_state_sharding_type" not in stored:
        raise ConvertError(
            f"{where}: its optimizer is not megatron-core's distributed one, whose state alone can be carried"
        )
    if any("betas" not in group for group in stored["optimizer"]["param_groups"]):
        raise ConvertError(f"{where}: its optimizer is not Adam, whose state alone can be carried")
