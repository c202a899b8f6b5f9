"""Which patches and tokens a model must predict: block-wise image masks and BERT token masks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_vlmoe.tokenizers.text import TextTokenizer

IGNORED_LABEL = -100
"""Label of a position that is not predicted."""


@dataclass(frozen=True)
class Vocabulary:
    """What masking needs of a text tokenizer, without its model."""

    size: int
    mask_id: int
    special_ids: frozenset[int]
    """Neither predicted nor drawn as a replacement."""

    @classmethod
    def of(cls, tokenizer: TextTokenizer) -> Vocabulary:
        """That of a tokenizer."""
        return cls(tokenizer.size, tokenizer.mask_id, tokenizer.special_ids)


def blockwise_mask(
    height: int, width: int, num_masked: int, rng: np.random.Generator, *, min_block: int = 16
) -> npt.NDArray[np.bool_]:
    """Block-wise mask with exactly ``num_masked`` cells.

    Rectangles are drawn as in BEiT (arXiv 2106.08254, algorithm 1): area between ``min_block`` and
    what is still missing, log-uniform aspect ratio in 0.3 .. 1/0.3, until the mask is full or no
    rectangle fits. Cells that are then still missing are drawn one by one, as in BEiT v2, which
    keeps shapes static. A ``min_block`` above ``num_masked`` counts as ``num_masked``.

    Returns:
        bool ``[height, width]``, True where masked.

    Raises:
        ValueError: ``num_masked`` is not in 0..height*width, or ``min_block`` is below 1.
    """
    if not 0 <= num_masked <= height * width:
        raise ValueError(f"num_masked={num_masked} is not in 0..{height * width}")
    if min_block < 1:
        raise ValueError(f"min_block={min_block} is below 1")
    mask = np.zeros((height, width), dtype=np.bool_)
    smallest = min(min_block, num_masked)
    missing = num_masked
    while missing > 0:
        added = _mask_block(mask, smallest, missing, rng)
        if added == 0:
            break
        missing -= added
    if missing > 0:
        free = np.flatnonzero(~mask)
        mask.flat[rng.choice(free, size=missing, replace=False, shuffle=False)] = True
    return mask


def _mask_block(
    mask: npt.NDArray[np.bool_], smallest: int, missing: int, rng: np.random.Generator
) -> int:
    """Masks one rectangle with 1..missing new cells; returns how many, 0 if no attempt fits."""
    height, width = mask.shape
    # A block of full height or width is refused, as in BEiT, unless there is no smaller one.
    tallest, widest = max(1, height - 1), max(1, width - 1)
    log_aspect = -math.log(0.3)
    for draw in rng.random((10, 4)).tolist():
        area = smallest + draw[0] * (missing - smallest)
        aspect = math.exp((2.0 * draw[1] - 1.0) * log_aspect)
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (1 <= h <= tallest and 1 <= w <= widest):
            continue
        top, left = int(draw[2] * (height - h + 1)), int(draw[3] * (width - w + 1))
        block = mask[top : top + h, left : left + w]
        new = h * w - int(np.count_nonzero(block))
        if 0 < new <= missing:
            block[:] = True
            return new
    return 0


def natural_mask_count(num_maskable: int, fraction: float) -> int:
    """Tokens to predict of ``num_maskable``: the rounded share, at least 1 if there are any."""
    return min(num_maskable, max(1, math.floor(num_maskable * fraction + 0.5)))


def maskable_positions(ids: npt.ArrayLike, vocab: Vocabulary) -> npt.NDArray[np.int64]:
    """Ascending positions of the ids ``[L]`` that are not special."""
    return np.flatnonzero(~np.isin(ids, list(vocab.special_ids)))


def mask_tokens(
    ids: npt.ArrayLike,
    fraction: float,
    vocab: Vocabulary,
    rng: np.random.Generator,
    num_masked: int | None = None,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Chooses tokens to predict and hides them (BERT, arXiv 1810.04805, section 3.1).

    Of the chosen tokens each becomes [MASK] with probability 0.8, a random id that is not special
    with 0.1, and stays with 0.1. Special ids are never chosen.

    Args:
        ids: ``[L]`` integers.
        fraction: share of the n tokens that are not special to choose: n * fraction rounded,
            at least 1, none if n = 0.
        vocab: gives ``size``, ``mask_id`` and ``special_ids``.
        rng: source of the draws.
        num_masked: chooses this many instead (all n if there are fewer).

    Returns:
        inputs int64 ``[L]``, and labels int64 ``[L]``: the original id where chosen, else -100.

    Raises:
        ValueError: ids are not 1-D, ``fraction`` is not in 0..1, or ``num_masked`` is negative.
    """
    inputs = np.array(ids, dtype=np.int64)
    if inputs.ndim != 1:
        raise ValueError(f"ids have shape {inputs.shape}, not [L]")
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction={fraction} is not in 0..1")
    if num_masked is not None and num_masked < 0:
        raise ValueError(f"num_masked={num_masked} is negative")
    labels = np.full(inputs.shape, IGNORED_LABEL, dtype=np.int64)
    candidates = maskable_positions(inputs, vocab)
    if num_masked is None:
        count = natural_mask_count(len(candidates), fraction)
    else:
        count = min(len(candidates), num_masked)
    if count == 0:
        return inputs, labels
    chosen = rng.choice(candidates, size=count, replace=False, shuffle=False)
    labels[chosen] = inputs[chosen]
    specials = sorted(i for i in vocab.special_ids if 0 <= i < vocab.size)
    action = rng.random(count)
    # A number among the ordinary ids becomes an id by stepping over the specials in order.
    random_ids = (rng.random(count) * (vocab.size - len(specials))).astype(np.int64)
    for special_id in specials:
        random_ids += random_ids >= special_id
    kept_or_random = np.where(action < 0.9, random_ids, labels[chosen])
    inputs[chosen] = np.where(action < 0.8, vocab.mask_id, kept_or_random)
    return inputs, labels
