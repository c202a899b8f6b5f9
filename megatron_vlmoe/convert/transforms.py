"""How a tensor of a checkpoint and its counterparts in a Hugging Face export become each other.

Every transform only moves values (and drops or restores rows and biases that are zero by construction), so going there
and back is equal bit for bit. Letters: D width, H heads, K head width, V vocabulary, P patch side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vlmoe.config.schema import ModelConfig
from megatron_vlmoe.stream.sizes import padded_vocab_size

Shape = tuple[int, ...]


class Transform(Protocol):
    """From one tensor here (ours) to one or more there (theirs), and back."""

    def shapes(self, ours: Shape, model: ModelConfig) -> tuple[Shape, ...]:
        """Shapes there of a tensor that has the shape `ours` here."""
        ...

    def split(self, ours: Tensor, model: ModelConfig) -> tuple[Tensor, ...]:
        """The tensors there."""
        ...

    def join(self, theirs: Sequence[Tensor], model: ModelConfig) -> Tensor:
        """The tensor here."""
        ...


@dataclass(frozen=True)
class Same:
    """The same tensor on both sides."""

    def shapes(self, ours: Shape, model: ModelConfig) -> tuple[Shape, ...]:
        """``[...]`` to ``[...]``."""
        return (ours,)

    def split(self, ours: Tensor, model: ModelConfig) -> tuple[Tensor, ...]:
        """As it is."""
        return (ours,)

    def join(self, theirs: Sequence[Tensor], model: ModelConfig) -> Tensor:
        """As it is."""
        return theirs[0]


@dataclass(frozen=True)
class LeadingAxis:
    """A table ``[R, D]`` here is ``[1, R, D]`` there, where models hold it for broadcasting over a batch."""

    def shapes(self, ours: Shape, model: ModelConfig) -> tuple[Shape, ...]:
        """``[R, D]`` to ``[1, R, D]``."""
        return ((1, *ours),)

    def split(self, ours: Tensor, model: ModelConfig) -> tuple[Tensor, ...]:
        """Adds the axis."""
        return (ours.unsqueeze(0),)

    def join(self, theirs: Sequence[Tensor], model: ModelConfig) -> Tensor:
        """Removes the axis."""
        return theirs[0].squeeze(0)


@dataclass(frozen=True)
class PatchConvolution:
    """The patch projection ``[D, 3 P P]`` here is the kernel ``[D, 3, P, P]`` of a convolution there."""

    def shapes(self, ours: Shape, model: ModelConfig) -> tuple[Shape, ...]:
        """``[D, 3 P P]`` to ``[D, 3, P, P]``."""
        return ((ours[0], 3, model.patch_size, model.patch_size),)

    def split(self, ours: Tensor, model: ModelConfig) -> tuple[Tensor, ...]:
        """Unfolds the pixels of a patch, channel first."""
        return (ours.reshape(ours.shape[0], 3, model.patch_size, model.patch_size),)

    def join(self, theirs: Sequence[Tensor], model: ModelConfig) -> Tensor:
        """Folds them."""
        return theirs[0].flatten(1)


@dataclass(frozen=True)
class VocabularyRows:
    """Rows beyond the vocabulary, which only fill it up to a multiple of 128, do not travel; they come back as zero.

    Args:
        field: which vocabulary, `vocab_size` or `visual_vocab_size`.
    """

    field: str

    def shapes(self, ours: Shape, model: ModelConfig) -> tuple[Shape, ...]:
        """``[padded V, ...]`` to ``[V, ...]``."""
        return ((getattr(model, self.field), *ours[1:]),)

    def split(self, ours: Tensor, model: ModelConfig) -> tuple[Tensor, ...]:
        """Trims."""
        return (ours[: getattr(model, self.field)],)

    def join(self, theirs: Sequence[Tensor], model: ModelConfig) -> Tensor:
        """Pads with zeros."""
        (rows,) = theirs
        missing = padded_vocab_size(len(rows)) - len(rows)
        # `pad` counts axes from the last.
        return F.pad(rows, [0, 0] * (rows.dim() - 1) + [0, missing])


@dataclass(frozen=True)
class FusedQkv:
    """megatron-core's fused projection, rows ``[H, (q, k, v), K]``, is three matrices there.

    Args:
        parts: what travels, in the order of the names there. The key's bias is zero by construction and does not.
    """

    parts: tuple[str, ...] = ("q", "k", "v")

    def shapes(self, ours: Shape, model: ModelConfig) -> tuple[Shape, ...]:
        """``[3 D, ...]`` to ``[D, ...]`` each."""
        return ((ours[0] // 3, *ours[1:]),) * len(self.parts)

    def split(self, ours: Tensor, model: ModelConfig) -> tuple[Tensor, ...]:
        """Takes the heads of each part together."""
        heads = model.num_attention_heads
        by_head = ours.reshape(heads, 3, ours.shape[0] // (3 * heads), *ours.shape[1:])
        return tuple(by_head[:, "qkv".index(part)].flatten(0, 1) for part in self.parts)

    def join(self, theirs: Sequence[Tensor], model: ModelConfig) -> Tensor:
        """Interleaves them by head; a part that did not travel is zero."""
        given = dict(zip(self.parts, theirs))
        parts = [given.get(part, torch.zeros_like(theirs[0])) for part in "qkv"]
        heads = model.num_attention_heads
        by_head = [part.reshape(heads, -1, *part.shape[1:]) for part in parts]
        return torch.stack(by_head, dim=1).flatten(0, 2)
