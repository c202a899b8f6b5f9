"""The feed-forward half of a MoME block: one branch per modality, each with its own LayerNorm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Union

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_vlmoe.config.schema import MoEConfig
from megatron_vlmoe.moe.layer import ModalityMoELayer
from megatron_vlmoe.stream.batch import StreamBatch
from megatron_vlmoe.stream.block_plan import BlockPlan, Branch


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
        runs = [(part, branch.name) for branch in branches for part in branch.slices(layout)]
        runs.sort(key=lambda run: (run[0].start, run[0].stop))
        # One split: its gradient is one concatenation, where every slice would fill a whole stream.
        pieces = hidden.split([part.stop - part.start for part, _ in runs])
        inputs = {}
        for branch in branches:
            own = [piece for piece, (_, name) in zip(pieces, runs) if name == branch.name]
            tokens = own[0] if len(own) == 1 else torch.cat(own)
            inputs[branch.name] = self.norm(branch.name)(tokens)
        outputs = self._branches(branches, inputs, hidden[:0], stream)
        parts = {
            branch.name: iter(
                outputs[branch.name].split([p.stop - p.start for p in branch.slices(layout)])
            )
            for branch in branches
        }
        return torch.cat([next(parts[name]) for _, name in runs])

    def _branches(
        self,
        branches: list[Branch],
        inputs: dict[str, Tensor],
        empty: Tensor,
        stream: StreamBatch,
    ) -> dict[str, Tensor]:
        """Outputs of the named branches for their tokens ``[T, 1, D]``."""
        outputs = {}
        for branch in branches:
            if not branch.num_experts:
                output, bias = self.ffn(branch.name)(inputs[branch.name])
                outputs[branch.name] = output if bias is None else output + bias
        if self.moe is not None:
            # Every pool takes part in every micro-batch, also without tokens: collectives must match.
            pools = self.plan.pools
            pool_inputs = [inputs.get(pool.name, empty) for pool in pools]
            for pool, output in zip(pools, self.moe(pool_inputs, stream)):
                outputs[pool.name] = output
        return outputs


def dense_ffn_spec() -> ModuleSpec:
    """megatron-core's MLP on its column- and row-parallel layers."""
    return ModuleSpec(
        module=MLP,
        submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
    )
