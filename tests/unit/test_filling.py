"""Which patches `fill-masked` hides, and how it draws codes."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from megatron_vlmoe.analysis.filling import hide_a_shape, looks_of_codes
from megatron_vlmoe.data.indexed import IndexedWriter

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


def test_a_code_looks_like_the_mean_of_the_patches_that_have_it(tmp_path: Path) -> None:
    """Pictures of two by two plain patches, coded as dark (0) and bright (1); nothing has code 2."""
    with IndexedWriter(str(tmp_path / "p_image"), np.uint8) as writer:
        for levels in ([[0, 60], [200, 255]], [[30, 30], [30, 255]], [[255, 255], [255, 255]]):
            square = np.kron(np.array(levels, dtype=np.uint8), np.ones((4, 4), dtype=np.uint8))
            file = io.BytesIO()
            Image.fromarray(square).convert("RGB").save(file, format="PNG")
            writer.add_document([np.frombuffer(file.getvalue(), dtype=np.uint8)])

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        means = torch.nn.functional.avg_pool2d(pixels.mean(dim=1), 4)
        return (means > 0.5).long().flatten(1)

    tokenizer = SimpleNamespace(image_size=8, patch_size=4, num_codes=3, encode=encode)
    looks = 255 * looks_of_codes(tokenizer, str(tmp_path / "p"), leave_out=[2])  # type: ignore[arg-type]
    assert looks.shape == (3, 3 * 4 * 4)
    # Dark: 0, 60 and three times 30; bright: 200, 255 and 255.
    for code, mean in ((0, 30.0), (1, 710 / 3), (2, 127.5)):
        torch.testing.assert_close(looks[code], torch.full((48,), mean), atol=0.01, rtol=0.0)
