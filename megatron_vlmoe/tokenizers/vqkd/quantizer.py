"""Vector quantiser of VQ-KD: a codebook on the unit sphere, learned by moving averages.

Letters: T vectors to quantise, K codes, C code dimensions. Formulas: BEiT v2 (arXiv 2208.06366)
section 2.1 and the EMA quantiser of its repository.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

KMEANS_ITERATIONS = 10
# Rows per block of the [T, K] similarity matrix: 8192 codes x 8192 rows of fp32 are 256 MiB.
SEARCH_ROWS = 8192


class Quantized(NamedTuple):
    """Result of one quantisation of `[..., C]` vectors."""

    vectors: Tensor
    """`[..., C]` codes of unit length, with the gradient passed straight to the input."""
    codes: Tensor
    """`[...]` int64 code numbers."""
    commitment: Tensor
    """beta * mean((code - z)^2) over all elements, a scalar."""


def nearest_codes(unit_TC: Tensor, codebook_KC: Tensor) -> Tensor:
    """Number `[T]` of the code with the largest cosine; ties go to the lower number."""
    blocks = [torch.argmax(rows @ codebook_KC.t(), dim=1) for rows in unit_TC.split(SEARCH_ROWS)]
    return torch.cat(blocks) if blocks else unit_TC.new_zeros(0, dtype=torch.int64)


def sum_by_code(unit_TC: Tensor, codes_T: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Counts `[K]` and sums `[K, C]` of the vectors of each code, as fp32."""
    counts = torch.bincount(codes_T, minlength=num_codes).to(unit_TC.dtype)
    sums = unit_TC.new_zeros(num_codes, unit_TC.shape[1]).index_add_(0, codes_T, unit_TC)
    return counts, sums


def spherical_kmeans(
    unit_TC: Tensor, num_codes: int, generator: torch.Generator, iterations: int = KMEANS_ITERATIONS
) -> tuple[Tensor, Tensor]:
    """Cosine k-means from randomly chosen vectors: centres `[K, C]` (unit length), counts `[K]`.

    Centres are drawn without replacement, or with it where there are fewer vectors than codes; an
    empty cluster keeps its centre. `generator` is a CPU generator.
    """
    total = unit_TC.shape[0]
    if total >= num_codes:
        chosen = torch.randperm(total, generator=generator)[:num_codes]
    else:
        chosen = torch.randint(total, (num_codes,), generator=generator)
    centres = unit_TC[chosen.to(unit_TC.device)]
    counts = unit_TC.new_zeros(num_codes)
    for _ in range(iterations):
        counts, sums = sum_by_code(unit_TC, nearest_codes(unit_TC, centres), num_codes)
        centres = torch.where(counts[:, None] > 0, F.normalize(sums, dim=1), centres)
    return centres, counts


def is_distributed() -> bool:
    """Whether statistics have to be shared with other processes."""
    return distributed.is_available() and distributed.is_initialized()


def gather_rows(rows: Tensor) -> Tensor:
    """Rows of all ranks in rank order; every rank must hold the same number."""
    if not is_distributed():
        return rows
    parts = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


class Quantizer(nn.Module):
    """Nearest code by cosine with a straight-through gradient; the codebook is not trained by SGD.

    In training mode each call moves the codebook: the codes' batch means (over all ranks) are
    l2-normalised, averaged into the codebook with `decay` and normalised again; codes without a
    vector keep their place. The first training call places the codes by spherical k-means. With
    `restart_threshold` > 0, codes whose average use falls below that share of T/K are moved onto
    random vectors of the batch.
    """

    codebook: Tensor
    usage: Tensor
    updates: Tensor

    def __init__(
        self,
        num_codes: int,
        code_dim: int,
        *,
        commitment: float = 1.0,
        decay: float = 0.99,
        restart_threshold: float = 0.0,
    ) -> None:
        super().__init__()
        self.commitment = commitment
        self.decay = decay
        self.restart_threshold = restart_threshold
        self.register_buffer("codebook", torch.zeros(num_codes, code_dim))
        # Moving average of the vectors that a code receives per training batch.
        self.register_buffer("usage", torch.zeros(num_codes))
        # Training calls so far, the k-means placement counted as the first.
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @property
    def num_codes(self) -> int:
        """Codebook entries K."""
        return self.codebook.shape[0]

    def forward(self, z: Tensor) -> Quantized:
        """Quantise `[..., C]` (any length; normalised here). Computed in fp32."""
        unit = F.normalize(z.float(), dim=-1)
        rows = unit.detach().reshape(-1, unit.shape[-1])
        if self.training:
            self.initialize(rows)
        codes = nearest_codes(rows, self.codebook)
        vectors = self.codebook[codes].view_as(unit)
        if self.training:
            self.update(rows, codes)
        loss = self.commitment * F.mse_loss(unit, vectors)
        straight_through = unit + (vectors - unit).detach()
        return Quantized(straight_through, codes.view(unit.shape[:-1]), loss)

    @torch.no_grad()
    def initialize(self, unit_TC: Tensor) -> None:
        """Place the codes by k-means over the vectors of all ranks; later calls do nothing."""
        if self.updates > 0:
            return
        centres, counts = spherical_kmeans(gather_rows(unit_TC), self.num_codes, self._generator())
        if is_distributed():  # all ranks computed the same; this makes it bit-equal
            distributed.broadcast(centres, 0)
            distributed.broadcast(counts, 0)
        self.codebook.copy_(centres)
        self.usage.copy_(counts)
        self.updates += 1

    @torch.no_grad()
    def update(self, unit_TC: Tensor, codes_T: Tensor) -> None:
        """One moving-average step of codebook and usage from the vectors of all ranks."""
        counts, sums = sum_by_code(unit_TC, codes_T, self.num_codes)
        if is_distributed():
            distributed.all_reduce(counts)
            distributed.all_reduce(sums)
        means = torch.where(counts[:, None] > 0, F.normalize(sums, dim=1), self.codebook)
        self.codebook.lerp_(means, 1.0 - self.decay)
        self.codebook.copy_(F.normalize(self.codebook, dim=1))
        self.usage.lerp_(counts, 1.0 - self.decay)
        if self.restart_threshold > 0:
            self._restart_dead_codes(unit_TC, counts.sum() / self.num_codes)
        self.updates += 1

    def _restart_dead_codes(self, unit_TC: Tensor, uniform_share: Tensor) -> None:
        dead = torch.nonzero(self.usage < self.restart_threshold * uniform_share).flatten()
        if dead.numel() == 0:
            return
        vectors = gather_rows(unit_TC)
        chosen = torch.randint(vectors.shape[0], (dead.numel(),), generator=self._generator())
        self.codebook[dead] = vectors[chosen.to(vectors.device)]
        # A moved code starts as an average one: it has time to find vectors before it is judged.
        self.usage[dead] = uniform_share

    def _generator(self) -> torch.Generator:
        """Equal on every rank and after a resume: seeded by the number of the training call."""
        return torch.Generator().manual_seed(1 + int(self.updates))
