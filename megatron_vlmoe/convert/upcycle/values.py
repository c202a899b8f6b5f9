"""Values of new experts and routers; pure functions of the source's tensors, a seed and a key.

Letters: S experts of the source, E of the result, F inner width, D width, N sampled tokens, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vlmoe.stream.draws import keyed_generator

# Standard deviation of the logits of a small router: its gates are 1 / E within 1e-5 of themselves, and still some
# thirty steps of fp32 apart, so that tokens spread over the experts where a zero router would send all to expert 0.
SMALL_LOGIT_STD = 2e-6
# Axis of an expert's inner channels, by parameter; `bias2` has none.
CHANNEL_AXIS = {"weight1": 0, "bias1": 0, "weight2": 1}
SAMPLED_TOKENS = 4096


@dataclass(frozen=True)
class Diversity:
    """How the copies of one expert differ.

    Args:
        noise: standard deviation of the noise on matrices, relative to the matrix's own.
        drop_fraction: share of the inner channels that start anew.
        seed: of both.
    """

    noise: float = 0.0
    drop_fraction: float = 0.0
    seed: int = 1234


def copy_experts(source: Tensor, copies: int) -> Tensor:
    """``[S, ...]`` to ``[S copies, ...]``; the copies of an expert follow each other."""
    return source.repeat_interleave(copies, dim=0)


def dropped_channels(pool: str, expert: int, inner: int, how: Diversity) -> Tensor:
    """Inner channels of an expert that start anew, in rising order; the same for all its parameters.

    Args:
        pool: name of the pool in the model.
        expert: number of the expert.
        inner: F.
        how: share and seed.
    """
    generator = keyed_generator(torch.device("cpu"), how.seed, "dropped", pool, expert)
    chosen = torch.randperm(inner, generator=generator)[: round(how.drop_fraction * inner)]
    return chosen.sort().values


@torch.no_grad()
def diversify(experts: Tensor, part: str, pool: str, how: Diversity) -> Tensor:
    """Adds noise to the experts' matrices and draws dropped channels anew.

    The new values of dropped channels are normal with mean and standard deviation of the values that they replace, of
    each parameter on its own (Drop-Upcycling, arXiv 2502.19261). The output bias has no channels and no noise.

    Args:
        experts: ``[E, F, D]`` weight1, ``[E, F]`` bias1, ``[E, D, F]`` weight2 or ``[E, D]`` bias2 in fp32.
        part: which of them.
        pool: name of the pool in the model; part of the seed.
        how: strength and seed.
    """
    made = experts.clone()
    for index, expert in enumerate(made):
        generator = keyed_generator(torch.device("cpu"), how.seed, "upcycle", pool, part, index)
        if how.noise and part.startswith("weight"):
            size = how.noise * float(expert.std(correction=0))
            expert.add_(torch.randn(expert.shape, generator=generator), alpha=size)
        axis = CHANNEL_AXIS.get(part)
        if how.drop_fraction and axis is not None:
            channels = dropped_channels(pool, index, expert.shape[axis], how)
            if len(channels):
                old = expert.index_select(axis, channels)
                new = torch.randn(old.shape, generator=generator)
                new = new * old.std(correction=0) + old.mean()
                expert.index_copy_(axis, channels, new)
    return made


def forget_channels(moment: Tensor, part: str, pool: str, how: Diversity) -> Tensor:
    """First moments ``[E, ...]`` with zeros for the channels that `diversify` drew anew."""
    axis = CHANNEL_AXIS.get(part)
    if not how.drop_fraction or axis is None:
        return moment
    made = moment.clone()
    for index, expert in enumerate(made):
        channels = dropped_channels(pool, index, expert.shape[axis], how)
        expert.index_fill_(axis, channels, 0.0)
    return made


def small_router(
    num_experts: int,
    norm: tuple[Tensor, Tensor],
    seed: int,
    key: str,
    logit_std: float = SMALL_LOGIT_STD,
) -> Tensor:
    """Rows ``[E, D]`` whose logits have a small standard deviation.

    Args:
        num_experts: E.
        norm: weight and bias of the LayerNorm before the router; they fix the length of its inputs.
        seed: seed.
        key: the router's key.
        logit_std: the standard deviation.
    """
    weight, bias = norm
    generator = keyed_generator(torch.device("cpu"), seed, "small router", key)
    rows = torch.randn((num_experts, len(weight)), generator=generator)
    square = weight.double().square().sum() + bias.double().square().sum()
    length = max(float(square.sqrt()), 1e-12)
    return rows * (logit_std / length)


def grown_router(
    rows: Tensor, copies: int, norm: tuple[Tensor, Tensor], seed: int, key: str
) -> Tensor:
    """Rows ``[S, D]`` to ``[S copies, D]``: copies share their expert's row but for what breaks their tie."""
    made = copy_experts(rows, copies)
    return made + small_router(len(made), norm, seed, key)


@dataclass(frozen=True)
class GateRange:
    """What the sum of a token's K gates is.

    Args:
        mean: over tokens.
        low: 5th percentile.
        high: 95th percentile.
    """

    mean: float
    low: float
    high: float


@torch.no_grad()
def sampled_gates(
    router: Tensor,
    norm: tuple[Tensor, Tensor],
    topk: int,
    noise_std: float = 0.0,
    seed: int = 0,
) -> GateRange:
    """The gates of a router for random tokens, there being no data: normal ones that went through the LayerNorm.

    Args:
        router: rows ``[E, D]``.
        norm: weight and bias of the LayerNorm before the router.
        topk: K.
        noise_std: of the router noise; 0 in evaluation.
        seed: of tokens and noise.
    """
    weight, bias = norm
    generator = keyed_generator(torch.device("cpu"), seed, "sampled gates")
    tokens = torch.randn((SAMPLED_TOKENS, len(weight)), generator=generator)
    tokens = torch.nn.functional.layer_norm(tokens, weight.shape, weight.float(), bias.float())
    logits = tokens @ router.float().T
    logits = logits + noise_std * torch.randn(logits.shape, generator=generator)
    total = torch.softmax(logits, dim=1).topk(topk, dim=1).values.sum(dim=1)
    low, high = torch.quantile(total, torch.tensor([0.05, 0.95])).tolist()
    return GateRange(float(total.mean()), low, high)
