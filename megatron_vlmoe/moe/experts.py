"""Pools of expert FFNs, held as batched weights so that one matmul serves all experts of a rank.

Letters: E experts of a pool on this rank, F inner width, D width, R rows per expert, N rows in total.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Iterator, Optional, Sequence

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.extensions import transformer_engine as te_layers
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_vlmoe.runtime.compiled import compiled
from megatron_vlmoe.runtime.gradients import GradientStore
from megatron_vlmoe.runtime.host_threads import side_by_side
from megatron_vlmoe.stream.block_plan import Branch

# torch takes fp16 and fp32 too, but computes them one expert after the other, by sizes that it reads on the host.
GROUPED_MM_DTYPES = (torch.bfloat16,)


class SharedGradients:
    """Gradients of a pool's parameters that several backward passes write, each the part of its own experts.

    Only the last pass hands them to autograd, which would else add up gradients of the whole pool.

    Args:
        passes: how many there will be.
    """

    def __init__(self, passes: int) -> None:
        self.passes = passes
        self._unfinished: dict[str, tuple[Any, int]] = {}

    def of(self, name: str, make: Callable[[], Any]) -> Any:
        """The gradient of a parameter, made by the first pass that asks."""
        if name not in self._unfinished:
            self._unfinished[name] = make(), self.passes
        return self._unfinished[name][0]

    def finish(self, name: str) -> bool:
        """Says that a pass has written its part; whether it was the last."""
        gradient, left = self._unfinished.pop(name)
        if left > 1:
            self._unfinished[name] = gradient, left - 1
        return left == 1


@dataclass(frozen=True)
class ExpertRange:
    """Consecutive experts of a pool that compute by themselves.

    Args:
        first: the first of them, among those of this rank.
        gradients: shared by all ranges of the pool in a forward pass.
    """

    first: int
    gradients: SharedGradients


def every_expert() -> ExpertRange:
    """The range of a pass over a whole pool."""
    return ExpertRange(0, SharedGradients(1))


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
        self._make_parameters(config, pg_collection)
        for parameter in self.parameters():
            # Always reduced over the expert-data-parallel group, also with EP = 1: with TP > 1 the replicas
            # on other TP ranks see other tokens, and megatron-core would otherwise let them drift apart.
            parameter.allreduce = False  # type: ignore[attr-defined]
            # Not a duplicate of TP rank 0's: the gradient norm must count it on every rank that owns it.
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
            parameter.partition_dim = 0  # type: ignore[attr-defined]
            parameter.partition_stride = 1  # type: ignore[attr-defined]

    def _make_parameters(
        self, config: TransformerConfig, pg_collection: ProcessGroupCollection
    ) -> None:
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
            self.register_parameter(name, parameter)

    def forward(
        self,
        rows: Tensor,
        counts: Optional[Tensor] = None,
        sizes: Optional[Sequence[int]] = None,
        part: Optional[ExpertRange] = None,
    ) -> Tensor:
        """All experts at once: ``[E, R, D]`` to ``[E, R, D]``; or ``[N, D]`` sorted by expert, of each as many as
        `counts` ``[E]`` says, and rows of none at the end.

        With three dimensions `counts` may say how many of every expert's rows are in use, from the first on; the others
        come out as anything finite. Goes through the module's call, whose hooks wait for parameters that are still
        being gathered.

        Args:
            counts: where the rows are.
            sizes: the same numbers, where the host knows them.
            part: with three dimensions, to which experts the rows belong; None: to all.
        """
        own = (self.weight1, self.bias1, self.weight2, self.bias2)
        if rows.device.type == "cpu":
            return one_by_one(rows, counts, *own, part)
        if rows.dim() == 3:
            return batched(rows, *own, part, self.compile_gelu)
        assert counts is not None
        return grouped(rows, counts, *own, sizes, self.compile_gelu)

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


class GroupedExpertPool(ExpertPool):
    """The same experts by TransformerEngine's grouped products, which can be in 8 bits.

    Every expert has parameters of its own; in a checkpoint they are slices of those of `ExpertPool`. What the products
    know of scales is in none.

    Args:
        num_experts: see `ExpertPool`, as are the others.
    """

    linear_fc1: nn.Module
    linear_fc2: nn.Module

    def _make_parameters(
        self, config: TransformerConfig, pg_collection: ProcessGroupCollection
    ) -> None:
        hidden, inner = config.hidden_size, config.moe_ffn_hidden_size
        options: dict[str, Any] = {
            "config": config,
            "init_method": config.init_method,
            "bias": True,
            "skip_bias_add": False,
            "is_expert": True,
            "pg_collection": pg_collection,
        }
        self.linear_fc1 = te_layers.TEColumnParallelGroupedLinear(
            self.num_local_experts, hidden, inner, tp_comm_buffer_name="fc1", **options
        )
        self.linear_fc2 = te_layers.TERowParallelGroupedLinear(
            self.num_local_experts, inner, hidden, tp_comm_buffer_name="fc2", **options
        )

    def forward(
        self,
        rows: Tensor,
        counts: Optional[Tensor] = None,
        sizes: Optional[Sequence[int]] = None,
        part: Optional[ExpertRange] = None,
    ) -> Tensor:
        """See `ExpertPool`; rows are those of all experts."""
        if part is not None:
            raise ValueError("grouped products take the rows of all experts at once")
        if rows.dim() == 3:
            splits = [rows.shape[1]] * len(rows)
        else:
            assert counts is not None
            splits = counts.tolist() if sizes is None else list(sizes)
        used = rows.reshape(-1, rows.shape[-1])[: sum(splits)]
        inner, _ = self.linear_fc1(used, splits)
        outputs, _ = self.linear_fc2(compiled(bias_gelu, self.compile_gelu)(inner, None), splits)
        if rows.dim() == 3:
            return outputs.view(rows.shape)  # type: ignore[no-any-return]
        return F.pad(outputs, (0, 0, 0, len(rows) - len(used)))

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: Sequence[tuple[int, int, int]] = (),
        metadata: Optional[dict] = None,
    ) -> ShardedStateDict:
        """Every parameter of an expert as a slice of its pool's, whose first axis is the number of the expert."""
        shards = {}
        offset = len(sharded_offsets)
        for number, linear in (("1", self.linear_fc1), ("2", self.linear_fc2)):
            for name, parameter in linear.named_parameters():
                # As `weight3`.
                kind = name.rstrip("0123456789")
                expert = self.ep_rank * self.num_local_experts + int(name.removeprefix(kind))
                shards[f"{prefix}linear_fc{number}.{name}"] = ShardedTensor.from_rank_offsets(
                    f"{prefix}{kind}{number}",
                    parameter,
                    *sharded_offsets,
                    (offset, expert, self.num_experts),
                    replica_id=(0, 0, self.replica),
                    prepend_axis_num=offset + 1,
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
    part: Optional[ExpertRange] = None,
    compile: bool = False,
) -> Tensor:
    """The FFNs of all experts or of a part of them, each on as many rows: ``[E, R, D]`` to ``[E, R, D]``.

    A product with a bias writes the bias to all rows first. Where the GELU is a compiled function, that one takes the
    bias too, and a product alone has two passes less over the inner activations.
    """
    part = part or every_expert()
    if compile:
        product = batched_linear(rows, weight1, None, part, "1")
        own_bias = bias1[part.first : part.first + len(rows)]
        inner = compiled(bias_gelu, True)(product, own_bias.unsqueeze(1))
    else:
        inner = F.gelu(batched_linear(rows, weight1, bias1, part, "1"))
    return batched_linear(inner, weight2, bias2, part, "2")


def grouped(
    rows: Tensor,
    counts: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    sizes: Optional[Sequence[int]] = None,
    compile: bool = False,
) -> Tensor:
    """The FFNs of all experts on rows ``[N, D]`` sorted by expert, ``counts[e]`` of each.

    Rows at the end may belong to no expert, and come out as 0. `sizes` are the counts where the host knows them.
    """
    if sizes is None and not _has_grouped_kernel(rows):
        # Once for both products: the host waits for it.
        sizes = counts.tolist()
    ends = counts.cumsum(0)
    expert = torch.searchsorted(ends, torch.arange(len(rows), device=rows.device), right=True)
    absent = (expert == len(counts)).unsqueeze(1)
    # Biases by a product: indexing would add up their gradients in 16 bits, one row after the other.
    owner = (expert.unsqueeze(1) == torch.arange(len(counts), device=rows.device)).to(rows.dtype)
    # What a grouped kernel leaves in rows of no group may be NaN, forward and backward.
    present = rows.masked_fill(absent, 0.0)
    inner = grouped_matmul(present, weight1, ends, sizes).masked_fill(absent, 0.0)
    inner = compiled(bias_gelu, compile)(inner, owner @ bias1).masked_fill(absent, 0.0)
    outputs = grouped_matmul(inner, weight2, ends, sizes) + owner @ bias2
    return outputs.masked_fill(absent, 0.0)


def one_by_one(
    rows: Tensor,
    counts: Optional[Tensor],
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    part: Optional[ExpertRange] = None,
) -> Tensor:
    """Either of these for processors, one expert after the other; rows that are not in use come out as 0.

    Args:
        rows: ``[E, R, D]``, of which the first ``counts[e]`` are in use (None: all), or ``[N, D]`` sorted by expert.
        counts: ``[E]``, on the CPU.
        part: the experts of these rows; None: all.
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
    output: Tensor = _OneByOne.apply(
        flat, sizes, part or every_expert(), weight1, bias1, weight2, bias2
    )
    return output.view(rows.shape)


class _OneByOne(torch.autograd.Function):
    """The FFNs of a pool expert by expert, for processors: ``W2 gelu(W1 x + b1) + b2``.

    There, a batched matmul is slower than separate ones, and what one expert needs stays in the cache from one step of
    its FFN to the next, which the inner activations ``[N, F]`` of all tokens together do not. Weight gradients are
    added to megatron-core's gradient buffer (`main_grad`) by the matmul that computes them: with many experts,
    allocating them, storing them and adding them up costs more than the arithmetic. With several threads, each computes
    experts of its own.

    Args of `apply`: rows ``[N, D]``; for every expert the number of its rows and of those behind them that are of none,
    which come out as 0; which experts of the pool these are; the parameters of `ExpertPool`.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        rows: Tensor,
        sizes: list[int],
        part: ExpertRange,
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

        def compute(pieces: Iterator[int]) -> None:
            for piece in pieces:
                own, expert = 2 * piece, part.first + piece
                if sizes[own]:
                    torch.addmm(bias[expert][0], x[own], first[expert], out=inner[own])
                    torch.ops.aten.gelu.out(inner[own], out=y[own])
                    torch.addmm(bias[expert][1], y[own], second[expert], out=result[own])
                if sizes[own + 1]:
                    result[own + 1].zero_()

        side_by_side(compute, _operations(sizes, weight1))
        ctx.save_for_backward(rows, before, activated, weight1, weight2)
        ctx.sizes, ctx.part = sizes, part
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Optional[Tensor], ...]:  # type: ignore[override]
        rows, before, activated, weight1, weight2 = ctx.saved_tensors
        sizes, part, needs = ctx.sizes, ctx.part, ctx.needs_input_grad
        of_rows = torch.empty_like(rows) if needs[0] else None
        makers: dict[str, Callable[[], Any]] = {
            "weight1": lambda: GradientStore(weight1),
            "bias1": lambda: grad.new_zeros(weight1.shape[:2]),
            "weight2": lambda: GradientStore(weight2),
            "bias2": lambda: grad.new_zeros(weight2.shape[:2]),
        }
        names = [name for name, needed in zip(makers, needs[3:]) if needed]
        found = {name: part.gradients.of(name, makers[name]) for name in names}
        store1, store2, of_bias1, of_bias2 = map(
            found.get, ("weight1", "weight2", "bias1", "bias2")
        )
        x, inner, y, upstream = (v.split(sizes) for v in (rows, before, activated, grad))
        through = None if of_rows is None else of_rows.split(sizes)
        first, second = weight1.unbind(), weight2.unbind()

        def compute(pieces: Iterator[int]) -> None:
            scratch = before.new_empty(max(sizes[::2]), weight1.shape[1])
            for piece in pieces:
                own, expert = 2 * piece, part.first + piece
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
        last = {name for name in names if part.gradients.finish(name)}
        gradients = (found[name] if name in last else None for name in makers)
        return (
            of_rows,
            None,
            None,
            *(own.gradient if isinstance(own, GradientStore) else own for own in gradients),
        )


def _operations(sizes: list[int], weight: Tensor) -> list[int]:
    """Of a forward pass of every expert, floating-point ones; weight ``[E, F, D]``, sizes as `_OneByOne` has them."""
    of_row = 4 * weight.shape[1] * weight.shape[2]
    return [of_row * rows for rows in sizes[::2]]


class _BatchedLinear(torch.autograd.Function):
    """``rows[e] @ weight[e].T + bias[e]`` for rows ``[E, R, K]``, weight ``[E, M, K]``, bias ``[E, M]`` or None, or for
    some of the experts.

    The weight's gradient has the layout of the weight. Differentiating ``baddbmm`` gives the gradient of the transposed
    weight, and storing that costs a transposed copy of every expert weight in every backward pass: 5 % of the layer
    with 32 experts.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Optional[Tensor],
        part: ExpertRange,
        name: str,
    ) -> Tensor:
        ctx.own = slice(part.first, part.first + len(rows))
        ctx.gradients, ctx.name = part.gradients, name
        ctx.save_for_backward(rows, weight)
        transposed = weight[ctx.own].transpose(1, 2)
        if bias is None:
            return torch.bmm(rows, transposed)
        return torch.baddbmm(bias[ctx.own].unsqueeze(1), rows, transposed)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Optional[Tensor], ...]:  # type: ignore[override]
        rows, weight = ctx.saved_tensors
        needs_rows, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        of_rows = torch.bmm(grad, weight[ctx.own]) if needs_rows else None
        of_weight = of_bias = None
        shared, name = ctx.gradients, ctx.name
        if needs_weight:
            of_weight = shared.of(f"weight{name}", lambda: torch.empty_like(weight))
            torch.bmm(grad.transpose(1, 2), rows, out=of_weight[ctx.own])
            of_weight = of_weight if shared.finish(f"weight{name}") else None
        if needs_bias:
            of_bias = shared.of(f"bias{name}", lambda: grad.new_empty(weight.shape[:2]))
            torch.sum(grad, dim=1, out=of_bias[ctx.own])
            of_bias = of_bias if shared.finish(f"bias{name}") else None
        return of_rows, of_weight, of_bias, None, None


def batched_linear(
    rows: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    part: Optional[ExpertRange] = None,
    name: str = "",
) -> Tensor:
    """``rows[e] @ weight[e].T + bias[e]``: ``[E, R, K]`` to ``[E, R, M]`` by weight ``[E, M, K]`` and bias ``[E, M]``.

    Args:
        part: the experts of these rows; None: all.
        name: of the parameters among the gradients of the part.
    """
    output: Tensor = _BatchedLinear.apply(rows, weight, bias, part or every_expert(), name)
    return output


def _has_grouped_kernel(rows: Tensor) -> bool:
    return rows.dtype in GROUPED_MM_DTYPES and hasattr(F, "grouped_mm") and rows.shape[0] > 0


def grouped_matmul(
    rows: Tensor, weight: Tensor, ends: Tensor, sizes: Optional[Sequence[int]] = None
) -> Tensor:
    """``rows[i] @ weight[expert of i].T`` for rows ``[N, K]`` sorted by expert, weight ``[E, M, K]``.

    Rows at the end may belong to no expert, and come out as anything. Uses torch's grouped kernel where it exists for
    the dtype, else one matmul per expert.

    Args:
        ends: where the rows of every expert end ``[E]``, on their device.
        sizes: how many rows every expert has; needed where there is no grouped kernel.
    """
    if _has_grouped_kernel(rows):
        offsets = ends.to(torch.int32)
        return _ContiguousGrad.apply(F.grouped_mm(rows, weight.transpose(1, 2), offs=offsets))
    assert sizes is not None
    # Indexing `weight[e]` would make a gradient of the whole pool for every expert; the gradients of an
    # unbound tensor are stacked once.
    experts = weight.unbind(0)
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
        in_fp8: bool = False,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        kind = GroupedExpertPool if in_fp8 else ExpertPool
        for pool in pools:
            own = kind(pool.num_experts, config, pg_collection, compile)
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
