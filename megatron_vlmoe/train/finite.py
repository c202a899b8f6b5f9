"""Whether what a checkpoint is about to hold is finite; the last good checkpoint stays the last one where it is not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megatron_vlmoe.config.errors import TrainingError
from megatron_vlmoe.train.checkpoint_files import is_optimizer_key


@torch.no_grad()
def check_finite(content: Mapping[str, Any], step: int) -> None:
    """Refuses weights and optimizer state with NaN or infinite values; every rank must call it.

    The largest absolute values of all tensors of a device and type are one fused operation, and the host waits once
    for the device.

    Args:
        content: of the checkpoint, with sharded tensors.

    Raises:
        TrainingError: on every rank, naming the first such tensor, of the weights if there is one.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[tuple[str, Tensor]]] = defaultdict(list)
    for value in nested_values(content):
        if isinstance(value, (ShardedTensor, ShardedTensorFactory)):
            data = value.data
            if torch.is_tensor(data) and data.is_floating_point() and data.numel():
                groups[data.device, data.dtype].append((value.key, data.detach()))
    bad: list[str] = []
    for group in groups.values():
        # Of 16 bits too, the largest value is exact, where a sum of squares might overflow.
        norms = torch._foreach_norm([tensor for _, tensor in group], float("inf"))
        finite = torch.stack(norms).isfinite().tolist()
        bad += [key for (key, _), is_finite in zip(group, finite) if not is_finite]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, sorted(set(bad)))
    names = sorted(set().union(*gathered), key=lambda name: (is_optimizer_key(name), name))
    if names:
        more = f" and {len(names) - 1} other tensors" if len(names) > 1 else ""
        raise not_finite(f"step {step}: {names[0]}{more}")


def not_finite(what: str) -> TrainingError:
    """The error of tensors that hold NaN or infinite values."""
    return TrainingError(
        f"{what}: NaN or infinite values, so no checkpoint is written; the run can go on "
        "from its last one, with a lower optim.lr or optim.clip_grad for example"
    )
