"""Which patches `fill-masked` hides."""

from __future__ import annotations

import numpy as np

from megatron_vlmoe.analysis.filling import hide_a_shape

SHOWN = np.array(
    [
        [1, 1, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],  # touches the first part at a corner only
        [0, 0, 0, 0, 1, 1],
        [0, 0, 0, 0, 1, 1],
        [0, 0, 0, 0, 0, 0],
    ],
    dtype=bool,
)
PARTS = [{(0, 0), (0, 1), (1, 1)}, {(2, 2)}, {(3, 4), (3, 5), (4, 4), (4, 5)}]


def test_one_connected_part_is_hidden_whole_and_the_rest_in_blocks() -> None:
    whole = set()
    for seed in range(40):
        mask = hide_a_shape(SHOWN, 9, np.random.default_rng(seed))
        hidden = {(int(row), int(column)) for row, column in np.argwhere(mask)}
        assert 5 <= len(hidden) <= 9
        whole |= {number for number, part in enumerate(PARTS) if part <= hidden}
        assert any(part <= hidden for part in PARTS)
    assert whole == {0, 1, 2}


def test_a_part_that_is_too_large_is_hidden_as_far_as_it_goes() -> None:
    everything = np.ones((4, 4), dtype=bool)
    assert hide_a_shape(everything, 6, np.random.default_rng(0)).sum() == 6


def test_a_plain_picture_has_blocks_alone() -> None:
    nothing = np.zeros((8, 8), dtype=bool)
    assert hide_a_shape(nothing, 25, np.random.default_rng(0)).sum() == 25
    assert hide_a_shape(nothing, 25, np.random.default_rng(0)).tolist() != (
        hide_a_shape(nothing, 25, np.random.default_rng(1)).tolist()
    )
