"""Losses of the downstream tasks against direct readings of their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_vlmoe.losses.contrastive import (
    CachedGradients,
    contrastive_loss,
    first_is_right,
)
from megatron_vlmoe.losses.tasks import (
    class_loss,
    hard_negatives,
    matching_loss,
    soft_target_loss,
)


def test_soft_targets_by_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    # Class 0 among the answers, first and not, and a question with none.
    answers = torch.tensor([[0, 3, -1], [2, 0, -1], [4, -1, -1], [-1, -1, -1]])
    scores = torch.tensor([[1.0, 0.3, 0.0], [0.6, 0.9, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    total = 0.0
    for row in range(4):
        targets = {int(a): float(s) for a, s in zip(answers[row], scores[row]) if a >= 0}
        for number in range(5):
            p = 1.0 / (1.0 + math.exp(-float(logits[row, number])))
            t = targets.get(number, 0.0)
            total -= t * math.log(p) + (1.0 - t) * math.log(1.0 - p)
    assert float(soft_target_loss(logits, answers, scores)) == pytest.approx(total / 4, rel=1e-6)


def test_class_loss_by_hand() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.125, 0.75]]))
    labels = torch.tensor([0, 2])
    assert float(class_loss(logits, labels)) == pytest.approx(-(math.log(0.5 * 0.75)) / 2)
    # A third of 0.3 goes to every class.
    smooth = -(0.8 * math.log(0.5) + 0.2 * math.log(0.25))
    assert float(class_loss(logits[:1], labels[:1], 0.3)) == pytest.approx(smooth)
    mixed = class_loss(logits, labels, 0.0, labels.flip(0), torch.tensor([0.75, 0.75]))
    own, other = math.log(0.5) + math.log(0.75), math.log(0.25) + math.log(0.125)
    assert float(mixed) == pytest.approx(-(0.75 * own + 0.25 * other) / 2)


def unit(rows: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(values, dim=1)


def test_contrastive_loss_by_a_loop_and_over_parts() -> None:
    images, texts, scale = unit(6, 1), unit(6, 2), torch.tensor([1.5], dtype=torch.float64)
    logits = [[math.exp(1.5) * float(i @ t) for t in texts] for i in images]
    expected = 0.0
    for n in range(6):
        row, column = logits[n], [line[n] for line in logits]
        for values in (row, column):
            expected += math.log(sum(map(math.exp, values))) - values[n]
    whole = contrastive_loss(images, texts, images, texts, scale, 0)
    assert float(whole) == pytest.approx(expected / 12)
    parts = [
        contrastive_loss(images[s], texts[s], images, texts, scale, s.start)
        for s in (slice(0, 2), slice(2, 4), slice(4, 6))
    ]
    assert float(sum(parts)) / 3 == pytest.approx(expected / 12)


def test_cached_gradients_are_those_of_the_whole_pool() -> None:
    leaves = [unit(6, 3).float(), unit(6, 4).float(), torch.tensor([2.0])]
    for leaf in leaves:
        leaf.requires_grad_()
    images, texts, scale = leaves
    contrastive_loss(images, texts, images, texts, scale, 0).backward()
    expected = [leaf.grad.clone() for leaf in leaves]
    cache = CachedGradients.compute(*(leaf.detach() for leaf in leaves))
    for leaf in leaves:
        leaf.grad = None
    for start in (0, 2, 4):
        rows = slice(start, start + 2)
        # What the schedule and the data-parallel mean do: divide by the number of parts.
        (cache.surrogate(images[rows], texts[rows], scale, rows, 3).sum() / 3).backward()
    for leaf, gradient in zip(leaves, expected):
        torch.testing.assert_close(leaf.grad, gradient)


def test_matching_loss_leaves_rows_without_negatives_out() -> None:
    logits = torch.log(torch.tensor([[0.25, 0.75], [0.5, 0.5], [0.8, 0.2]] * 2))
    logits[3:] = 7.0 * torch.randn(3, 2)
    valid = torch.tensor([True, False])
    expected = -(math.log(0.75) + math.log(0.5) + math.log(0.8)) / 3
    assert float(matching_loss(logits, valid)) == pytest.approx(expected)
    assert float(matching_loss(logits, torch.tensor([False, False]))) == 0.0


def test_hard_negatives_follow_similarity_and_never_share_the_image() -> None:
    similarity = torch.tensor([[5.0, 1.0, 2.0, 0.0], [0.0, 9.0, 9.0, 9.0]])
    same = torch.tensor([[True, False, False, True], [True, True, True, True]])
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for _ in range(4000):
        index, valid = hard_negatives(similarity, same, generator)
        assert valid.tolist() == [True, False] and int(index[1]) == 0
        drawn.append(int(index[0]))
    assert set(drawn) == {1, 2}
    assert drawn.count(2) / 4000 == pytest.approx(math.e / (1 + math.e), abs=0.025)


def test_recall_at_1_by_hand() -> None:
    """Three captions of a pool of four; the first two are of one image."""
    images = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-1.0, 0.0]])
    captions = torch.tensor([[0.8, 0.6], [0.9, 0.1], [-0.6, 0.8]])
    documents = torch.tensor([7, 7, 3])
    pool = torch.tensor([7, 5, 3, 9])
    # Nearest are rows 1 (0.96 > 0.8), 0 and 2 (0.8 > 0.6).
    assert first_is_right(captions, images, documents, pool).tolist() == [False, True, True]
    # A row of another number shows the same image: found.
    pool[1] = 7
    assert first_is_right(captions, images, documents, pool).tolist() == [True, True, True]
