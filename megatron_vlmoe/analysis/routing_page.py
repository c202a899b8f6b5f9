"""The page of the routing explorer: one HTML file with pictures, decisions and measures inside, for any browser."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
import numpy.typing as npt
from PIL import Image

from megatron_vlmoe import __version__
from megatron_vlmoe.analysis.routing import FIRST, IMAGE, LAST, PADDING, TEXT, Item, Trace
from megatron_vlmoe.analysis.routing_figures import expert_colors, ink_on, words_by_expert
from megatron_vlmoe.runtime.pages import write_page

Array = npt.NDArray[Any]
SHOWN = 100
"""Items on the page at most; measures are over all."""
WORDS = 24
PAGE_BYTES = 9_500_000
"""What the page holds besides its script at most: pictures, decisions and measures."""
_PICTURES = ((88, 1.0), (75, 1.0), (60, 1.0), (45, 1.0), (30, 1.0), (30, 0.6))
"""JPEG quality and scale of the pictures, of which the first with which they fit is taken."""


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
    the patches, of each every choice. `expert` holds 2 times the expert plus 1 where it was kept, or the largest number
    where the item was not read, in a byte, or from 128 experts on in two, the low one first; `gate` 255 times the gate.
    `texts` has for every item [place, choices, gates, kept] of each token. Pictures are as good, and items as many, as
    `PAGE_BYTES` allows.
    """
    shown = min(SHOWN, len(items))
    while True:
        content = _decisions(summary, trace, items, shown)
        room = PAGE_BYTES - len(json.dumps(content))
        pictures = _pictures(items[:shown], room)
        if pictures is not None or shown == 1:
            break
        shown = -(-3 * shown // 4) if shown > 4 else shown - 1
    for entry, picture in zip(content["items"], pictures or [""]):
        entry["picture"] = picture
    return content


def _decisions(
    summary: Mapping[str, Any], trace: Trace, items: Sequence[Item], shown: int
) -> dict[str, Any]:
    """The content without pictures, for so many items."""
    described = [
        {
            "name": item.name,
            "caption": item.caption,
            "pieces": item.pieces,
            "wordOf": item.word_of_piece,
        }
        for item in items[:shown]
    ]
    grid = max(item.grid for item in items)
    routers = []
    for number, known in enumerate(summary["routers"]):
        rows, entry = trace.rows(number), dict(known)
        if (rows["modality"] == IMAGE).any():
            entry["images"] = _image_decisions(rows, shown, 1 + grid**2, known["experts"])
        if (rows["modality"] == TEXT).any():
            entry["texts"] = _text_decisions(rows, shown)
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
        "items": described,
        "routers": routers,
        "consecutive": summary["consecutive"],
        "colors": colors,
        "inks": [ink_on(color) for color in colors],
        "places": {"first": FIRST, "last": LAST, "padding": PADDING},
    }


def _pictures(items: Sequence[Item], room: int) -> Optional[list[str]]:
    """The pictures as data URLs, empty without one, in the best quality that has room; None if none has."""
    for quality, scale in _PICTURES:
        found: list[str] = []
        left = room
        for item in items:
            found.append(_data_url(item.display, quality, scale))
            left -= len(found[-1])
            if left < 0:
                break
        else:
            return found
    return None


def _data_url(picture: Optional[Image.Image], quality: int, scale: float) -> str:
    if picture is None:
        return ""
    if scale < 1.0:
        side = round(scale * picture.width)
        picture = picture.resize((side, side), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=quality, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _image_decisions(
    rows: Mapping[str, Array], items: int, tokens: int, experts: int
) -> dict[str, str]:
    k, kind = rows["expert"].shape[1], "<u1" if experts < 128 else "<u2"
    expert = np.full((items, tokens, k), np.iinfo(kind).max, dtype=kind)
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
