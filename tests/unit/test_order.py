"""Order: keyed draws, epochs that cover everything once, and blends with exact shares."""

from __future__ import annotations

import hashlib
import pickle
from fractions import Fraction

import numpy as np
import pytest

from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.data.order import (
    MAX_TABLE,
    Blend,
    BlendedOrder,
    FeistelPermutation,
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


def test_orders_stay_as_they_were() -> None:
    """Runs that were started with an earlier version go on with the same samples."""
    key = (1 << 32) + 2
    order = SampleOrder(70_001, 11, dataset=key)
    first = [order.locate(place)[1] for place in range(5)]
    assert first == [7260, 14227, 8000, 14633, 64282]
    later = [order.locate(3 * 70_001 + place)[1] for place in range(5)]
    assert later == [19800, 46611, 32421, 2558, 64138]
    digests = [
        hashlib.sha256(epoch_permutation(n, 11, 3, key).astype("<i4").tobytes()).hexdigest()[:16]
        for n in (1000, 70_001)
    ]
    assert digests == ["1f95cb969a8e2621", "039d9bb29d912138"]
    assert MAX_TABLE == 1 << 27


@pytest.mark.parametrize("size", [*range(1, 35), 127, 128, 129, 1000, 4097, 30_011])
def test_a_permutation_without_a_table_has_every_number_once(size: int) -> None:
    permutation = FeistelPermutation(size, np.random.default_rng(size))
    assert sorted(permutation[place] for place in range(size)) == list(range(size))
    for place in (-1, size):
        with pytest.raises(IndexError):
            permutation[place]


def chi_square(found: np.ndarray, cells: int) -> float:
    """Of counts in equally likely cells, in standard deviations above its mean."""
    counts = np.bincount(found, minlength=cells)
    expected = len(found) / cells
    return (((counts - expected) ** 2).sum() / expected - (cells - 1)) / np.sqrt(2 * (cells - 1))


@pytest.mark.parametrize("size", [(1 << 27) + 1, 999_999_937])
def test_a_permutation_without_a_table_looks_like_chance(size: int) -> None:
    permutation = FeistelPermutation(size, keyed_rng(3, Purpose.SAMPLE_ORDER, 1, 2))
    found = np.array([permutation[place] for place in range(20_000)])
    strided = np.array([permutation[place] for place in range(0, size, size // 20_000)])
    # Where each goes, by coarse and by fine position, and where pairs of neighbours go.
    for cells in (
        found * 64 // size,
        found % 64,
        strided * 64 // size,
        strided % 64,
        (found[1:] * 8 // size) * 8 + found[:-1] * 8 // size,
        ((found[1:] - found[:-1]) % size) * 64 // size,
    ):
        assert abs(chi_square(cells, 64)) < 4.5


def test_where_a_sample_comes_depends_on_the_key_alone_and_is_uniform() -> None:
    keys = [
        (seed, epoch, dataset) for seed in range(20) for epoch in range(20) for dataset in range(5)
    ]
    places = [
        SampleOrder(101, seed, dataset=dataset, max_table=100).locate(101 * epoch + 7)[1]
        for seed, epoch, dataset in keys
    ]
    assert abs(chi_square(np.array(places), 101)) < 4.5


def test_an_order_without_a_table_resumes_anywhere() -> None:
    order = SampleOrder(131, seed=3, dataset=9, max_table=130)
    found = [order.locate(number) for number in range(3 * 131)]
    for epoch in range(3):
        own = found[epoch * 131 : (epoch + 1) * 131]
        assert {place[0] for place in own} == {epoch}
        assert sorted(place[1] for place in own) == list(range(131))
    assert len({tuple(found[epoch * 131 : (epoch + 1) * 131]) for epoch in range(3)}) == 3
    # Whatever process asks, and whatever it was asked before.
    again = pickle.loads(pickle.dumps(order))
    assert [again.locate(n) for n in reversed(range(3 * 131))] == found[::-1]
    # As in the version that introduced it.
    assert [index for _, index in found[:5]] == [70, 103, 112, 16, 120]


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
