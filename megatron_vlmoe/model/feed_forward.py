"""The feed-forward half of a MoME block: one branch per modality, each with its own LayerNorm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Union

import torch
from megatron.core import parallel_state
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_vlmoe.config.block_plan import BlockPlan, Branch
from megatron_vlmoe.config.schema import MoEConfig
from megatron_vlmoe.moe.layer import ModalityMoELayer
from megatron_vlmoe.moe.stream_batch import StreamBatch


@dataclass
class MoMEFeedForwardSubmodules:
    """Specs of the branches.

    Args:
        norm: LayerNorm of every branch.
        dense: FFN of a dense branch.
        moe: layer that holds all pools of the block; unused in a dense block.
    """

    norm: Union[ModuleSpec, type]
    dense: ModuleSpec
    moe: ModuleSpec


class MoMEFeedForward(MegatronModule):
    """Routes tokens by modality (paper section 3.2): V-FFN or V-MoE, T-FFN or T-MoE, VL-FFN.

    Args:
        config: megatron-core configuration.
        submodules: specs of the branches.
        plan: which branches the block has.
        moe: routing options of the pools.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoMEFeedForwardSubmodules,
        plan: BlockPlan,
        moe: MoEConfig,
    ) -> None:
        super().__init__(config=config)
        self.plan = plan
        # Direct children: inside a ModuleDict megatron-core would save tensor-parallel shards as replicas.
        for branch in plan.branches:
            norm = build_module(
                submodules.norm,
                config=config,
                hidden_size=config.hidden_size,
                eps=config.layernorm_epsilon,
            )
            self.add_module(f"{branch.name}_norm", norm)
        for branch in plan.dense:
            ffn = build_module(
                submodules.dense,
                config=config,
                tp_group=parallel_state.get_tensor_model_parallel_group(),
            )
            self.add_module(f"{branch.name}_ffn", ffn)
        self.moe: ModalityMoELayer | None = None
        if plan.pools:
            self.moe = build_module(submodules.moe, config=config, plan=plan, moe=moe)

    def set_layer_number(self, layer_number: int) -> None:
        """megatron-core's check that the spec's plan belongs to this block."""
        if layer_number != self.plan.layer_number:
            raise ValueError(f"block {layer_number} was given the plan of {self.plan.layer_number}")

    def norm(self, branch: str) -> nn.Module:
        """The LayerNorm of a branch."""
        return self.get_submodule(f"{branch}_norm")

    def ffn(self, branch: str) -> nn.Module:
        """The FFN of a dense branch."""
        return self.get_submodule(f"{branch}_ffn")

    def forward(self, hidden: Tensor, stream: StreamBatch) -> Tensor:
        """Branch outputs for the local stream: ``[T, 1, D]`` to ``[T, 1, D]``."""
        layout = stream.layout
        branches = [b for b in self.plan.branches if b.num_tokens(layout)]
        inputs = {branch.name: self._read(branch, hidden, stream) for branch in branches}
        outputs: dict[str, Tensor] = {}
        for branch in branches:
            if not branch.num_experts:
                outputs[branch.name] = self._dense(branch, inputs[branch.name])
        if self.moe is not None:
            # Every pool takes part in every micro-batch, also without tokens: collectives must match.
            pools = self.plan.pools
            empty = hidden[:0]
            pool_inputs = [inputs.get(pool.name, empty) for pool in pools]
            for pool, output in zip(pools, self.moe(pool_inputs, stream)):
                outputs[pool.name] = output
        return self._write(branches, outputs, stream)

    def _read(self, branch: Branch, hidden: Tensor, stream: StreamBatch) -> Tensor:
        slices = branch.slices(stream.layout)
        parts = [hidden[part] for part in slices]
        tokens = parts[0] if len(parts) == 1 else torch.cat(parts)
        return self.norm(branch.name)(tokens)

    def _dense(self, branch: Branch, tokens: Tensor) -> Tensor:
        output, bias = self.ffn(branch.name)(tokens)
        return output if bias is None else output + bias

    def _write(
        self, branches: list[Branch], outputs: dict[str, Tensor], stream: StreamBatch
    ) -> Tensor:
        pieces: list[tuple[int, Tensor]] = []
        for branch in branches:
            slices = branch.slices(stream.layout)
            sizes = [part.stop - part.start for part in slices]
            for part, value in zip(slices, outputs[branch.name].split(sizes)):
                pieces.append((part.start, value))
        pieces.sort(key=lambda piece: piece[0])
        return torch.cat([value for _, value in pieces])


def dense_ffn_spec() -> ModuleSpec:
    """megatron-core's MLP on its column- and row-parallel layers."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules

    return ModuleSpec(
        module=MLP,
        submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
    )
