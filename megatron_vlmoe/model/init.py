"""Initial weights of the model chunks of a rank.

The full tensor is drawn on the CPU and each rank takes its shard, so every layout starts from the same
weights and no two experts are equal. The values are those of `initial_values`.
"""

from __future__ import annotations

from typing import Sequence

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from megatron_vlmoe.config.schema import ModelConfig
from megatron_vlmoe.model.initial_values import EXPERT_KEY, full_initial_value, initial_experts


@torch.no_grad()
def initialize_parameters(
    chunks: Sequence[MegatronModule], model: ModelConfig, seed: int, metadata: dict
) -> None:
    """Fills every parameter of the model chunks of this rank.

    Args:
        chunks: `VLMoEModel` stages.
        model: initial standard deviation and LayerScale.
        seed: seed of the run.
        metadata: megatron-core's sharded-state-dict metadata.

    Raises:
        RuntimeError: if a parameter has no place in the sharded state dict.
    """
    for chunk in chunks:
        shards = {
            id(shard.data): shard
            for shard in chunk.sharded_state_dict(metadata=metadata).values()
            if isinstance(shard, ShardedTensor)
        }
        by_pointer = {
            shard.data.data_ptr(): shard for shard in shards.values() if shard.data.numel()
        }
        for name, parameter in chunk.named_parameters():
            if name.endswith("logit_scale"):
                # A number that its module sets, not a draw.
                continue
            shard = shards.get(id(parameter)) or by_pointer.get(parameter.data_ptr())
            if shard is None:
                raise RuntimeError(f"parameter {name} is not in the sharded state dict")
            parameter.copy_(initial_value(shard, model, seed).view_as(parameter))
            _mark_shard(parameter, shard)


def _mark_shard(parameter: nn.Parameter, shard: ShardedTensor) -> None:
    """Marks tensor-parallel shards, as megatron-core's own initialisation would.

    Unmarked shards count as replicas of TP rank 0, and the gradient norm would leave the others out.
    """
    shape = tuple(shard.global_shape)[shard.prepend_axis_num :]
    axes = [axis for axis, size in enumerate(shard.local_shape) if size != shape[axis]]
    if axes and not hasattr(parameter, "tensor_model_parallel"):
        set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=axes[0], stride=1)


def initial_value(shard: ShardedTensor, model: ModelConfig, seed: int) -> Tensor:
    """This rank's part of a parameter, from its global key and shape (fp32, CPU)."""
    shape = tuple(shard.global_shape)[shard.prepend_axis_num :]
    offset = tuple(shard.global_offset)[shard.prepend_axis_num :]
    local = tuple(shard.local_shape)
    if EXPERT_KEY.search(shard.key):
        experts = range(offset[0], offset[0] + local[0])
        return initial_experts(shard.key, shape[1:], model, seed, experts)
    full = full_initial_value(shard.key, shape, model, seed)
    index = tuple(slice(start, start + size) for start, size in zip(offset, local))
    return full[index]
