"""Pictures, a tokenizer, and the tools of this repository, for tests of what they make."""

from __future__ import annotations

import io
import json
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
WORDS = ["a", "red", "blue", "green", "small", "large", "circle", "square", "star", "left", "two"]
WORDS += ["of", "the", "under", "over"]


def tool(name: str) -> Callable[[Sequence[str]], int]:
    """Runs a tool with words, in this process, and returns its exit status."""
    script = str(ROOT / "tools" / f"{name}.py")

    def main(words: Sequence[str]) -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [script, *words])
            patch.setattr(sys, "path", list(sys.path))
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(script, run_name="__main__")
        assert isinstance(ended.value.code, int)
        return ended.value.code

    return main


def sentence(number: int) -> str:
    """One of many sentences."""
    return " ".join(WORDS[(number * 7 + i * i) % len(WORDS)] for i in range(3 + number % 9))


def write_tokenizer(path: Path) -> str:
    """Trains a tiny tokenizer into a file; returns its name."""
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentence(i) for i in range(300)),
        model_writer=stream,
        vocab_size=70,
        hard_vocab_limit=False,
        bos_id=0,
        pad_id=1,
        eos_id=2,
        unk_id=3,
        control_symbols=["[MASK]"],
        minloglevel=2,
    )
    path.write_bytes(stream.getvalue())
    return str(path)


def picture(seed: int, width: int = 48, height: int = 32) -> Image.Image:
    """Noise."""
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    """The content of an image file."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def files_of(folder: Path) -> list[str]:
    """Names in a folder."""
    return sorted(path.name for path in folder.iterdir())


def rejects_of(prefix: Path | str) -> list[tuple[str, str]]:
    """Record and reason of every rejected one."""
    lines = Path(f"{prefix}.rejects.jsonl").read_text().splitlines()
    return [(row["record"], row["reason"]) for row in map(json.loads, lines)]
