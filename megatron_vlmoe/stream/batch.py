"""What a block must know about the micro-batch besides its hidden states."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional, Sequence

import torch
from torch import Tensor

from megatron_vlmoe.stream.draws import DrawKey
from megatron_vlmoe.stream.layout import StreamLayout


@dataclass(frozen=True, eq=False)
class StreamBatch:
    """Layout, padding and random key of one micro-batch on one tensor-parallel rank.

    Args:
        layout: this rank's share of the micro-batch.
        tensor_rank: tensor-parallel rank.
        tensor_size: tensor-parallel size; samples of rank r are the r-th part of each segment.
        pair_lengths: tokens of every caption of the whole micro-batch ``[n]``, special tokens included.
        key: names the micro-batch for random draws; None draws nothing.
        text_documents: document number of every token of every text ``[n, L]``, to restart attention.
        text_lengths: tokens of every text ``[n]``, special tokens included; None where texts are packed full.
        drawn_layout: layout for which random numbers are drawn, of which this one has a part of the segments; None
            means `layout`. A forward pass over a part of a micro-batch then sees the numbers of the whole.
    """

    layout: StreamLayout
    tensor_rank: int = 0
    tensor_size: int = 1
    pair_lengths: Optional[Tensor] = None
    key: Optional[DrawKey] = None
    text_documents: Optional[Tensor] = None
    text_lengths: Optional[Tensor] = None
    drawn_layout: Optional[StreamLayout] = None
    # Every block asks for the same masks: made once for a micro-batch.
    _masks: dict[tuple[str, ...], Tensor] = field(default_factory=dict, init=False, repr=False)
    _slots: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def share(self, samples: Tensor) -> Tensor:
        """This rank's part of a tensor over the samples of the whole micro-batch."""
        return samples.chunk(self.tensor_size, dim=0)[self.tensor_rank] if len(samples) else samples

    def slot_mask(self, segment: str) -> Optional[Tensor]:
        """True where a slot of a segment holds a token: ``[n, L]`` over the whole micro-batch; None if all do."""
        lengths = {"texts": self.text_lengths, "pair_texts": self.pair_lengths}.get(segment)
        if lengths is None or not self.layout.count(segment):
            return None
        if segment not in self._slots:
            slots = torch.arange(self.layout.length(segment), device=lengths.device)
            self._slots[segment] = slots < lengths.unsqueeze(1)
        return self._slots[segment]

    def token_mask(self, segments: Sequence[str], device: torch.device) -> Optional[Tensor]:
        """True for tokens that are not padding, over this rank's tokens of the segments; None if all are."""
        masks = [self.slot_mask(segment) for segment in segments]
        if all(mask is None for mask in masks):
            return None
        key = tuple(segments)
        if key not in self._masks:
            self._masks[key] = torch.cat(
                [
                    torch.ones(self.layout.size(segment), dtype=torch.bool, device=device)
                    if mask is None
                    else self.share(mask).reshape(-1)
                    for segment, mask in zip(segments, masks)
                ]
            )
        return self._masks[key]

    def normal(
        self,
        layer_number: int,
        purpose: str,
        segments: Sequence[str],
        width: int,
        device: torch.device,
    ) -> Optional[Tensor]:
        """Standard normal draws for this rank's tokens of the segments: ``[T, width]`` in fp32.

        The draw covers the whole micro-batch, so every layout takes its share of the same numbers.
        """
        if self.key is None:
            return None
        generator = self.key.generator(layer_number, purpose, device)
        drawn = self.drawn_layout or self.layout
        parts = []
        for segment in segments:
            shape = (drawn.count(segment) * self.tensor_size, drawn.length(segment), width)
            whole = torch.empty(shape, device=device).normal_(generator=generator)
            if self.layout.count(segment):
                parts.append(self.share(whole).reshape(-1, width))
        return torch.cat(parts) if parts else torch.empty(0, width, device=device)

    def keep_scale(
        self, layer_number: int, purpose: str, drop_rate: float, device: torch.device
    ) -> Optional[Tensor]:
        """Stochastic depth: 0 for dropped samples, 1 / (1 - rate) for others, per token ``[T, 1, 1]``.

        The two halves of a pair share one draw. None if nothing is dropped.
        """
        if self.key is None or drop_rate <= 0.0:
            return None
        generator = self.key.generator(layer_number, purpose, device)
        scale: dict[str, Tensor] = {}
        for name in ("texts", "pairs", "images"):
            count = getattr(self.drawn_layout or self.layout, name) * self.tensor_size
            uniform = torch.empty(count, device=device).uniform_(generator=generator)
            scale[name] = self.share((uniform >= drop_rate) / (1.0 - drop_rate))
        order = (
            ("texts", "texts"),
            ("pairs", "pair_texts"),
            ("pairs", "pair_images"),
            ("images", "images"),
        )
        parts = [
            scale[samples].unsqueeze(1).expand(-1, self.layout.length(segment)).reshape(-1)
            for samples, segment in order
            if self.layout.count(segment)
        ]
        return torch.cat(parts).view(-1, 1, 1)
