"""Evaluation on held-out data: exact losses, masked accuracies and the unigram entropy to compare with."""

from __future__ import annotations

from typing import Any, Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.objectives.masked import LABELS, LOSSES
from megatron_vlmoe.runtime.distributed import Ranks, device
from megatron_vlmoe.train.step import StepRunner


def evaluate(
    runner: StepRunner,
    batches: Iterable[Mapping[str, Tensor]],
    config: RunConfig,
    ranks: Ranks,
    num_micro_batches: int,
) -> dict[str, float]:
    """Runs `train.eval_steps` steps of held-out data.

    Returns:
        On every rank `eval/loss/*` (nats per masked slot), `acc/*` (share of masked slots whose most likely
        class is right) and `unigram/*` (entropy in nats of guessing by the labels' own frequencies).
    """
    iterator = iter(batches)
    counters = _Counters(config)
    for _ in range(config.train.eval_steps):
        with torch.no_grad():
            results = runner.evaluate(iterator, num_micro_batches)
        for result in results:
            # All tensor-parallel ranks hold the same sums; the first one speaks for them.
            if ranks.tensor == 0:
                counters.add(result)
    return counters.reduce(config)


class _Counters:
    """Sums and label histograms over micro-batches, in one tensor for one all-reduce."""

    def __init__(self, config: RunConfig) -> None:
        self.sums = torch.zeros(len(LOSSES), 3, dtype=torch.float64, device=device())
        sizes = {
            name: config.model.vocab_size
            if "text" in LABELS[name]
            else config.model.visual_vocab_size
            for name in LOSSES
        }
        self.histograms = {
            name: torch.zeros(size, dtype=torch.float64, device=device())
            for name, size in sizes.items()
        }

    def add(self, result: Mapping[str, Any]) -> None:
        """Adds one micro-batch."""
        for row, name in enumerate(LOSSES):
            if name not in result:
                continue
            self.sums[row] += result[name]
            labels = result["labels"][LABELS[name]].reshape(-1)
            valid = (labels >= 0).to(self.histograms[name].dtype)
            self.histograms[name].scatter_add_(0, labels.clamp(min=0), valid)

    def reduce(self, config: RunConfig) -> dict[str, float]:
        """Metrics over all ranks; losses without any slot are left out."""
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
