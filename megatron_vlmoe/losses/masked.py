"""MLM, MIM and VLM losses of a micro-batch (paper section 3.1) and their weighted total.

Each of the four losses is the mean over the predicted positions of one micro-batch, over all tensor-parallel ranks;
gradients are then averaged over micro-batches and data-parallel ranks, so a micro-batch is the unit that
every parallel layout shares.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Mapping, NamedTuple, Optional, Sequence, cast

import torch
from torch import Tensor

from megatron_vlmoe.config.schema import ObjectivesConfig
from megatron_vlmoe.model.heads import Predicted
from megatron_vlmoe.stream.batch import Batch, ImageSegment, map_values
from megatron_vlmoe.stream.layout import SegmentName

LOSSES = ("mlm", "mim", "vlm_text", "vlm_image")
# The segment that a loss is over.
LOSS_SEGMENTS: Mapping[str, SegmentName] = MappingProxyType(
    {"mlm": "texts", "mim": "images", "vlm_text": "pair_texts", "vlm_image": "pair_images"}
)
EVALUATED = ("all", "foreground", "paired", "exchanged")
"""Positions that evaluation adds up apart: all; patches of the foreground; of pairs whose captions can be moved to
other images, as they are and so moved."""
PAIR_LOSSES = ("vlm_text", "vlm_image")
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


class EvaluationSums(NamedTuple):
    """What evaluation adds up of one loss over micro-batches, for exact averages over any split of the data.

    Args:
        counts: loss, hits and number of predicted positions ``[3]`` in fp64.
        labels: of the predicted positions ``[n, M]``, negative where unused.
        foreground: `counts` of the positions that show more than an image's ground; None of texts.
    """

    counts: Tensor
    labels: Tensor
    foreground: Optional[Tensor]


@torch.no_grad()
def evaluation_sums(
    batch: Batch, predicted: Mapping[SegmentName, Predicted]
) -> dict[str, EvaluationSums]:
    """The sums of a micro-batch for every loss."""
    result = {}
    for segment, (losses, correct) in predicted.items():
        assert correct is not None, "the heads tell correctness in evaluation only"
        own = batch[segment]
        used = own["labels"].reshape(-1) >= 0
        rows = torch.stack([losses.double(), correct.double(), used.double()])
        # Texts have none.
        shown = cast(ImageSegment, own).get("foreground")
        result[LOSS_OF[segment]] = EvaluationSums(
            rows.sum(dim=1),
            own["labels"],
            None if shown is None else (rows * shown.reshape(-1)).sum(dim=1),
        )
    return result


def exchange_captions(batch: Batch) -> Batch:
    """The micro-batch with every caption beside another image; as it is where there is no other."""
    exchanged = batch.copy()
    distance = int(batch.get("exchange_distance", 0))
    if distance:
        exchanged["pair_texts"] = map_values(
            batch["pair_texts"], lambda values: values.roll(distance, dims=0)
        )
    return exchanged


def evaluation_metrics(
    sums: Mapping[str, Tensor], histograms: Sequence[Tensor]
) -> dict[str, float]:
    """Metrics of held-out data from its sums.

    Args:
        sums: by `EVALUATED`, loss, hits and number of positions of every loss ``[4, 3]``.
        histograms: how often each label occurs, of every loss.

    Returns:
        `eval/loss/*` (nats per predicted position), `acc/*` (share of these whose most likely class is right) and
        `unigram/*` (entropy in nats of guessing by the labels' own frequencies). Of images the first two stand also for
        patches of the foreground and of the background alone. `eval/grounding/*` is the loss of pairs beside another
        image or caption minus that of the true pairs. What is over nothing is left out.
    """
    metrics: dict[str, float] = {}
    for row, (name, histogram) in enumerate(zip(LOSSES, histograms)):
        whole, shown, paired, exchanged = (sums[kind][row] for kind in EVALUATED)
        parts = {"": whole}
        if shown[2] > 0:
            parts |= {"_foreground": shown, "_background": whole - shown}
        for suffix, part in parts.items():
            loss, hits, count = part.tolist()
            if count > 0:
                metrics[f"eval/loss/{name}{suffix}"] = loss / count
                metrics[f"acc/{name}{suffix}"] = hits / count
        if whole[2] > 0:
            metrics[f"unigram/{name}"] = float(torch.special.entr(histogram / whole[2]).sum())
        if paired[2] > 0:
            metrics[f"eval/grounding/{name}"] = float((exchanged - paired)[0] / paired[2])
    return metrics
