"""Micro-batches of one layout through megatron-core's pipeline schedules."""

from __future__ import annotations

import functools
import itertools
from typing import Any, Callable, Iterator, Optional

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.runtime.distributed import Ranks, device
from megatron_vlmoe.stream.batch import Batch, StreamBatch, TextSegment, map_values
from megatron_vlmoe.stream.draws import DrawKey
from megatron_vlmoe.stream.layout import StreamLayout
from megatron_vlmoe.train.setup import TrainingParts

Prepare = Callable[[Batch], Batch]
"""Completes a batch that is on the device."""
Finish = Callable[[Batch, Any], tuple[Tensor, dict[str, Any]]]
"""Batch and outputs of the heads to the loss of the micro-batch and what the run wants to know of it."""


class StepRunner:
    """Runs micro-batches through the model.

    Args:
        config: the run.
        parts: model chunks and megatron-core configuration.
        ranks: where this process stands.
    """

    def __init__(self, config: RunConfig, parts: TrainingParts, ranks: Ranks) -> None:
        self.config = config
        self.parts = parts
        self.ranks = ranks
        self.layout = StreamLayout.from_config(config.model, config.data)

    def start_step(self) -> None:
        """Zeroes the gradients of a training step that begins."""
        for chunk in self.parts.wrapped:
            chunk.zero_grad_buffer()
        self.parts.optimizer.zero_grad()

    def train(
        self,
        batches: Iterator[Batch],
        num_micro_batches: int,
        finish: Finish,
        prepare: Optional[Prepare] = None,
    ) -> list[dict[str, Any]]:
        """Forward and backward; what `finish` tells of every micro-batch on the last stage, else empty."""
        return self._run(
            batches, num_micro_batches, self.layout, finish, prepare, backward=True, training=True
        )

    def look(
        self,
        batches: Iterator[Batch],
        num_micro_batches: int,
        layout: StreamLayout,
        finish: Finish,
    ) -> list[dict[str, Any]]:
        """Forward alone over a part of what training reads, with the draws of training and no gradient.

        Expert capacity is that of the part: where tokens are dropped, they may be others than in training.
        """
        with torch.no_grad():
            return self._run(
                batches, num_micro_batches, layout, finish, None, backward=False, training=True
            )

    def evaluate(
        self,
        batches: Iterator[Batch],
        num_micro_batches: int,
        finish: Finish,
        prepare: Optional[Prepare] = None,
        layout: Optional[StreamLayout] = None,
    ) -> list[dict[str, Any]]:
        """Forward alone in evaluation mode, without any draw."""
        layout = layout or self.layout
        with torch.no_grad():
            return self._run(
                batches, num_micro_batches, layout, finish, prepare, backward=False, training=False
            )

    def _run(
        self,
        batches: Iterator[Batch],
        num_micro_batches: int,
        layout: StreamLayout,
        finish: Finish,
        prepare: Optional[Prepare],
        backward: bool,
        training: bool,
    ) -> list[dict[str, Any]]:
        for chunk in self.parts.wrapped:
            chunk.train(training)
        prepared = (
            self._prepare(batch, prepare) for batch in itertools.islice(batches, num_micro_batches)
        )
        # With virtual stages every chunk walks the same micro-batches at its own pace.
        iterators: Any = list(itertools.tee(prepared, len(self.parts.chunks)))
        schedule = get_forward_backward_func()
        return schedule(
            forward_step_func=functools.partial(self._forward, layout, finish, training),
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.parts.wrapped,
            num_microbatches=num_micro_batches,
            seq_length=layout.num_tokens,
            micro_batch_size=1,
            forward_only=not backward,
        )

    def _forward(
        self,
        layout: StreamLayout,
        finish: Finish,
        draws: bool,
        iterator: Iterator[Batch],
        model: Any,
    ) -> tuple[Any, Callable[[Any], Any]]:
        batch = next(iterator)
        stream = self.stream(batch, draws, layout)
        return model(batch, stream), functools.partial(finish, batch)

    def stream(
        self, batch: Batch, draws: bool, layout: Optional[StreamLayout] = None
    ) -> StreamBatch:
        """The StreamBatch of a batch; `draws` turns noise and stochastic depth on."""
        key = DrawKey(self.config.train.seed, int(batch["micro_batch"])) if draws else None
        texts, captions = batch.get("texts", TextSegment()), batch.get("pair_texts", TextSegment())
        return StreamBatch(
            layout=(layout or self.layout).shard(self.ranks.tensor_size),
            tensor_rank=self.ranks.tensor,
            tensor_size=self.ranks.tensor_size,
            pair_lengths=captions.get("lengths"),
            drawn_layout=self.layout.shard(self.ranks.tensor_size),
            key=key,
            text_documents=texts.get("documents"),
            text_lengths=texts.get("lengths"),
        )

    @staticmethod
    def _prepare(batch: Batch, prepare: Optional[Prepare]) -> Batch:
        """Moves a batch to the device and lets the objective complete it."""
        target, number = device(), batch["micro_batch"]
        moved = map_values(
            batch, lambda value: value if value is number else value.to(target, non_blocking=True)
        )
        return moved if prepare is None else prepare(moved)
