"""Auxiliary losses of the router: balance, magnitude and entropy.

Each loss is a non-linear function of sums over tokens. The two steps are kept apart so that a
parallel run can add up the sums of its ranks, in one all-reduce for all losses, before anything
non-linear happens:

    compute_router_statistics(...) -> vector of sums   (linear in the tokens)
    losses_from_statistics(...)    -> the losses       (scalars)

All losses compute in at least float32 (float64 stays float64) over the tokens that a mask [T]
(bool) leaves, and are exactly 0 with zero gradients if no token counts. CV^2 is the squared
coefficient of variation over the experts, `var / mean^2` with the population variance.

- importance (VL-MoE, A.3): CV^2 of the summed gates `sum_t softmax(A_t)_e`.
- load (VL-MoE, A.3): CV^2 of the smooth load `sum_t 1 - Phi((eta_t - A_te) / sigma)`, where eta_t
  is the k-th largest noisy logit of the token: the probability that the expert is among the top k
  if only its noise is drawn again. The gradient also flows through eta, as in V-MoE
  (google-research/vmoe). Half of it and half of importance are the paper's vloss.
- z (VL-MoE, A.3; ST-MoE, arXiv 2202.08906): mean over tokens of `logsumexp(A_t)^2`.
- gshard (GShard and Switch, arXiv 2101.03961, eq. 4): `E * sum_e f_e P_e`. f_e is the expert's
  share of the T*k assignments (top k of the logits that choose the experts: the noisy ones where
  there is noise, as in V-MoE and Tutel; ties to the lower expert; no gradient), P_e the mean of
  its gate. 1 at perfect balance.
- local_entropy (LIMoE, arXiv 2206.02770): mean over tokens of the entropy of `softmax(A_t)`, in
  nats, over the tokens of one modality.
- global_entropy (LIMoE): minus the entropy of the mean gate, in nats. With a threshold tau it is
  `max(0, tau - entropy)`: tau = log S asks softly for at least S experts in use.

Letters in shapes: T tokens, E experts. Clean logits A = W x; noisy logits = A + sigma * N(0, 1).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_vlmoe.moe.routing_ops import check_mask, check_matrix, top_k_experts
from megatron_vlmoe.stream.sizes import check_top_k, statistics_sections


def statistics_size(terms: Sequence[str], num_experts: int) -> int:
    """Length of the vector that `compute_router_statistics` returns for these terms."""
    return sum(statistics_sections(terms, num_experts).values())


def compute_router_statistics(
    logits: Tensor,
    noisy_logits: Tensor | None,
    k: int,
    noise_std: float,
    terms: Sequence[str],
    mask: Tensor | None = None,
) -> Tensor:
    """Sums over tokens from which `losses_from_statistics` computes the losses `terms`.

    The statistics of disjoint sets of tokens add up to those of their union, the empty set
    included. The layout depends on the set of terms and on E only, not on the order of terms.

    Args:
        logits: [T, E] clean router logits.
        noisy_logits: [T, E] the logits that chose the experts; needed for the term "load", and what
            "gshard" counts. None: experts were chosen by the clean ones.
        k: choices per token; used by "load" and "gshard".
        noise_std: sigma; used by "load" only.
        terms: names from `TERMS`.
        mask: [T] bool, True = the token counts.

    Returns:
        1-D tensor of `statistics_size(terms, E)` sums, float32 (float64 for float64 logits),
        differentiable with respect to both logits.

    Raises:
        ValueError: on an unknown term, shapes that do not fit, or "load" without noisy logits or
            with noise_std <= 0.
    """
    check_matrix("logits", logits)
    num_tokens, num_experts = logits.shape
    check_mask(mask, num_tokens)
    check_top_k(k, num_experts)
    sections = statistics_sections(terms, num_experts)
    if noisy_logits is not None and noisy_logits.shape != logits.shape:
        raise ValueError(
            f"noisy_logits {list(noisy_logits.shape)} and logits {list(logits.shape)} "
            "must have one shape"
        )
    clean = _prepare(logits, mask)
    dispatching = clean if noisy_logits is None else _prepare(noisy_logits, mask)

    sums = {"tokens": _count_tokens(clean, mask)}
    if "gates" in sections:
        sums["gates"] = _sum_tokens(torch.softmax(clean, dim=1), mask)
    if "load" in sections:
        if noisy_logits is None:
            raise ValueError("the load loss needs noisy logits")
        probability = _selection_probability(clean, dispatching, k, noise_std)
        sums["load"] = _sum_tokens(probability, mask)
    if "assignments" in sections:
        sums["assignments"] = _count_assignments(dispatching, k, mask)
        sums["dispatching_gates"] = _sum_tokens(torch.softmax(dispatching, dim=1), mask)
    if "squared_lse" in sections:
        sums["squared_lse"] = _sum_tokens(torch.logsumexp(clean, dim=1).square(), mask).view(1)
    if "entropy" in sections:
        # p * log p from log_softmax: finite gradients also where a gate underflows to 0.
        log_gates = torch.log_softmax(clean, dim=1)
        entropy = -(log_gates.exp() * log_gates).sum(dim=1)
        sums["entropy"] = _sum_tokens(entropy, mask).view(1)
    return torch.cat([sums[section] for section in sections])


def losses_from_statistics(
    stats: Tensor,
    terms: Sequence[str],
    num_experts: int,
    k: int,
    entropy_threshold: float | None = None,
) -> dict[str, Tensor]:
    """The losses `terms` of the tokens whose (summed) statistics are given.

    Args:
        stats: what `compute_router_statistics` returned for these terms, summed over the parts
            of the batch.
        k: choices per token; used by "gshard" only.
        entropy_threshold: tau of "global_entropy"; None: no threshold.

    Returns:
        One scalar per term, in the order of `terms`; each exactly 0 if no token counted.

    Raises:
        ValueError: on an unknown term or a vector of another size.
    """
    sections, size = statistics_sections(terms, num_experts), statistics_size(terms, num_experts)
    if stats.shape != (size,):
        raise ValueError(
            f"statistics of {', '.join(terms)} with {num_experts} experts have size {size}, got {list(stats.shape)}"
        )
    sums = dict(zip(sections, torch.split(stats, list(sections.values())), strict=True))
    num_tokens = sums["tokens"].detach().squeeze(0)
    divisor = num_tokens.clamp(min=1)

    losses: dict[str, Tensor] = {}
    for term in terms:
        if term == "importance":
            loss = _squared_variation(sums["gates"])
        elif term == "load":
            loss = _squared_variation(sums["load"])
        elif term == "z":
            loss = sums["squared_lse"].squeeze(0) / divisor
        elif term == "gshard":
            share = sums["assignments"].detach() / (divisor * k)
            loss = num_experts * (share * (sums["dispatching_gates"] / divisor)).sum()
        elif term == "local_entropy":
            loss = sums["entropy"].squeeze(0) / divisor
        else:
            loss = _negative_entropy(sums["gates"] / divisor)
            if entropy_threshold is not None:
                loss = torch.relu(entropy_threshold + loss)
        # Zero through multiplication keeps the graph: every rank must take part in the backward.
        losses[term] = loss * (num_tokens > 0)
    return losses


def _prepare(logits: Tensor, mask: Tensor | None) -> Tensor:
    """At least float32; rows that do not count are zeroed, so that no NaN there can spread."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if mask is None else logits.masked_fill(~mask[:, None], 0.0)


def _sum_tokens(values: Tensor, mask: Tensor | None) -> Tensor:
    """Sum of `values` [T] or [T, E] over the tokens that count."""
    if mask is not None:
        values = values.masked_fill(~mask if values.dim() == 1 else ~mask[:, None], 0.0)
    return values.sum(dim=0)


def _count_tokens(like: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return like.new_full((1,), like.shape[0])
    return mask.sum(dim=0, keepdim=True).to(like.dtype)


def _count_assignments(logits: Tensor, k: int, mask: Tensor | None) -> Tensor:
    """[E] how often each expert is among the top k; without gradient."""
    _, expert = top_k_experts(logits.detach(), k)
    chosen = torch.zeros_like(logits).scatter_(1, expert, 1.0)
    return _sum_tokens(chosen, mask)


def _selection_probability(clean: Tensor, noisy: Tensor, k: int, noise_std: float) -> Tensor:
    """[T, E] probability of each expert to be in the top k if only its noise is drawn again."""
    if not noise_std > 0:
        raise ValueError(f"noise_std must be positive for the load loss, got {noise_std}")
    gate, _ = top_k_experts(noisy, k)
    threshold = gate[:, -1:]
    # 1 - Phi(x) = erfc(x / sqrt 2) / 2, exact in the tail where 1 - Phi cancels.
    return 0.5 * torch.erfc((threshold - clean) / (noise_std * math.sqrt(2.0)))


def _squared_variation(values: Tensor) -> Tensor:
    """var / mean^2 of non-negative `values` [E]; 0 where the mean vanishes.

    Dividing before squaring avoids underflow, and without a square root the gradient exists at
    perfect balance, too.
    """
    mean = values.mean()
    vanishes = mean <= torch.finfo(values.dtype).tiny ** 0.5
    safe_mean = torch.where(vanishes, torch.ones_like(mean), mean)
    return ((values - mean) / safe_mean).square().mean()


def _negative_entropy(distribution: Tensor) -> Tensor:
    """sum p log p; the clamp keeps the gradient finite where p is 0."""
    tiny = torch.finfo(distribution.dtype).tiny
    return (distribution * distribution.clamp(min=tiny).log()).sum()
