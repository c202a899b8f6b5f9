"""The token stream of a micro-batch: the only place that knows the order of its segments.

Letters: T tokens, D width, n samples of a segment, L tokens of a sample.

A micro-batch carries all three objectives as one stream ``[T, 1, D]`` of four segments::

    | text-only texts | texts of pairs | images of pairs | image-only images |
    |<------ text tokens ------------->|<------ vision tokens ----------->|
                      |<------ pair tokens ------------>|

Inside a segment the tokens of a sample are consecutive. With tensor parallelism each rank holds whole
samples: an equal share of every segment, in the same order of segments. A tensor gathered along its first
dimension over TP ranks is therefore one local stream after another.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Mapping

from megatron_vlmoe.config.errors import ConfigError, near_multiples
from megatron_vlmoe.config.schema import RunConfig

if TYPE_CHECKING:
    from torch import Tensor

TextSegmentName = Literal["texts", "pair_texts"]
ImageSegmentName = Literal["pair_images", "images"]
SegmentName = Literal[TextSegmentName, ImageSegmentName]

SEGMENTS: tuple[SegmentName, ...] = ("texts", "pair_texts", "pair_images", "images")
TEXT_SEGMENTS: tuple[TextSegmentName, ...] = ("texts", "pair_texts")
VISION_SEGMENTS: tuple[ImageSegmentName, ...] = ("pair_images", "images")
PAIR_SEGMENTS: tuple[SegmentName, ...] = ("pair_texts", "pair_images")


@dataclass(frozen=True)
class StreamLayout:
    """Counts and lengths of the samples of one micro-batch, hence every slice of its stream.

    Args:
        texts: packed texts.
        pairs: image-text pairs.
        images: images without text.
        text_length: tokens of a packed text.
        pair_text_length: tokens of a caption, padding included.
        image_length: tokens of an image, [I_CLS] included.
    """

    texts: int
    pairs: int
    images: int
    text_length: int
    pair_text_length: int
    image_length: int

    @classmethod
    def of(cls, config: RunConfig) -> StreamLayout:
        """The layout of a whole micro-batch of one data-parallel rank.

        Contrastive pretraining reads the two halves of its pairs apart: as texts that are as long as captions, and as
        images.
        """
        model, data = config.model, config.data
        texts, pairs, images = data.micro_texts, data.micro_pairs, data.micro_images
        text_length = model.text_length
        if config.objectives.kind == "contrastive":
            texts, pairs, images = pairs, 0, pairs
            text_length = model.pair_text_length
        return cls(
            texts=texts,
            pairs=pairs,
            images=images,
            text_length=text_length,
            pair_text_length=model.pair_text_length,
            image_length=model.image_length,
        )

    def shard(self, tensor_parallel_size: int) -> StreamLayout:
        """The layout of one tensor-parallel rank's share.

        Raises:
            ConfigError: if a count is not divisible.
        """
        for name in ("texts", "pairs", "images"):
            count = getattr(self, name)
            if count % tensor_parallel_size:
                raise ConfigError(
                    f"data.micro_{name}={count} is not divisible by "
                    f"parallel.tensor_model_parallel_size={tensor_parallel_size}: "
                    f"--data.micro_{name} {near_multiples(count, tensor_parallel_size)} fits"
                )
        return dataclasses.replace(
            self,
            texts=self.texts // tensor_parallel_size,
            pairs=self.pairs // tensor_parallel_size,
            images=self.images // tensor_parallel_size,
        )

    def count(self, segment: str) -> int:
        """Samples of a segment."""
        return {
            "texts": self.texts,
            "pair_texts": self.pairs,
            "pair_images": self.pairs,
            "images": self.images,
        }[segment]

    def length(self, segment: str) -> int:
        """Tokens of one sample of a segment."""
        return {
            "texts": self.text_length,
            "pair_texts": self.pair_text_length,
            "pair_images": self.image_length,
            "images": self.image_length,
        }[segment]

    def size(self, *segments: str) -> int:
        """Tokens of the named segments together."""
        return sum(self.count(segment) * self.length(segment) for segment in segments)

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole stream, T."""
        return self.size(*SEGMENTS)

    def slice(self, *segments: str) -> slice:
        """The stream slice of consecutive segments.

        Raises:
            ValueError: if the segments are not consecutive and in stream order.
        """
        first = SEGMENTS.index(segments[0])
        if SEGMENTS[first : first + len(segments)] != segments:
            raise ValueError(f"segments {segments} are not consecutive in the stream {SEGMENTS}")
        start = self.size(*SEGMENTS[:first])
        return slice(start, start + self.size(*segments))

    def take(self, stream: Tensor, segment: str, gathered: int = 1) -> Tensor:
        """Samples of one segment: ``[gathered * T, ...]`` to ``[gathered * n, L, ...]``.

        With ``gathered`` local streams one after another, the samples of all of them come in rank order.
        """
        tail = stream.shape[1:]
        local = stream.view(gathered, self.num_tokens, *tail)[:, self.slice(segment)]
        return local.reshape(gathered * self.count(segment), self.length(segment), *tail)

    def segments(self, stream: Tensor, gathered: int = 1) -> dict[str, Tensor]:
        """All segments at once, each as :meth:`take` gives it.

        One split: its gradient is one concatenation, where every :meth:`take` fills a whole stream with zeros.
        """
        tail = stream.shape[1:]
        parts = stream.view(gathered, self.num_tokens, *tail).split(
            [self.size(segment) for segment in SEGMENTS], dim=1
        )
        return {
            segment: part.reshape(gathered * self.count(segment), self.length(segment), *tail)
            for segment, part in zip(SEGMENTS, parts)
        }

    def assemble(self, samples: Mapping[str, Tensor], gathered: int = 1) -> Tensor:
        """Inverse of :meth:`take` over all segments: ``[gathered * T, ...]``; empty segments may be absent."""
        import torch

        parts = []
        for segment in SEGMENTS:
            if self.count(segment) == 0:
                continue
            value = samples[segment]
            parts.append(value.reshape(gathered, self.size(segment), *value.shape[2:]))
        return torch.cat(parts, dim=1).flatten(0, 1)
