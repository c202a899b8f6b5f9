"""A page about one evaluation: facts, scores and sample predictions, in a single HTML file that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from PIL import Image

from megatron_vlmoe.data.augment import decode_image
from megatron_vlmoe.runtime.files import write_text_atomic

LONGER_SIDE = 320
"""Pixels to which pictures are scaled down."""

_JPEG_QUALITY = 85

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --card: #f6f8fa; --page: #ffffff;
  --right: #116329; --wrong: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9aa4af; --line: #373e47; --card: #1c2128;
  --page: #0f1318; --right: #57d47a; --wrong: #ff8b82; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 3rem; max-width: 76rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 1rem; }
h2 { font-size: 1.1rem; margin: 2rem 0 .75rem; }
table { border-collapse: collapse; }
th, td { padding: .3rem 1.25rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left; font-weight: 400;
  vertical-align: top; overflow-wrap: anywhere; }
th { color: var(--soft); white-space: nowrap; }
td.number { text-align: right; padding-right: 0; font-variant-numeric: tabular-nums; }
.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1rem; }
article { display: flex; flex-direction: column; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; padding: .85rem; }
.pictures { display: flex; flex-wrap: wrap; gap: .5rem; margin-bottom: .6rem; }
.pictures img { flex: 1 1 6rem; min-width: 0; max-width: 100%; max-height: 14rem; object-fit: contain;
  border-radius: 4px; }
dl { margin: 0; }
dt { color: var(--soft); font-size: .8rem; }
dd { margin: 0 0 .4rem; overflow-wrap: anywhere; }
.mark { margin: auto 0 0; padding-top: .3rem; font-weight: 600; }
.right { color: var(--right); } .wrong { color: var(--wrong); } .open { color: var(--soft); }
""".strip()


@dataclass(frozen=True)
class Example:
    """One sample and what the model made of it.

    Args:
        images: encoded JPEG, PNG or WebP pictures, shown side by side.
        fields: (name, text) in the order in which they are shown, such as ("question", "What colour ...?").
        correct: whether the prediction is right; None: unknown.
    """

    images: tuple[bytes, ...]
    fields: tuple[tuple[str, str], ...]
    correct: Optional[bool]


def write_report(
    path: Path,
    title: str,
    facts: Sequence[tuple[str, str]],
    metrics: Mapping[str, float],
    examples: Sequence[Example],
) -> None:
    """Writes the page; the file appears whole or not at all.

    Args:
        path: an ``.html`` file; its folder is made.
        title: heading.
        facts: (name, text), such as ("checkpoint", "...").
        metrics: name -> value; one that is not finite is shown as a dash.
        examples: in the order in which they are shown.

    Raises:
        DataError: a picture that cannot be read; the message names the example.
        OSError: the file cannot be written; the message names it.
    """
    write_text_atomic(path, "\n".join(_page(title, facts, metrics, examples)) + "\n")


def _page(
    title: str,
    facts: Sequence[tuple[str, str]],
    metrics: Mapping[str, float],
    examples: Sequence[Example],
) -> Iterator[str]:
    yield "<!DOCTYPE html>"
    yield '<html lang="en">'
    yield '<head><meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{html.escape(title)}</title>"
    yield f"<style>\n{_STYLE}\n</style></head>"
    yield f"<body><main><h1>{html.escape(title)}</h1>"
    if facts:
        yield from _table(((name, text) for name, text in facts), "")
    if metrics:
        yield "<h2>Scores</h2>"
        yield from _table(((name, _number(value)) for name, value in metrics.items()), "number")
    if examples:
        yield f"<h2>Examples ({len(examples)})</h2>"
        yield '<div class="examples">'
        for number, example in enumerate(examples, start=1):
            yield from _card(example, number)
        yield "</div>"
    yield "</main></body></html>"


def _table(rows: Iterator[tuple[str, str]], kind: str) -> Iterator[str]:
    cell = f'<td class="{kind}">' if kind else "<td>"
    yield "<table>"
    for name, text in rows:
        yield f'<tr><th scope="row">{html.escape(name)}</th>{cell}{html.escape(text)}</td></tr>'
    yield "</table>"


def _number(value: float) -> str:
    """Whole numbers as they are, others to two places."""
    if not math.isfinite(value):
        return "\N{EN DASH}"
    return str(int(value)) if isinstance(value, int) else f"{value:.2f}"


def _card(example: Example, number: int) -> Iterator[str]:
    kind, mark = {
        True: ("right", "\N{CHECK MARK} right"),
        False: ("wrong", "\N{BALLOT X} wrong"),
        None: ("open", "not scored"),
    }[example.correct]
    yield "<article>"
    if example.images:
        yield '<div class="pictures">'
        for index, data in enumerate(example.images, start=1):
            name = f"Picture {index} of example {number}"
            yield f'<img alt="{name}" src="{_embedded(data, name)}">'
        yield "</div>"
    yield "<dl>"
    for name, text in example.fields:
        yield f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>"
    yield "</dl>"
    yield f'<p class="mark {kind}">{mark}</p></article>'


def _embedded(data: bytes, where: str) -> str:
    """The picture, no larger than needed, as a data URL."""
    picture = decode_image(data, where)
    picture.thumbnail((LONGER_SIDE, LONGER_SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=_JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"
