"""megatron-core's linear layers and word embeddings, with a shorter way on a CPU without tensor parallelism.

There megatron-core adds the bias in a pass of its own, and its kernel that adds weight gradients to the buffer needs
a GPU. Here one product adds the bias, another the gradient, and the gradient of word embeddings is as large as the
words that occur. Everywhere else, and for parameters, names and shards, megatron-core's classes are what they are.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from torch import Tensor

from megatron_vlmoe.runtime.gradients import GradientStore


class ColumnLinear(ColumnParallelLinear):
    """``[T, 1, K]`` to ``[T, 1, M]`` and the bias, if it is still to be added."""

    def forward(  # type: ignore[override]
        self, input_: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Optional[Tensor]]:
        """See megatron-core's class."""
        if _is_alone(self):
            return _Linear.apply(input_, self.weight, self.bias), None
        output: tuple[Tensor, Optional[Tensor]] = super().forward(input_, *args, **kwargs)
        return output


class RowLinear(RowParallelLinear):
    """``[T, 1, K]`` to ``[T, 1, M]`` and the bias, if it is still to be added."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Optional[Tensor]]:  # type: ignore[override]
        """See megatron-core's class."""
        if _is_alone(self):
            return _Linear.apply(input_, self.weight, self.bias), None
        output: tuple[Tensor, Optional[Tensor]] = super().forward(input_)
        return output


class WordEmbedding(VocabParallelEmbedding):
    """Ids ``[1, N]`` to ``[1, N, D]``; megatron-core's shapes with sequence parallelism."""

    def forward(self, ids: Tensor) -> Tensor:  # type: ignore[override]
        """See megatron-core's class."""
        # megatron-core's hook adds a sparse gradient to its buffer; a bare one stays a dense tensor.
        if _is_alone(self) and hasattr(self.weight, "main_grad"):
            return F.embedding(ids, self.weight, sparse=True)
        output: Tensor = super().forward(ids)
        return output


def _is_alone(module: Any) -> bool:
    return module.tp_group.size() == 1 and module.weight.device.type == "cpu"


class _Linear(torch.autograd.Function):
    """``x @ weight.T + bias`` for x ``[..., K]``, weight ``[M, K]``, bias ``[M]`` or None."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Optional[Tensor]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        # Not the view that a product of rows would be: the cross entropy works in place.
        output = x.new_empty(*x.shape[:-1], len(weight))
        rows, result = x.reshape(-1, x.shape[-1]), output.view(-1, len(weight))
        if bias is None:
            torch.mm(rows, weight.t(), out=result)
        else:
            torch.addmm(bias, rows, weight.t(), out=result)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, grad: Tensor
    ) -> tuple[Optional[Tensor], Optional[Tensor], Optional[Tensor]]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        of_weight = None
        rows = grad.reshape(-1, grad.shape[-1])
        if needs_weight:
            store = GradientStore(weight)
            store.add_product(rows, x.reshape(-1, x.shape[-1]))
            of_weight = store.gradient
        return (
            torch.mm(rows, weight).view_as(x) if needs_x else None,
            of_weight,
            rows.sum(dim=0) if needs_bias else None,
        )
