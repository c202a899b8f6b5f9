"""Evaluation on held-out data: exact losses, masked accuracies and the unigram entropy to compare with."""

from __future__ import annotations

from typing import Iterable, Mapping

import torch
import torch.distributed as dist

from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.losses.masked import LOSS_SEGMENTS, LOSSES, MaskedSums
from megatron_vlmoe.runtime.distributed import device
from megatron_vlmoe.stream.layout import TEXT_SEGMENTS


def reduce_evaluation(
    results: Iterable[Mapping[str, MaskedSums]], config: RunConfig
) -> dict[str, float]:
    """Exact averages over the micro-batches of all ranks; every rank must call it.

    Args:
        results: what is added up of this rank's micro-batches.
        config: the run.

    Returns:
        On every rank `eval/loss/*` (nats per predicted position), `acc/*` (share of these whose most likely
        class is right) and `unigram/*` (entropy in nats of guessing by the labels' own frequencies).
    """
    counters = _Counters(config)
    for result in results:
        counters.add(result)
    return counters.reduce()


class _Counters:
    """Sums and label histograms over micro-batches, in one tensor for one all-reduce."""

    def __init__(self, config: RunConfig) -> None:
        self.sums = torch.zeros(len(LOSSES), 3, dtype=torch.float64, device=device())
        sizes = {
            name: config.model.vocab_size
            if LOSS_SEGMENTS[name] in TEXT_SEGMENTS
            else config.model.visual_vocab_size
            for name in LOSSES
        }
        self.histograms = {
            name: torch.zeros(size, dtype=torch.float64, device=device())
            for name, size in sizes.items()
        }

    def add(self, result: Mapping[str, MaskedSums]) -> None:
        """Adds one micro-batch."""
        for row, name in enumerate(LOSSES):
            if name not in result:
                continue
            self.sums[row] += result[name].sums
            labels = result[name].labels.reshape(-1)
            valid = (labels >= 0).to(self.histograms[name].dtype)
            self.histograms[name].scatter_add_(0, labels.clamp(min=0), valid)

    def reduce(self) -> dict[str, float]:
        """Metrics over all ranks; losses over nothing are left out."""
        flat = torch.cat([self.sums.reshape(-1), *(self.histograms[name] for name in LOSSES)])
        dist.all_reduce(flat)
        sums = flat[: self.sums.numel()].view_as(self.sums)
        histograms = flat[self.sums.numel() :].split(
            [len(self.histograms[name]) for name in LOSSES]
        )
        metrics: dict[str, float] = {}
        for name, (loss, hits, count), histogram in zip(LOSSES, sums.tolist(), histograms):
            if count > 0:
                metrics[f"eval/loss/{name}"] = loss / count
                metrics[f"acc/{name}"] = hits / count
                share = histogram / histogram.sum()
                metrics[f"unigram/{name}"] = float(torch.special.entr(share).sum())
        return metrics


def evaluation_line(metrics: Mapping[str, float]) -> str:
    """One line for the log: loss, accuracy and the unigram entropy beside it."""
    parts = [
        f"{name} {metrics[f'eval/loss/{name}']:.3f} (unigram {metrics[f'unigram/{name}']:.3f}, "
        f"acc {100 * metrics[f'acc/{name}']:.1f} %)"
        for name in LOSSES
        if f"eval/loss/{name}" in metrics
    ]
    return "evaluation | " + " | ".join(parts)
