"""One training or evaluation step through megatron-core's pipeline schedules."""

from __future__ import annotations

import functools
import itertools
from typing import Any, Callable, Iterator, Mapping, Optional, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.config.stream import StreamLayout
from megatron_vlmoe.moe.stream_batch import StreamBatch
from megatron_vlmoe.objectives.masked import evaluation_sums, total_loss
from megatron_vlmoe.runtime.distributed import Ranks, device
from megatron_vlmoe.runtime.draws import DrawKey
from megatron_vlmoe.train.setup import TrainingParts

Batch = Mapping[str, Tensor]


class ImageEncoder(Protocol):
    """The frozen image tokenizer."""

    def encode(self, pixels: Tensor) -> Tensor:
        """Codes ``[n, N]`` of pixels ``[n, 3, S, S]`` in 0..1."""
        ...


class StepRunner:
    """Runs micro-batches of one layout through the model.

    Args:
        config: the run.
        parts: model chunks and megatron-core configuration.
        ranks: where this process stands.
        image_tokenizer: computes visual tokens on the last stage; None if they are stored.
    """

    def __init__(
        self,
        config: RunConfig,
        parts: TrainingParts,
        ranks: Ranks,
        image_tokenizer: Optional[ImageEncoder] = None,
    ) -> None:
        self.config = config
        self.parts = parts
        self.ranks = ranks
        self.image_tokenizer = image_tokenizer
        whole = StreamLayout.from_config(config.model, config.data)
        self.whole_layout = whole
        self.layout = whole.shard(ranks.tensor_size)

    def train(self, batches: Iterator[Batch], num_micro_batches: int) -> list[dict[str, Tensor]]:
        """Forward and backward of one step; losses of every micro-batch on the last stage, else empty."""
        for chunk in self.parts.wrapped:
            chunk.train()
            chunk.zero_grad_buffer()
        self.parts.optimizer.zero_grad()
        return self._run(batches, num_micro_batches, forward_only=False, finish=self._training_loss)

    def evaluate(self, batches: Iterator[Batch], num_micro_batches: int) -> list[dict[str, Tensor]]:
        """Forward only; sums of every micro-batch on the last stage, else empty."""
        for chunk in self.parts.wrapped:
            chunk.eval()
        return self._run(batches, num_micro_batches, forward_only=True, finish=self._evaluation)

    def _run(
        self,
        batches: Iterator[Batch],
        num_micro_batches: int,
        forward_only: bool,
        finish: Callable[[Batch, Any], tuple[Tensor, dict[str, Tensor]]],
    ) -> list[dict[str, Tensor]]:
        prepared = (self._prepare(batch) for batch in itertools.islice(batches, num_micro_batches))
        # With virtual stages every chunk walks the same micro-batches at its own pace.
        iterators: Any = list(itertools.tee(prepared, len(self.parts.chunks)))
        schedule = get_forward_backward_func()
        return schedule(
            forward_step_func=functools.partial(self._forward, finish, forward_only),
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.parts.wrapped,
            num_microbatches=num_micro_batches,
            seq_length=self.whole_layout.num_tokens,
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def _forward(
        self,
        finish: Callable[[Batch, Any], tuple[Tensor, dict[str, Tensor]]],
        forward_only: bool,
        iterator: Iterator[Batch],
        model: Any,
    ) -> tuple[Any, Callable[[Any], Any]]:
        batch = next(iterator)
        stream = self.stream(batch, draws=not forward_only)
        return model(batch, stream), functools.partial(finish, batch)

    def stream(self, batch: Batch, draws: bool) -> StreamBatch:
        """The StreamBatch of a batch; `draws` turns noise and stochastic depth on."""
        key = DrawKey(self.config.train.seed, int(batch["micro_batch"])) if draws else None
        return StreamBatch(
            layout=self.layout,
            tensor_rank=self.ranks.tensor,
            tensor_size=self.ranks.tensor_size,
            pair_lengths=batch.get("pair_lengths"),
            key=key,
            text_documents=batch.get("text_segments"),
        )

    def _training_loss(self, batch: Batch, slots: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, single = total_loss(slots, batch, self.config.objectives)
        return loss, {"total": loss.detach().clone(), **single}

    def _evaluation(self, batch: Batch, slots: Any) -> tuple[Tensor, dict[str, Tensor]]:
        sums: dict[str, Any] = dict(evaluation_sums(slots, batch))
        sums["labels"] = {
            name: batch[name]
            for name in ("text_labels", "pair_text_labels", "image_codes", "pair_image_codes")
            if name in batch
        }
        return torch.zeros(1, device=device()), sums

    def _prepare(self, batch: Batch) -> Batch:
        """Moves a batch to the device and adds visual tokens that are not stored."""
        target = device()
        # The micro-batch number stays on the host: it seeds generators.
        moved = {
            key: value if key == "micro_batch" else value.to(target, non_blocking=True)
            for key, value in batch.items()
        }
        if self.ranks.is_last_stage and self.image_tokenizer is not None:
            for name in ("image", "pair"):
                if f"{name}_tokenizer_pixels" in moved:
                    prefix = "image" if name == "image" else "pair_image"
                    codes = self._codes(moved.pop(f"{name}_tokenizer_pixels"))
                    moved[f"{prefix}_codes"] = codes.gather(1, moved[f"{prefix}_positions"])
        return moved

    @torch.no_grad()
    def _codes(self, pixels: Tensor) -> Tensor:
        """Codes of all images of the micro-batch from this rank's share ``[n / TP, 3, S, S]`` of uint8."""
        assert self.image_tokenizer is not None
        codes = self.image_tokenizer.encode(pixels.float() / 255.0)
        if self.ranks.tensor_size == 1:
            return codes
        parts = [torch.empty_like(codes) for _ in range(self.ranks.tensor_size)]
        group = parallel_state.get_tensor_model_parallel_group()
        torch.distributed.all_gather(parts, codes.contiguous(), group=group)
        return torch.cat(parts)
