"""Where a process stands among the others; needs neither torch nor megatron-core."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Ranks:
    """Where this process stands in the layout (rank order tp-cp-ep-dp-pp).

    Args:
        rank: rank in the world.
        world_size: processes.
        local_world_size: processes on this machine.
        tensor: rank and size along TP, likewise the others.
    """

    rank: int
    world_size: int
    local_world_size: int
    tensor: int
    tensor_size: int
    pipeline: int
    pipeline_size: int
    data: int
    data_size: int
    expert: int
    expert_size: int

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embeddings."""
        return self.pipeline == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the heads."""
        return self.pipeline == self.pipeline_size - 1


def environment_world_size() -> int:
    """Processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def environment_rank() -> int:
    """Number of this process among them; 0 without torchrun."""
    return int(os.environ.get("RANK", 0))
