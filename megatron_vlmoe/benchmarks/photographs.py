"""Generated JPEGs for benchmarks of loading and indexing."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
from PIL import Image


def photographs(count: int, width: int, height: int, seed: int) -> Iterator[bytes]:
    """JPEG files that cost about as much to decode as photographs: smooth shapes under fine noise."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        coarse = rng.integers(0, 256, (height // 25 + 1, width // 25 + 1, 3), np.uint8)
        smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        pixels = np.asarray(smooth, np.float32)
        pixels = pixels + rng.normal(0, 6, pixels.shape).astype(np.float32)
        stream = io.BytesIO()
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
        yield stream.getvalue()
