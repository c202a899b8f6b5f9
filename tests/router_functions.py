"""The auxiliary losses of a router one by one, and Batch Priority Routing in dense form, for tests to compare with."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_vlmoe.moe.aux_losses import compute_router_statistics, losses_from_statistics
from megatron_vlmoe.moe.routing_ops import route_slots, top_k_experts


def one_loss(
    term: str,
    logits: Tensor,
    noisy_logits: Tensor | None = None,
    k: int = 1,
    noise_std: float = 0.0,
    mask: Tensor | None = None,
    threshold: float | None = None,
) -> Tensor:
    """The loss of one name."""
    stats = compute_router_statistics(logits, noisy_logits, k, noise_std, (term,), mask)
    return losses_from_statistics(stats, (term,), logits.shape[1], k, threshold)[term]


def importance_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    return one_loss("importance", logits, mask=mask)


def load_loss(
    logits: Tensor, noisy_logits: Tensor, k: int, noise_std: float, mask: Tensor | None = None
) -> Tensor:
    return one_loss("load", logits, noisy_logits, k, noise_std, mask)


def vloss(
    logits: Tensor, noisy_logits: Tensor, k: int, noise_std: float, mask: Tensor | None = None
) -> Tensor:
    """0.5 * importance loss + 0.5 * load loss, from one vector of sums."""
    terms = ("importance", "load")
    stats = compute_router_statistics(logits, noisy_logits, k, noise_std, terms, mask)
    losses = losses_from_statistics(stats, terms, logits.shape[1], k)
    return 0.5 * losses["importance"] + 0.5 * losses["load"]


def z_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    return one_loss("z", logits, mask=mask)


def gshard_loss(logits: Tensor, k: int, mask: Tensor | None = None) -> Tensor:
    return one_loss("gshard", logits, k=k, mask=mask)


def local_entropy_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    return one_loss("local_entropy", logits, mask=mask)


def global_entropy_loss(
    logits: Tensor, threshold: float | None = None, mask: Tensor | None = None
) -> Tensor:
    return one_loss("global_entropy", logits, mask=mask, threshold=threshold)


def batch_priority_route(
    gates: Tensor, k: int, capacity: int, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What `route_slots` keeps: keep [T, E] bool and position [T, E] in the expert's buffer; -1 where not kept."""
    gate, expert = top_k_experts(gates, k)
    routing = route_slots(gate, expert, gates.shape[1], capacity, mask)
    chosen_position = torch.where(routing.token_kept, routing.token_slot - expert * capacity, -1)
    position = torch.full(gates.shape, -1, dtype=torch.int64, device=gates.device)
    position.scatter_(1, expert, chosen_position)
    return position >= 0, position
