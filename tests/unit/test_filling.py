"""Which patches `fill-masked` hides, and how it draws codes."""

from __future__ import annotations

import io
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_vlmoe.analysis.filling import (
    draw_filled,
    fill,
    hide_a_shape,
    looks_of_codes,
    read_hidden_words,
)
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


class _Text:
    """Words are pieces; 0 opens, 1 closes, 2 hides, 3 fills up."""

    mask_token_id = 2
    words = ("[CLS]", "[SEP]", "[MASK]", "[PAD]", "▁red", "▁blue", "▁circle", "s", "▁wobbly", "▁.")

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self.words[i] for i in ids]

    def build_inputs_with_special_tokens(self, ids: list[int]) -> list[int]:
        return [0, *ids, 1]

    def pad(self, inputs: dict[str, list[list[int]]], return_tensors: str) -> dict[str, Any]:
        length = max(map(len, inputs["input_ids"]))
        rows = [row + [3] * (length - len(row)) for row in inputs["input_ids"]]
        ids = torch.tensor(rows)
        return {"input_ids": ids, "attention_mask": (ids != 3).long()}


def test_hidden_words_are_counted_by_class_with_their_picture_and_with_another(
    tmp_path: Path,
) -> None:
    """A model that reads the first piece off the picture's colour, and guesses `circle` everywhere else."""
    captions = [[4, 6], [5, 6, 7], [4, 8], [5, 6], [5, 9]]
    colors = {4: (255, 0, 0), 5: (0, 0, 255)}
    with IndexedWriter(str(tmp_path / "p_image"), np.uint8) as images:
        with IndexedWriter(str(tmp_path / "p_text"), np.uint16) as texts:
            for ids in captions:
                file = io.BytesIO()
                Image.new("RGB", (4, 4), colors[ids[0]]).save(file, format="PNG")
                images.add_document([np.frombuffer(file.getvalue(), dtype=np.uint8)])
                texts.add_document([np.array(ids, dtype=np.uint16)])

    seen: list[torch.Tensor] = []

    def model(
        input_ids: torch.Tensor, attention_mask: torch.Tensor, pixel_values: torch.Tensor
    ) -> SimpleNamespace:
        assert attention_mask.tolist() == (input_ids != 3).long().tolist()
        seen.append(input_ids)
        logits = torch.zeros(*input_ids.shape, 10)
        logits[:, :, 6] = 1.0
        for row, pixels in enumerate(pixel_values):
            # Sure enough to be right, not certain.
            logits[row, 1, 4 if pixels[0, 0, 0] > 0.5 else 5] = 3.0
        return SimpleNamespace(mlm_logits=logits)

    def read(pictures: list[Image.Image], return_tensors: str) -> dict[str, torch.Tensor]:
        rows = [torch.tensor(np.array(one)).permute(2, 0, 1) / 255.0 for one in pictures]
        return {"pixel_values": torch.stack(rows)}

    model.config = SimpleNamespace(pair_text_length=8)  # type: ignore[attr-defined]
    processor = SimpleNamespace(tokenizer=_Text(), image_processor=read)
    found = read_hidden_words(model, processor, str(tmp_path / "p"), count=50, seed=1)
    by_name = {one.name: one for one in found}
    # Half of two pieces is one, of three two; what was asked is what was hidden.
    hidden = int((seen[0] == 2).sum())
    assert hidden == 6 and len(seen) == 2 and torch.equal(seen[0], seen[1])
    assert by_name["all"].count == hidden
    assert sum(one.count for one in found if one.name != "all") == hidden
    total = math.log(8 + math.e + math.exp(3))
    color = by_name["color"]
    assert color.right == color.count and color.right_beside_another < color.count
    assert color.loss == pytest.approx(total - 3.0, abs=1e-5)
    wrong = color.count - color.right_beside_another
    assert color.loss_beside_another == pytest.approx(total - 3.0 + 3.0 * wrong / color.count)
    shape = by_name["shape"]
    # `circles` is one word of two pieces, of which the second is never guessed.
    assert shape.right <= shape.count and shape.right == shape.right_beside_another
    assert shape.loss == shape.loss_beside_another


def test_no_caption_has_another_picture_among_one(tmp_path: Path) -> None:
    with IndexedWriter(str(tmp_path / "p_image"), np.uint8) as images:
        images.add_document([np.zeros(1, dtype=np.uint8)])
    assert read_hidden_words(None, SimpleNamespace(tokenizer=None), str(tmp_path / "p"), 9, 0) == []


WORDS = ["<s>", "</s>", "[MASK]", *"a $5 and a $10 bill, or \\frac".split()]


class Tokenizer:
    """A word is a piece; `[MASK]` is 2."""

    mask_token_id = 2

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return ["▁" + WORDS[i] for i in ids]

    def build_inputs_with_special_tokens(self, ids: list[int]) -> list[int]:
        return [0, *ids, 1]

    def decode(self, ids: list[int]) -> str:
        return " ".join(WORDS[i] for i in ids)


def test_a_long_caption_is_read_as_far_as_the_model_does(tmp_path: Path) -> None:
    """A model of 2 by 2 patches and 12 tokens; of dollars no formula is made."""
    read: list[int] = []

    def model(input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        read.extend(input_ids[0].tolist())
        return SimpleNamespace(
            mlm_logits=torch.zeros(1, input_ids.shape[1], len(WORDS)),
            mim_logits=torch.zeros(1, 4, 3),
        )

    sizes = {"image_size": 8, "patch_size": 4, "visual_vocab_size": 3, "pair_text_length": 12}
    model.config = SimpleNamespace(**sizes)  # type: ignore[attr-defined]
    image = Image.new("RGB", (20, 8), "red")
    processor = SimpleNamespace(
        tokenizer=Tokenizer(),
        image_processor=lambda *_, **__: {"pixel_values": torch.zeros(1, 3, 8, 8)},
    )
    codes = torch.zeros(1, 4, dtype=torch.long)
    tokenizer: Any = SimpleNamespace(
        **{"grid": 2, "image_size": 8, "patch_size": 4, "num_codes": 3, "encode": lambda _: codes}
    )
    ids = list(range(3, len(WORDS))) * 3
    rng = np.random.default_rng(0)
    filled = fill(model, processor, tokenizer, torch.zeros(3, 48), image, ids, rng)
    assert len(read) == 12 and read[0] == 0 and read[-1] == 1 and read.count(2) == 1
    assert filled.truth in WORDS and filled.text.split()[0] == "a"
    assert math.isclose(filled.guesses[0][1], 1 / len(WORDS), rel_tol=1e-5)
    assert draw_filled([filled], tmp_path / "filled.png").is_file()
