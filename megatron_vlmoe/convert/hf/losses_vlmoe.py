"""Losses of the heads of VL-MoE.

Labels may be on another device than the logits: with a `device_map` the inputs are on the first, the heads on the last.

Letters in shapes: n samples, C classes.
"""

from __future__ import annotations

from typing import Optional

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
    # Rows without a label would only be turned into fp32 for nothing. A sum over none is 0 and has a gradient.
    labels = labels.to(logits.device)
    kept = labels != -100
    losses = F.cross_entropy(logits[kept].float(), labels[kept], reduction="sum")
    return losses / kept.sum().clamp(min=1)


def answer_loss(logits: Tensor, labels: Optional[Tensor]) -> Optional[Tensor]:
    """Binary cross entropy of logits ``[n, C]`` against scores ``[n, C]``, summed over the answers (VQA)."""
    if labels is None:
        return None
    if labels.shape != logits.shape:
        raise ValueError(
            f"labels are {list(labels.shape)}, not {list(logits.shape)}: a score for every answer"
        )
    labels = labels.to(logits.device, torch.float32)
    losses = F.binary_cross_entropy_with_logits(logits.float(), labels, reduction="sum")
    return losses / len(logits)


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
    target = torch.arange(len(similarity), device=similarity.device)
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
    own = torch.arange(len(similarity), device=similarity.device)
    if len(own) == 1:
        return own, own, torch.ones_like(own)
    wrong_images, wrong_texts = (
        torch.multinomial(torch.softmax(rows.float().fill_diagonal_(float("-inf")), dim=1), 1)[:, 0]
        for rows in (similarity.clone(), similarity.t().clone())
    )
    texts = torch.stack([own, own, wrong_texts], dim=1).flatten()
    images = torch.stack([own, wrong_images, own], dim=1).flatten()
    return texts, images, torch.tensor([1, 0, 0], device=own.device).repeat(len(own))
