"""Draws of a counter: an independent computation of single numbers, their distribution, and who sees which."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers import small_config

torch = pytest.importorskip("torch")

from megatron_vlmoe.stream.counter_draws import (  # noqa: E402
    CounterDraws,
    Drawn,
    splitmix64,
    standard_normal,
)
from megatron_vlmoe.stream.draws import PURPOSES  # noqa: E402
from megatron_vlmoe.stream.layout import SEGMENTS, StreamLayout  # noqa: E402

# Pools of 8 and 5 experts on samples of 16, 8 and 17 tokens; the last of four blocks has a shared pool's VL block.
OPTIONS = "--moe.num_text_experts 5 --moe.vl true --moe.num_vl_experts 4".split()
SHARED = "--moe.shared_router true --model.pair_text_length 16".split()


def draws(
    config: Any, layers: Any = range(1, 5), rank: int = 0, size: int = 1, **layout: int
) -> CounterDraws:
    share = replace(StreamLayout.of(config), **layout).shard(size)
    return CounterDraws(config, layers, share, rank, torch.float32, torch.device("cpu"))


def drawn(config: Any, micro_batch: int, **options: Any) -> Drawn:
    return draws(config, **options).draw(torch.tensor(micro_batch))


def chain(*numbers: int) -> int:
    """splitmix64 in whole numbers: the first one is the seed, every output the next state."""
    state = numbers[0] % 2**64
    for number in numbers[1:]:
        z = (state + (number + 1) * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        state = z ^ (z >> 31)
    return state


def test_splitmix64_has_the_published_outputs() -> None:
    # The first outputs of Vigna's splitmix64.c from the state 1234567, as Rosetta Code and others list them.
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    outputs = splitmix64(torch.tensor(1234567), torch.arange(5))
    assert [value % 2**64 for value in outputs.tolist()] == published
    assert [chain(1234567, number) for number in range(5)] == published


@pytest.mark.parametrize(
    ("seed", "options", "pools"),
    [
        (
            1234,
            OPTIONS,
            {
                (2, "text_noise"): ("texts", "pair_texts"),
                (2, "vision_noise"): ("pair_images", "images"),
                (4, "text_noise"): ("texts",),
                (4, "vl_noise"): ("pair_texts", "pair_images"),
                (4, "vision_noise"): ("images",),
            },
        ),
        # Texts and images of one length, captions between them of another.
        (
            -3,
            "--moe.shared_router true --model.text_length 17".split(),
            {(2, "shared_noise"): SEGMENTS, (4, "shared_noise"): ("texts", "images")},
        ),
    ],
)
def test_every_number_is_that_of_its_place(
    seed: int, options: list[str], pools: dict[tuple[int, str], tuple[str, ...]]
) -> None:
    config = small_config(*options, "--train.seed", str(seed))
    micro_batch = 70_000_000_001
    found = drawn(config, micro_batch)
    assert found.noise.keys() == pools.keys()
    layout = StreamLayout.of(config)
    for (layer, purpose), segments in pools.items():
        rows = iter(found.noise[layer, purpose].tolist())
        for segment in segments:
            for sample in range(layout.count(segment)):
                for position in range(layout.length(segment)):
                    row = next(rows)
                    for expert, value in enumerate(row):
                        place = position * math.ceil(len(row) / 2) + expert // 2
                        codes = PURPOSES[purpose], layer, SEGMENTS.index(segment), sample
                        bits = chain(seed, *codes, micro_batch, place)
                        radius = math.sqrt(-2 * math.log(((bits >> 32) + 0.5) / 2**32))
                        angle = 2 * math.pi * (bits % 2**32) / 2**32
                        expected = radius * (math.sin if expert % 2 else math.cos)(angle)
                        assert value == pytest.approx(expected, abs=4e-6)
        assert next(rows, None) is None
    # Stochastic depth is 0.2 in the last of four blocks, linear from the first; halves of a pair share a draw.
    assert {key for key in found.keep_scales} == {
        (layer, f"{part}_drop_path") for layer in (2, 3, 4) for part in ("attention", "ffn")
    }
    for (layer, purpose), scales in found.keep_scales.items():
        rate, values = 0.2 * (layer - 1) / 3, iter(scales.flatten().tolist())
        for segment in SEGMENTS:
            source = SEGMENTS.index("pair_texts" if segment == "pair_images" else segment)
            for sample in range(layout.count(segment)):
                bits = chain(seed, PURPOSES[purpose], layer, source, sample, micro_batch)
                kept = (bits >> 32) / 2**32 >= rate
                for _ in range(layout.length(segment)):
                    assert next(values) == (pytest.approx(1 / (1 - rate)) if kept else 0.0)
        assert next(values, None) is None


def test_a_rank_and_a_chunk_draw_their_share_of_the_whole() -> None:
    config = small_config(*SHARED, "--moe.vl", "true", "--moe.num_vl_experts", "4")
    layout = StreamLayout.of(config)
    whole = drawn(config, 5)
    assert whole.noise[4, "shared_noise"].shape == (layout.size("texts", "images"), 8)
    for rank in range(2):
        for layers in ((1, 2), (3, 4)):
            own = drawn(config, 5, layers=layers, rank=rank, size=2)
            for kind in ("noise", "keep_scales"):
                mine, all_of_it = getattr(own, kind), getattr(whole, kind)
                assert mine.keys() == {key for key in all_of_it if key[0] in layers}
                for (layer, purpose), values in mine.items():
                    pools = {"shared_noise": ("texts", "images"), "vl_noise": SEGMENTS[1:3]}
                    segments = pools[purpose] if layer == 4 and purpose in pools else SEGMENTS
                    sizes = [layout.size(segment) for segment in segments]
                    parts = all_of_it[layer, purpose].split(sizes)
                    expected = torch.cat([part.chunk(2)[rank] for part in parts])
                    torch.testing.assert_close(values, expected, rtol=0, atol=1e-6)


def test_a_part_of_the_segments_has_the_numbers_of_the_whole() -> None:
    config = small_config()
    whole, part = drawn(config, 5), drawn(config, 5, pairs=0)
    layout = StreamLayout.of(config)
    expected = {
        "text_noise": whole.noise[2, "text_noise"][: layout.size("texts")],
        "vision_noise": whole.noise[2, "vision_noise"][layout.size("pair_images") :],
    }
    for purpose, values in expected.items():
        torch.testing.assert_close(part.noise[2, purpose], values, rtol=0, atol=1e-6)
    texts, pairs, images = whole.keep_scales[4, "ffn_drop_path"].split(
        [layout.size("texts"), layout.size("pair_texts", "pair_images"), layout.size("images")]
    )
    assert torch.equal(part.keep_scales[4, "ffn_drop_path"], torch.cat([texts, images]))
    # A pool without tokens draws nothing.
    assert drawn(config, 5, texts=0, pairs=0).noise.keys() == {
        (2, "vision_noise"),
        (4, "vision_noise"),
    }


def test_what_is_off_is_not_drawn() -> None:
    config = small_config("--model.drop_path", "0", "--moe.noise_std", "0")
    assert not drawn(config, 1).noise and not drawn(config, 1).keep_scales
    frozen = small_config("--moe.train_experts", "false")
    assert not drawn(frozen, 1).noise and drawn(frozen, 1).keep_scales


def _chi_square(counts: Any) -> float:
    """Of equally likely cells, in standard deviations from its mean."""
    counts = np.asarray(counts, float).ravel()
    expected, freedom = counts.mean(), counts.size - 1
    return float((((counts - expected) ** 2).sum() / expected - freedom) / math.sqrt(2 * freedom))


def _streams() -> dict[str, Any]:
    """Bits ``[2, n]`` of neighbours in every number of the chain, as unsigned 32-bit halves that are used apart."""
    n = 2**17
    counter, zero = torch.arange(n), torch.zeros(n, dtype=torch.int64)

    def bits(**codes: Any) -> Any:
        state = zero + codes.pop("seed", 1234)
        for name in ("purpose", "layer", "segment", "sample", "micro", "place"):
            state = splitmix64(state, torch.as_tensor(codes.pop(name, 1)))
        assert not codes
        return state

    return {
        "places": torch.stack([bits(place=counter), bits(place=counter + 1)]),
        "experts of equal place": torch.stack(
            [bits(place=16 * counter), bits(place=16 * counter + 1)]
        ),
        "micro-batches": torch.stack([bits(micro=counter), bits(micro=counter + 1)]),
        "samples": torch.stack([bits(sample=counter), bits(sample=counter + 1)]),
        "layers": torch.stack([bits(place=counter), bits(layer=2, place=counter)]),
        "purposes": torch.stack([bits(place=counter), bits(purpose=2, place=counter)]),
        "seeds": torch.stack([bits(place=counter), bits(seed=1235, place=counter)]),
        "sample and micro-batch": torch.stack(
            [bits(micro=counter), bits(sample=2, micro=counter - 1)]
        ),
    }


@pytest.mark.parametrize("name", list(_streams()))
def test_neighbours_are_independent(name: str) -> None:
    """Every byte of a number and the same byte of its neighbour fill the 65,536 cells of a table evenly, and bits flip
    with probability one half."""
    first, second = _streams()[name]
    for shift in range(0, 64, 8):
        left, right = ((values >> shift) & 255 for values in (first, second))
        table = torch.bincount(left * 256 + right, minlength=65_536)
        assert abs(_chi_square(table)) < 5, shift
        assert abs(_chi_square(torch.bincount(left, minlength=256))) < 5, shift
    flips = torch.stack([((first ^ second) >> bit) & 1 for bit in range(64)]).double().mean(dim=1)
    assert float((flips - 0.5).abs().max()) < 5 * 0.5 / math.sqrt(len(first))


def test_the_test_of_independence_fails_for_a_bad_hash() -> None:
    """One product, as of a Lehmer generator, and a mixer without its second half."""
    counter = torch.arange(2**17)
    product = counter * -7046029254386353131
    half = product ^ ((product >> 30) & (2**34 - 1))
    for values in (product, half):
        left, right = (((own >> 32) & 255) for own in (values, values.roll(-1)))
        table = torch.bincount(left * 256 + right, minlength=65_536)
        assert abs(_chi_square(table)) > 50


def test_noise_is_normal() -> None:
    """Moments, quantiles and correlations of a million numbers, each within five standard errors."""
    sizes = "--data.micro_images 128 --data.global_images 512 --moe.num_vision_experts 32"
    config = small_config(*sizes.split(), "--model.num_vl_layers", "0")
    found = [drawn(config, number).noise for number in range(8)]
    values = torch.stack([own[layer, "vision_noise"] for own in found for layer in (2, 4)]).double()
    count = values.numel()
    assert count > 10**6
    moments = [float((values**power).mean()) for power in (1, 2, 3, 4)]
    # Of powers of a normal number: means 0, 1, 0, 3, variances 1, 2, 15, 96.
    for moment, mean, variance in zip(moments, (0, 1, 0, 3), (1, 2, 15, 96)):
        assert moment == pytest.approx(mean, abs=5 * math.sqrt(variance / count))
    cells = torch.bincount((torch.special.ndtr(values.flatten()) * 1000).long(), minlength=1000)
    assert len(cells) == 1000 and abs(_chi_square(cells)) < 5
    assert float(values.max()) > 4.5 and float(values.min()) < -4.5
    # Neighbours in experts (which may come of the same bits), tokens, blocks, micro-batches.
    others = {
        "experts": (values[..., :-1], values[..., 1:]),
        "tokens": (values[:, :-1], values[:, 1:]),
        "blocks": (values[::2], values[1::2]),
        "micro-batches": (values[:-2], values[2:]),
    }
    for name, (left, right) in others.items():
        for power in (1, 2):
            a, b = (part.flatten() ** power for part in (left, right))
            correlation = float(torch.corrcoef(torch.stack([a, b]))[0, 1])
            assert abs(correlation) < 5 / math.sqrt(len(a)), (name, power)


def test_the_largest_and_smallest_bits_are_finite() -> None:
    bits = torch.tensor([0, -1, 2**32 - 1, -(2**32), 2**63 - 1, -(2**63)])
    values = standard_normal(bits.clone())
    assert values.shape == (12,) and bool(values.isfinite().all())
    assert float(values.abs().max()) == pytest.approx(math.sqrt(2 * 33 * math.log(2)), rel=1e-6)


def test_stochastic_depth_drops_its_rate() -> None:
    sizes = [f"--data.{kind}_images {count}" for kind, count in (("micro", 64), ("global", 256))]
    config = small_config("--model.drop_path", "0.3", *" ".join(sizes).split())
    plan = draws(config, texts=0, pairs=0)
    scales = [plan.draw(torch.tensor(n)).keep_scales for n in range(100)]
    # Micro-batches, purposes, samples; a sample has 17 tokens.
    dropped = (
        torch.stack(
            [
                torch.stack(
                    [
                        own[4, f"{part}_drop_path"].view(64, 17)[:, 0]
                        for part in ("attention", "ffn")
                    ]
                )
                for own in scales
            ]
        )
        == 0
    )
    values = dropped.double()
    assert abs(float(values.mean()) - 0.3) < 4 * math.sqrt(0.3 * 0.7 / values.numel())
    for left, right in (
        (values[1:], values[:-1]),
        (values[:, :1], values[:, 1:]),
        (values[..., 1:], values[..., :-1]),
    ):
        pair = torch.stack([left.flatten(), right.flatten()])
        assert abs(float(torch.corrcoef(pair)[0, 1])) < 4 / math.sqrt(pair.shape[1])
