"""Contrastive losses of images and texts, of retrieval (paper section 4.2, after VLMo) and of pretraining (paper A.1).

Letters: m rows of this rank, B rows of the pool (all data-parallel ranks), D width. A row is an image and its caption;
features are unit vectors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


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


@torch.no_grad()
def first_is_right(
    queries: Tensor, candidates: Tensor, documents: Tensor, all_documents: Tensor
) -> Tensor:
    """Whether the nearest candidate of every query belongs to its image: bool ``[m]``.

    Args:
        queries: ``[m, D]``.
        candidates: of the other kind ``[B, D]``.
        documents: image of every query ``[m]``; two captions may have the same.
        all_documents: image of every candidate ``[B]``.
    """
    nearest = (queries @ candidates.T).argmax(dim=1)
    return all_documents[nearest] == documents
