"""The sequences within which the tokens of a micro-batch attend, for kernels that take lengths in place of a mask.

Letters: T tokens of the stream of all tensor-parallel ranks, n samples of a segment, L tokens of a sample, S sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vlmoe.stream.layout import StreamLayout


@dataclass(frozen=True, eq=False)
class Sequences:
    """Consecutive sequences that have every token of a stream once.

    Args:
        boundaries: where each sequence begins, and T: int32 ``[S + 1]``, ascending. Where two are equal, a sequence is
            empty.
        longest: no sequence has more tokens.
        order: the stream's token at each place of the sequences ``[T]``; None where they follow the stream.
        places: the place of each token of the stream, the inverse ``[T]``.
    """

    boundaries: Tensor
    longest: int
    order: Optional[Tensor] = None
    places: Optional[Tensor] = None


def attention_sequences(
    layout: StreamLayout,
    gathered: int,
    device: torch.device,
    *,
    text_lengths: Optional[Tensor] = None,
    text_documents: Optional[Tensor] = None,
    num_documents: int = 0,
    pair_lengths: Optional[Tensor] = None,
) -> Sequences:
    """Texts, then pairs, then images; every document of a packed text, and the padding of every other text and of every
    pair, is a sequence of its own.

    A pair is its caption, then its image, and last its padding, which sees itself alone and which nothing else sees.
    The number of sequences depends on the layout and on `num_documents` alone, and nothing is read on the host.

    Args:
        layout: of one of the local streams.
        gathered: local streams, one after another.
        device: of the stream.
        text_lengths: tokens of every text ``[n]``; None where texts are full.
        text_documents: number of the document of every token of every text ``[n, L]``, ascending; with it
            `text_lengths` is not looked at.
        num_documents: the texts have at most so many documents together; 0: as many as tokens.
        pair_lengths: tokens of every caption ``[n]``.
    """
    size = gathered * layout.num_tokens
    texts, pairs, images = (gathered * n for n in (layout.texts, layout.pairs, layout.images))
    text, caption, image = layout.text_length, layout.pair_text_length, layout.image_length
    pair = caption + image
    begin_pairs = texts * text
    begin_images = begin_pairs + pairs * pair

    def starts(begin: int, count: int, length: int) -> Tensor:
        return begin + length * torch.arange(count, device=device)

    parts = []
    if texts and text_documents is not None:
        changes = F.pad(text_documents.diff(dim=1) != 0, (1, 0), value=True).flatten()
        # A token that begins no document makes an empty sequence behind all of them.
        begin = torch.where(changes, starts(0, begin_pairs, 1), begin_pairs).sort().values
        parts.append(begin[: num_documents or begin_pairs])
    elif texts and text_lengths is not None:
        begin = starts(0, texts, text)
        parts.append(torch.stack([begin, begin + text_lengths], dim=1).flatten())
    elif texts:
        parts.append(starts(0, texts, text))
    if pairs:
        assert pair_lengths is not None, "pairs need the lengths of their captions"
        begin = starts(begin_pairs, pairs, pair)
        parts.append(torch.stack([begin, begin + pair_lengths + image], dim=1).flatten())
    if images:
        parts.append(starts(begin_images, images, image))
    parts.append(torch.full((1,), size, device=device))
    boundaries = torch.cat(parts).to(torch.int32)
    lengths = ((texts, text), (pairs, pair), (images, image))
    longest = max(length for count, length in lengths if count)
    if not pairs and gathered == 1:
        return Sequences(boundaries, longest)

    tokens = layout.segments(torch.arange(size, device=device), gathered)
    of_pairs = torch.cat([tokens["pair_texts"], tokens["pair_images"]], dim=1)
    if pairs:
        assert pair_lengths is not None
        place, used = torch.arange(pair, device=device), pair_lengths.unsqueeze(1)
        padding_last = torch.where(place < used + image, place + caption - used, place - image)
        of_pairs = of_pairs.gather(1, torch.where(place < used, place, padding_last))
    kinds = (tokens["texts"], of_pairs, tokens["images"])
    order = torch.cat([kind.flatten() for kind in kinds])
    places = torch.empty_like(order).scatter_(0, order, torch.arange(size, device=device))
    return Sequences(boundaries, longest, order, places)
