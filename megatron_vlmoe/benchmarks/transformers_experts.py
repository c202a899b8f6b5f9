"""Experts as the models of transformers have them, with weights of ours.

Letters: T tokens, D width, F inner width, E experts, K experts per token.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_vlmoe.benchmarks.compare import NotRun, memory_needed

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")


def transformers_experts(
    implementation: str, fc1: Tensor, fc1_bias: Tensor, fc2: Tensor, fc2_bias: Tensor
) -> nn.Module:
    """A module of tokens ``[T, D]``, chosen experts ``[T, K]`` and gates ``[T, K]`` to ``[T, D]``.

    Its parameters are the given tensors, not copies.

    Args:
        implementation: one of `IMPLEMENTATIONS`, as in `experts_implementation` of transformers.
        fc1: ``[E, F, D]``.
        fc1_bias: ``[E, F]``.
        fc2: ``[E, D, F]``.
        fc2_bias: ``[E, D]``.

    Raises:
        NotRun: transformers is older than its experts.
    """
    # Where a package is missing, one asks for its parts in vain.
    parts = ("transformers", "transformers.integrations", "transformers.integrations.moe")
    if not all(map(importlib.util.find_spec, parts)):
        raise NotRun("needs transformers 5")
    from transformers.integrations.moe import use_experts_implementation

    @use_experts_implementation(has_gate=False, has_bias=True)
    class Experts(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.num_experts = len(fc1)
            self.up_proj = nn.Parameter(fc1)
            self.up_proj_bias = nn.Parameter(fc1_bias)
            self.down_proj = nn.Parameter(fc2)
            self.down_proj_bias = nn.Parameter(fc2_bias)
            self.act_fn = nn.GELU()

        def forward(self, tokens: Tensor, expert: Tensor, gate: Tensor) -> Tensor:
            """The loop over experts with tokens that transformers' own models have as "eager"."""
            result = torch.zeros_like(tokens)
            for number in expert.unique().tolist():
                choice, token = torch.where((expert == number).T)
                hidden = F.linear(tokens[token], self.up_proj[number], self.up_proj_bias[number])
                hidden = F.linear(
                    self.act_fn(hidden), self.down_proj[number], self.down_proj_bias[number]
                )
                gated = hidden * gate[token, choice, None].to(hidden.dtype)
                result.index_add_(0, token, gated)
            return result

    class Options:
        _experts_implementation = implementation

    experts: nn.Module = Experts(Options())
    return experts


def batched_mm_needs(rows: int, weight: Tensor, copies: int = 1) -> None:
    """Raises `NotRun` if there is no memory for a copy of its expert's matrix for every row.

    Args:
        rows: T * K.
        weight: one matrix of every expert ``[E, F, D]``.
        copies: of so large tensors that are there at once.
    """
    memory_needed(copies * rows * weight[0].numel() * weight.element_size() / 1e9)
