"""Pictures in rows, each with a frame and its texts below it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

from PIL import Image, ImageDraw, ImageFont

_COLUMNS = 6
_CELL = 208
_MARGIN = 10
_GAP = 4
_TEXT_LINES = 4
_FONT_SIZE = 12
_LINE = 15
_FRAME, _SOFT, _INK, _LABEL = "#9aa4af", "#57606a", "#1b1f24", "#1f5fa8"


@dataclass(frozen=True)
class Cell:
    """One sample.

    Args:
        images: RGB pictures, drawn side by side; at least one.
        heading: a line above the texts, such as the sample's number.
        texts: each begins a line of its own; what does not fit into four lines is cut.
        label: answer or class, on lines of its own below the texts; may be empty.
    """

    images: Sequence[Image.Image]
    heading: str
    texts: Sequence[str] = ()
    label: str = ""


@dataclass(frozen=True)
class _Drawn:
    pictures: list[Image.Image]
    lines: list[tuple[str, str]]

    @property
    def picture_height(self) -> int:
        return max(picture.height for picture in self.pictures)


def draw_sheet(cells: Iterable[Cell]) -> Image.Image:
    """Draws cells in rows of six; a row is as high as its pictures and texts need."""
    font, is_known = _font()
    drawn = [
        _Drawn(
            _scaled(cell.images),
            [(line, _SOFT) for line in _wrapped(cell.heading, font, is_known, 1)]
            + [(line, _INK) for line in _paragraphs(cell.texts, font, is_known)]
            + [(line, _LABEL) for line in _wrapped(cell.label, font, is_known, 2)],
        )
        for cell in cells
    ]
    rows = [drawn[start : start + _COLUMNS] for start in range(0, len(drawn), _COLUMNS)]
    above = [max(cell.picture_height for cell in row) + 4 for row in rows]
    below = [max(len(cell.lines) for cell in row) * _LINE for row in rows]
    width = _MARGIN + min(_COLUMNS, len(drawn)) * (_CELL + _MARGIN)
    height = _MARGIN + sum(above) + sum(below) + len(rows) * _MARGIN
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    top = _MARGIN
    for row, picture_space, text_space in zip(rows, above, below):
        for column, cell in enumerate(row):
            left = x = _MARGIN + column * (_CELL + _MARGIN)
            for picture in cell.pictures:
                sheet.paste(picture, (x, top))
                box = (x - 1, top - 1, x + picture.width, top + picture.height)
                draw.rectangle(box, outline=_FRAME)
                x += picture.width + _GAP
            for number, (line, color) in enumerate(cell.lines):
                draw.text((left, top + picture_space + number * _LINE), line, color, font)
        top += picture_space + text_space + _MARGIN
    return sheet


def _scaled(images: Sequence[Image.Image]) -> list[Image.Image]:
    """Pictures that fill a cell side by side, small ones enlarged."""
    width = (_CELL - _GAP * (len(images) - 1)) // len(images)
    scaled = []
    for image in images:
        factor = min(width / image.width, _CELL / image.height)
        size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
        scaled.append(image.resize(size, Image.Resampling.BICUBIC))
    return scaled


def _font() -> tuple[ImageFont.FreeTypeFont, Callable[[str], bool]]:
    """DejaVu Sans, which comes with matplotlib and has most alphabets, and which characters it has."""
    import matplotlib
    from matplotlib.ft2font import FT2Font

    path = str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))
    known = FT2Font(path).get_charmap()
    return ImageFont.truetype(path, _FONT_SIZE), lambda letter: ord(letter) in known


def _paragraphs(
    texts: Sequence[str], font: ImageFont.FreeTypeFont, is_known: Callable[[str], bool]
) -> list[str]:
    """The lines of several texts, of which each has its part of the space."""
    share = max(1, _TEXT_LINES // max(1, len(texts)))
    return [line for text in texts for line in _wrapped(text, font, is_known, share)]


def _wrapped(
    text: str, font: ImageFont.FreeTypeFont, is_known: Callable[[str], bool], most: int
) -> list[str]:
    """Lines of whole words that fit a cell; only a word that is longer than a line is divided.

    Characters that the font does not have are shown by their numbers, as in ``<U+661F>``.
    """
    shown = "".join(x if is_known(x) or x.isspace() else f"<U+{ord(x):04X}>" for x in text)
    lines = [""]
    for word in shown.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if font.getlength(longer) <= _CELL:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if font.getlength(lines[-1] + letter) > _CELL:
                lines.append("")
            lines[-1] += letter
    if len(lines) > most:
        last = lines[most - 1]
        while font.getlength(f"{last}\N{HORIZONTAL ELLIPSIS}") > _CELL:
            last = last[:-1]
        lines = [*lines[: most - 1], f"{last}\N{HORIZONTAL ELLIPSIS}"]
    return lines if lines != [""] else []
