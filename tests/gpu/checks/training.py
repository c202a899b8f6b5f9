"""A model that trains in this process, for the checks of steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from helpers import small_config
from torch import Tensor

from megatron_vlmoe.data.collate import BatchShare
from megatron_vlmoe.data.random_batches import RandomData
from megatron_vlmoe.runtime.distributed import destroy, initialize
from megatron_vlmoe.stream.batch import map_values
from megatron_vlmoe.stream.sizes import num_micro_batches
from megatron_vlmoe.train.pretrain import pretraining_objective
from megatron_vlmoe.train.setup import TrainingParts, build_training
from megatron_vlmoe.train.step import StepRunner
from megatron_vlmoe.train.step_graph import Capture, capture_cuda_graph


class Training:
    """Steps of the small model of the tests, on random batches.

    Args:
        config: the run.
        precision: of its arithmetic; fp16 also on a CPU, which a run refuses.
        capture: makes the graph of `train.cuda_graph`.
    """

    def __init__(
        self, config: Any, precision: Any, capture: Capture[Any] = capture_cuda_graph
    ) -> None:
        self.config = config
        self.parts: TrainingParts = build_training(config, precision)
        ranks = self.ranks
        self.runner = StepRunner(config, self.parts, ranks, capture)
        self.count = num_micro_batches(config, 1)
        self.objective: Any = pretraining_objective(config, ranks, None, self.count)
        self.data = RandomData(config, BatchShare.of(ranks))
        self.step = 0

    @property
    def ranks(self) -> Any:
        """Those of a single process."""
        from megatron_vlmoe.runtime.distributed import current_ranks

        return current_ranks()

    def batches(self) -> list[Any]:
        """Those of the next step, pinned as a loader's where there is a GPU."""
        found: Any = list(self.data.loader("train", self.step * self.count, self.count))
        if not torch.cuda.is_available():
            return found
        return [
            # The number of the micro-batch seeds generators on the host.
            {**map_values(batch, Tensor.pin_memory), "micro_batch": batch["micro_batch"]}
            for batch in found
        ]

    def forward_backward(self, batches: list[Any]) -> list[dict[str, Tensor]]:
        """Gradients and losses of a step."""
        self.runner.start_step()
        return self.runner.train(iter(batches), self.count, self.objective)

    def update(self) -> tuple[bool, float]:
        """The optimizer's step: whether it was taken, and the norm of the gradients."""
        updated, norm, _ = self.parts.optimizer.step()
        if updated:
            self.parts.scheduler.step(increment=1)
        self.step += 1
        return bool(updated), float(norm or 0.0)

    def train(self, steps: int) -> list[float]:
        """Takes steps; the mean loss of each."""
        losses = []
        for _ in range(steps):
            results = self.forward_backward(self.batches())
            self.update()
            losses.append(sum(float(own["total"]) for own in results) / len(results))
        return losses

    def weights(self) -> list[Tensor]:
        """Copies of all parameters."""
        return [p.detach().clone() for chunk in self.parts.chunks for p in chunk.parameters()]

    def gradients(self) -> list[Tensor]:
        """Copies of the fp32 gradients of the last step."""
        parameters = [p for chunk in self.parts.chunks for p in chunk.parameters()]
        return [p.main_grad.clone() for p in parameters if p.requires_grad]


@contextmanager
def training(
    *words: str,
    precision: str = "bf16",
    deterministic: bool = False,
    capture: Capture[Any] = capture_cuda_graph,
) -> Iterator[Training]:
    """A run of the small model with options on top; process groups end with it."""
    config = small_config(*words)
    initialize(config.parallel, config.train.seed, deterministic)
    try:
        yield Training(config, precision, capture)
    finally:
        torch.use_deterministic_algorithms(False)
        destroy()
