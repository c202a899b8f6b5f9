"""Losses of the downstream tasks: classes and answers, and contrastive and matching losses of images and texts.

Letters: n samples, C classes, A answers of a question; m rows of this rank, B rows of the pool (all ranks), D width. A
row is an image and its caption; features are unit vectors. Retrieval is that of paper section 4.2, after VLMo.
"""

from __future__ import annotations

from dataclasses import dataclass
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


def contrastive_loss(
    images: Tensor,
    texts: Tensor,
    all_images: Tensor,
    all_texts: Tensor,
    logit_scale: Tensor,
    first_row: int,
) -> Tensor:
    """Mean of image-to-text and text-to-image cross entropy over the local rows, in nats.

    The mean over ranks is the loss of the whole pool. Another caption of the same image counts as a negative (VLMo).

    Args:
        images: local image features ``[m, D]``.
        texts: features of their captions ``[m, D]``.
        all_images: image features of the pool ``[B, D]``, the local ones from `first_row` on.
        all_texts: caption features of the pool ``[B, D]``.
        logit_scale: log of the inverse temperature.
        first_row: place of the first local row in the pool.
    """
    scale = logit_scale.exp()
    target = first_row + torch.arange(images.shape[0], device=images.device)
    to_text = F.cross_entropy(scale * images @ all_texts.T, target)
    to_image = F.cross_entropy(scale * texts @ all_images.T, target)
    return 0.5 * (to_text + to_image)


@dataclass(frozen=True)
class CachedGradients:
    """The contrastive loss of a whole step and its gradients (gradient caching, arXiv 2101.06983).

    Args:
        loss: loss of the pool.
        images: gradient with respect to the image features of the pool ``[B, D]``.
        texts: the same for caption features ``[B, D]``.
        logit_scale: gradient with respect to the log of the inverse temperature.
    """

    loss: Tensor
    images: Tensor
    texts: Tensor
    logit_scale: Tensor

    @classmethod
    def compute(cls, images: Tensor, texts: Tensor, logit_scale: Tensor) -> CachedGradients:
        """From features of the whole pool ``[B, D]`` that have no graph."""
        leaves = [value.detach().float().requires_grad_() for value in (images, texts, logit_scale)]
        with torch.enable_grad():
            image, text, scale = leaves
            loss = contrastive_loss(image, text, image, text, scale, 0)
            gradients = torch.autograd.grad(loss.sum(), leaves)
        return cls(loss.detach().reshape(()), *gradients)

    def surrogate(
        self, images: Tensor, texts: Tensor, logit_scale: Tensor, rows: slice, parts: int
    ) -> Tensor:
        """A loss whose gradients, averaged over `parts`, are those of the pool's loss.

        Args:
            images: features of one micro-batch with their graph ``[m, D]``.
            texts: the same for captions.
            logit_scale: the parameter.
            rows: its rows in the pool.
            parts: micro-batches of the pool: of a step, over all data-parallel ranks.
        """
        of_features = (images * self.images[rows]).sum() + (texts * self.texts[rows]).sum()
        return parts * of_features + (logit_scale * self.logit_scale).sum()


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
