"""Micro-batches of one layout through megatron-core's pipeline schedules, and what a step asks of an objective."""

from __future__ import annotations

import contextlib
import functools
import itertools
from typing import Any, Callable, Iterable, Iterator, Optional, Protocol, TypeVar

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.runtime.distributed import Ranks, device
from megatron_vlmoe.stream.batch import Batch, StreamBatch, TextSegment, map_values
from megatron_vlmoe.stream.counter_draws import CounterDraws
from megatron_vlmoe.stream.draws import DrawKey
from megatron_vlmoe.stream.layout import StreamLayout
from megatron_vlmoe.train.setup import ModelParts, TrainingParts
from megatron_vlmoe.train.step_graph import Capture, StepGraph, capture_cuda_graph
from megatron_vlmoe.train.stragglers import ForwardTimer

Outputs = TypeVar("Outputs", contravariant=True)
"""What the heads of the last stage return; the heads and the objective of a run are chosen together."""
Result = TypeVar("Result")
Prepare = Callable[[Batch], Batch]
"""Completes a batch that is on the device."""
Losses = dict[str, Tensor]
"""Of one micro-batch, on the last pipeline stage: `total` and the single losses by name, without gradient."""
Measure = Callable[[Batch, Outputs], Result]
"""Batch and outputs of the heads to what is wanted of the micro-batch."""


class StepObjective(Protocol[Outputs]):
    """What a training step asks of an objective."""

    def prepare_step(self, runner: StepRunner, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The micro-batches to train on, made from those of the data.

        Args:
            runner: for an objective that must first see the whole step without gradient (`forward_no_grad`).
            batches: the micro-batches of the step, on the host, as many as the step has.
        """
        ...

    def prepare(self, batch: Batch) -> Batch:
        """Completes a micro-batch that is on the device."""
        ...

    def loss(self, batch: Batch, outputs: Outputs) -> tuple[Tensor, Losses]:
        """The loss of a micro-batch with its graph, which the schedule divides in place, and the losses to log."""
        ...


class StepRunner:
    """Runs micro-batches through the model of a rank.

    Args:
        capture: makes the graph of `train.cuda_graph`.
    """

    def __init__(
        self,
        config: RunConfig,
        parts: ModelParts,
        ranks: Ranks,
        capture: Capture[Any] = capture_cuda_graph,
    ) -> None:
        self.config = config
        self.parts = parts
        self.ranks = ranks
        self.layout = StreamLayout.of(config)
        self.graph = StepGraph(capture) if config.train.cuda_graph else None
        measures = config.health.straggler_factor > 0.0 and self.graph is None
        self.timer = ForwardTimer() if measures else None
        self._draws: dict[tuple[int, StreamLayout], CounterDraws] = {}

    def start_step(self) -> None:
        """Zeroes the gradients of a training step that begins."""
        assert isinstance(self.parts, TrainingParts), "the model was built forward-only"
        for chunk in self.parts.wrapped:
            chunk.zero_grad_buffer()
        self.parts.optimizer.zero_grad()

    def train(
        self,
        batches: Iterator[Batch],
        num_micro_batches: int,
        objective: StepObjective[Outputs],
    ) -> list[Losses]:
        """Forward and backward of one step.

        Args:
            batches: its micro-batches come next.
            num_micro_batches: how many.
            objective: completes them and makes the loss.

        Returns:
            The losses of every micro-batch on the last stage; empty elsewhere. With `train.cuda_graph` they are
            tensors that the next step fills anew, and `num_micro_batches` and `objective` must be the same in all.
        """
        step = objective.prepare_step(self, itertools.islice(batches, num_micro_batches))
        return self._run(
            step, num_micro_batches, objective.loss, prepare=objective.prepare, backward=True
        )

    def forward_no_grad(
        self,
        batches: Iterator[Batch],
        num_micro_batches: int,
        measure: Measure[Outputs, Result],
        layout: StreamLayout,
    ) -> list[Result]:
        """Forward alone over a part of what training reads, with the draws of training and no gradient.

        Expert capacity is that of the part: where tokens are dropped, they may be others than in training.
        """
        return self._run(batches, num_micro_batches, _without_loss(measure), layout)

    def evaluate(
        self,
        batches: Iterator[Batch],
        num_micro_batches: int,
        measure: Measure[Outputs, Result],
        prepare: Prepare = lambda batch: batch,
        layout: Optional[StreamLayout] = None,
    ) -> list[Result]:
        """Forward alone in evaluation mode, without any draw.

        Args:
            batches: the micro-batches come next.
            num_micro_batches: how many.
            measure: what is wanted of each.
            prepare: completes each on the device.
            layout: of these micro-batches; None: that of training.

        Returns:
            What `measure` returned for each on the last stage; empty elsewhere.
        """
        finish = _without_loss(measure)
        return self._run(batches, num_micro_batches, finish, layout, prepare, training=False)

    def _run(
        self,
        batches: Iterator[Batch],
        num_micro_batches: int,
        finish: Measure[Outputs, tuple[Tensor, Result]],
        layout: Optional[StreamLayout] = None,
        prepare: Prepare = lambda batch: batch,
        backward: bool = False,
        training: bool = True,
    ) -> list[Result]:
        def forward(iterator: Iterator[Batch], model: MegatronModule) -> tuple[Any, Any]:
            batch, chunk = next(iterator), self.parts.wrapped.index(model)
            stream = self.stream(batch, training, layout, chunk)
            is_timed = backward and self.timer is not None
            with self.timer.measured() if is_timed else contextlib.nullcontext():  # type: ignore[union-attr]
                outputs = model(batch, stream)
            return outputs, functools.partial(finish, batch)

        for chunk in self.parts.wrapped:
            chunk.train(training)
        prepared = (
            prepare(self._to_device(batch))
            for batch in itertools.islice(batches, num_micro_batches)
        )

        def passes(batches: Iterable[Batch]) -> list[Result]:
            # With virtual stages every chunk walks the same micro-batches at its own pace.
            iterators: Any = list(itertools.tee(batches, len(self.parts.chunks)))
            schedule = get_forward_backward_func()
            with torch.set_grad_enabled(backward):
                return schedule(
                    forward_step_func=forward,
                    data_iterator=iterators if len(iterators) > 1 else iterators[0],
                    model=self.parts.wrapped,
                    num_microbatches=num_micro_batches,
                    seq_length=(layout or self.layout).num_tokens,
                    micro_batch_size=1,
                    forward_only=not backward,
                )

        if backward and self.graph is not None:
            return self.graph.run(prepared, passes)
        return passes(prepared)

    def stream(
        self,
        batch: Batch,
        draws: bool,
        layout: Optional[StreamLayout] = None,
        chunk: int = 0,
    ) -> StreamBatch:
        """The StreamBatch of a batch for one model chunk.

        Args:
            batch: on the device.
            draws: turns noise and stochastic depth on.
            layout: of the whole micro-batch; None: that of training.
            chunk: number of the chunk among those of this rank.
        """
        share = (layout or self.layout).shard(self.ranks.tensor_size)
        key = drawn = None
        if draws and self.config.train.counter_draws:
            drawn = self._counter_draws(chunk, share).draw(batch["draw_counter"])
        elif draws:
            key = DrawKey(self.config.train.seed, int(batch["micro_batch"]))
        texts, captions = batch.get("texts", TextSegment()), batch.get("pair_texts", TextSegment())
        return StreamBatch(
            layout=share,
            tensor_rank=self.ranks.tensor,
            tensor_size=self.ranks.tensor_size,
            pair_lengths=captions.get("lengths"),
            drawn_layout=self.layout.shard(self.ranks.tensor_size),
            key=key,
            drawn=drawn,
            text_documents=texts.get("documents"),
            text_lengths=texts.get("lengths"),
            document_count=int(texts["document_count"]) if "document_count" in texts else 0,
        )

    def _counter_draws(self, chunk: int, share: StreamLayout) -> CounterDraws:
        if (chunk, share) not in self._draws:
            self._draws[chunk, share] = CounterDraws(
                self.config,
                [layer.layer_number for layer in self.parts.chunks[chunk].decoder.layers],
                share,
                self.ranks.tensor,
                self.parts.transformer_config.params_dtype,
                device(),
            )
        return self._draws[chunk, share]

    def _to_device(self, batch: Batch) -> Batch:
        target, number = device(), batch.get("micro_batch")
        # The number of the micro-batch seeds generators, that of documents sizes tensors: both are wanted on the host.
        stays = (number, batch.get("texts", TextSegment()).get("document_count"))

        def move(value: Tensor) -> Tensor:
            stay = any(value is own for own in stays)
            return value if stay else value.to(target, non_blocking=True)

        moved = map_values(batch, move)
        if self.config.train.counter_draws and number is not None:
            moved["draw_counter"] = number.to(target, non_blocking=True)
        return moved


def _without_loss(measure: Measure[Outputs, Result]) -> Measure[Outputs, tuple[Tensor, Result]]:
    """What the schedule wants of a forward pass without a backward one: some loss, too."""
    return lambda batch, outputs: (torch.zeros(1, device=device()), measure(batch, outputs))
