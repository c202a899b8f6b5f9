"""Pools of expert FFNs, held as batched weights so that one matmul serves all experts of a rank.

Letters: E experts of a pool on this rank, F inner width, D width, R rows per expert, N rows in total.
"""

from __future__ import annotations

from typing import Any, Optional, Sequence

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_vlmoe.stream.block_plan import Branch

GROUPED_MM_DTYPES = (torch.bfloat16,)


class ExpertPool(nn.Module):
    """The experts of one pool that this rank owns: ``e(x) = W2 gelu(W1 x + b1) + b2`` (paper section 3.2).

    Parameters are ``weight1 [E, F, D]``, ``bias1 [E, F]``, ``weight2 [E, D, F]``, ``bias2 [E, D]``; their
    global first axis is the expert number of the pool, sharded over expert parallel ranks.

    `num_experts` counts the experts of the pool over all ranks.
    """

    weight1: nn.Parameter
    bias1: nn.Parameter
    weight2: nn.Parameter
    bias2: nn.Parameter

    def __init__(
        self, num_experts: int, config: TransformerConfig, pg_collection: ProcessGroupCollection
    ) -> None:
        super().__init__()
        self.ep_size = pg_collection.ep.size()
        self.ep_rank = pg_collection.ep.rank()
        self.replica = pg_collection.expt_dp.rank()
        self.num_experts = num_experts
        self.num_local_experts = num_experts // self.ep_size
        local, hidden, inner = (
            self.num_local_experts,
            config.hidden_size,
            config.moe_ffn_hidden_size,
        )
        assert inner is not None
        shapes = {
            "weight1": (local, inner, hidden),
            "bias1": (local, inner),
            "weight2": (local, hidden, inner),
            "bias2": (local, hidden),
        }
        for name, shape in shapes.items():
            parameter = nn.Parameter(torch.empty(shape, dtype=config.params_dtype))
            # Always reduced over the expert-data-parallel group, also with EP = 1: with TP > 1 the replicas
            # on other TP ranks see other tokens, and megatron-core would otherwise let them drift apart.
            parameter.allreduce = False  # type: ignore[attr-defined]
            # Not a duplicate of TP rank 0's: the gradient norm must count it on every rank that owns it.
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
            parameter.partition_dim = 0  # type: ignore[attr-defined]
            parameter.partition_stride = 1  # type: ignore[attr-defined]
            self.register_parameter(name, parameter)

    def forward(self, rows: Tensor, counts: Optional[Tensor] = None) -> Tensor:
        """All experts at once: ``[E, R, D]`` to ``[E, R, D]``; or ``[N, D]`` sorted by expert, of each as many as
        `counts` ``[E]`` says.

        Goes through the module's call, whose hooks wait for parameters that are still being gathered.
        """
        if counts is None:
            hidden = F.gelu(batched_linear(rows, self.weight1, self.bias1))
            return batched_linear(hidden, self.weight2, self.bias2)
        expert = torch.repeat_interleave(
            torch.arange(self.num_local_experts, device=rows.device),
            counts.to(rows.device),
            output_size=rows.shape[0],
        )
        hidden = F.gelu(grouped_matmul(rows, self.weight1, counts) + self.bias1[expert])
        return grouped_matmul(hidden, self.weight2, counts) + self.bias2[expert]

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: Sequence[tuple[int, int, int]] = (),
        metadata: Optional[dict] = None,
    ) -> ShardedStateDict:
        """Every parameter as a shard of axis 0 over expert parallel ranks."""
        shards = {}
        offset = len(sharded_offsets)
        for name, parameter in self.named_parameters():
            shards[f"{prefix}{name}"] = ShardedTensor.from_rank_offsets(
                f"{prefix}{name}",
                parameter,
                *sharded_offsets,
                (offset, self.ep_rank, self.ep_size),
                replica_id=(0, 0, self.replica),
                prepend_axis_num=offset,
            )
        return shards


class _BatchedLinear(torch.autograd.Function):
    """``rows[e] @ weight[e].T + bias[e]`` for rows ``[E, R, K]``, weight ``[E, M, K]``, bias ``[E, M]``.

    The weight's gradient has the layout of the weight. Differentiating ``baddbmm`` gives the gradient of the transposed
    weight, and storing that costs a transposed copy of every expert weight in every backward pass: 5 % of the layer
    with 32 experts.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(rows, weight)
        return torch.baddbmm(bias.unsqueeze(1), rows, weight.transpose(1, 2))

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad: Tensor
    ) -> tuple[Optional[Tensor], Optional[Tensor], Optional[Tensor]]:
        rows, weight = ctx.saved_tensors
        needs_rows, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            torch.bmm(grad, weight) if needs_rows else None,
            torch.bmm(grad.transpose(1, 2), rows) if needs_weight else None,
            grad.sum(dim=1) if needs_bias else None,
        )


batched_linear = _BatchedLinear.apply


def grouped_matmul(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """``rows[i] @ weight[expert of i].T`` for rows ``[N, K]`` sorted by expert, weight ``[E, M, K]``.

    Uses torch's grouped kernel where it exists for the dtype, else one matmul per expert.
    """
    if rows.dtype in GROUPED_MM_DTYPES and hasattr(F, "grouped_mm") and rows.shape[0] > 0:
        offsets = counts.to(rows.device).cumsum(0).to(torch.int32)
        return _ContiguousGrad.apply(F.grouped_mm(rows, weight.transpose(1, 2), offs=offsets))
    # Indexing `weight[e]` would make a gradient of the whole pool for every expert; the gradients of an
    # unbound tensor are stacked once.
    experts = weight.unbind(0)
    parts = [part @ own.T for part, own in zip(rows.split(counts.tolist(), dim=0), experts)]
    return torch.cat(parts, dim=0)


class _ContiguousGrad(torch.autograd.Function):
    """Identity whose backward makes the gradient contiguous, which the grouped kernel's backward needs."""

    @staticmethod
    def forward(ctx: object, value: Tensor) -> Tensor:  # type: ignore[override]
        return value

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad.contiguous()


class PooledExperts(MegatronModule):
    """The experts of every pool of one MoE block, by pool name (the `experts` spec of the MoE layer)."""

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        pools: Sequence[Branch],
    ) -> None:
        super().__init__(config=config)
        for pool in pools:
            self.add_module(pool.name, ExpertPool(pool.num_experts, config, pg_collection))
        owned = sum(self.pool(pool.name).num_local_experts for pool in pools)
        if owned != num_local_experts:
            raise ValueError(
                f"{owned} experts on this rank, megatron-core expects {num_local_experts}"
            )

    def pool(self, name: str) -> ExpertPool:
        """One pool's experts."""
        module = self.get_submodule(name)
        assert isinstance(module, ExpertPool)
        return module
