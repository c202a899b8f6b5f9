"""A page about one evaluation: scores, answers and sample predictions, in one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import jinja2
from PIL import Image

from megatron_vlmoe.data.augment import decode_image
from megatron_vlmoe.runtime.files import write_text_atomic

LONGER_SIDE = 320
"""Pixels to which pictures are scaled down."""

_JPEG_QUALITY = 85
_TEMPLATE = "report.html.j2"


@dataclass(frozen=True)
class CountRow:
    """One bar, or a pair of bars, of `Counts`; `true` is None where there is nothing to compare with."""

    name: str
    predicted: int
    true: Optional[int] = None


@dataclass(frozen=True)
class Counts:
    """How often something was said, and how often it is true, as bars.

    Args:
        title: heading.
        note: what is counted.
        names: of `predicted` and `true` in every row; the second may be empty.
        rows: at least one.
    """

    title: str
    note: str
    names: tuple[str, str]
    rows: Sequence[CountRow]

    def percent(self, value: int) -> str:
        """Length of a bar relative to the longest."""
        longest = max(max(row.predicted, row.true or 0) for row in self.rows)
        return f"{100.0 * value / max(longest, 1):.1f}"


@dataclass(frozen=True)
class Example:
    """One sample and what the model made of it.

    Args:
        images: encoded JPEG, PNG or WebP pictures, shown side by side.
        fields: (name, text) in the order in which they are shown, such as ("question", "What colour ...?").
        gained: what the prediction scores, 0 (wrong) to 1 (right); None: there is no label.
        labels: below the pictures, one for each; empty: none.
    """

    images: tuple[bytes, ...]
    fields: tuple[tuple[str, str], ...]
    gained: Optional[float]
    labels: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """`right`, `partly`, `wrong` or `open`."""
        return kind_of(self.gained)

    @property
    def mark(self) -> str:
        """What the prediction is worth, in words."""
        if self.gained is None:
            return "not scored"
        if self.kind == "partly":
            return f"{self.gained:.2g} of 1"
        return "\N{CHECK MARK} right" if self.kind == "right" else "\N{BALLOT X} wrong"


@dataclass(frozen=True)
class Report:
    """What the page shows, from top to bottom.

    Args:
        title: heading.
        headlines: the main score of every labelled split: its name, such as "val/accuracy, percent", the value, and
            what it compares with, such as "guessing: 50".
        notes: sentences below them: the model, splits without labels.
        counts: what was predicted how often.
        chosen: sentences that say how the examples were chosen.
        examples: in the order in which they are shown.
        metrics: all scores, folded; name -> value; one that is not finite is shown as a dash.
        facts: settings, folded; (name, text), such as ("seed", "1234").
    """

    title: str
    headlines: Sequence[tuple[str, float, str]] = ()
    notes: Sequence[str] = ()
    counts: Sequence[Counts] = ()
    chosen: Sequence[str] = ()
    examples: Sequence[Example] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    facts: Sequence[tuple[str, str]] = ()


def kind_of(gained: Optional[float]) -> str:
    """`right` (1), `partly` (in between), `wrong` (0) or `open` (None)."""
    if gained is None:
        return "open"
    return "right" if gained >= 1.0 else "partly" if gained > 0.0 else "wrong"


def write_report(path: Path, report: Report) -> None:
    """Writes the page; the file appears whole or not at all.

    Args:
        path: an ``.html`` file; its folder is made.
        report: what is shown; all texts are escaped.

    Raises:
        DataError: a picture that cannot be read; the message names the example.
        OSError: the file cannot be written; the message names it.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    # Of every picture of every example its name, its data URL and what stands below it.
    pictures = []
    for place, example in enumerate(report.examples, start=1):
        names = [f"Picture {n} of example {place}" for n in range(1, len(example.images) + 1)]
        urls = [_embedded(data, name) for data, name in zip(example.images, names)]
        labels = example.labels or ("",) * len(names)
        pictures.append(list(zip(names, urls, labels, strict=True)))
    page = environment.get_template(_TEMPLATE).render(report=report, pictures=pictures)
    write_text_atomic(path, page + "\n")


def number(value: float) -> str:
    """Counts (int) as they are, scores (float) to two places, a dash where there is none."""
    if not math.isfinite(value):
        return "\N{EN DASH}"
    return str(value) if isinstance(value, int) else f"{value:.2f}"


def _embedded(data: bytes, where: str) -> str:
    """The picture, no larger than needed, as a data URL."""
    picture = decode_image(data, where)
    picture.thumbnail((LONGER_SIDE, LONGER_SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=_JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"
