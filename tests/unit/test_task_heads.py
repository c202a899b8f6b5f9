"""What the heads of the tasks give in 16 bits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch


def test_logits_of_a_16_bit_model_do_not_tie() -> None:
    """A tie counts as wrong: in bf16 most images would have equal logits among a thousand."""
    from megatron_vlmoe.model.task_heads import ImageClassifier, TwoLayerClassifier

    config: Any = SimpleNamespace(
        hidden_size=64,
        params_dtype=torch.bfloat16,
        sequence_parallel=False,
        layernorm_epsilon=1e-6,
    )
    run: Any = SimpleNamespace(task=SimpleNamespace(num_classes=1000))
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(32, 64, generator=generator).bfloat16()
    heads = (TwoLayerClassifier(config, 64, 1000), ImageClassifier(config, run).classifier)
    for head in heads:
        for parameter in head.parameters():
            if parameter.dim() == 2:
                parameter.data.normal_(std=0.2, generator=generator)
        with torch.no_grad():
            logits = head(vectors).float()
        distinct = [len(row.unique()) for row in logits]
        assert min(distinct) > 990
