"""What a run adds up between two logged steps: its losses, and what its routers did."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.model.vlmoe import VLMoEModel
from megatron_vlmoe.moe.router import HEADER
from megatron_vlmoe.runtime.distributed import device, is_rank_zero
from megatron_vlmoe.stream.block_plan import block_plans
from megatron_vlmoe.train.metrics import Counters, collect
from megatron_vlmoe.train.step import Losses


class Interval(NamedTuple):
    """What happened between two logged steps, over all ranks.

    Args:
        means: losses by name.
        counters: of the routers.
        bad_images: images that were replaced.
        seconds: of a forward pass, by rank.
    """

    means: dict[str, float]
    counters: Counters
    bad_images: int
    seconds: list[float]


class IntervalSums:
    """Sums since the last logged step. A checkpoint in between keeps them, so that no step is missing in the log.

    Args:
        config: the run.
        chunks: model chunks of this rank, whose routers count by themselves.
        loss_names: losses of a micro-batch, the same on every rank.
    """

    def __init__(
        self, config: RunConfig, chunks: Sequence[VLMoEModel], loss_names: Sequence[str]
    ) -> None:
        self.config = config
        self.chunks = chunks
        self.loss_names = tuple(loss_names)
        self.steps = 0
        # Of this rank, of how many micro-batches, and how many images are missing; read at the next report.
        self.losses = torch.zeros(len(loss_names) + 2, dtype=torch.float64, device=device())
        # Of all ranks; what routers have counted since then is still theirs.
        self.counters: Counters = {}

    def add(self, results: Sequence[Losses], bad_images: int = 0) -> None:
        """Adds a step, with the losses of those micro-batches that this rank speaks for, and its missing images."""
        for result in results:
            for index, name in enumerate(self.loss_names):
                if name in result:
                    self.losses[index] += result[name].double()
            self.losses[-2] += 1.0
        if bad_images:
            self.losses[-1] += bad_images
        self.steps += 1

    def count(self) -> None:
        """Takes what the routers have counted, before they count something else; every rank must call it."""
        self.counters = self._counted(clear=True)

    def take(self, seconds: float = 0.0) -> Interval:
        """What there is over all ranks; starts the next interval.

        Args:
            seconds: of a forward pass of this rank.
        """
        self.count()
        times = self.losses.new_zeros(dist.get_world_size())
        times[dist.get_rank()] = seconds
        flat = torch.cat([self.losses, times])
        dist.all_reduce(flat)
        size = len(self.losses)
        *sums, micro_batches, bad_images = flat[:size].tolist()
        counters = self.counters
        self.losses.zero_()
        self.counters, self.steps = {}, 0
        # Of an interval whose steps were all skipped there is no mean.
        count = micro_batches or math.nan
        means = {name: value / count for name, value in zip(self.loss_names, sums)}
        return Interval(means, counters, int(bad_images), flat[size:].tolist())

    def clear(self) -> None:
        """Forgets everything, of a run that goes back; every rank must call it."""
        self.count()
        self.losses.zero_()
        self.counters, self.steps = {}, 0

    def saved(self) -> dict[str, Any]:
        """The sums over all ranks, for a checkpoint; empty right after a logged step. Every rank must call it.

        Nothing is taken: whether a run saves in between changes no bit of its next line.
        """
        if not self.steps:
            return {}
        losses = self.losses.clone()
        dist.all_reduce(losses)
        *sums, micro_batches, bad_images = losses.tolist()
        return {
            "steps": self.steps,
            "losses": dict(zip(self.loss_names, sums)),
            "micro_batches": micro_batches,
            "bad_images": bad_images,
            "header": list(HEADER),
            "counters": {
                f"{number} {pool}": vector.tolist()
                for (number, pool), vector in self._counted(clear=False).items()
            },
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Goes on with the sums of a checkpoint. Those of other losses or routers are left out."""
        sizes = {
            f"{plan.layer_number} {pool.name}": len(HEADER) + pool.num_experts
            for plan in block_plans(self.config.model, self.config.moe)
            for pool in plan.pools
        }
        if (
            not saved
            or tuple(saved["losses"]) != self.loss_names
            or saved["header"] != list(HEADER)
            or {key: len(vector) for key, vector in saved["counters"].items()} != sizes
        ):
            return
        self.steps = saved["steps"]
        if is_rank_zero():
            # Earlier versions had no such images.
            rest = saved["micro_batches"], saved.get("bad_images", 0.0)
            sums = [*saved["losses"].values(), *rest]
            self.losses.copy_(torch.tensor(sums, dtype=torch.float64))
        for key, values in saved["counters"].items():
            number, pool = key.split()
            self.counters[int(number), pool] = torch.tensor(values, dtype=torch.float64)

    def _counted(self, clear: bool) -> Counters:
        """The counters of all ranks with what the routers have counted besides."""
        new: Mapping[tuple[int, str], Tensor] = collect(self.chunks, self.config, clear)
        return {k: self.counters[k] + v if k in self.counters else v for k, v in new.items()}
