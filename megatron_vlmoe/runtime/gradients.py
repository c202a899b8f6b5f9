"""Where the gradient of a weight goes on a CPU: into megatron-core's buffer, added by the product that computes it."""

from __future__ import annotations

import torch
from torch import Tensor


class GradientStore:
    """Takes the gradient of a weight ``[M, K]``, or of a stack ``[E, M, K]`` of them, product by product.

    Products go to megatron-core's gradient buffer (`main_grad`) if there is one of the same type, else to a tensor of
    their own. A gradient that is made anew, and then added to the buffer, passes three times more over memory; with
    many experts or a large vocabulary that takes longer than the arithmetic.

    `gradient` is what the backward pass returns. Where the buffer has the values already, it is memory that nobody
    writes or reads: megatron-core's hook must find a gradient, but does not add it (`grad_added_to_main_grad`).
    """

    def __init__(self, weight: Tensor) -> None:
        buffer = getattr(weight, "main_grad", None)
        self.in_place = buffer is not None and buffer.dtype == weight.dtype
        self.gradient = torch.empty_like(weight)
        target = buffer if self.in_place else self.gradient
        assert target is not None
        if self.in_place:
            weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        self.targets = target.unbind() if target.dim() == 3 else (target,)

    def add_product(self, left: Tensor, right: Tensor, expert: int = 0) -> None:
        """Adds ``left.T @ right`` for left ``[R, M]``, right ``[R, K]`` to the gradient of the weight, or of one of the
        stack; outside the buffer it must be the only product of that weight."""
        target = self.targets[expert]
        if self.in_place:
            # Not `addmm_`, which torch's counter of FLOPs does not know.
            torch.addmm(target, left.t(), right, out=target)
        else:
            torch.mm(left.t(), right, out=target)
