"""LayerNorm that works with sequence parallelism and without transformer-engine or apex, and that of apex."""

from __future__ import annotations

from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn


def mark_sequence_parallel(parameter: nn.Parameter, config: TransformerConfig) -> nn.Parameter:
    """Marks a parameter that every TP rank applies to its own samples: its gradient is summed over TP."""
    parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return parameter


class LayerNorm(nn.LayerNorm):
    """torch's, under the signature of megatron-core's norm specs.

    megatron-core's own torch wrapper refuses sequence parallelism, which MoE with TP needs.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__(hidden_size, eps, dtype=config.params_dtype)
        mark_sequence_parallel(self.weight, config)
        mark_sequence_parallel(self.bias, config)


class ApexLayerNorm(FusedLayerNorm):
    """megatron-core's LayerNorm by a kernel of NVIDIA's apex, in the model's number format."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__(config, hidden_size, eps, persist_layer_norm=False)
        self.to(config.params_dtype)
