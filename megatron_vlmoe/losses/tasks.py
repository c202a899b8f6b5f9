"""Losses of the downstream tasks: classes and answers, and whether image and text match.

Letters: n samples, C classes, A answers of a question; m rows of this rank, B rows of the pool (all ranks). A row is an
image and its caption. Retrieval is that of paper section 4.2, after VLMo; its other loss is in losses/contrastive.py.
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


def matching_loss(logits: Tensor, valid: Tensor) -> Tensor:
    """Cross entropy of match or not, in nats, averaged over the valid triples.

    Args:
        logits: ``[3 m, 2]``; of each row the matching pair, that with a wrong image, that with a wrong caption.
        valid: rows whose negatives are real ``[m]``.
    """
    # Made on the device: a list copied there would stop the host in the middle of the forward pass.
    labels = (torch.arange(logits.shape[0], device=logits.device) % 3 == 0).long()
    losses = F.cross_entropy(logits, labels, reduction="none")
    weights = valid.to(losses.dtype).repeat_interleave(3)
    return (losses * weights).sum() / weights.sum().clamp(min=1.0)


@torch.no_grad()
def hard_negatives(
    similarity: Tensor, same_image: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draws one wrong item per row, the more similar the likelier (ALBEF, VLMo).

    Args:
        similarity: scaled similarity of the local rows to the pool ``[m, B]``.
        same_image: items that show or describe the row's own image ``[m, B]``; never drawn.
        generator: on the CPU: the draw is then the same on every device.

    Returns:
        Drawn items ``[m]``, and which rows had any item to draw ``[m]``; others get item 0.
    """
    same_image = same_image.cpu()
    logits = similarity.double().cpu().masked_fill(same_image, float("-inf"))
    valid = ~same_image.all(dim=1)
    weights = torch.softmax(torch.where(valid[:, None], logits, 0.0), dim=1)
    drawn = torch.multinomial(weights, 1, generator=generator).squeeze(1)
    return torch.where(valid, drawn, 0), valid
