"""Mixup and CutMix by hand arithmetic."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_vlmoe.finetune.data import (
    NO_MIX,
    Mix,
    MixBox,
    draw_mix,
    mix_box,
    mix_of_box,
    mix_pixels,
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def batch(count: int = 4, size: int = 6) -> np.ndarray:
    values = np.arange(count, dtype=np.uint8) * 50
    return np.broadcast_to(values[:, None, None, None], (count, 3, size, size)).copy()


def test_mixup_by_hand() -> None:
    pixels = batch()
    mixed = mix_pixels(pixels, pixels[::-1], Mix(0.75))
    # 0.75 * own + 0.25 * partner of 0, 50, 100, 150 and 150, 100, 50, 0; halves round to even.
    assert mixed.dtype == np.uint8
    assert mixed[:, 0, 0, 0].tolist() == [38, 62, 88, 112]
    assert len(np.unique(mixed)) == 4
    assert pixels[:, 0, 0, 0].tolist() == [0, 50, 100, 150]


def test_cutmix_by_hand() -> None:
    pixels = batch()
    mix = mix_of_box(MixBox(1, 3, 2, 6), 6)
    assert mix.lam == pytest.approx(28 / 36)
    mixed = mix_pixels(pixels, pixels[::-1], mix)
    expected = np.zeros((6, 6), dtype=np.uint8)
    expected[1:3, 2:6] = 150
    assert (mixed[0] == expected).all()
    assert (mixed[3] == 0).sum() == 3 * 8 and (mixed[3] == 150).sum() == 3 * 28
    assert pixels[0].max() == 0


def test_boxes_by_hand() -> None:
    # lambda 0.75: side 10 * 0.5 = 5, half of it 2.
    assert mix_box(10, 0.75, 5, 5) == MixBox(3, 7, 3, 7)
    assert mix_box(10, 0.75, 0, 9) == MixBox(0, 2, 7, 10)
    assert mix_box(10, 0.0, 5, 5) == MixBox(0, 10, 0, 10)
    assert mix_box(10, 1.0, 5, 5) == MixBox(5, 5, 5, 5)
    assert mix_of_box(mix_box(10, 0.75, 0, 9), 10).lam == pytest.approx(0.94)
    assert mix_of_box(mix_box(10, 0.0, 5, 5), 10).lam == 0.0


def test_draws_follow_their_probabilities() -> None:
    draws = [draw_mix(rng(seed), 32, 0.8, 1.0, switch_prob=0.3, prob=0.6) for seed in range(2000)]
    mixed = [mix for mix in draws if mix != NO_MIX]
    assert len(mixed) / 2000 == pytest.approx(0.6, abs=0.03)
    cut = [mix for mix in mixed if mix.box is not None]
    assert len(cut) / len(mixed) == pytest.approx(0.3, abs=0.04)
    weights = np.asarray([mix.lam for mix in mixed if mix.box is None])
    # Beta(a, a) has mean 1/2 and variance 1 / (4 (2 a + 1)).
    assert weights.mean() == pytest.approx(0.5, abs=0.03)
    assert weights.var() == pytest.approx(1 / (4 * 2.6), abs=0.01)
    for mix in cut:
        assert mix == mix_of_box(mix.box, 32)
        assert 0 <= mix.box.top <= mix.box.bottom <= 32 and 0 <= mix.box.left <= mix.box.right <= 32


def test_either_can_be_switched_off() -> None:
    only_mixup = [draw_mix(rng(seed), 8, 0.8, 0.0, switch_prob=1.0) for seed in range(50)]
    assert all(mix.box is None and mix.lam < 1.0 for mix in only_mixup)
    only_cutmix = [draw_mix(rng(seed), 8, 0.0, 1.0, switch_prob=0.0) for seed in range(50)]
    assert all(mix.box is not None for mix in only_cutmix)
    assert draw_mix(rng(), 8, 0.0, 0.0) == NO_MIX
    assert draw_mix(rng(3), 8) == draw_mix(rng(3), 8)


def test_no_mix_changes_nothing() -> None:
    pixels = batch(3)
    assert np.array_equal(mix_pixels(pixels, pixels[::-1], NO_MIX), pixels)
