"""The optimizer state of a sparse model from that of its source, as the sparse run would have saved it.

Adam's moments of copies: the gradient of ``c W`` is that of W divided by c, so an output layer that was multiplied by c
has its first moment divided by c and its second by c^2. A copy sees a share of the tokens that its source saw; its
second moment is too large at first (its steps too small) and settles within 1 / (1 - beta2) steps.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from megatron_vlmoe.config.errors import ConvertError

STATE = "optimizer.state."
PARAM, FIRST, SECOND = "param", "exp_avg", "exp_avg_sq"
MOMENTS = (PARAM, FIRST, SECOND)


def state_key(name: str, key: str) -> str:
    """Checkpoint key of one of a parameter's moments."""
    return f"{STATE}{name}.{key}"


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
