"""MLM, MIM and VLM losses of a micro-batch (paper section 3.1) and their weighted total.

Each of the four losses is the mean over the predicted positions of one micro-batch, over all tensor-parallel ranks;
gradients are then averaged over micro-batches and data-parallel ranks, so a micro-batch is the unit that
every parallel layout shares.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Mapping

import torch
from torch import Tensor

from megatron_vlmoe.config.schema import ObjectivesConfig
from megatron_vlmoe.model.heads import Predicted
from megatron_vlmoe.stream.batch import Batch
from megatron_vlmoe.stream.layout import SegmentName

LOSSES = ("mlm", "mim", "vlm_text", "vlm_image")
# The segment that a loss is over.
LOSS_SEGMENTS: Mapping[str, SegmentName] = MappingProxyType(
    {"mlm": "texts", "mim": "images", "vlm_text": "pair_texts", "vlm_image": "pair_images"}
)
LOSS_OF = MappingProxyType({segment: name for name, segment in LOSS_SEGMENTS.items()})


def total_loss(
    batch: Batch, predicted: Mapping[SegmentName, Predicted], objectives: ObjectivesConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted total and the single losses of one micro-batch."""
    weights = {name: getattr(objectives, f"{name}_weight") for name in LOSSES}
    # Where no position has a label, the mean is 0, with a graph.
    single = {
        LOSS_OF[segment]: own.losses.sum() / (batch[segment]["labels"] >= 0).sum().clamp(min=1)
        for segment, own in predicted.items()
    }
    # A zero weight is left out, so that an unused head gets no gradient at all.
    parts = [weights[name] * loss for name, loss in single.items() if weights[name] != 0.0]
    return torch.stack(parts).sum(), {name: loss.detach() for name, loss in single.items()}


@torch.no_grad()
def evaluation_sums(
    batch: Batch, predicted: Mapping[SegmentName, Predicted]
) -> dict[str, tuple[Tensor, Tensor]]:
    """What evaluation adds up over micro-batches for exact averages over any split of the data, for every loss.

    Returns:
        Loss, hits and number of predicted positions ``[3]`` in fp64; their labels ``[n, M]``, negative where unused.
    """
    sums = {}
    for segment, (losses, correct) in predicted.items():
        assert correct is not None, "the heads tell correctness in evaluation only"
        labels = batch[segment]["labels"]
        counts = [losses.double().sum(), correct.double().sum(), (labels >= 0).sum().double()]
        sums[LOSS_OF[segment]] = torch.stack(counts), labels
    return sums
