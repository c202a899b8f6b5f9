"""Pools of expert FFNs, held as batched weights so that one matmul serves all experts of a rank.

Letters: E experts of a pool on this rank, F inner width, D width, R rows per expert, N rows in total.
"""

from __future__ import annotations

from typing import Any, Iterator, Optional, Sequence

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_vlmoe.runtime.compiled import compiled
from megatron_vlmoe.runtime.gradients import GradientStore
from megatron_vlmoe.runtime.host_threads import side_by_side
from megatron_vlmoe.stream.block_plan import Branch

GROUPED_MM_DTYPES = (torch.bfloat16,)


class ExpertPool(nn.Module):
    """The experts of one pool that this rank owns: ``e(x) = W2 gelu(W1 x + b1) + b2`` (paper section 3.2).

    Parameters are ``weight1 [E, F, D]``, ``bias1 [E, F]``, ``weight2 [E, D, F]``, ``bias2 [E, D]``; their
    global first axis is the expert number of the pool, sharded over expert parallel ranks.

    Args:
        num_experts: the experts of the pool over all ranks.
        compile: bias and GELU are one compiled function (on a GPU).
    """

    weight1: nn.Parameter
    bias1: nn.Parameter
    weight2: nn.Parameter
    bias2: nn.Parameter

    def __init__(
        self,
        num_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.compile_gelu = compile
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
        `counts` ``[E]`` says, and rows of none at the end.

        With three dimensions `counts` may say how many of every expert's rows are in use, from the first on; the others
        come out as anything finite. Goes through the module's call, whose hooks wait for parameters that are still
        being gathered.
        """
        own = (self.weight1, self.bias1, self.weight2, self.bias2)
        if rows.device.type == "cpu":
            return one_by_one(rows, counts, *own)
        if rows.dim() == 3:
            return batched(rows, *own, compile=self.compile_gelu)
        assert counts is not None
        return grouped(rows, counts, *own, compile=self.compile_gelu)

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


def bias_gelu(rows: Tensor, bias: Optional[Tensor]) -> Tensor:
    """What stands between the two products of an FFN: exact GELU of rows and a bias that broadcasts to them, if it is
    still to be added."""
    return F.gelu(rows if bias is None else rows + bias)


def batched(
    rows: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    compile: bool = False,
) -> Tensor:
    """The FFNs of all experts, each on as many rows: ``[E, R, D]`` to ``[E, R, D]``.

    A product with a bias writes the bias to all rows first. Where the GELU is a compiled function, that one takes the
    bias too, and a product alone has two passes less over the inner activations.
    """
    if compile:
        product = batched_linear(rows, weight1, None)
        inner = compiled(bias_gelu, True)(product, bias1.unsqueeze(1))
    else:
        inner = F.gelu(batched_linear(rows, weight1, bias1))
    return batched_linear(inner, weight2, bias2)


def grouped(
    rows: Tensor,
    counts: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    compile: bool = False,
) -> Tensor:
    """The FFNs of all experts on rows ``[N, D]`` sorted by expert, ``counts[e]`` of each.

    Rows at the end may belong to no expert, and come out as 0.
    """
    ends = counts.to(rows.device).cumsum(0)
    expert = torch.searchsorted(ends, torch.arange(len(rows), device=rows.device), right=True)
    absent = (expert == len(counts)).unsqueeze(1)
    # Biases by a product: indexing would add up their gradients in 16 bits, one row after the other.
    owner = (expert.unsqueeze(1) == torch.arange(len(counts), device=rows.device)).to(rows.dtype)
    # What a grouped kernel leaves in rows of no group may be NaN, forward and backward.
    inner = grouped_matmul(rows.masked_fill(absent, 0.0), weight1, counts).masked_fill(absent, 0.0)
    inner = compiled(bias_gelu, compile)(inner, owner @ bias1).masked_fill(absent, 0.0)
    outputs = grouped_matmul(inner, weight2, counts) + owner @ bias2
    return outputs.masked_fill(absent, 0.0)


def one_by_one(
    rows: Tensor,
    counts: Optional[Tensor],
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
) -> Tensor:
    """Either of these for processors, one expert after the other; rows that are not in use come out as 0.

    Args:
        rows: ``[E, R, D]``, of which the first ``counts[e]`` are in use (None: all), or ``[N, D]`` sorted by expert.
        counts: ``[E]``, on the CPU.
    """
    # Rows in use and rows that are not, in turn.
    if rows.dim() == 2:
        assert counts is not None
        used = counts.tolist()
        sizes = [size for count in used for size in (count, 0)]
        sizes[-1] = len(rows) - sum(used)
    else:
        length = rows.shape[1]
        used = [length] * len(rows) if counts is None else counts.tolist()
        sizes = [size for count in used for size in (count, length - count)]
    flat = rows.reshape(-1, rows.shape[-1])
    output: Tensor = _OneByOne.apply(flat, sizes, weight1, bias1, weight2, bias2)
    return output.view(rows.shape)


class _OneByOne(torch.autograd.Function):
    """The FFNs of a pool expert by expert, for processors: ``W2 gelu(W1 x + b1) + b2``.

    There, a batched matmul is slower than separate ones, and what one expert needs stays in the cache from one step of
    its FFN to the next, which the inner activations ``[N, F]`` of all tokens together do not. Weight gradients are
    added to megatron-core's gradient buffer (`main_grad`) by the matmul that computes them: with many experts,
    allocating them, storing them and adding them up costs more than the arithmetic. With several threads, each computes
    experts of its own.

    Args of `apply`: rows ``[N, D]``; for every expert the number of its rows and of those behind them that are of none,
    which come out as 0; the parameters of `ExpertPool`.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        rows: Tensor,
        sizes: list[int],
        weight1: Tensor,
        bias1: Tensor,
        weight2: Tensor,
        bias2: Tensor,
    ) -> Tensor:
        before = rows.new_empty(len(rows), weight1.shape[1])
        activated = torch.empty_like(before)
        outputs = torch.empty_like(rows)
        # Views of all experts by one call each: with small experts, making views takes longer than the arithmetic.
        x, inner, y = (value.split(sizes) for value in (rows, before, activated))
        result = outputs.split(sizes)
        first, second = (weight.transpose(1, 2).unbind() for weight in (weight1, weight2))
        bias = list(zip(bias1.unbind(), bias2.unbind()))

        def compute(experts: Iterator[int]) -> None:
            for expert in experts:
                own = 2 * expert
                if sizes[own]:
                    torch.addmm(bias[expert][0], x[own], first[expert], out=inner[own])
                    torch.ops.aten.gelu.out(inner[own], out=y[own])
                    torch.addmm(bias[expert][1], y[own], second[expert], out=result[own])
                if sizes[own + 1]:
                    result[own + 1].zero_()

        side_by_side(compute, _operations(sizes, weight1))
        ctx.save_for_backward(rows, before, activated, weight1, weight2)
        ctx.sizes = sizes
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Optional[Tensor], ...]:  # type: ignore[override]
        rows, before, activated, weight1, weight2 = ctx.saved_tensors
        sizes, needs = ctx.sizes, ctx.needs_input_grad
        of_rows = torch.empty_like(rows) if needs[0] else None
        store1 = GradientStore(weight1) if needs[2] else None
        store2 = GradientStore(weight2) if needs[4] else None
        of_bias1 = grad.new_zeros(weight1.shape[:2]) if needs[3] else None
        of_bias2 = grad.new_zeros(weight2.shape[:2]) if needs[5] else None
        x, inner, y, upstream = (v.split(sizes) for v in (rows, before, activated, grad))
        through = None if of_rows is None else of_rows.split(sizes)
        first, second = weight1.unbind(), weight2.unbind()

        def compute(experts: Iterator[int]) -> None:
            scratch = before.new_empty(max(sizes[::2]), weight1.shape[1])
            for expert in experts:
                own = 2 * expert
                if through is not None and sizes[own + 1]:
                    through[own + 1].zero_()
                if store2 is not None:
                    store2.add_product(upstream[own], y[own], expert)
                of_inner = scratch[: sizes[own]]
                torch.mm(upstream[own], second[expert], out=of_inner)
                torch.ops.aten.gelu_backward.grad_input(of_inner, inner[own], grad_input=of_inner)
                if store1 is not None:
                    store1.add_product(of_inner, x[own], expert)
                if of_bias1 is not None:
                    torch.sum(of_inner, dim=0, out=of_bias1[expert])
                if of_bias2 is not None:
                    torch.sum(upstream[own], dim=0, out=of_bias2[expert])
                if through is not None:
                    torch.mm(of_inner, first[expert], out=through[own])

        side_by_side(compute, _operations(sizes, weight1))
        gradients = [None if own is None else own.gradient for own in (store1, store2)]
        return of_rows, None, gradients[0], of_bias1, gradients[1], of_bias2


def _operations(sizes: list[int], weight: Tensor) -> list[int]:
    """Of a forward pass of every expert, floating-point ones; weight ``[E, F, D]``, sizes as `_OneByOne` has them."""
    return [4 * rows * weight[0].numel() for rows in sizes[::2]]


class _BatchedLinear(torch.autograd.Function):
    """``rows[e] @ weight[e].T + bias[e]`` for rows ``[E, R, K]``, weight ``[E, M, K]``, bias ``[E, M]`` or None.

    The weight's gradient has the layout of the weight. Differentiating ``baddbmm`` gives the gradient of the transposed
    weight, and storing that costs a transposed copy of every expert weight in every backward pass: 5 % of the layer
    with 32 experts.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(rows, weight)
        if bias is None:
            return torch.bmm(rows, weight.transpose(1, 2))
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

    Rows at the end may belong to no expert, and come out as anything. Uses torch's grouped kernel where it exists for
    the dtype, else one matmul per expert.
    """
    if rows.dtype in GROUPED_MM_DTYPES and hasattr(F, "grouped_mm") and rows.shape[0] > 0:
        offsets = counts.to(rows.device).cumsum(0).to(torch.int32)
        return _ContiguousGrad.apply(F.grouped_mm(rows, weight.transpose(1, 2), offs=offsets))
    # Indexing `weight[e]` would make a gradient of the whole pool for every expert; the gradients of an
    # unbound tensor are stacked once.
    experts = weight.unbind(0)
    sizes = counts.tolist()
    *parts, rest = rows.split([*sizes, len(rows) - sum(sizes)], dim=0)
    products = [part @ own.T for part, own in zip(parts, experts)]
    return torch.cat([*products, rest.new_zeros(len(rest), weight.shape[1])], dim=0)


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
        compile: bool = False,
    ) -> None:
        super().__init__(config=config)
        for pool in pools:
            own = ExpertPool(pool.num_experts, config, pg_collection, compile)
            self.add_module(pool.name, own)
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
