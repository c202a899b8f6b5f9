"""Static pictures of a routing trace, as Fig. 3 of the paper: patches and words by expert, and experts on pictures.

Loads, drops and classes are those of `routing.json`. Letters: E experts, g patches along a side.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import numpy as np
import numpy.typing as npt
from PIL import Image

from megatron_vlmoe.analysis.plots import plain, save_figure
from megatron_vlmoe.analysis.routing import FIRST, IMAGE, INPUTS, TEXT, Item, Trace
from megatron_vlmoe.analysis.routing_measures import top_gates

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = npt.NDArray[Any]
Summary = Mapping[str, Any]

# Okabe and Ito's colours for all kinds of colour vision; the last is a grey in the place of their black.
_HUES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#7f7f7f")
# Towards white (above 0) or black, by turns: no set of 32 colours is told apart by everyone, so that wherever an expert
# is shown its number is written too.
_SHADES = (0.0, 0.5, -0.4, 0.72)
PATCHES = 14
WORDS = 9
PICTURES = 6
_TILE = 72
_CLASS_COLORS = (
    "#4477aa",
    "#ccbb44",
    "#228833",
    "#aa3377",
    "#66ccee",
    "#ee6677",
    "#bbbbbb",
    "#000000",
)


def expert_colors(count: int) -> list[str]:
    """A colour for every expert, as ``#rrggbb``; after 32 they come again."""
    colors = []
    for number in range(count):
        hue = _HUES[number % len(_HUES)]
        shade = _SHADES[number // len(_HUES) % len(_SHADES)]
        channels = [int(hue[at : at + 2], 16) / 255.0 for at in (1, 3, 5)]
        target = 1.0 if shade > 0.0 else 0.0
        mixed = [value + abs(shade) * (target - value) for value in channels]
        colors.append("#" + "".join(f"{round(255 * value):02x}" for value in mixed))
    return colors


def ink_on(color: str) -> str:
    """Black or white, whichever is easier to read on a colour."""
    red, green, blue = (int(color[at : at + 2], 16) / 255.0 for at in (1, 3, 5))
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.45 else "#ffffff"


def draw_all(summary: Summary, trace: Trace, items: Sequence[Item], folder: Path) -> list[Path]:
    """Draws patches, words and overlays of every block into a folder; returns the files."""
    import matplotlib

    matplotlib.use("Agg")
    made = []
    for number in _drawn(trace):
        router, rows = summary["routers"][number], trace.rows(number)
        name = f"block_{router['block']}"
        if router["pool"] in ("shared", "vl"):
            name += f"_{router['pool']}"
        figures: list[tuple[str, Figure]] = []
        if (rows["modality"] == IMAGE).any():
            figures.append(("patches", patch_figure(router, rows, items)))
            figures.append(("overlay", overlay_figure(router, rows, items)))
        if (rows["modality"] == TEXT).any():
            figures.append(("words", word_figure(router, rows, items)))
        made += [save_figure(figure, folder / f"{kind}_{name}.png") for kind, figure in figures]
    return made


def _drawn(trace: Trace) -> list[int]:
    """Of every pool of every block the router with the first of `INPUTS` that meets it."""
    chosen: dict[tuple[int, str], int] = {}
    for number, router in enumerate(trace.routers):
        known = chosen.get((router.block, router.pool))
        order = INPUTS.index(router.input)
        if known is None or order < INPUTS.index(trace.routers[known].input):
            chosen[router.block, router.pool] = number
    return sorted(chosen.values())


def _title(router: Summary, what: str) -> str:
    read = {"pairs": "pairs", "images": "pictures alone", "texts": "captions alone"}
    return f"{what}: block {router['block']}, {router['pool']} experts, {read[router['input']]}"


def _draw_load(axis: Axes, router: Summary) -> None:
    """Bars of the load of every expert, the dropped part of it hatched; the upper left corner of the figure."""
    total = max(router["assignments"], 1)
    shares = np.array(router["load"]) / total
    dropped = np.array(router["dropped_load"]) / total
    numbers = np.arange(router["experts"])
    colors = expert_colors(router["experts"])
    axis.barh(numbers, shares - dropped, color=colors, height=0.8)
    axis.barh(
        *(numbers, dropped),
        left=shares - dropped,
        height=0.8,
        color="white",
        edgecolor=colors,
        hatch="/////",
        linewidth=0.8,
    )
    axis.axvline(1.0 / router["experts"], color="black", linestyle="--", linewidth=0.9)
    for number, share, lost in zip(numbers, router["load"], router["dropped_load"]):
        # What was counted, for whoever wants to count again.
        axis.annotate(
            f"{share}" + (f" ({lost} dropped)" if lost else ""),
            (shares[number], number),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8},
        )
    axis.set_yticks(numbers, [f"expert {number}" for number in numbers], fontsize=8)
    for label, color in zip(axis.get_yticklabels(), colors):
        label.set_bbox({"facecolor": color, "edgecolor": "none", "boxstyle": "round,pad=0.25"})
        label.set_color(ink_on(color))
    axis.set_ylim(router["experts"] - 0.5, -0.5)
    axis.set_xlim(0.0, max(1.6 * float(shares.max()), 1.2 / router["experts"]))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.tick_params(axis="x", labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title("share of tokens\n(hatched: dropped; dashes: even share)", fontsize=8)


def patch_figure(router: Summary, rows: Mapping[str, Array], items: Sequence[Item]) -> Figure:
    """For every expert its load and the patches that go to it with the largest gates, with what is around them."""
    from matplotlib.figure import Figure

    experts = router["experts"]
    own = {
        name: values[(rows["modality"] == IMAGE) & (rows["place"] >= 0)]
        for name, values in rows.items()
    }
    sheet = np.full((experts * _TILE, PATCHES * _TILE, 3), 255, dtype=np.uint8)
    for number in range(experts):
        found = top_gates(
            *(own["expert"][:, 0], own["gate"][:, 0], own["item"], own["place"]),
            number=number,
            count=PATCHES,
        )
        for column, (item, place, _) in enumerate(found):
            tile = _patch_with_surroundings(items[item], place, _TILE - 6)
            top, left = number * _TILE + 3, column * _TILE + 3
            sheet[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    figure = Figure(figsize=(13, max(2.6, 0.62 * experts + 1.3)), constrained_layout=True)
    load, patches = figure.subplots(1, 2, width_ratios=(1, 3.3))
    _draw_load(load, router)
    patches.imshow(sheet, aspect="auto", interpolation="nearest")
    patches.axis("off")
    patches.set_title(
        "patches (framed) that it is the first choice of with the largest gates, one of each picture first",
        fontsize=8,
    )
    figure.suptitle(_title(router, "Patches by expert"), fontsize=11)
    return figure


def _patch_with_surroundings(item: Item, place: int, side: int) -> Array:
    """A patch in its frame with half a patch around it: uint8 ``[side, side, 3]``, grey beyond the picture."""
    assert item.display is not None
    row, column = divmod(place, item.grid)
    image, width = item.display, item.display.width / item.grid
    box = ((column - 0.5) * width, (row - 0.5) * width, (column + 1.5) * width, (row + 1.5) * width)
    tile = np.array(
        image.transform(
            (side, side),
            Image.Transform.EXTENT,
            box,
            Image.Resampling.BICUBIC,
            fillcolor=(225,) * 3,
        )
    )
    near, far = side // 4, side - side // 4 - 1
    for inset, value in ((0, 0), (1, 255)):
        low, high = near + inset, far - inset
        tile[low, low : high + 1] = tile[high, low : high + 1] = value
        tile[low : high + 1, low] = tile[low : high + 1, high] = value
    return tile


def words_by_expert(
    router: Summary, rows: Mapping[str, Array], items: Sequence[Item]
) -> list[Counter[str]]:
    """How many pieces of each word have each expert as first choice, punctuation apart ``[E]``."""
    counts: list[Counter[str]] = [Counter() for _ in range(router["experts"])]
    own = (rows["modality"] == TEXT) & (rows["place"] >= 0)
    contents = {item: items[item].piece_labels for item in set(rows["item"][own].tolist())}
    for item, place, expert in zip(
        rows["item"][own].tolist(), rows["place"][own].tolist(), rows["expert"][own, 0].tolist()
    ):
        labels = contents[item]
        alone = labels["word class"][place] == "punctuation"
        counts[expert][f"“{labels['word'][place]}”" if alone else labels["word"][place]] += 1
    return counts


def word_figure(router: Summary, rows: Mapping[str, Array], items: Sequence[Item]) -> Figure:
    """For every expert its load, the classes of its words, and its most frequent words."""
    from matplotlib.figure import Figure

    experts = router["experts"]
    figure = Figure(figsize=(13, max(2.8, 0.36 * experts + 1.7)), constrained_layout=True)
    load, classes, words = figure.subplots(1, 3, width_ratios=(1.1, 1.5, 1.8))
    _draw_load(load, router)
    counted: Optional[Summary] = router["classes"].get("word class")
    if counted is not None:
        counts = np.array(counted["counts"])
        totals = counts.sum(axis=1)
        shares = counts / np.maximum(totals, 1)[:, None]
        left = np.zeros(experts)
        for number, name in enumerate(counted["names"]):
            color = _CLASS_COLORS[number % len(_CLASS_COLORS)]
            classes.barh(
                np.arange(experts),
                shares[:, number],
                left=left,
                color=color,
                label=name,
                height=0.8,
            )
            left += shares[:, number]
        classes.set_xlim(0.0, 1.0)
        classes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        classes.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.1))
    classes.set_ylim(experts - 0.5, -0.5)
    classes.set_yticks([])
    classes.tick_params(axis="x", labelsize=7)
    classes.spines[["top", "right", "left"]].set_visible(False)
    classes.set_title("classes of its words", fontsize=8)
    words.set_ylim(experts - 0.5, -0.5)
    words.set_xlim(0, 1)
    words.axis("off")
    words.set_title("its most frequent words, and how many pieces of them", fontsize=8)
    for number, count in enumerate(words_by_expert(router, rows, items)):
        common = sorted(count.items(), key=lambda one: (-one[1], one[0]))[:WORDS]
        text = "   ".join(f"{word} {times}" for word, times in common) or "no word"
        words.text(0.0, number, plain(text), va="center", fontsize=8)
    figure.suptitle(_title(router, "Words by expert"), fontsize=11)
    return figure


def overlay_figure(router: Summary, rows: Mapping[str, Array], items: Sequence[Item]) -> Figure:
    """Some pictures, and beside each the expert of every patch: colour and number, a cross where it was dropped."""
    from matplotlib.collections import LineCollection
    from matplotlib.colors import to_rgba
    from matplotlib.figure import Figure

    own = rows["modality"] == IMAGE
    met = list(dict.fromkeys(rows["item"][own].tolist()))[:PICTURES]
    colors = expert_colors(router["experts"])
    lines = -(-len(met) // 3)
    height = 2.35 * lines + 0.6
    # Laid out by hand: finding a layout around every number takes longer than drawing them.
    figure = Figure(figsize=(13, height))
    axes = figure.subplots(lines, 6, squeeze=False)
    edges = {"left": 0.005, "right": 0.995, "bottom": 0.01, "top": 1 - 0.62 / height}
    figure.subplots_adjust(**edges, wspace=0.03, hspace=0.12)
    for axis in axes.flat:
        axis.axis("off")
    for number, item in enumerate(met):
        line, column = divmod(number, 3)
        image = items[item].display
        assert image is not None
        picture, overlaid = axes[line, 2 * column : 2 * column + 2]
        grid = items[item].grid
        picture.imshow(np.asarray(image), extent=(0, grid, grid, 0))
        # Pale and grey, so that the colours of the experts stay what they are.
        pale = 128 + np.asarray(image.convert("L")) // 2
        overlaid.imshow(pale, cmap="gray", vmin=0, vmax=255, extent=(0, grid, grid, 0))
        picture.set_title(plain(items[item].name[-34:]), fontsize=6)
        patches = own & (rows["item"] == item) & (rows["place"] != FIRST)
        places, experts = rows["place"][patches], rows["expert"][patches, 0]
        kept = rows["kept"][patches, 0]
        cells = np.empty((grid * grid, 4))
        cells[places] = [to_rgba(colors[expert], 0.75) for expert in experts]
        overlaid.imshow(
            cells.reshape(grid, grid, 4), extent=(0, grid, grid, 0), interpolation="nearest"
        )
        for place, expert in zip(places.tolist(), experts.tolist()):
            row, at = divmod(place, grid)
            overlaid.text(
                *(at + 0.5, row + 0.54, str(expert)),
                ha="center",
                va="center",
                fontsize=min(7.0, 62.0 / grid),
                color=ink_on(colors[expert]),
            )
        lost = places[~kept]
        # A cross with room for the number.
        corners = [
            [
                (column + x + side * (1 - 2 * x), row + y + side * (1 - 2 * y))
                for side in (0.08, 0.28)
            ]
            for row, column in (divmod(place, grid) for place in lost.tolist())
            for x, y in ((0, 0), (0, 1), (1, 0), (1, 1))
        ]
        overlaid.add_collection(LineCollection(corners, colors="black", linewidths=0.9))
        overlaid.hlines(range(1, grid), 0, grid, colors="white", linewidths=0.4)
        overlaid.vlines(range(1, grid), 0, grid, colors="white", linewidths=0.4)
        overlaid.set_xlim(0, grid)
        overlaid.set_ylim(grid, 0)
        overlaid.set_title(f"{len(lost)} of {grid * grid} dropped (crossed)", fontsize=6)
    figure.suptitle(_title(router, "The first choice of every patch"), fontsize=11)
    return figure
