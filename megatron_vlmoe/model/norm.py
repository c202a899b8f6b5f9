"""LayerNorm that works with sequence parallelism and without transformer-engine or apex."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


def mark_sequence_parallel(parameter: nn.Parameter, config: TransformerConfig) -> nn.Parameter:
    """Marks a parameter that every TP rank applies to its own samples: its gradient is summed over TP."""
    parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return parameter


class LayerNorm(nn.Module):
    """LayerNorm over the last dimension (the signature is that of megatron-core's norm specs).

    megatron-core's own torch wrapper refuses sequence parallelism, which MoE with TP needs.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        dtype = config.params_dtype
        self.weight = mark_sequence_parallel(
            nn.Parameter(torch.ones(hidden_size, dtype=dtype)), config
        )
        self.bias = mark_sequence_parallel(
            nn.Parameter(torch.zeros(hidden_size, dtype=dtype)), config
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalised ``[..., D]``."""
        return F.layer_norm(hidden, self.weight.shape, self.weight, self.bias, self.eps)
