"""Ranking anew: each direction has its own candidates, and nothing else gets before them."""

from __future__ import annotations

import numpy as np

from megatron_vlmoe.finetune.metrics import recall_at_k
from megatron_vlmoe.finetune.retrieval import best_of_rows, reranked


def test_recalls_by_a_loop() -> None:
    rng = np.random.default_rng(0)
    num_images, num_texts, k = 12, 36, 4
    scores = rng.uniform(-1.0, 1.0, (num_images, num_texts))
    matched = rng.normal(0.0, 4.0, scores.shape)
    owner = np.arange(num_texts) % num_images
    of_images, of_texts = best_of_rows(scores, k), best_of_rows(scores.T, k).T
    assert (of_images.sum(axis=1) == k).all() and (of_texts.sum(axis=0) == k).all()

    def found(query: np.ndarray, extra: np.ndarray, right: set[int], at: int) -> bool:
        order = np.argsort(-query, kind="stable")
        head = sorted(order[:k], key=lambda i: -(query[i] + extra[i]))
        return bool(right & set([*head, *order[k:]][:at]))

    ways = {"TR": (scores, matched, of_images), "IR": (scores, matched, of_texts)}
    for at in (1, 5, 10):
        images = [
            found(scores[i], matched[i], set(np.flatnonzero(owner == i)), at)
            for i in range(num_images)
        ]
        texts = [found(scores[:, c], matched[:, c], {int(owner[c])}, at) for c in range(num_texts)]
        for way, expected in (("TR", images), ("IR", texts)):
            recalls = recall_at_k(reranked(*ways[way]), owner, (at,))
            assert np.isclose(recalls[f"{way}@{at}"], 100 * np.mean(expected)), (way, at)
