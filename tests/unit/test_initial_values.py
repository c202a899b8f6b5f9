"""Initial weights: positions of sines and cosines, keys like queries."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch

from megatron_vlmoe.config.schema import ModelConfig
from megatron_vlmoe.model.initial_values import (
    IMAGE_POSITIONS,
    TEXT_POSITIONS,
    full_initial_value,
)

QKV = "decoder.layers.1.self_attention.linear_qkv.weight"


def model(**options: float) -> ModelConfig:
    return ModelConfig(
        hidden_size=64, num_attention_heads=4, image_size=96, init_std=0.2, **options
    )


@pytest.mark.parametrize(
    "key, shape", [(IMAGE_POSITIONS, (37, 64)), (TEXT_POSITIONS, (64, 64)), (QKV, (192, 64))]
)
def test_without_the_options_weights_are_drawn(key: str, shape: tuple[int, int]) -> None:
    drawn = full_initial_value(key, shape, model(), 1)
    # A normal distribution cut at one standard deviation has a standard deviation of 0.54.
    assert drawn.std().item() == pytest.approx(0.108, rel=0.1)
    assert not torch.equal(drawn, full_initial_value(key, shape, model(), 2))


def test_draws_are_normal_within_one_standard_deviation() -> None:
    drawn = full_initial_value(QKV, (600, 500), model(), 1)
    normal = NormalDist(0.0, 0.2)
    inside = normal.cdf(0.2) - normal.cdf(-0.2)
    for bound in (-0.15, -0.1, -0.02, 0.0, 0.05, 0.12, 0.2):
        expected = (normal.cdf(bound) - normal.cdf(-0.2)) / inside
        assert (drawn <= bound).float().mean().item() == pytest.approx(expected, abs=0.004)
    assert drawn.abs().max() <= 0.2
    # The same numbers with every version of torch: a model can be trained again elsewhere.
    begin = torch.tensor([-0.008761, 0.174711, 0.194021, 0.179770])
    torch.testing.assert_close(drawn[0, :4], begin, atol=1e-5, rtol=0.0)


def test_positions_of_patches_are_of_rows_and_columns() -> None:
    table = full_initial_value(IMAGE_POSITIONS, (37, 64), model(init_sincos_std=0.3), 1)
    assert torch.equal(table[0], torch.zeros(64)), "[I_CLS]"
    grid = table[1:].view(6, 6, 64)
    for column in range(6):
        assert torch.equal(grid[:, column, :32], grid[:, 0, :32]), (
            "half of the width is of the row alone"
        )
        assert torch.equal(grid[column, :, 32:], grid[0, :, 32:]), "the other half of the column"
    assert torch.equal(grid[2, 5, :32], grid[5, 2, 32:]), "rows and columns are alike"
    torch.testing.assert_close(table[1:].square().mean(1).sqrt(), torch.full((36,), 0.3))
    # The shortest wave is 4 patches long: the first sine is 0, 1, 0, -1, 0, 1 down the rows.
    wave = 0.3 * math.sqrt(2.0) * torch.tensor([0.0, 1.0, 0.0, -1.0, 0.0, 1.0])
    torch.testing.assert_close(grid[:, 0, 0], wave)
    products = grid @ grid[2, 2]
    assert products[2, 3] > products[2, 4] > products[2, 5], "nearer patches start more alike"


def test_positions_of_texts_go_on_in_longer_ones() -> None:
    options = model(init_sincos_std=0.3)
    table = full_initial_value(TEXT_POSITIONS, (64, 65), options, 1)
    assert torch.equal(table[0, :33], torch.zeros(33)), "sines of place 0"
    assert table.shape == (64, 65)
    products = table @ table[30]
    assert products[30] > products[31] > products[32] and products[30] > 2 * products[50]
    longer = full_initial_value(TEXT_POSITIONS, (100, 65), options, 2)
    assert torch.equal(table, longer[:64]), "neither drawn nor of the length"


@pytest.mark.parametrize("correlation", [0.5, 0.8, 1.0])
def test_keys_correlate_with_the_queries_of_their_head(correlation: float) -> None:
    drawn = full_initial_value(QKV, (192, 64), model(), 1).view(4, 3, 16, 64)
    mimetic = full_initial_value(QKV, (192, 64), model(init_qk_correlation=correlation), 1)
    query, key, value = mimetic.view(4, 3, 16, 64).unbind(1)
    assert torch.equal(query, drawn[:, 0]) and torch.equal(value, drawn[:, 2])
    expected = correlation * drawn[:, 0] + math.sqrt(1.0 - correlation**2) * drawn[:, 1]
    torch.testing.assert_close(key, expected)
    for head in range(4):
        together = torch.corrcoef(torch.stack([query[head].flatten(), key[head].flatten()]))
        assert together[0, 1].item() == pytest.approx(correlation, abs=0.08)
    assert key.std().item() == pytest.approx(drawn[:, 1].std().item(), rel=0.05)
    # A token is then most like itself: the product of query and key weights is near a multiple of the identity.
    product = query[0].T @ key[0]
    assert product.diagonal().mean() > 4 * product.abs().mean() * correlation
