"""Losses of the heads of VL-MoE, and of its routers.

Labels may be on another device than the logits: with a `device_map` the inputs are on the first, the heads on the last.

Letters in shapes: n samples, C classes, T tokens of a pool in the batch, E experts, K experts per token.
"""

from __future__ import annotations

import math
from typing import Mapping, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .configuration_vlmoe import VLMoEConfig


def masked_loss(logits: Optional[Tensor], labels: Optional[Tensor]) -> Optional[Tensor]:
    """Cross entropy over the positions with a label, of logits ``[n, L, C]`` and labels ``[n, L]`` (-100: none).

    Raises:
        ValueError: there are labels and nothing was predicted, or they are not as many as the predictions.
    """
    if labels is None:
        return None
    if logits is None:
        raise ValueError("labels for an input that is missing, or that the model has no head for")
    if labels.shape != logits.shape[:2]:
        raise ValueError(f"labels are {list(labels.shape)}, not {list(logits.shape[:2])}")
    labels = labels.to(logits.device)
    kept = labels != -100
    count = kept.sum().clamp(min=1)
    if torch.compiler.is_compiling():
        # A graph has no shape that depends on how many labels there are.
        logits, labels = logits.flatten(0, 1), labels.flatten()
    else:
        # Rows without a label would only be turned into fp32 for nothing.
        logits, labels = logits[kept], labels[kept]
    # A sum over none is 0 and has a gradient.
    return F.cross_entropy(logits.float(), labels, reduction="sum") / count


def answer_loss(logits: Tensor, labels: Optional[Tensor], config: VLMoEConfig) -> Optional[Tensor]:
    """Binary cross entropy of logits ``[n, C]`` against scores ``[n, C]``, summed over the answers (VQA).

    Where `config.problem_type` is `single_label_classification`, cross entropy against classes ``[n]``.
    """
    if labels is None:
        return None
    if config.problem_type == "single_label_classification":
        return classification_loss(logits, labels, config)
    if labels.shape != logits.shape:
        raise ValueError(
            f"labels are {list(labels.shape)}, not {list(logits.shape)}: a score for every answer"
        )
    labels = labels.to(logits.device, torch.float32)
    losses = F.binary_cross_entropy_with_logits(logits.float(), labels, reduction="sum")
    return losses / logits.shape[0]


def classification_loss(
    logits: Tensor, labels: Optional[Tensor], config: VLMoEConfig
) -> Optional[Tensor]:
    """The loss that `config.problem_type` names; by number and type of the labels where it names none.

    Args:
        logits: ``[n, C]``.
        labels: ``[n]``, or ``[n, C]`` for several labels or values.
        config: of the model.
    """
    if labels is None:
        return None
    logits, labels = logits.float(), labels.to(logits.device)
    kind = config.problem_type
    if kind is None:
        several = "multi_label" if labels.is_floating_point() else "single_label"
        kind = "regression" if logits.shape[1] == 1 else f"{several}_classification"
    if kind == "regression":
        return F.mse_loss(logits.flatten(), labels.float().flatten())
    if kind == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(logits, labels.float())
    return F.cross_entropy(logits, labels)


def contrastive_loss(similarity: Optional[Tensor]) -> Tensor:
    """Mean of text-to-image and image-to-text cross entropy of similarities ``[n, n]``.

    Raises:
        ValueError: there are not as many texts as images.
    """
    if similarity is None or similarity.shape[0] != similarity.shape[1]:
        raise ValueError("return_loss needs as many texts as images")
    target = torch.arange(similarity.shape[0], device=similarity.device)
    to_image, to_text = (F.cross_entropy(rows, target) for rows in (similarity, similarity.t()))
    return 0.5 * (to_image + to_text)


@torch.no_grad()
def hard_negative_pairs(similarity: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs to judge: of every row the right one, its text with a wrong image, its image with a wrong text (VLMo).

    Wrong partners are drawn, the more similar the likelier (ALBEF). A single row has none.

    Args:
        similarity: of texts and images ``[n, n]``.

    Returns:
        Numbers of the texts, numbers of the images, and 1 for a match, else 0: ``[3 n]`` each.
    """
    samples = similarity.shape[0]
    own = torch.arange(samples, device=similarity.device)
    if samples == 1:
        return own, own, torch.ones_like(own)
    wrong_images, wrong_texts = (
        torch.multinomial(torch.softmax(rows.float().fill_diagonal_(float("-inf")), dim=1), 1)[:, 0]
        for rows in (similarity.clone(), similarity.t().clone())
    )
    texts = torch.stack([own, own, wrong_texts], dim=1).flatten()
    images = torch.stack([own, wrong_images, own], dim=1).flatten()
    return texts, images, torch.tensor([1, 0, 0], device=own.device).repeat(samples)


def router_loss(
    logits: Tensor,
    noisy_logits: Tensor,
    expert: Tensor,
    noise_std: float,
    weights: Mapping[str, float],
    mask: Optional[Tensor],
) -> Tensor:
    """Weighted sum of the auxiliary losses of one router, over the tokens that count; 0 if none does.

    Args:
        logits: without noise, in fp32 ``[T, E]``.
        noisy_logits: the logits that chose the experts ``[T, E]``.
        expert: chosen experts, the best first ``[T, K]``.
        noise_std: sigma of the expected load.
        weights: of the losses, by name. `importance` and `load`: squared coefficient of variation of the experts'
            summed gates, and of their summed probability to be among the first K if only their own noise is drawn
            again (V-MoE, arXiv 2106.05974; VL-MoE A.3). `z`: mean squared log-sum-exp (ST-MoE, arXiv 2202.08906).
            `gshard`: E times the sum over experts of their share of the choices times their mean gate (Switch
            Transformer, arXiv 2101.03961). `local_entropy` and `global_entropy`: mean entropy of a token's gates,
            and minus the entropy of the mean gates, with `global_entropy_experts` S above 0 as
            ``max(0, log S - entropy)`` (LIMoE, arXiv 2206.02770).
        mask: tokens that count ``[T]``; None: all.

    Returns:
        A scalar in fp32.
    """
    counted = logits.new_ones(logits.shape[0], 1)
    if mask is not None:
        counted = mask.unsqueeze(1).to(logits.dtype)
        # Also so that no NaN of padding spreads.
        logits = logits.masked_fill(~mask.unsqueeze(1), 0.0)
        noisy_logits = noisy_logits.masked_fill(~mask.unsqueeze(1), 0.0)
    tokens = counted.sum()

    def mean(values: Tensor) -> Tensor:
        return (counted * values).sum(dim=0) / tokens.clamp(min=1.0)

    log_gates = torch.log_softmax(logits, dim=1)
    total = logits.new_zeros(())
    for name, weight in weights.items():
        if name == "importance":
            loss = _squared_variation(mean(log_gates.exp()))
        elif name == "load":
            distance = noisy_logits.gather(1, expert[:, -1:]) - logits
            loss = _squared_variation(
                mean(0.5 * torch.erfc(distance / (noise_std * math.sqrt(2.0))))
            )
        elif name == "z":
            loss = mean(torch.logsumexp(logits, dim=1, keepdim=True).square()).sum()
        elif name == "gshard":
            share = mean(torch.zeros_like(logits).scatter(1, expert, 1.0 / expert.shape[1]))
            loss = logits.shape[1] * (share * mean(torch.softmax(noisy_logits, dim=1))).sum()
        elif name == "local_entropy":
            loss = -mean(log_gates.exp() * log_gates).sum()
        elif name == "global_entropy":
            gates = mean(log_gates.exp())
            loss = (gates * gates.clamp(min=torch.finfo(gates.dtype).tiny).log()).sum()
            if experts := weights.get("global_entropy_experts", 0.0):
                loss = torch.relu(math.log(experts) + loss)
        else:
            continue
        total = total + weight * loss
    return total * (tokens > 0)


def _squared_variation(values: Tensor) -> Tensor:
    """Variance of non-negative values ``[E]`` over their squared mean; 0 where the mean vanishes."""
    mean = values.mean()
    vanishes = mean <= torch.finfo(values.dtype).tiny ** 0.5
    return ((values - mean) / mean.masked_fill(vanishes, 1.0)).square().mean()


def total_loss(*losses: Optional[Tensor]) -> Optional[Tensor]:
    """Sum of the losses that there are; None if there is none."""
    found = [loss for loss in losses if loss is not None]
    return torch.stack(found).sum() if found else None
