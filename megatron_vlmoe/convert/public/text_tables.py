"""BERT's text embedding as two tables that are added, which is all that our text embedding does.

BERT embeds token v at position i as ``f(v, i) = LayerNorm(word[v] + type[0] + position[i])``. Without positions (a
model with relative ones) f depends on the token alone, and its values are a word table exactly. With positions no two
tables add up to f. The best ones in the mean square over all tokens and positions are f's means over positions and
the deviations of its means over tokens (two-way analysis of variance); what they miss is measured.

Letters: V tokens, L positions, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

# Of BERT's embedding; the blocks have another.
EPSILON = 1e-12
CHUNK = 256


@dataclass(frozen=True)
class TextTables:
    """Tables whose sum stands for BERT's embedding.

    Args:
        words: ``[V, D]``.
        positions: ``[L, D]``; None where the model adds none.
        residual: what the sum misses, as the root mean square relative to that of the embedding.
    """

    words: Tensor
    positions: Optional[Tensor]
    residual: float


def additive_tables(
    words: Tensor, token_type: Tensor, positions: Optional[Tensor], weight: Tensor, bias: Tensor
) -> TextTables:
    """The tables of an embedding.

    Args:
        words: ``[V, D]``.
        token_type: ``[D]``, the row that every token gets.
        positions: ``[L, D]``; None where they are not added.
        weight: ``[D]``, of the LayerNorm.
        bias: ``[D]``, of the LayerNorm.
    """

    def normalized(values: Tensor) -> Tensor:
        return F.layer_norm(values, weight.shape, weight, bias, EPSILON)

    if positions is None:
        return TextTables(normalized(words + token_type), None, 0.0)
    count, length = len(words), len(positions)
    means = torch.empty_like(words)
    sums = torch.zeros(positions.shape, dtype=torch.float64)
    square = 0.0
    for first in range(0, count, CHUNK):
        chunk = words[first : first + CHUNK] + token_type
        values = normalized(chunk.unsqueeze(1) + positions)
        means[first : first + CHUNK] = values.mean(dim=1)
        sums += values.sum(dim=0, dtype=torch.float64)
        square += float(values.square().sum(dtype=torch.float64))
    deviations = sums / count - means.mean(dim=0, dtype=torch.float64)
    # The two parts are orthogonal, so their squares add up.
    kept = length * float(means.square().sum(dtype=torch.float64))
    kept += count * float(deviations.square().sum())
    residual = math.sqrt(max(square - kept, 0.0) / square)
    return TextTables(means, deviations.to(words.dtype), residual)
