"""MLM, MIM and VLM losses of a micro-batch (paper section 3.1) and their weighted total.

Each of the four losses is the mean over the valid slots of one micro-batch, over all tensor-parallel ranks;
gradients are then averaged over micro-batches and data-parallel ranks, so a micro-batch is the unit that
every parallel layout shares.
"""

from __future__ import annotations

from typing import Mapping, Optional

import torch
from torch import Tensor

from megatron_vlmoe.config.schema import ObjectivesConfig

LOSSES = ("mlm", "mim", "vlm_text", "vlm_image")
LABELS = {
    "mlm": "text_labels",
    "mim": "image_codes",
    "vlm_text": "pair_text_labels",
    "vlm_image": "pair_image_codes",
}


def loss_weights(objectives: ObjectivesConfig) -> dict[str, float]:
    """Weight of every loss in the total."""
    return {name: getattr(objectives, f"{name}_weight") for name in LOSSES}


def masked_mean(losses: Tensor, labels: Tensor) -> Tensor:
    """Mean of ``losses [S]`` over slots with a label; 0 with a graph if there is none."""
    valid = (labels.reshape(-1) >= 0).sum()
    return losses.sum() / valid.clamp(min=1)


def total_loss(
    slots: Mapping[str, tuple[Tensor, Optional[Tensor]]],
    batch: Mapping[str, Tensor],
    objectives: ObjectivesConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted total and the single losses of one micro-batch.

    Args:
        slots: losses and correctness per slot, as the model's heads return them.
        batch: the labels.
        objectives: weights.
    """
    weights = loss_weights(objectives)
    single = {name: masked_mean(losses, batch[LABELS[name]]) for name, (losses, _) in slots.items()}
    # A zero weight is left out, so that an unused head gets no gradient at all.
    parts = [weights[name] * loss for name, loss in single.items() if weights[name] != 0.0]
    return torch.stack(parts).sum(), {name: loss.detach() for name, loss in single.items()}


@torch.no_grad()
def evaluation_sums(
    slots: Mapping[str, tuple[Tensor, Optional[Tensor]]], batch: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Sums for exact averages over any split of the data: loss, hits and count ``[3]`` of every loss."""
    sums = {}
    for name, (losses, correct) in slots.items():
        assert correct is not None, "the heads tell correctness in evaluation only"
        count = (batch[LABELS[name]] >= 0).sum()
        sums[name] = torch.stack([losses.double().sum(), correct.double().sum(), count.double()])
    return sums
