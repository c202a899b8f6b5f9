"""Scenes as pictures: drawn at three times the size with Pillow, then averaged down."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from itertools import product
from typing import Any

from PIL import Image, ImageDraw

from megatron_vlmoe.sample_corpus.world import GRID, Scene, Shape

Rgb = tuple[int, int, int]
Point = tuple[float, float]

SUPERSAMPLING = 3
JPEG_QUALITY = 90
COLOR_VALUES: dict[str, Rgb] = {
    "red": (214, 32, 38),
    "green": (40, 156, 56),
    "blue": (36, 84, 214),
    "yellow": (246, 214, 28),
    "orange": (246, 130, 20),
    "purple": (140, 56, 178),
}
BACKGROUND_VALUES: dict[str, Rgb] = {
    "white": (250, 250, 250),
    "gray": (158, 160, 162),
    "black": (22, 22, 24),
    "beige": (232, 214, 180),
}
RADII = {"small": 0.29, "large": 0.44}
"""As a fraction of the smaller side of a grid cell."""
ARM = 0.32
"""Half the width of a cross's arm."""
CORNERS: dict[str, Sequence[Point]] = {
    # In the box from (-1, -1), top left, to (1, 1).
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": [(0, -0.95), (1, 0.85), (-1, 0.85)],
    "diamond": [(0, -1), (0.75, 0), (0, 1), (-0.75, 0)],
    "cross": [
        (x * c - y * s, x * s + y * c)
        # Each arm is the one before turned by 90 degrees.
        for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))
        for x, y in ((ARM, -1.0), (ARM, -ARM), (1.0, -ARM))
    ],
    "star": [
        (length * math.cos(math.pi * (k / 5 - 0.5)), length * math.sin(math.pi * (k / 5 - 0.5)))
        for k, length in enumerate((1.0, 0.42) * 5)
    ],
}
LETTER_STROKES: dict[str, Sequence[tuple[Point, Point]]] = {
    # In the same box; drawn here so that no font file decides.
    "A": (((-0.9, 1), (0, -1)), ((0, -1), (0.9, 1)), ((-0.5, 0.3), (0.5, 0.3))),
    "E": (((-0.7, -1), (-0.7, 1)), ((-0.7, -1), (0.8, -1)), ((-0.7, 0), (0.6, 0)))
    + (((-0.7, 1), (0.8, 1)),),
    "H": (((-0.8, -1), (-0.8, 1)), ((0.8, -1), (0.8, 1)), ((-0.8, 0), (0.8, 0))),
    "L": (((-0.6, -1), (-0.6, 1)), ((-0.6, 1), (0.8, 1))),
    "T": (((-0.9, -1), (0.9, -1)), ((0, -1), (0, 1))),
    "X": (((-0.8, -1), (0.8, 1)), ((0.8, -1), (-0.8, 1))),
}


def encode_picture(scene: Scene, suffix: str) -> bytes:
    """The picture as a PNG where ``suffix`` is ".png", as a JPEG otherwise.

    It has ``scene.width`` x ``scene.height`` pixels.
    """
    buffer = io.BytesIO()
    how: dict[str, Any] = (
        {"format": "PNG"} if suffix == ".png" else {"format": "JPEG", "quality": JPEG_QUALITY}
    )
    render_picture(scene).save(buffer, **how)
    return buffer.getvalue()


def render_picture(scene: Scene) -> Image.Image:
    """The picture, RGB, ``scene.width`` x ``scene.height`` pixels."""
    size = (scene.width * SUPERSAMPLING, scene.height * SUPERSAMPLING)
    canvas = Image.new("RGB", size, BACKGROUND_VALUES[scene.background])
    for shape in scene.shapes:
        _draw_shape(canvas, shape)
    return canvas.reduce(SUPERSAMPLING)


def _draw_shape(canvas: Image.Image, shape: Shape) -> None:
    cell_width, cell_height = canvas.width / GRID, canvas.height / GRID
    unit = min(cell_width, cell_height)
    center_x = (shape.column + 0.5) * cell_width + shape.shift[0] * unit
    center_y = (shape.row + 0.5) * cell_height + shape.shift[1] * unit
    radius = RADII[shape.size] * unit
    side = 2 * math.ceil(radius) + 1
    mask = Image.new("1", (side, side))
    center = side / 2
    if shape.kind == "circle":
        box = [center - radius, center - radius, center + radius, center + radius]
        ImageDraw.Draw(mask).ellipse(box, fill=1)
    else:
        points = [(center + x * radius, center + y * radius) for x, y in CORNERS[shape.kind]]
        ImageDraw.Draw(mask).polygon(points, fill=1)
    red, green, blue = COLOR_VALUES[shape.color]
    fill = Image.new("RGB", (side, side), (red, green, blue))
    draw, dark = ImageDraw.Draw(fill), (red * 2 // 5, green * 2 // 5, blue * 2 // 5)
    # Coarser on small shapes, or a resized picture would lose it.
    repeats = 4 if shape.size == "large" else 3
    period = side / repeats
    if shape.texture == "striped":
        for number in range(repeats):
            top = (number + 0.3) * period
            draw.rectangle([0, top, side, top + 0.45 * period], fill=dark)
    elif shape.texture == "dotted":
        dot = 0.27 * period
        for row, column in product(range(repeats), range(repeats + 1)):
            x, y = (column + 0.5 * (row % 2)) * period, (row + 0.5) * period
            draw.ellipse([x - dot, y - dot, x + dot, y + dot], fill=dark)
    if shape.letter is not None:
        scale = 0.5 * radius if shape.kind in ("circle", "square") else 0.36 * radius
        # A triangle is widest below its middle.
        middle = center + (0.28 * radius if shape.kind == "triangle" else 0.0)
        for (x0, y0), (x1, y1) in LETTER_STROKES[shape.letter]:
            start = (center + x0 * scale, middle + y0 * scale)
            end = (center + x1 * scale, middle + y1 * scale)
            draw.line([start, end], fill=(0, 0, 0), width=max(2, round(0.15 * radius)))
    canvas.paste(fill, (round(center_x - center), round(center_y - center)), mask)
