"""A micro-batch: its tensors, segment by segment, and what a block must know of it besides its hidden states.

Letters: n samples of a segment, L tokens of a sample, N patches, M predicted positions of a sample, S side of the
image tokenizer's or the model's images, A answers of a question.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Callable, Literal, Optional, Sequence, TypedDict, TypeVar

import torch
from torch import Tensor

from megatron_vlmoe.stream.counter_draws import Drawn
from megatron_vlmoe.stream.draws import DrawKey
from megatron_vlmoe.stream.layout import PAIR_SEGMENTS, SEGMENTS, StreamLayout
from megatron_vlmoe.stream.sequences import Sequences, attention_sequences


class TextSegment(TypedDict, total=False):
    """Texts, or the captions of pairs, of a micro-batch; integers are int64."""

    ids: Tensor
    """``[n, L]``, padded; masked where tokens are predicted."""

    lengths: Tensor
    """Tokens of every sample ``[n]``, special tokens included; absent where all are full."""

    documents: Tensor
    """Number of the document of every token within its packed text ``[n, L]``, with `data.reset_attention`."""

    document_count: Tensor
    """Documents of all of these texts together, with `data.reset_attention`; stays on the host: it sizes tensors."""

    positions: Tensor
    """Predicted positions ``[n, M]``, ascending; 0 where unused."""

    labels: Tensor
    """Tokens at these positions ``[n, M]``; -100 where unused."""

    sample_numbers: Tensor
    """Number of every sample, counted over the run ``[n]`` (pretraining)."""


class ImageSegment(TypedDict, total=False):
    """Images, or the images of pairs, of a micro-batch; integers are int64, pixels uint8."""

    pixels: Tensor
    """``[n / TP, 3, S, S]``: this tensor-parallel rank's share, on the first pipeline stage only."""

    tokenizer_pixels: Tensor
    """``[n / TP, 3, S, S]`` for the image tokenizer, on the last stage only, and only if codes are not stored."""

    replaced: Tensor
    """Which of these could not be decoded and are grey, bool ``[n / TP]``, with `data.on_bad_image`; leaves the batch
    before it reaches the device."""

    mask: Tensor
    """Hidden patches, bool ``[n, N]``; absent where all are seen."""

    positions: Tensor
    """Hidden patches ``[n, M]``, ascending; [I_CLS] is not counted."""

    labels: Tensor
    """Visual tokens of these patches ``[n, M]``, on the last stage; computed from `tokenizer_pixels` if not stored."""

    foreground: Tensor
    """Whether these patches show more than the image's ground, bool ``[n, M]`` (evaluation, on the last stage)."""

    sample_numbers: Tensor
    """Number of every sample, counted over the run ``[n]`` (pretraining)."""


class Batch(TypedDict, total=False):
    """A micro-batch of one data-parallel rank: the segments that it has, and what is known of it as a whole.

    Every rank of a model has all samples in the same order, but of pixels only its tensor-parallel share.
    """

    texts: TextSegment
    pair_texts: TextSegment
    pair_images: ImageSegment
    images: ImageSegment

    micro_batch: Tensor
    """Its number, counted over the run and all data-parallel ranks; stays on the host, since it seeds generators."""

    draw_counter: Tensor
    """The same number on the device, added there (`train.counter_draws`)."""

    step: Tensor
    """Number of its step, from 0 (pretraining)."""

    truncated_captions: Tensor
    """Captions that were cut (pretraining)."""

    dropped_caption_masks: Tensor
    """Tokens of captions that were not masked because all M positions are used (pretraining)."""

    exchange_distance: Tensor
    """Places by which the captions can be moved so that each meets another image; 0: none (evaluation)."""

    samples: Tensor
    """Index of every sample or evaluation item in its split ``[n]`` (tasks)."""

    sample_numbers: Tensor
    """Number of every sample, counted over the run ``[n]`` (training on a task)."""

    labels: Tensor
    """Class of every sample ``[n]``; -1 where unknown (tasks with classes)."""

    answers: Tensor
    """Answers that have a score ``[n, A]``; -1 where unused (VQA)."""

    scores: Tensor
    """Their scores in 0..1, fp32 ``[n, A]`` (VQA)."""

    partner_labels: Tensor
    """Class of the image that was mixed into every image ``[n]`` (mixup and cutmix)."""

    own_share: Tensor
    """Share of the image's own class in its target, fp32 ``[n]`` (mixup and cutmix)."""

    image_documents: Tensor
    """Number of every image ``[n]``: in its split (retrieval), or over all datasets (contrastive pretraining)."""

    negatives_valid: Tensor
    """Rows for which there was a wrong image and a wrong caption to draw, bool ``[n]`` (retrieval)."""

    valid: Tensor
    """False for the copies that fill up the last micro-batches, bool ``[n]`` (evaluation of a task)."""


Nested = TypeVar("Nested")


def map_values(nested: Nested, change: Callable[[Any], Any]) -> Nested:
    """Applies `change` to every value of nested dictionaries; a value that stands in two places is changed once."""
    changed: dict[int, Any] = {}

    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: walk(inner) for name, inner in value.items()}
        if id(value) not in changed:
            changed[id(value)] = change(value)
        return changed[id(value)]

    return walk(nested)


@dataclass(frozen=True, eq=False)
class StreamBatch:
    """Layout, padding and random key of one micro-batch on one tensor-parallel rank.

    Args:
        layout: this rank's share of the micro-batch.
        tensor_rank: tensor-parallel rank.
        tensor_size: tensor-parallel size; samples of rank r are the r-th part of each segment.
        pair_lengths: tokens of every caption of the whole micro-batch ``[n]``, special tokens included.
        key: names the micro-batch for random draws; None draws nothing, unless it is `drawn`.
        text_documents: document number of every token of every text ``[n, L]``, to restart attention.
        text_lengths: tokens of every text ``[n]``, special tokens included; None where texts are packed full.
        document_count: documents of all texts of the micro-batch together; 0 is unknown.
        drawn_layout: layout for which random numbers are drawn, of which this one has a part of the segments; None
            means `layout`. A forward pass over a part of a micro-batch then sees the numbers of the whole.
        drawn: numbers that are drawn already, with `train.counter_draws`.
    """

    layout: StreamLayout
    tensor_rank: int = 0
    tensor_size: int = 1
    pair_lengths: Optional[Tensor] = None
    key: Optional[DrawKey] = None
    text_documents: Optional[Tensor] = None
    text_lengths: Optional[Tensor] = None
    document_count: int = 0
    drawn_layout: Optional[StreamLayout] = None
    drawn: Optional[Drawn] = None
    # Every block asks for the same masks: made once for a micro-batch.
    _masks: dict[tuple[str, ...], Tensor] = field(default_factory=dict, init=False, repr=False)
    _sample_masks: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _attention_masks: dict[str, Optional[Tensor]] = field(
        default_factory=dict, init=False, repr=False
    )
    _sequences: list[Sequences] = field(default_factory=list, init=False, repr=False)

    def share(self, samples: Tensor) -> Tensor:
        """This rank's part of a tensor over the samples of the whole micro-batch."""
        return samples.chunk(self.tensor_size, dim=0)[self.tensor_rank] if len(samples) else samples

    def sample_mask(self, segment: str) -> Optional[Tensor]:
        """True where a sample of the segment has a token, not padding: ``[n, L]`` over the whole micro-batch; None if
        there is no padding."""
        lengths = {"texts": self.text_lengths, "pair_texts": self.pair_lengths}.get(segment)
        if lengths is None or not self.layout.count(segment):
            return None
        if segment not in self._sample_masks:
            positions = torch.arange(self.layout.length(segment), device=lengths.device)
            self._sample_masks[segment] = positions < lengths.unsqueeze(1)
        return self._sample_masks[segment]

    def attention_mask(self, samples: Literal["texts", "pairs"]) -> Optional[Tensor]:
        """Which keys a query of the same sample may see, over the whole micro-batch; None if it may see all.

        ``[n, 1, 1, L]`` where that depends on the key alone, ``[n, 1, L, L]`` for documents of packed texts; those of
        a pair are its caption and its image.
        """
        if samples not in self._attention_masks:
            mask = self.sample_mask("pair_texts" if samples == "pairs" else "texts")
            documents = self.text_documents
            if samples == "pairs":
                assert mask is not None, "pairs need the lengths of their captions"
                image = mask.new_ones(len(mask), self.layout.image_length)
                mask = torch.cat([mask, image], dim=1)[:, None, None, :]
            elif documents is not None:
                mask = (documents.unsqueeze(2) == documents.unsqueeze(1)).unsqueeze(1)
            elif mask is not None:
                mask = mask[:, None, None, :]
            self._attention_masks[samples] = mask
        return self._attention_masks[samples]

    def sequences(self, device: torch.device) -> Sequences:
        """The same as `attention_mask` for all samples at once, as sequences of the gathered stream."""
        if not self._sequences:
            self._sequences.append(
                attention_sequences(
                    self.layout,
                    self.tensor_size,
                    device,
                    text_lengths=self.text_lengths,
                    text_documents=self.text_documents,
                    # Rounded up to a power of two: tensors of few different sizes.
                    num_documents=1 << (self.document_count - 1).bit_length()
                    if self.document_count
                    else 0,
                    pair_lengths=self.pair_lengths,
                )
            )
        return self._sequences[0]

    def token_mask(self, segments: Sequence[str], device: torch.device) -> Optional[Tensor]:
        """True for tokens that are not padding, over this rank's tokens of the segments; None if all are."""
        masks = [self.sample_mask(segment) for segment in segments]
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

        The draw covers the whole micro-batch, so every layout takes its share of the same numbers. None if nothing is
        drawn.
        """
        if self.drawn is not None:
            return self.drawn.noise.get((layer_number, purpose))
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
        if self.drawn is not None:
            return self.drawn.keep_scales.get((layer_number, purpose))
        if self.key is None or drop_rate <= 0.0:
            return None
        generator = self.key.generator(layer_number, purpose, device)
        scale: dict[str, Tensor] = {}
        for name in ("texts", "pairs", "images"):
            count = getattr(self.drawn_layout or self.layout, name) * self.tensor_size
            uniform = torch.empty(count, device=device).uniform_(generator=generator)
            scale[name] = self.share((uniform >= drop_rate) / (1.0 - drop_rate))
        parts = []
        for segment in SEGMENTS:
            if self.layout.count(segment):
                of_samples = scale["pairs" if segment in PAIR_SEGMENTS else segment].unsqueeze(1)
                parts.append(of_samples.expand(-1, self.layout.length(segment)).reshape(-1))
        return torch.cat(parts).view(-1, 1, 1)
