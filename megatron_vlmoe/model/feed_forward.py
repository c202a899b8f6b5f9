"""The dense FFN with a compiled activation."""

from __future__ import annotations

from typing import Any, Optional

from megatron.core.transformer.mlp import MLP
from torch import Tensor

from megatron_vlmoe.moe.experts import bias_gelu
from megatron_vlmoe.runtime.compiled import compiled


class CompiledMLP(MLP):
    """megatron-core's FFN, ``W2 gelu(W1 x + b1) + b2``, with bias and exact GELU in one kernel.

    megatron-core's own fusion of the two is that of another function, GELU's approximation by tanh.
    """

    def forward(
        self, hidden_states: Tensor, per_token_scale: None = None, **unused: Any
    ) -> tuple[Tensor, Optional[Tensor]]:
        """``[T, 1, D]`` to ``[T, 1, D]``, and the second bias, which the caller adds."""
        inner, bias = self.linear_fc1(hidden_states)
        output, output_bias = self.linear_fc2(compiled(bias_gelu, True)(inner, bias))
        return output, output_bias
