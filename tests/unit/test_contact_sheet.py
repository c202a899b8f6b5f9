"""The picture of a dataset: whole words, question and answer apart, a frame, no boxes for unknown characters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from megatron_vlmoe.prepare.inspect import Cell, draw_sheet

Written = list[tuple[int, int, str, str]]
QUESTION = "What is the colour of the unbelievably large horse beside the tree?"


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Written:
    """Left, top, text and colour of every line that is drawn."""
    lines: Written = []
    draw = ImageDraw.ImageDraw.text

    def keep(self: Any, place: tuple[int, int], text: str, fill: str, *more: Any) -> None:
        lines.append((*place, text, fill))
        draw(self, place, text, fill, *more)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", keep)
    return lines


def white(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), "white")


def test_words_stay_whole_and_the_answer_has_a_line_of_its_own(written: Written) -> None:
    draw_sheet([Cell([white(40, 40)], "[7] 123", [QUESTION], "brown, dark brown (0.3)")])
    texts = [text for _, _, text, _ in written]
    assert texts[0] == "[7] 123" and texts[-1] == "brown, dark brown (0.3)"
    assert " ".join(texts[1:-1]) == QUESTION and len(texts) > 4
    assert len({color for *_, color in written}) == 3


def test_a_long_text_ends_with_dots(written: Written) -> None:
    draw_sheet([Cell([white(40, 40)], "[0]", [QUESTION * 9], "class " * 99)])
    texts = [text for _, _, text, _ in written]
    assert len(texts) == 1 + 4 + 2 and texts[4].endswith("…") and texts[6].endswith("…")


def test_characters_without_a_shape_are_named(written: Written) -> None:
    draw_sheet([Cell([white(40, 40)], "[0]", ["ein großes Русский 星 ⁇"])])
    assert " ".join(text for _, _, text, _ in written[1:]) == "ein großes Русский <U+661F> ⁇"


def test_pictures_fill_their_cells_in_a_frame(written: Written) -> None:
    """A white picture can be told from the page; a flat one leaves no space above its text."""
    small = np.asarray(draw_sheet([Cell([white(20, 5), white(20, 5)], "[0]", ["a"])]).convert("L"))
    rows, columns = np.nonzero(small[:30] < 200)
    assert (rows.min(), columns.min()) == (9, 9), "the frame's corner"
    assert columns.max() > 200, "small pictures are enlarged to the width of a cell"
    assert written[0][1] < 60
    cells = [Cell([white(10, 10)], str(number)) for number in range(8)]
    written.clear()
    draw_sheet(cells)
    assert len({top for _, top, _, _ in written}) == 2 and len(written) == 8
