"""Prediction heads of masked data modelling, on masked positions only.

Letters: n samples, M predicted positions of a sample, S positions in total, D width, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import Mapping, NamedTuple, Optional, Sequence

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.model.linear import ColumnLinear
from megatron_vlmoe.runtime.compiled import compiled
from megatron_vlmoe.stream.batch import Batch, StreamBatch
from megatron_vlmoe.stream.layout import (
    TEXT_SEGMENTS,
    VISION_SEGMENTS,
    SegmentName,
    StreamLayout,
)
from megatron_vlmoe.stream.sizes import padded_vocab_size


class VocabHead(MegatronModule):
    """Linear ``D -> V`` with bias, sharded over the vocabulary; rows beyond V are padding.

    Args:
        num_classes: V.
        compile: cross entropy of 16-bit logits is one compiled function where a rank has the whole vocabulary. In fp32
            megatron-core's, which works in place, needs half of the memory.
    """

    def __init__(self, config: TransformerConfig, num_classes: int, compile: bool = False) -> None:
        super().__init__(config=config)
        self.num_classes = num_classes
        padded = padded_vocab_size(num_classes)
        self.linear = ColumnLinear(
            config.hidden_size,
            padded,
            config=config,
            init_method=lambda tensor: None,
            bias=True,
            gather_output=False,
            skip_bias_add=False,
        )
        self.tp_group = parallel_state.get_tensor_model_parallel_group()
        rows = padded // self.tp_group.size()
        self.first_row = rows * self.tp_group.rank()
        self.valid_rows = max(0, min(rows, num_classes - self.first_row))
        whole = self.tp_group.size() == 1 and config.params_dtype != torch.float32
        self.compile_loss = compile and whole

    def forward(self, hidden: Tensor) -> Tensor:
        """Local rows ``[S / TP, 1, D]`` to logits of all rows ``[S, V / TP]`` in fp32; padding is -inf."""
        logits, _ = self.linear(hidden)
        logits = logits.squeeze(1).float()
        if self.valid_rows < logits.shape[1]:
            padding = torch.arange(logits.shape[1], device=logits.device) >= self.valid_rows
            logits = logits.masked_fill(padding, float("-inf"))
        return logits

    def score(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Optional[Tensor]]:
        """Losses, and in evaluation hits, both ``[TP, S / TP]``, of local rows ``[S / TP, D]``.

        Args:
            labels: of all rows ``[TP, S / TP]``.
        """
        if self.compile_loss and self.training:
            logits, _ = self.linear(hidden.unsqueeze(1))
            function = compiled(cross_entropy, True)
            losses = function(logits.squeeze(1), labels.reshape(-1), self.num_classes)
            return losses.view_as(labels), None
        logits, target = self(hidden.unsqueeze(1)), labels.reshape(-1)
        # Before the loss, which spends the logits; training has no use for it.
        correct = None if self.training else self.correct(logits, target).view_as(labels)
        return self.losses(logits, target).view_as(labels), correct

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy ``[S]`` in nats; 0 where the label is negative (an unused position).

        The kernel works in place: the logits are spent afterwards.
        """
        target = labels.clamp(min=0)
        loss = vocab_parallel_cross_entropy(logits.unsqueeze(1), target.unsqueeze(1))
        return loss.squeeze(1) * (labels >= 0)

    @torch.no_grad()
    def correct(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Whether the largest logit is the label ``[S]``; unused positions are False."""
        value, index = logits.max(dim=1)
        index = index + self.first_row
        if self.tp_group.size() > 1:
            pair = torch.stack([value.double(), index.double()])
            pairs = [torch.empty_like(pair) for _ in range(self.tp_group.size())]
            torch.distributed.all_gather(pairs, pair, group=self.tp_group)
            values, indices = torch.stack(pairs).unbind(1)
            best = values.argmax(dim=0, keepdim=True)
            index = indices.gather(0, best).squeeze(0).long()
        return index == labels


def cross_entropy(logits: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Cross entropy ``[S]`` in nats, in fp32, of logits ``[S, V]``; 0 where the label is negative.

    Args:
        num_classes: logits from there on are padding.
    """
    logits = logits.float()
    if num_classes < logits.shape[1]:
        padding = torch.arange(logits.shape[1], device=logits.device) >= num_classes
        logits = logits.masked_fill(padding, float("-inf"))
    return F.cross_entropy(logits, labels.clamp(min=0), reduction="none") * (labels >= 0)


class Predicted(NamedTuple):
    """What a vocabulary head says of the predicted positions of a segment, equal on all tensor-parallel ranks.

    Args:
        losses: cross entropy in nats ``[n * M]``; 0 where a position is unused.
        correct: whether the most likely class is the label ``[n * M]``; in evaluation only.
    """

    losses: Tensor
    correct: Optional[Tensor]


class Heads(MegatronModule):
    """What the last stage ends with: hidden states to what the objective needs."""

    def forward(
        self, hidden: Tensor, batch: Batch, stream: StreamBatch
    ) -> Mapping[str, Tensor] | Mapping[SegmentName, Predicted]:
        """Outputs by name for the local stream ``[T, 1, D]`` after the last LayerNorm."""
        raise NotImplementedError

    def unreached(self, layout: StreamLayout) -> dict[str, nn.Module]:
        """Modules that get no gradient in a run of this layout, by name."""
        return {}


class MaskedHeads(Heads):
    """MLM head for texts and captions, MIM head for images (untied, as BEiT-3; the paper is silent)."""

    def __init__(self, config: TransformerConfig, run: RunConfig) -> None:
        super().__init__(config=config)
        model = run.model
        self.objectives = run.objectives
        self.chunk_rows = run.train.head_chunk_rows
        # A run without texts or without images has no tokenizer for them, hence no head.
        sizes = (model.vocab_size, model.visual_vocab_size)
        self.text, self.image = (
            VocabHead(config, size, run.train.compile) if size else None for size in sizes
        )

    def forward(
        self, hidden: Tensor, batch: Batch, stream: StreamBatch
    ) -> dict[SegmentName, Predicted]:
        """What is predicted at the `positions` of every segment that the layout has, over the whole micro-batch."""
        result: dict[SegmentName, Predicted] = {}
        for head, segments in ((self.text, TEXT_SEGMENTS), (self.image, VISION_SEGMENTS)):
            present = [segment for segment in segments if stream.layout.count(segment)]
            if present:
                assert head is not None, "the vocabulary of a head must be known"
                result.update(_predict(head, self.chunk_rows, present, hidden, batch, stream))
        return result

    def unreached(self, layout: StreamLayout) -> dict[str, nn.Module]:
        """Heads without samples, or whose losses all have weight 0."""
        wanted = self.objectives
        text = (layout.texts and wanted.mlm_weight) or (layout.pairs and wanted.vlm_text_weight)
        image = (layout.images and wanted.mim_weight) or (layout.pairs and wanted.vlm_image_weight)
        heads = (("heads.text", self.text, text), ("heads.image", self.image, image))
        return {name: head for name, head, used in heads if head is not None and not used}


def _predict(
    head: VocabHead,
    chunk_rows: int,
    segments: Sequence[SegmentName],
    hidden: Tensor,
    batch: Batch,
    stream: StreamBatch,
) -> dict[SegmentName, Predicted]:
    """All segments of a head together; rows of a gathered tensor come rank by rank."""
    rows, labels, sizes = [], [], []
    for segment in segments:
        samples = stream.layout.take(hidden.squeeze(1), segment)
        # Positions of images count patches; [I_CLS] stands before them.
        offset = 1 if segment in VISION_SEGMENTS else 0
        positions = stream.share(batch[segment]["positions"]) + offset
        n, length, width = samples.shape
        start = torch.arange(n, device=positions.device).unsqueeze(1) * length
        places = (positions + start).reshape(-1)
        rows.append(samples.reshape(n * length, width).index_select(0, places))
        labels.append(batch[segment]["labels"].reshape(stream.tensor_size, -1))
        sizes.append(rows[-1].shape[0])
    own, target = torch.cat(rows), torch.cat(labels, dim=1)
    size = chunk_rows or max(1, len(own))
    score = head.score
    if chunk_rows and torch.is_grad_enabled():
        # What the backward pass needs, which is as large as the logits, is not kept but made again.
        score = functools.partial(
            checkpoint, head.score, use_reentrant=False, preserve_rng_state=False
        )
    parts = [score(*part) for part in zip(own.split(size), target.split(size, dim=1))]
    losses, correct = zip(*parts)

    def by_segment(chunks: Sequence[Tensor]) -> list[Tensor]:
        split = torch.cat(tuple(chunks), dim=1).split(sizes, dim=1)
        return [values.reshape(-1) for values in split]

    hits = [None] * len(segments) if head.training else by_segment(correct)
    return {
        segment: Predicted(loss, hit)
        for segment, loss, hit in zip(segments, by_segment(losses), hits)
    }
