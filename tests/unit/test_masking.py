"""Masks: exact counts, block structure, and BERT's 80/10/10 rule."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest

from megatron_vlmoe.data.masking import blockwise_mask, mask_tokens


@dataclass(frozen=True)
class Vocabulary:
    size: int = 40
    mask_id: int = 4
    special_ids: frozenset[int] = frozenset({0, 1, 4, 17, 39})


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize(
    "height,width",
    [(1, 1), (1, 7), (7, 1), (2, 2), (3, 5), (5, 3), (4, 4), (8, 8), (14, 14)],
)
def test_blockwise_mask_has_exactly_the_count(height: int, width: int) -> None:
    for num_masked in range(height * width + 1):
        for seed in range(5):
            mask = blockwise_mask(height, width, num_masked, rng(seed))
            assert mask.dtype == np.bool_ and mask.shape == (height, width)
            assert mask.sum() == num_masked


@pytest.mark.parametrize("num_masked", [-1, 197, 1000])
def test_blockwise_mask_refuses_impossible_counts(num_masked: int) -> None:
    with pytest.raises(ValueError, match=rf"={num_masked} .*0\.\.196"):
        blockwise_mask(14, 14, num_masked, rng())


def test_blockwise_mask_is_a_function_of_the_generator() -> None:
    first, second = (blockwise_mask(14, 14, 78, rng(3)) for _ in range(2))
    assert np.array_equal(first, second)
    assert len({blockwise_mask(14, 14, 78, rng(seed)).tobytes() for seed in range(200)}) == 200


def test_mask_tokens_is_a_function_of_the_generator() -> None:
    first, second = (mask_tokens(np.arange(5, 39), 0.3, Vocabulary(), rng(3)) for _ in range(2))
    assert all((a == b).all() for a, b in zip(first, second))


def neighbours_share(mask: np.ndarray) -> float:
    """Share of horizontally adjacent cells that are both masked, of those with the left masked."""
    return (mask[:, :-1] & mask[:, 1:]).sum() / mask[:, :-1].sum()


def test_blockwise_mask_is_made_of_blocks() -> None:
    blocks = np.mean([neighbours_share(blockwise_mask(14, 14, 78, rng(i))) for i in range(100)])
    scattered = []
    for i in range(100):
        flat = np.zeros(196, dtype=bool)
        flat[rng(i).choice(196, 78, replace=False)] = True
        scattered.append(neighbours_share(flat.reshape(14, 14)))
    assert np.mean(scattered) == pytest.approx(78 / 196, abs=0.03)
    assert blocks > 0.75


def test_blockwise_mask_reaches_every_cell() -> None:
    counts = sum(blockwise_mask(14, 14, 78, rng(i)).astype(int) for i in range(300))
    # A corner is covered only by blocks that lie exactly in it.
    assert counts.min() > 2


def test_min_block_sets_the_smallest_block() -> None:
    def share(min_block: int) -> float:
        masks = [blockwise_mask(14, 14, 60, rng(i), min_block=min_block) for i in range(60)]
        return float(np.mean([neighbours_share(mask) for mask in masks]))

    assert share(60) > share(1) + 0.03


@pytest.mark.parametrize(
    "length,fraction,expected",
    [(126, 0.15, 19), (10, 0.5, 5), (3, 0.5, 2), (1, 0.15, 1), (2, 1.0, 2), (0, 0.5, 0)],
)
def test_mask_tokens_count(length: int, fraction: float, expected: int) -> None:
    ids = np.concatenate([[0], np.full(length, 7), [1]])
    _, labels = mask_tokens(ids, fraction, Vocabulary(), rng())
    assert (labels != -100).sum() == expected


@pytest.mark.parametrize("fraction", [0.0, 0.15, 0.25, 0.5, 1.0])
def test_special_tokens_do_not_count(fraction: float) -> None:
    for n in (0, 1, 2, 3, 6, 10, 18, 126):
        # At both ends and in the middle.
        ids = np.array([0, *([7] * (n // 2)), 1, *([8] * (n - n // 2)), 1])
        _, labels = mask_tokens(ids, fraction, Vocabulary(), rng(n))
        expected = min(n, max(1, math.floor(n * fraction + 0.5))) if n else 0
        assert (labels != -100).sum() == expected, (n, fraction)


def test_mask_tokens_fixed_count_is_clamped() -> None:
    ids = np.array([0, 5, 6, 7, 1])
    for wanted, expected in [(0, 0), (2, 2), (3, 3), (9, 3)]:
        _, labels = mask_tokens(ids, 0.15, Vocabulary(), rng(), num_masked=wanted)
        assert (labels != -100).sum() == expected


@pytest.mark.parametrize("fraction,num_masked", [(-0.1, None), (1.1, None), (0.5, -1)])
def test_mask_tokens_refuses_bad_arguments(fraction: float, num_masked: int | None) -> None:
    with pytest.raises(ValueError):
        mask_tokens([5, 6], fraction, Vocabulary(), rng(), num_masked)


def test_mask_tokens_refuses_a_matrix() -> None:
    with pytest.raises(ValueError, match=r"\[L\]"):
        mask_tokens(np.zeros((2, 2), dtype=int), 0.5, Vocabulary(), rng())


def test_specials_are_never_chosen_and_the_rest_is_untouched() -> None:
    vocab = Vocabulary()
    ids = rng(1).integers(0, vocab.size, 500)
    original = ids.copy()
    inputs, labels = mask_tokens(ids, 0.5, vocab, rng(2))
    assert np.array_equal(ids, original)
    assert inputs.dtype == labels.dtype == np.int64
    special = np.isin(ids, list(vocab.special_ids))
    assert (labels[special] == -100).all()
    chosen = labels != -100
    assert np.array_equal(labels[chosen], ids[chosen])
    assert np.array_equal(inputs[~chosen], ids[~chosen])
    replaced = chosen & (inputs != ids) & (inputs != vocab.mask_id)
    assert not np.isin(inputs[replaced], list(vocab.special_ids)).any()
    assert (inputs >= 0).all() and (inputs < vocab.size).all()


def test_replacement_frequencies() -> None:
    vocab = Vocabulary()
    ids = np.full(40_000, 20)
    inputs, _ = mask_tokens(ids, 1.0, vocab, rng(5))
    masked, kept = (inputs == vocab.mask_id).mean(), (inputs == 20).mean()
    # Five standard errors of a share of 40 000 draws are at most 0.01.
    assert masked == pytest.approx(0.8, abs=0.01)
    # One of the 35 ordinary ids is the original itself.
    assert kept == pytest.approx(0.1 + 0.1 / 35, abs=0.0076)
    random_ids = inputs[(inputs != vocab.mask_id) & (inputs != 20)]
    assert set(random_ids) == set(range(40)) - vocab.special_ids - {20}
    counts = np.bincount(random_ids, minlength=40)[sorted(set(random_ids))]
    assert counts.min() > 60 and counts.max() < 180  # expected 114 each, sigma 10.7


def test_choice_is_uniform_over_positions() -> None:
    ids = np.concatenate([[0], np.full(10, 9), [1, 1]])
    chosen = np.zeros(len(ids))
    for seed in range(1000):
        chosen += mask_tokens(ids, 0.3, Vocabulary(), rng(seed))[1] != -100
    assert chosen[[0, 11, 12]].sum() == 0
    assert chosen.sum() == 3000
    assert chosen[1:11].min() > 225 and chosen[1:11].max() < 375  # expected 300, sigma 14.5
