"""The page of the routing explorer: one HTML file with pictures, decisions and measures inside, for any browser."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_vlmoe import __version__
from megatron_vlmoe.analysis.routing import FIRST, IMAGE, LAST, PADDING, TEXT, Item, Trace
from megatron_vlmoe.analysis.routing_figures import expert_colors, ink_on, words_by_expert
from megatron_vlmoe.runtime.pages import write_page

Array = npt.NDArray[Any]
SHOWN = 100
"""Items on the page; measures are over all."""
WORDS = 24
_PICTURE_BYTES = 5_500_000
"""Encoded pictures together; with the decisions the page stays below 10 MB."""
_QUALITIES = (88, 75, 60, 45, 30)


def write_routing_page(
    summary: Mapping[str, Any], trace: Trace, items: Sequence[Item], folder: Path
) -> Path:
    """Writes `routing.html`; returns it.

    Raises:
        FileError: it cannot be written.
    """
    page = folder / "routing.html"
    content = page_content(summary, trace, items)
    template = Path(__file__).with_name("routing.html.j2")
    write_page(page, template, {}, content=content, summary=summary, version=__version__)
    return page


def page_content(summary: Mapping[str, Any], trace: Trace, items: Sequence[Item]) -> dict[str, Any]:
    """What the script of the page reads: the summary, the items, and of every router what it decided.

    Of a router, `images` has the decisions about patches as bytes in base64: for each item on the page [I_CLS] and
    the patches, of each every choice. `expert` holds 2 times the expert plus 1 where it was kept (65535: the item was
    not read), as 16-bit integers with the low byte first; `gate` 255 times the gate. `texts` has for every item
    [place, choices, gates, kept] of each token.
    """
    pictures = _pictures(items[:SHOWN])
    shown = [
        {
            "name": item.name,
            "picture": picture,
            "caption": item.caption,
            "pieces": item.pieces,
            "wordOf": item.word_of_piece,
        }
        for item, picture in zip(items, pictures)
    ]
    grid = max(item.grid for item in items)
    routers = []
    for number, known in enumerate(summary["routers"]):
        rows, entry = trace.rows(number), dict(known)
        if (rows["modality"] == IMAGE).any():
            entry["images"] = _image_decisions(rows, len(shown), 1 + grid**2)
        if (rows["modality"] == TEXT).any():
            entry["texts"] = _text_decisions(rows, len(shown))
            counts = words_by_expert(entry, rows, items)
            entry["words"] = [
                sorted(count.items(), key=lambda one: (-one[1], one[0]))[:WORDS] for count in counts
            ]
        routers.append(entry)
    most = max(router.experts for router in trace.routers)
    colors = expert_colors(most)
    return {
        "grid": grid,
        "total": len(items),
        "topk": summary["experts_per_token"],
        "permutations": summary["permutations"],
        "items": shown,
        "routers": routers,
        "consecutive": summary["consecutive"],
        "colors": colors,
        "inks": [ink_on(color) for color in colors],
        "places": {"first": FIRST, "last": LAST, "padding": PADDING},
    }


def _pictures(items: Sequence[Item]) -> list[str]:
    """The pictures as data URLs, in the best quality in which they are not too large together; empty without one."""
    encoded: list[bytes] = []
    for quality in _QUALITIES:
        encoded = []
        for item in items:
            buffer = io.BytesIO()
            if item.display is not None:
                item.display.save(buffer, format="JPEG", quality=quality, optimize=True)
            encoded.append(buffer.getvalue())
        if sum(map(len, encoded)) <= _PICTURE_BYTES:
            break
    return [
        f"data:image/jpeg;base64,{base64.b64encode(data).decode()}" if data else ""
        for data in encoded
    ]


def _image_decisions(rows: Mapping[str, Array], items: int, tokens: int) -> dict[str, str]:
    k = rows["expert"].shape[1]
    expert = np.full((items, tokens, k), 65535, dtype="<u2")
    gate = np.zeros((items, tokens, k), dtype=np.uint8)
    own = (rows["modality"] == IMAGE) & (rows["item"] < items)
    at = (rows["item"][own], rows["place"][own] + 1)
    expert[at] = 2 * rows["expert"][own] + rows["kept"][own]
    gate[at] = np.rint(255 * np.clip(rows["gate"][own], 0.0, 1.0))
    return {
        "expert": base64.b64encode(expert.tobytes()).decode(),
        "gate": base64.b64encode(gate.tobytes()).decode(),
    }


def _text_decisions(rows: Mapping[str, Array], items: int) -> list[list[Any]]:
    found: list[list[Any]] = [[] for _ in range(items)]
    own = (rows["modality"] == TEXT) & (rows["item"] < items) & (rows["place"] != PADDING)
    for item, *token in zip(
        rows["item"][own].tolist(),
        rows["place"][own].tolist(),
        rows["expert"][own].tolist(),
        np.round(rows["gate"][own], 3).tolist(),
        rows["kept"][own].astype(int).tolist(),
    ):
        found[item].append(token)
    return found
