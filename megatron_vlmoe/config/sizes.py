"""Sizes that model, dispatch and estimates must agree on."""

from __future__ import annotations

import math

VOCAB_MULTIPLE = 128


def padded_vocab_size(vocab_size: int) -> int:
    """Rows of word embeddings and heads: a multiple of 128, whatever the layout."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def expert_capacity(
    num_tokens: int, num_experts: int, k: int, capacity_factor: float, multiple_of: int = 1
) -> int:
    """Slots per expert: `max(1, min(T, ceil(T * k * capacity_factor / E)))`, in floating point.

    The ceiling is rounded up to `multiple_of` before the minimum with T, so a result is not a
    multiple where T cuts it short. A factor <= 0 means that no token may be dropped: returns T.

    Raises:
        ValueError: for negative or zero counts, k above E, or a factor that is not finite.
    """
    if num_tokens < 0:
        raise ValueError(f"num_tokens must be at least 0, got {num_tokens}")
    if multiple_of < 1:
        raise ValueError(f"multiple_of must be at least 1, got {multiple_of}")
    if not math.isfinite(capacity_factor):
        raise ValueError(f"capacity_factor must be finite, got {capacity_factor}")
    check_top_k(k, num_experts)
    if capacity_factor <= 0:
        return num_tokens
    capacity = math.ceil(num_tokens * k * capacity_factor / num_experts)
    capacity = math.ceil(capacity / multiple_of) * multiple_of
    return max(1, min(num_tokens, capacity))


def check_top_k(k: int, num_experts: int) -> None:
    """Raises ValueError unless k is in 1..E."""
    if num_experts < 1:
        raise ValueError(f"num_experts must be at least 1, got {num_experts}")
    if not 1 <= k <= num_experts:
        raise ValueError(f"k must be in 1..{num_experts} (the number of experts), got {k}")
