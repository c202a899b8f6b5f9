"""Mixup and CutMix by hand arithmetic; slices of a micro-batch blend like the whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_vlmoe.finetune.mixing import (
    NO_MIX,
    Mix,
    MixBox,
    draw_mix,
    mix_box,
    mix_of_box,
    mixup_cutmix,
    partner_index,
    smooth_targets,
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def batch(count: int = 4, size: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = torch.arange(count, dtype=torch.uint8).mul(50).view(-1, 1, 1, 1)
    return pixels.expand(-1, 3, size, size).clone(), torch.eye(count)


def test_mixup_by_hand() -> None:
    pixels, targets = batch()
    mixed, soft = mixup_cutmix(pixels, targets, Mix(0.75))
    # 0.75 * own + 0.25 * partner of 0, 50, 100, 150 and 150, 100, 50, 0; halves round to even.
    assert mixed.dtype == torch.uint8
    assert mixed[:, 0, 0, 0].tolist() == [38, 62, 88, 112]
    assert mixed.unique().numel() == 4
    assert soft[0].tolist() == [0.75, 0, 0, 0.25] and soft[1].tolist() == [0, 0.75, 0.25, 0]
    mixed, _ = mixup_cutmix(pixels.float(), targets, Mix(0.75))
    assert mixed[:, 2, 3, 4].tolist() == [37.5, 62.5, 87.5, 112.5]
    assert pixels[:, 0, 0, 0].tolist() == [0, 50, 100, 150] and targets[0, 3] == 0


def test_cutmix_by_hand() -> None:
    pixels, targets = batch()
    mix = mix_of_box(MixBox(1, 3, 2, 6), 6)
    assert mix.lam == pytest.approx(28 / 36)
    mixed, soft = mixup_cutmix(pixels, targets, mix)
    expected = torch.zeros(6, 6, dtype=torch.uint8)
    expected[1:3, 2:6] = 150
    assert torch.equal(mixed[0], expected.expand(3, 6, 6))
    assert int((mixed[3] == 0).sum()) == 3 * 8 and int((mixed[3] == 150).sum()) == 3 * 28
    assert soft[0].tolist() == pytest.approx([28 / 36, 0, 0, 8 / 36])
    assert int(pixels[0].max()) == 0


def test_boxes_by_hand() -> None:
    # lambda 0.75: side 10 * 0.5 = 5, half of it 2.
    assert mix_box(10, 0.75, 5, 5) == MixBox(3, 7, 3, 7)
    assert mix_box(10, 0.75, 0, 9) == MixBox(0, 2, 7, 10)
    assert mix_box(10, 0.0, 5, 5) == MixBox(0, 10, 0, 10)
    assert mix_box(10, 1.0, 5, 5) == MixBox(5, 5, 5, 5)
    assert mix_of_box(mix_box(10, 0.75, 0, 9), 10).lam == pytest.approx(0.94)
    assert mix_of_box(mix_box(10, 0.0, 5, 5), 10).lam == 0.0


def test_slices_blend_like_the_whole() -> None:
    pixels, targets = batch(6)
    for mix in (Mix(0.3), mix_of_box(MixBox(0, 4, 1, 5), 6)):
        whole, soft = mixup_cutmix(pixels, targets, mix)
        for own in ([0, 1, 2], [3, 4, 5], [1, 4]):
            partners = [partner_index(i, 6) for i in own]
            part, part_soft = mixup_cutmix(
                pixels[own], targets[own], mix, pixels[partners], targets[partners]
            )
            assert torch.equal(part, whole[own]) and torch.equal(part_soft, soft[own])


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
    pixels, targets = batch(3)
    mixed, soft = mixup_cutmix(pixels, targets, NO_MIX)
    assert torch.equal(mixed, pixels) and torch.equal(soft, targets)


def test_partners_must_fit() -> None:
    pixels, targets = batch()
    with pytest.raises(ValueError, match="go together"):
        mixup_cutmix(pixels, targets, Mix(0.5), pixels)
    with pytest.raises(ValueError, match="do not fit"):
        mixup_cutmix(pixels, targets, Mix(0.5), pixels[:2], targets[:2])


def test_smooth_targets_by_hand() -> None:
    soft = smooth_targets(torch.tensor([2, 0]), 4, 0.2)
    # 0.2 / 4 for each class and 0.8 more for the right one.
    assert torch.allclose(soft, torch.tensor([[0.05, 0.05, 0.85, 0.05], [0.85, 0.05, 0.05, 0.05]]))
    assert smooth_targets(torch.tensor([1]), 3).tolist() == [[0.0, 1.0, 0.0]]
    assert smooth_targets(torch.zeros(0, dtype=torch.long), 3, 0.1).shape == (0, 3)
    for label in (-1, 4):
        with pytest.raises(ValueError, match="of 4 classes"):
            smooth_targets(torch.tensor([0, label]), 4)
