"""Sizes that model, dispatch and estimates must agree on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from megatron_vlmoe.config.errors import ConfigError, divisors, near_multiples
from megatron_vlmoe.config.schema import AuxLossConfig, MoEConfig, ParallelConfig, RunConfig

VOCAB_MULTIPLE = 128
TERMS = ("importance", "load", "z", "gshard", "local_entropy", "global_entropy")
"""The auxiliary losses of a router; their formulas are in moe/aux_losses."""
# Losses that ask for what expert choice has by construction: as many tokens for every expert.
BALANCE_TERMS = ("importance", "load", "gshard")
# Losses that a shared router has for each modality apart (LIMoE, arXiv 2206.02770, section 3).
ENTROPY_TERMS = ("local_entropy", "global_entropy")


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


def experts_per_token(moe: MoEConfig, num_experts: int) -> float:
    """Experts of a pool that compute a token in training, on average and before any is dropped: k; where experts
    choose, the tokens that they take over all tokens."""
    if moe.routing == "expert_choice":
        return min(num_experts, moe.topk * moe.capacity_factor)
    return moe.topk


def router_noise_std(moe: MoEConfig, num_experts: int) -> float:
    """Standard deviation of the noise on the logits of a router in training."""
    return 1.0 / num_experts if moe.noise_std < 0.0 else moe.noise_std


def drop_path_rate(last: float, layer_number: int, num_layers: int) -> float:
    """Stochastic depth of a block (numbers from 1): linear from 0 in the first to `last` in the last one (BEiT)."""
    return last * (layer_number - 1) / max(num_layers - 1, 1)


class RouterLosses(NamedTuple):
    """Auxiliary losses of a router over some tokens of its pool.

    Args:
        terms: their names.
        weights: their weights.
        tokens: which tokens count: all of them, or those of one modality.
    """

    terms: tuple[str, ...]
    weights: AuxLossConfig
    tokens: Literal["all", "text", "vision"]


def router_losses(
    moe: MoEConfig, pool: str, num_experts: int, training: bool
) -> list[RouterLosses]:
    """The auxiliary losses of the router of a pool; of a shared one the entropies of either modality stand apart."""

    def terms(weights: AuxLossConfig) -> list[str]:
        if not moe.train_experts:
            return []
        left_out = set(BALANCE_TERMS) if moe.routing == "expert_choice" else set()
        if not training or router_noise_std(moe, num_experts) <= 0.0:
            # Without noise the load loss has no meaning (V-MoE): evaluation reports the others.
            left_out.add("load")
        return [term for term in weights.active_terms() if term not in left_out]

    text, vision = moe.text_aux, moe.vision_aux
    if pool != "shared":
        weights = text if pool == "text" else vision
        groups = [RouterLosses(tuple(terms(weights)), weights, "all")]
    else:
        others = tuple(term for term in terms(vision) if term not in ENTROPY_TERMS)
        entropies = [
            tuple(term for term in terms(weights) if term in ENTROPY_TERMS)
            for weights in (text, vision)
        ]
        groups = [
            RouterLosses(others, vision, "all"),
            RouterLosses(entropies[0], text, "text"),
            RouterLosses(entropies[1], vision, "vision"),
        ]
    return [group for group in groups if group.terms]


def statistics_sections(terms: Sequence[str], num_experts: int) -> dict[str, int]:
    """Sections of the vector of sums over tokens from which a router's losses come, in order, and their sizes.

    Sums that several losses need appear once.

    Raises:
        ValueError: on an unknown loss.
    """
    unknown = [term for term in terms if term not in TERMS]
    if unknown:
        raise ValueError(f"unknown auxiliary loss '{unknown[0]}'; known: {', '.join(TERMS)}")
    wanted = set(terms)
    sections = {"tokens": 1}
    if wanted & {"importance", "global_entropy"}:
        sections["gates"] = num_experts
    if "load" in wanted:
        sections["load"] = num_experts
    if "gshard" in wanted:
        sections["assignments"] = num_experts
        sections["dispatching_gates"] = num_experts
    if "z" in wanted:
        sections["squared_lse"] = 1
    if "local_entropy" in wanted:
        sections["entropy"] = 1
    return sections


def check_parallel_sizes(parallel: ParallelConfig) -> None:
    """Raises ConfigError unless TP, PP, virtual PP and EP are at least 1."""
    for name in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "virtual_pipeline_model_parallel_size",
        "expert_model_parallel_size",
    ):
        value = getattr(parallel, name)
        if value < 1:
            raise ConfigError(f"parallel.{name}={value} must be at least 1")


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Data-parallel ranks of the layout.

    Raises:
        ConfigError: if the layout does not fit the number of processes.
    """
    check_parallel_sizes(parallel)
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    expert = parallel.expert_model_parallel_size
    # Both TP and EP divide the ranks of a pipeline stage.
    unit = pipeline * math.lcm(tensor, expert)
    if world_size % (tensor * pipeline):
        raise ConfigError(
            f"{_processes(world_size)} cannot hold parallel.tensor_model_parallel_size={tensor} x "
            f"parallel.pipeline_model_parallel_size={pipeline}: {_start(world_size, unit)}"
        )
    stage = world_size // pipeline
    if stage % expert:
        of_a_stage = " of a pipeline stage" if pipeline > 1 else ""
        raise ConfigError(
            f"parallel.expert_model_parallel_size={expert} does not divide {_processes(stage)}{of_a_stage}: "
            f"{_start(world_size, unit)}, or use --parallel.expert_model_parallel_size {math.gcd(stage, expert)}"
        )
    return world_size // (tensor * pipeline)


def _processes(number: int) -> str:
    return f"{number} process" if number == 1 else f"{number} processes"


def _start(world_size: int, unit: int) -> str:
    """How to start a number of processes that is a multiple of `unit`."""
    if world_size == 1:
        return f"start with torchrun --nproc-per-node {unit} (or plan with --dry-run-world-size {unit})"
    return f"start {near_multiples(world_size, unit)} processes"


def num_micro_batches(config: RunConfig, data_size: int) -> int:
    """Micro-batches of a step on each data-parallel rank.

    Raises:
        ConfigError: if a global batch is not made of whole micro-batches, or the objectives disagree.
    """
    sizes = {
        name: (getattr(config.data, f"micro_{name}"), getattr(config.data, f"global_{name}"))
        for name in ("texts", "images", "pairs")
        if getattr(config.data, f"micro_{name}") > 0
    }
    parallel = config.parallel
    pipeline = parallel.pipeline_model_parallel_size
    interleaved = parallel.virtual_pipeline_model_parallel_size > 1

    def advice() -> str:
        return batch_sizes_that_fit(
            {(f"data.micro_{n}", f"data.global_{n}"): size for n, size in sizes.items()},
            data_size,
            parallel.tensor_model_parallel_size,
            pipeline if interleaved else 1,
        )

    counts: dict[str, int] = {}
    for name, (micro, total) in sizes.items():
        if total == 0 or total % (micro * data_size):
            raise ConfigError(
                f"data.global_{name}={total} is not a multiple of data.micro_{name}={micro} x "
                f"{data_size} data-parallel rank(s){advice()}"
            )
        counts[name] = total // (micro * data_size)
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name}: {count}" for name, count in counts.items())
        raise ConfigError(
            f"data.global_* / data.micro_* give different numbers of micro-batches ({listed}); "
            f"every micro-batch carries all objectives{advice()}"
        )
    count = next(iter(counts.values()))
    if interleaved and count % pipeline:
        raise ConfigError(
            f"{count} micro-batch(es) per step are not divisible by "
            f"parallel.pipeline_model_parallel_size={pipeline}, which interleaving needs{advice()}"
        )
    return count


def attention_packs(config: RunConfig, by_transformer_engine: bool, in_fp32: bool) -> bool:
    """Whether attention computes sequences of different lengths and none of the padding between them.

    TransformerEngine's kernels for that take 16 bits. Padding then attends to padding alone, which experts that get it
    would see.

    Args:
        by_transformer_engine: whether `model.transformer_impl` means TransformerEngine.
        in_fp32: whether the model computes in fp32.
    """
    if config.model.attention_backend == "auto":
        return by_transformer_engine and not in_fp32 and not config.moe.route_padding
    return config.model.attention_backend == "varlen"


def text_mask_slots(config: RunConfig) -> int:
    """Predicted tokens of a packed text: the rounded share of its length - 2 words (paper section 3.1)."""
    words = config.model.text_length - 2
    return int(config.objectives.text_mask_fraction * words + 0.5)


def batch_sizes_that_fit(
    sizes: Mapping[tuple[str, str], tuple[int, int]],
    data_size: int,
    tensor_size: int = 1,
    count_multiple: int = 1,
) -> str:
    """The end of an error message: options that make whole micro-batches, the same number for all objectives.

    Smaller micro-batches come first, which leave the global batch and so the training as it is; where none fits,
    larger global batches.

    Args:
        sizes: (option of the micro-batch, option of the global batch) to their sizes.
        data_size: data-parallel ranks.
        tensor_size: TP, which divides a micro-batch.
        count_multiple: what divides the number of micro-batches.

    Returns:
        `; use --data.micro_texts 8`.
    """
    totals = [total for _, total in sizes.values()]
    # What may divide all of them; the divisors of a batch of any size are found at once.
    share, rest = divmod(math.gcd(*totals), data_size * tensor_size)
    for count in divisors(share) if min(totals) > 0 and not rest else ():
        ranks = data_size * count
        if count % count_multiple == 0 and all(
            total // ranks <= micro for micro, total in sizes.values()
        ):
            options = {
                option: (micro, total // ranks) for (option, _), (micro, total) in sizes.items()
            }
            break
    else:
        # Every micro-batch stays; as many of them as the largest global batch needs.
        needed = max(-(-total // (micro * data_size)) for micro, total in sizes.values())
        count = max(1, -(-needed // count_multiple)) * count_multiple
        options = {
            option: (total, micro * data_size * count)
            for (_, option), (micro, total) in sizes.items()
        }
    changed = [f"--{option} {new}" for option, (old, new) in options.items() if new != old]
    return f"; use {' '.join(changed)}" if changed else ""
