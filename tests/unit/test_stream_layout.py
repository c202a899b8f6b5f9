"""Segments of the token stream."""

from __future__ import annotations

import pytest
import torch

from megatron_vlmoe.stream.layout import SEGMENTS, StreamLayout

LAYOUT = StreamLayout(texts=2, pairs=3, images=1, text_length=4, pair_text_length=2, image_length=5)


@pytest.mark.parametrize("gathered", [1, 2])
def test_segments_are_the_samples_in_stream_order(gathered: int) -> None:
    # 8 text tokens, 6 caption tokens, 15 image tokens of pairs, 5 of the lone image.
    assert LAYOUT.num_tokens == 34
    stream = torch.arange(gathered * 34).view(-1, 1)
    segments = LAYOUT.segments(stream, gathered)
    starts, counts, lengths = (0, 8, 14, 29), (2, 3, 3, 1), (4, 2, 5, 5)
    for name, start, count, length in zip(SEGMENTS, starts, counts, lengths):
        expected = [
            rank * 34 + start + token for rank in range(gathered) for token in range(count * length)
        ]
        assert segments[name].shape == (gathered * count, length, 1)
        assert segments[name].flatten().tolist() == expected
        assert torch.equal(segments[name], LAYOUT.take(stream, name, gathered))
    assert torch.equal(LAYOUT.assemble(segments, gathered), stream)


def test_gradient_of_segments_reaches_every_token_once() -> None:
    stream = torch.randn(34, 1, requires_grad=True)
    weight = torch.randn(34, 1)
    parts = LAYOUT.segments(stream)
    scales = LAYOUT.segments(weight)
    sum((parts[name] * scales[name]).sum() for name in SEGMENTS).backward()
    assert torch.equal(stream.grad, weight)
