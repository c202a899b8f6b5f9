"""Losses of the classification tasks.

Letters: n samples, C classes, A answers of a question.
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_target_loss(logits: Tensor, answers: Tensor, scores: Tensor) -> Tensor:
    """Binary cross entropy against soft scores, summed over the classes, averaged over the samples (VQA; VLMo).

    Args:
        logits: ``[n, C]``.
        answers: classes with a score ``[n, A]``; -1 where unused.
        scores: their targets in 0..1 ``[n, A]``.
    """
    target = torch.zeros_like(logits)
    # Added, since unused places all point to class 0.
    target.scatter_add_(1, answers.clamp(min=0), scores.to(logits.dtype) * (answers >= 0))
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="sum")
    return loss / logits.shape[0]


def class_loss(
    logits: Tensor,
    labels: Tensor,
    smoothing: float = 0.0,
    partners: Optional[Tensor] = None,
    share: Optional[Tensor] = None,
) -> Tensor:
    """Cross entropy in nats, averaged over the samples.

    Args:
        logits: ``[n, C]``.
        labels: ``[n]``.
        smoothing: share of the target that is spread over all C classes.
        partners: labels of the samples that were mixed in ``[n]`` (mixup, cutmix).
        share: share of the sample's own label ``[n]``; the partner's has the rest.
    """
    own = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
    if partners is None or share is None:
        return own.mean()
    other = F.cross_entropy(logits, partners, label_smoothing=smoothing, reduction="none")
    return (share * own + (1.0 - share) * other).mean()
