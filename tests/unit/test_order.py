"""Order: keyed draws, epochs that cover everything once, and blends with exact shares."""

from __future__ import annotations

import pickle
from fractions import Fraction

import numpy as np
import pytest

from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.data.order import (
    Blend,
    BlendedOrder,
    Purpose,
    SampleOrder,
    SampleRef,
    epoch_permutation,
    keyed_rng,
    parse_blend,
)


def test_keyed_draws_depend_on_every_part_of_the_key_and_nothing_else() -> None:
    base = {"seed": 1, "purpose": Purpose.TEXT_MASK, "dataset": 2, "epoch": 3, "index": 4}
    first = keyed_rng(**base).random(8)
    assert np.array_equal(first, keyed_rng(**base).random(8))
    others = [
        keyed_rng(**base | change).random(8)
        for change in (
            {"seed": 2},
            {"purpose": Purpose.BLEND},
            {"dataset": 3},
            {"epoch": 4},
            {"index": 5},
        )
    ]
    for i, other in enumerate(others):
        assert not np.intersect1d(first, other).size
        assert all(not np.intersect1d(other, later).size for later in others[i + 1 :])


def test_consecutive_keys_give_independent_uniforms() -> None:
    draws = np.array([keyed_rng(0, Purpose.TEXT_MASK, index=i).random() for i in range(4000)])
    assert draws.mean() == pytest.approx(0.5, abs=0.02)
    assert np.abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.06


def test_epoch_permutation_covers_all_and_changes() -> None:
    orders = [epoch_permutation(1000, 7, epoch) for epoch in range(3)]
    for order in orders:
        assert order.dtype == np.int32
        assert np.array_equal(np.sort(order), np.arange(1000))
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], epoch_permutation(1000, 8, 0))
    assert not np.array_equal(orders[0], epoch_permutation(1000, 7, 0, dataset=1))


def test_sample_order_covers_every_epoch_once_in_any_order_of_asking() -> None:
    order = SampleOrder(13, seed=3)
    asked = np.random.default_rng(0).permutation(13 * 5)
    found = {int(number): order.locate(int(number)) for number in asked}
    for epoch in range(5):
        places = [found[number] for number in range(epoch * 13, (epoch + 1) * 13)]
        assert {place[0] for place in places} == {epoch}
        assert sorted(place[1] for place in places) == list(range(13))
    assert [found[n] for n in range(65)] == [SampleOrder(13, seed=3).locate(n) for n in range(65)]


def test_unshuffled_order_is_the_stored_one() -> None:
    order = SampleOrder(4, seed=3, shuffle=False)
    assert [order.locate(n) for n in range(6)] == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]


def test_an_order_pickles_without_its_permutations() -> None:
    order = SampleOrder(100_000, seed=3)
    expected = order.locate(5)
    data = pickle.dumps(order)
    assert len(data) < 2000
    assert pickle.loads(data).locate(5) == expected


def test_an_empty_order_is_refused() -> None:
    with pytest.raises(ValueError, match="num_samples=0"):
        SampleOrder(0, seed=1)


def test_parse_blend() -> None:
    assert parse_blend(("a", "b"), "data.text").weights is None
    spec = parse_blend(("0.7", "a", "2.1", "b/0"), "data.text")
    assert spec.prefixes == ("a", "b/0")
    assert spec.weights == (Fraction(1, 4), Fraction(3, 4))


@pytest.mark.parametrize(
    "words", [("0.7", "a", "b"), ("a", "0.7"), ("0.7",), ("0.7", "0.3", "a", "b"), ("0", "a")]
)
def test_a_malformed_blend_names_its_option(words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"^data.pairs "):
        parse_blend(words, "data.pairs")


@pytest.mark.parametrize(
    "weights",
    [
        ["0.7", "0.3"],
        ["1", "1", "1"],
        ["0.6", "0.3999", "0.0001"],
        ["0.0005", "0.0007", "0.9988"],
        [str(i) for i in (17, 123_456, 99, 10_000_000)],
    ],
)
def test_blend_shares_are_exact_and_no_number_is_lost(weights: list[str]) -> None:
    shares = [Fraction(weight) for weight in weights]
    total = sum(shares)
    blend = Blend(shares, seed=5)
    blocks = 3
    numbers: list[list[int]] = [[] for _ in shares]
    step = max(1, blend.block_size // 4096)
    if step > 1:  # a long block: check its arrays directly
        for block in range(blocks):
            datasets, own = blend._make_block(block)
            for dataset, found in enumerate(numbers):
                found.extend(own[datasets == dataset].tolist())
    else:
        for number in range(blocks * blend.block_size):
            dataset, inner = blend.locate(number)
            numbers[dataset].append(inner)
    for share, found in zip(shares, numbers, strict=True):
        assert found == list(range(len(found)))
        assert abs(len(found) - blocks * blend.block_size * share / total) < 1


def test_blend_mixes_inside_a_block() -> None:
    blend = Blend([0.5, 0.5], seed=1)
    datasets = [blend.locate(number)[0] for number in range(1024)]
    assert sum(datasets) == 512
    assert 400 < sum(a != b for a, b in zip(datasets, datasets[1:], strict=False)) < 620
    assert datasets != [Blend([0.5, 0.5], seed=2).locate(number)[0] for number in range(1024)]


def test_blend_counts_never_go_down() -> None:
    blend = Blend([Fraction(1, 5000), Fraction(1, 3000), Fraction(9, 10)], seed=1)
    before = [0, 0, 0]
    for block in range(1, 200):
        counts = blend.counts_before(block)
        assert sum(counts) == block * blend.block_size
        assert all(b <= c for b, c in zip(before, counts, strict=True))
        before = counts


def test_a_blend_far_into_the_run_needs_no_history() -> None:
    dataset, inner = Blend([0.25, 0.75], seed=1).locate(10**9)
    assert inner == pytest.approx([2.5e8, 7.5e8][dataset], abs=1024)


@pytest.mark.parametrize("weights", [[], [1, 0], [1, -1], [1, Fraction(1, 1 << 30)]])
def test_impossible_blends_are_refused(weights: list[int]) -> None:
    with pytest.raises(ConfigError):
        Blend(weights, seed=1)


def test_blended_order_covers_each_dataset_once_per_epoch() -> None:
    sizes = [30, 50]
    orders = [SampleOrder(size, 9, dataset=d) for d, size in enumerate(sizes)]
    blended = BlendedOrder(Blend([0.4, 0.6], seed=9), orders)
    places = [blended.locate(number) for number in range(1024)]
    for dataset, size in enumerate(sizes):
        own = [place for place in places if place.dataset == dataset]
        for epoch in range(len(own) // size):
            found = [place.index for place in own if place.epoch == epoch]
            assert sorted(found) == list(range(size))
    assert places[7] == blended.locate(7) and isinstance(places[7], SampleRef)
