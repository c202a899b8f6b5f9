"""What the pictures of the sample corpus show, read back from its `scenes.jsonl`: the truth to score a model against.

Letters: S side of the picture as a model sees it, g patches along a side.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.sample_corpus.world import Scene, Shape
from megatron_vlmoe.sample_corpus.writer import MARKER, shape_map

SCENES_FILE = "scenes.jsonl"
BACKGROUND = "background"
SHOWN_SHARE = 0.1
"""A patch shows a shape if more than this share of its pixels do, as in `data.samples.foreground`."""


def known_scenes(picture: Path) -> dict[Path, Scene]:
    """The scenes of the sample corpus that a picture lies in, by the paths of its pictures; empty for other pictures.

    Raises:
        DataError: its `scenes.jsonl` is damaged.
    """
    for root in picture.absolute().parents:
        if not (root / MARKER).is_file():
            continue
        scenes = {}
        for folder in (root, root / "tasks"):
            file = folder / SCENES_FILE
            if not file.is_file():
                continue
            try:
                for line in file.read_text(encoding="utf-8").splitlines():
                    row = json.loads(line)
                    scenes[folder / row["file"]] = _scene(row["scene"])
            except (ValueError, TypeError, KeyError) as error:
                raise DataError(
                    f"{file}: damaged: not scenes of a sample corpus ({error})"
                ) from error
        return scenes
    return {}


def _scene(row: dict[str, object]) -> Scene:
    shapes = row["shapes"]
    assert isinstance(shapes, list)
    return Scene(**{**row, "shapes": tuple(Shape(**shape) for shape in shapes)})  # type: ignore[arg-type]


def patch_truth(scene: Scene, size: int, grid: int) -> tuple[list[str], list[str]]:
    """Colour and kind of what each patch shows, row by row: ``[g * g]`` each.

    The picture is resized as a whole to a square of S, as models see it. A patch shows the shape with most of its
    pixels, or where all shapes together have a tenth of them at most, the background: its colour, and `background`
    as kind.
    """
    square = shape_map(scene).resize((size, size), Image.Resampling.NEAREST)
    side = size // grid
    cells: npt.NDArray[np.uint8] = np.asarray(square).reshape(grid, side, grid, side)
    patches = cells.transpose(0, 2, 1, 3).reshape(grid * grid, side * side)
    colors, kinds = [], []
    for patch in patches:
        counts = np.bincount(patch, minlength=1 + len(scene.shapes))
        if counts[1:].sum() > SHOWN_SHARE * patch.size:
            shape = scene.shapes[int(counts[1:].argmax())]
            colors.append(shape.color)
            kinds.append(shape.kind)
        else:
            # Told apart from a shape of the same colour, if there ever is one.
            colors.append(f"{scene.background} {BACKGROUND}")
            kinds.append(BACKGROUND)
    return colors, kinds
