"""The optimizer's state in a checkpoint, under the options of the run that loads it.

Of a saved parameter group only Adam's step count is state. Rates, bounds, betas, epsilon and weight decay are options,
and so is which parameters share a group (`optim.layer_decay`, `optim.head_lr_multiplier`): all of that is the loading
run's own. megatron-core looks saved groups up instead: 0.16.1 without their rates, so that it takes one group for
another, 0.19 with them, so that it finds none when a rate has changed. What it gets from here are therefore the run's
own groups, with the saved step count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

GROUPS = "param_groups"


def drop_requested_groups(requested: dict[str, Any]) -> None:
    """Takes the parameter groups out of what is asked of a checkpoint, which may have another number of them.

    Args:
        requested: the optimizer's sharded state dict for loading; changed in place.
    """
    for member in _members(requested):
        _inner(member).pop(GROUPS, None)


def adopt_groups(optimizer: Any, loaded: dict[str, Any], common: Mapping[str, Any]) -> None:
    """Puts the optimizer's own groups, with the saved step count, into a state dict that it is to load.

    Args:
        optimizer: megatron-core's, as built for this run.
        loaded: its state dict with the tensors of a checkpoint; changed in place.
        common: the optimizer's part of what the checkpoint holds besides tensors.
    """
    steps = {g["step"] for m in _members(common) for g in _inner(m).get(GROUPS, ()) if "step" in g}
    # All groups take every step together; where they differ, a group without parameters was left behind.
    step = {"step": max(steps)} if steps else {}
    parts = _members(loaded)
    for optimizer_part, part in zip(_optimizers(optimizer), parts, strict=True):
        own = optimizer_part.optimizer.state_dict()[GROUPS]
        _inner(part)[GROUPS] = [{**group, **step} for group in own]
        # A stage without parameters of this kind has asked for no state, and megatron-core has dropped the empty place.
        _inner(part).setdefault("state", {})


def tensor_keys(requested: Any) -> Iterator[str]:
    """Checkpoint keys of the tensors in a nested sharded state dict."""
    if isinstance(requested, ShardedTensor):
        yield requested.key
    elif isinstance(requested, Mapping):
        for value in requested.values():
            yield from tensor_keys(value)
    elif isinstance(requested, (list, tuple)):
        for value in requested:
            yield from tensor_keys(value)


def bound_loss_scale(optimizer: Any, starts_anew: bool) -> None:
    """Brings a loaded loss scale of fp16 within the bounds of this run; without fp16 there is none.

    megatron-core doubles the scale when its count of good steps *equals* the window: a saved count above a smaller
    window would never double it again.

    Args:
        optimizer: megatron-core's, after loading.
        starts_anew: whether `optim.initial_loss_scale` is another than the saved run's: the scale starts there again.
    """
    for part in _optimizers(optimizer):
        scaler = getattr(part, "grad_scaler", None)
        if scaler is None or not hasattr(scaler, "growth_interval"):
            continue
        if starts_anew:
            scaler._scale.fill_(part.config.initial_loss_scale)
            scaler._growth_tracker, scaler._hysteresis_tracker = 0, scaler.hysteresis
        scaler._scale = torch.maximum(scaler._scale, scaler.min_scale)
        scaler._growth_tracker = min(scaler._growth_tracker, scaler.growth_interval - 1)
        scaler._hysteresis_tracker = min(scaler._hysteresis_tracker, scaler.hysteresis)


def _optimizers(optimizer: Any) -> list[Any]:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _members(state: Mapping[Any, Any]) -> list[Any]:
    """The parts of a state dict: one, or one per chained optimizer under 0, 1, ..."""
    chained = sorted(key for key in state if isinstance(key, int))
    return [state[key] for key in chained] if chained else [state]


def _inner(member: Any) -> Any:
    """Where the groups lie: mixed-precision and distributed optimizers wrap the state of the inner one."""
    return member.get("optimizer", member)
