"""Numbers of one tensor and of a pair of tensors, in fp64 and piece by piece: no copy of a whole tensor is made."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Optional

import numpy as np
import torch
from torch import Tensor

# Elements that are in fp64 at a time (32 MiB).
PIECE = 1 << 22


@dataclass(frozen=True)
class Measure:
    """What one pass over the values of one or several tensors finds: sum of squares and largest of the finite ones.

    `first` is the place of the first value that is NaN or infinite; None if all are finite.
    """

    numel: int = 0
    square_sum: float = 0.0
    largest: float = 0.0
    nans: int = 0
    infinities: int = 0
    first: Optional[tuple[int, ...]] = None

    def __add__(self, other: Measure) -> Measure:
        return Measure(
            self.numel + other.numel,
            self.square_sum + other.square_sum,
            max(self.largest, other.largest),
            self.nans + other.nans,
            self.infinities + other.infinities,
            self.first if self.first is not None else other.first,
        )

    @property
    def rms(self) -> float:
        """Root mean square of the finite values; 0 if there is none."""
        count = self.numel - self.nans - self.infinities
        return math.sqrt(self.square_sum / count) if count else 0.0


def measure(tensor: Tensor) -> Measure:
    """Counts and sums of a tensor of any shape."""
    total, start = Measure(), 0
    for piece in _pieces(tensor):
        finite = torch.isfinite(piece)
        first = None
        nans = infinities = 0
        if not bool(finite.all()):
            nans = int(torch.isnan(piece).sum())
            infinities = int((~finite).sum()) - nans
            place = start + int((~finite).to(torch.uint8).argmax())
            first = tuple(int(index) for index in np.unravel_index(place, tensor.shape))
            piece = piece[finite]
        largest = float(piece.abs().max()) if piece.numel() else 0.0
        square_sum = float(piece.dot(piece))
        total += Measure(len(finite), square_sum, largest, nans, infinities, first)
        start += len(finite)
    return total


@dataclass(frozen=True)
class Distance:
    """How far two tensors, or two groups of tensors, are apart.

    Args:
        numel: number of values of either.
        different: values that are not equal (two NaNs are).
        not_finite: of these, those that are no number or infinite on one side or both.
        largest: largest absolute difference of the other values.
        square_sum: of the differences of the values that are finite on both sides.
        left_square_sum: of these values on the left, as `right_square_sum` on the right.
        product: sum of the products of left and right.
    """

    numel: int = 0
    different: int = 0
    not_finite: int = 0
    largest: float = 0.0
    square_sum: float = 0.0
    left_square_sum: float = 0.0
    right_square_sum: float = 0.0
    product: float = 0.0

    def __add__(self, other: Distance) -> Distance:
        ours, theirs = asdict(self), asdict(other)
        sums = {name: value + theirs[name] for name, value in ours.items()}
        return Distance(**sums | {"largest": max(self.largest, other.largest)})

    @property
    def equal(self) -> bool:
        """Whether every value is the same."""
        return self.different == 0

    @property
    def relative(self) -> float:
        """``|A - B| / max(|A|, |B|)`` in Euclidean norms: 0 if equal, at most 2."""
        scale = max(self.left_square_sum, self.right_square_sum)
        return math.sqrt(self.square_sum / scale) if scale else 0.0

    @property
    def cosine(self) -> float:
        """``A . B / (|A| |B|)``; of zeros 1 with zeros and 0 with anything else."""
        if not self.left_square_sum or not self.right_square_sum:
            return float(self.left_square_sum == self.right_square_sum)
        return self.product / math.sqrt(self.left_square_sum) / math.sqrt(self.right_square_sum)


def distance(left: Tensor, right: Tensor) -> Distance:
    """Compares two tensors of one shape, whatever their types."""
    total = Distance()
    for a, b in zip(_pieces(left), _pieces(right), strict=True):
        differs = (a != b) & ~(a.isnan() & b.isnan())
        finite = a.isfinite() & b.isfinite()
        numel, different, not_finite = len(a), int(differs.sum()), int((differs & ~finite).sum())
        if not bool(finite.all()):
            a, b = a[finite], b[finite]
        gap = a - b
        total += Distance(
            numel,
            different,
            not_finite,
            float(gap.abs().max()) if gap.numel() else 0.0,
            float(gap.dot(gap)),
            float(a.dot(a)),
            float(b.dot(b)),
            float(a.dot(b)),
        )
    return total


def row_norms(tensor: Tensor) -> list[float]:
    """Euclidean norm of every entry of the first axis: of an expert's matrix, or of a router's row."""
    return [math.sqrt(measure(row).square_sum) for row in tensor]


def mean_cosine(tensor: Tensor) -> Optional[float]:
    """Mean cosine over all pairs of different entries of the first axis; None if there is no pair of non-zero ones.

    Of E unit vectors u the sum over pairs of ``u_i . u_j`` is ``|sum of u|^2 - E``, so one sum is enough.
    """
    norms = torch.tensor(row_norms(tensor), dtype=torch.float64)
    count = int((norms > 0.0).sum())
    if count < 2:
        return None
    scales = torch.where(norms > 0.0, 1.0 / norms, 0.0)
    square_sum = 0.0
    for piece in tensor.detach().flatten(1).split(max(PIECE // len(norms), 1), dim=1):
        total = scales @ piece.double()
        square_sum += float(total.dot(total))
    return (square_sum - count) / (count * (count - 1))


def row_digests(tensor: Tensor) -> list[bytes]:
    """Fingerprint of the bits of every entry of the first axis."""
    rows = (row.contiguous().reshape(-1).view(torch.uint8).numpy() for row in tensor)
    return [hashlib.blake2b(memoryview(row), digest_size=16).digest() for row in rows]


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The values in order, in fp64."""
    for piece in tensor.detach().reshape(-1).split(PIECE):
        yield piece.double()
