"""Masks of patches and tokens: exact counts, what is never chosen, and the 80/10/10 shares."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from megatron_vlmoe.data.masking import blockwise_mask, mask_tokens


@dataclass(frozen=True)
class Vocabulary:
    size: int = 50
    mask_id: int = 4
    special_ids: tuple[int, ...] = (0, 1, 2, 3, 4)


VOCABULARY = Vocabulary()


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("height, width", [(1, 1), (1, 7), (4, 4), (5, 3), (14, 14)])
def test_every_possible_count_is_exact(height: int, width: int) -> None:
    for count in range(height * width + 1):
        mask = blockwise_mask(height, width, count, generator(count))
        assert mask.shape == (height, width) and mask.dtype == np.bool_
        assert int(mask.sum()) == count


@pytest.mark.parametrize("count", [-1, 17, 1000])
def test_impossible_counts_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=str(abs(count))):
        blockwise_mask(4, 4, count, generator())


def neighbours(mask: Any) -> int:
    return int((mask[1:] & mask[:-1]).sum() + (mask[:, 1:] & mask[:, :-1]).sum())


def test_patches_are_masked_in_blocks_everywhere() -> None:
    masks = [blockwise_mask(14, 14, 78, generator(seed)) for seed in range(200)]
    # 364 neighbouring pairs; independent masks have (78 * 77) / (196 * 195) of them both masked: 57.
    assert np.mean([neighbours(mask) for mask in masks]) > 80
    share = np.mean(masks, axis=0)
    # Blocks lie inside the image, so corners are masked least.
    assert share.min() > 0, "a patch is never masked"
    assert len({mask.tobytes() for mask in masks}) == 200


def test_masks_are_functions_of_the_generator() -> None:
    ids = np.arange(5, 45)
    assert (blockwise_mask(8, 8, 20, generator(3)) == blockwise_mask(8, 8, 20, generator(3))).all()
    first = mask_tokens(ids, 0.3, VOCABULARY, generator(3))
    second = mask_tokens(ids, 0.3, VOCABULARY, generator(3))
    assert all((a == b).all() for a, b in zip(first, second))


def masked_count(labels: Any) -> int:
    return int((labels != -100).sum())


@pytest.mark.parametrize("fraction", [0.0, 0.15, 0.25, 0.5, 1.0])
def test_number_of_masked_tokens(fraction: float) -> None:
    for n in (0, 1, 2, 3, 6, 10, 18, 126):
        # Special tokens at both ends and in the middle are not counted.
        ids = np.array([0, *([7] * (n // 2)), 1, *([8] * (n - n // 2)), 1])
        _, labels = mask_tokens(ids, fraction, VOCABULARY, generator(n))
        expected = min(n, max(1, math.floor(n * fraction + 0.5))) if n else 0
        assert masked_count(labels) == expected, (n, fraction)


def test_number_of_masked_tokens_can_be_given() -> None:
    ids = np.arange(5, 25)
    for count in (1, 7, 20):
        _, labels = mask_tokens(ids, 0.15, VOCABULARY, generator(), num_masked=count)
        assert masked_count(labels) == count


def test_inputs_and_labels() -> None:
    rng = generator(1)
    for _ in range(50):
        ids = rng.integers(0, VOCABULARY.size, 60)
        original = ids.copy()
        inputs, labels = mask_tokens(ids, 0.5, VOCABULARY, rng)
        assert (ids == original).all(), "the caller's tokens were changed"
        assert inputs.shape == labels.shape == ids.shape
        chosen = labels != -100
        assert (labels[chosen] == ids[chosen]).all()
        assert (inputs[~chosen] == ids[~chosen]).all()
        assert not np.isin(ids[chosen], VOCABULARY.special_ids).any()
        replaced = chosen & (inputs != ids) & (inputs != VOCABULARY.mask_id)
        assert not np.isin(inputs[replaced], VOCABULARY.special_ids).any()
        assert (inputs >= 0).all() and (inputs < VOCABULARY.size).all()


def test_80_10_10() -> None:
    rng = generator(2)
    masked = kept = drawn = 0
    seen = set()
    for _ in range(400):
        ids = np.full(100, 9)
        inputs, labels = mask_tokens(ids, 0.5, VOCABULARY, rng)
        chosen = inputs[labels != -100]
        masked += int((chosen == VOCABULARY.mask_id).sum())
        kept += int((chosen == 9).sum())
        other = chosen[(chosen != VOCABULARY.mask_id) & (chosen != 9)]
        drawn += len(other)
        seen.update(other.tolist())
    total = masked + kept + drawn
    assert total == 400 * 50
    # Standard deviations are under 0.003; a draw may hit the original id (1 in 45 of a tenth).
    assert masked / total == pytest.approx(0.8, abs=0.012)
    assert kept / total == pytest.approx(0.1 + 0.1 / 45, abs=0.012)
    assert drawn / total == pytest.approx(0.1, abs=0.012)
    # Every ordinary token is drawn now and then, the first and the last included.
    assert seen == set(range(5, VOCABULARY.size)) - {9}


def test_every_position_is_chosen_equally_often() -> None:
    rng = generator(5)
    ids = np.arange(5, 25)
    chosen = sum(
        (mask_tokens(ids, 0.3, VOCABULARY, rng)[1] != -100).astype(int) for _ in range(2000)
    )
    assert chosen.min() > 500 and chosen.max() < 700
