"""Initial weights as a pure function of (seed, parameter name, expert number).

The full tensor is drawn on the CPU and each rank takes its shard, so every layout starts from the same
weights and no two experts are equal. Values follow BEiT (paper section 4.1): truncated normal cut at one
standard deviation, zero biases, and block l's attention and FFN output matrices divided by sqrt(2 l).
"""

from __future__ import annotations

import math
import re
from typing import Sequence

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor, nn

from megatron_vlmoe.config.schema import ModelConfig
from megatron_vlmoe.runtime.draws import keyed_generator

EXPERT_KEY = re.compile(r"\.experts\.(\w+)\.(weight1|weight2|bias1|bias2)$")
OUTPUT_KEY = re.compile(r"(linear_proj|linear_fc2)\.weight$|\.weight2$")
LAYER_KEY = re.compile(r"decoder\.layers\.(\d+)\.")


@torch.no_grad()
def initialize_parameters(
    chunks: Sequence[nn.Module], model: ModelConfig, seed: int, metadata: dict
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
        return torch.stack([_full(shard.key, shape[1:], model, seed, e) for e in experts])
    full = _full(shard.key, shape, model, seed)
    index = tuple(slice(start, start + size) for start, size in zip(offset, local))
    return full[index]


def _full(
    key: str, shape: Sequence[int], model: ModelConfig, seed: int, expert: int = -1
) -> Tensor:
    """The whole parameter, or the whole parameter of one expert."""
    if key.endswith(("gamma_1", "gamma_2")):
        return torch.full(tuple(shape), model.layer_scale_init)
    if re.search(r"(bias|bias1|bias2)$", key):
        return torch.zeros(tuple(shape))
    if re.search(r"norm\.weight$", key):
        return torch.ones(tuple(shape))
    generator = keyed_generator(torch.device("cpu"), seed, key, expert)
    value = torch.empty(tuple(shape))
    std = model.init_std
    nn.init.trunc_normal_(value, std=std, a=-std, b=std, generator=generator)
    layer = LAYER_KEY.search(key)
    if layer and OUTPUT_KEY.search(key):
        value /= math.sqrt(2.0 * (int(layer.group(1)) + 1))
    return value
