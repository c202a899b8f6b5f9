"""Sizes that model, dispatch and estimates must agree on."""

from __future__ import annotations

import math

from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.config.schema import ParallelConfig, RunConfig

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


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Data-parallel ranks of the layout.

    Raises:
        ConfigError: if the layout does not fit the number of processes.
    """
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    if world_size % (tensor * pipeline):
        raise ConfigError(
            f"{world_size} process(es) cannot hold parallel.tensor_model_parallel_size={tensor} x "
            f"parallel.pipeline_model_parallel_size={pipeline}"
        )
    expert = parallel.expert_model_parallel_size
    if (world_size // pipeline) % expert:
        raise ConfigError(
            f"parallel.expert_model_parallel_size={expert} does not divide the "
            f"{world_size // pipeline} rank(s) of a pipeline stage"
        )
    return world_size // (tensor * pipeline)


def num_micro_batches(config: RunConfig, data_size: int) -> int:
    """Micro-batches of a step on each data-parallel rank.

    Raises:
        ConfigError: if a global batch is not made of whole micro-batches, or the objectives disagree.
    """
    counts: dict[str, int] = {}
    for name in ("texts", "images", "pairs"):
        micro = getattr(config.data, f"micro_{name}")
        total = getattr(config.data, f"global_{name}")
        if micro == 0:
            continue
        if total == 0 or total % (micro * data_size):
            raise ConfigError(
                f"data.global_{name}={total} is not a multiple of data.micro_{name}={micro} x "
                f"{data_size} data-parallel rank(s)"
            )
        counts[name] = total // (micro * data_size)
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name}: {count}" for name, count in counts.items())
        raise ConfigError(
            f"data.global_* / data.micro_* give different numbers of micro-batches ({listed}); "
            "every micro-batch carries all objectives"
        )
    count = next(iter(counts.values()))
    pipeline = config.parallel.pipeline_model_parallel_size
    if config.parallel.virtual_pipeline_model_parallel_size > 1 and count % pipeline:
        raise ConfigError(
            f"{count} micro-batch(es) per step are not divisible by "
            f"parallel.pipeline_model_parallel_size={pipeline}, which interleaving needs"
        )
    return count
