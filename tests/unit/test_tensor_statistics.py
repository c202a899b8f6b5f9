"""Numbers of tensors that an inspection and a comparison report, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_vlmoe.convert import statistics


@pytest.fixture(params=[3, 1 << 22], ids=["pieces", "whole"])
def piece(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers must not depend on how a tensor is cut."""
    monkeypatch.setattr(statistics, "PIECE", request.param)


@pytest.mark.usefixtures("piece")
def test_measure_by_hand() -> None:
    found = statistics.measure(torch.tensor([[3.0, -4.0], [0.0, 0.0]]))
    assert (found.numel, found.rms, found.largest, found.first) == (4, 2.5, 4.0, None)
    values = torch.zeros(2, 2, 3)
    values[0, 1, 2] = float("inf")
    values[1, 0, 0] = values[1, 1, 1] = float("nan")
    values[1, 1, 2] = 3.0
    found = statistics.measure(values)
    assert (found.nans, found.infinities, found.first) == (2, 1, (0, 1, 2))
    # The one finite value that is not zero, of nine finite ones.
    assert found.rms == pytest.approx(1.0) and found.largest == 3.0


@pytest.mark.usefixtures("piece")
def test_measure_counts_what_bf16_would_round_away() -> None:
    assert statistics.measure(torch.full((1000,), 0.1, dtype=torch.bfloat16)).rms == pytest.approx(
        0.10009765625, rel=1e-12
    )
    assert statistics.measure(torch.tensor([], dtype=torch.float32)).rms == 0.0


@pytest.mark.usefixtures("piece")
def test_distance_by_hand() -> None:
    left, right = torch.tensor([3.0, 4.0, 0.0, 1.0]), torch.tensor([3.0, 0.0, 0.0, 1.0])
    found = statistics.distance(left, right)
    assert (found.different, found.largest) == (1, 4.0)
    assert found.relative == pytest.approx(4.0 / math.sqrt(26.0))
    assert found.cosine == pytest.approx(10.0 / math.sqrt(26.0 * 10.0))
    zero = torch.zeros(4)
    assert statistics.distance(zero, left).relative == 1.0
    assert statistics.distance(zero, left).cosine == 0.0
    assert statistics.distance(left, -left).relative == pytest.approx(2.0)
    same = statistics.distance(left, left.clone())
    assert same.equal and same.relative == 0.0 and same.cosine == pytest.approx(1.0)
    assert statistics.distance(zero, zero).cosine == 1.0


@pytest.mark.usefixtures("piece")
def test_distance_of_values_that_are_not_finite() -> None:
    nan, inf = float("nan"), float("inf")
    left = torch.tensor([nan, inf, nan, 1.0, inf])
    right = torch.tensor([nan, inf, 2.0, 2.0, -inf])
    found = statistics.distance(left, right)
    assert (found.different, found.not_finite, found.largest) == (3, 2, 1.0)
    assert statistics.distance(left, left.clone()).equal


@pytest.mark.usefixtures("piece")
def test_cosine_and_norms_of_rows() -> None:
    rows = torch.tensor([[3.0, 4.0], [0.0, 2.0], [0.0, 0.0]])
    assert statistics.row_norms(rows) == [5.0, 2.0, 0.0]
    assert statistics.mean_cosine(rows) == pytest.approx(0.8)
    three = torch.eye(3)[[0, 0, 1]]
    assert statistics.mean_cosine(three) == pytest.approx(1.0 / 3.0)
    assert statistics.mean_cosine(torch.eye(3)[:1]) is None
    digests = statistics.row_digests(torch.tensor([[1.0, 2.0], [1.0, 2.0], [2.0, 1.0]]))
    assert digests[0] == digests[1] != digests[2]
