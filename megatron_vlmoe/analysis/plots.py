"""Pictures and tables of what runs logged: losses, accuracy, speed, and what their experts did.

A picture is made of sections, a section of panels. Of one run, what is about experts has a line per block; of several
runs it has a line per run, for the whole pool. `vlmoe plot` puts the sections of runs into one picture, `vlmoe report`
shows their panels one by one.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Mapping, Optional, Sequence

import numpy as np
import yaml

from megatron_vlmoe.config.errors import MetricsError
from megatron_vlmoe.config.yaml_files import parse_yaml
from megatron_vlmoe.runtime.files import open_atomic
from megatron_vlmoe.runtime.json_files import is_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

LOSSES = {
    "mlm": "masked language (texts)",
    "mim": "masked image (images)",
    "vlm_text": "masked captions (pairs)",
    "vlm_image": "masked patches (pairs)",
}

Row = Mapping[str, Any]
Runs = Mapping[str, Sequence[Row]]
"""The logged steps of every run by its name; runs have one colour each, in this order."""
NOT_FINITE = "not finite"
"""What stands where a value is infinite or not a number."""

_RUN_COLORS = (
    *("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#17becf"),
    *("#bcbd22", "#7f7f7f"),
)
LineStyle = Literal["-", "--", ":", "-."]
_LINES: tuple[LineStyle, ...] = ("-", "--", ":", "-.")
_EVALUATED: Mapping[str, Any] = {"marker": "o", "markersize": 3.5, "linewidth": 1.3}
# Parts of a picture's patches: their suffix in the keys, what they are called, and their line.
_PARTS = {
    "": "all patches",
    "_foreground": "foreground patches",
    "_background": "background patches",
}
# The emptiest load that is drawn; below it, an expert that gets nothing would be infinitely far down.
_LOWEST = 1 / 64
# Also of a run that was evaluated and has not logged a step yet.
_NAME = re.compile(r"(?:eval/)?loss/(\w+?)(?:_foreground|_background)?")
_BLOCK = re.compile(r"moe/(\w+)/layer_(\d+)/load_max")
_POOL = re.compile(r"moe/(\w+)/load_max")
_TERM = re.compile(r"moe/(\w+)/layer_\d+/aux/(\w+)")
# What `metrics.jsonl` has besides the scores of a task, which begin with the name of a split.
_NO_SPLITS = ("loss", "eval", "acc", "unigram", "moe")
_NO_SCORES = ("samples", "unlabelled")


def picture_file(output: Path) -> Path:
    """The file of a picture: the suffix says in what format; without one it is PNG, and the name gets it.

    Raises:
        MetricsError: a format that matplotlib does not know.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    target = output if output.suffix else output.with_suffix(".png")
    formats = FigureCanvasBase.get_supported_filetypes()
    if target.suffix[1:].lower() not in formats:
        raise MetricsError(f"{output}: not a picture's name; it may end in .{', .'.join(formats)}")
    return target


def save_figure(figure: Figure, output: Path) -> Path:
    """Writes a figure as the `picture_file` of this name and closes it; returns the file.

    Raises:
        FileError: the file cannot be written.
        MetricsError: a format that matplotlib does not know.
    """
    import matplotlib.pyplot as plt

    target = picture_file(output)
    with open_atomic(target) as file, warnings.catch_warnings():
        # Letters that its font lacks are boxes in the picture; a warning for each would bury everything else.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(file, format=target.suffix[1:], dpi=110)
    plt.close(figure)
    return target


def read_metrics(run: Path) -> list[Row]:
    """The logged steps of a run folder in ascending order, also while the run is going on.

    A line whose step is not above that of the line before is of a run that was resumed there: it takes the place of
    all lines from its step on. A last line without its end is being written, or was when the run was killed, and is
    left out.

    Raises:
        MetricsError: there is no metrics.jsonl, or a line is not an object of numbers with a step.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise MetricsError(f"{path}: no such file")
    try:
        *lines, _ = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError:
        raise MetricsError(f"{path}: not a text file in UTF-8") from None
    rows: list[Row] = []
    for number, line in enumerate(lines, start=1):
        try:
            # What is not finite is null in the files of this program; others write it as it is.
            row = json.loads(line, parse_constant=lambda _: None)
        except (ValueError, RecursionError):
            raise MetricsError(f"{path}: line {number} is not JSON") from None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise MetricsError(f"{path}: line {number} has no step")
        for key, value in row.items():
            if isinstance(value, float) and math.isinf(value):
                row[key] = None
            elif value is not None and not is_number(value):
                raise MetricsError(f"{path}: line {number}: {key} is not a number")
        while rows and rows[-1]["step"] >= row["step"]:
            rows.pop()
        rows.append(row)
    return rows


def series(rows: Sequence[Row], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of a metric where it was logged and is finite."""
    found = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return [step for step, _ in found], [value for _, value in found]


def last_value(rows: Sequence[Row], key: str) -> Optional[float]:
    """The last finite value of a metric, which may be older than the last one; None where there is none."""
    return next((row[key] for row in reversed(rows) if row.get(key) is not None), None)


def last_row(rows: Sequence[Row], key: str) -> Row:
    """The last line that has a metric, also where it is not finite (None); empty where it was never logged."""
    return next((row for row in reversed(rows) if key in row), {})


def divergence(rows: Sequence[Row]) -> str:
    """At which steps training or held-out losses of a run are not finite, in words; empty if at none.

    A step counts where any of the losses is infinite or not a number, as for the state of runs in `vlmoe study`.
    """
    keys = [
        f"{start}loss/{name}" for start in ("", "eval/") for name in ("total", *loss_names(rows))
    ]
    logged = [row for row in rows if any(key in row for key in keys)]
    broken = [any(row.get(key, 0.0) is None for key in keys) for row in logged]
    if not any(broken):
        return ""
    first = broken.index(True)
    if all(broken[first:]):
        return f"losses are not finite from step {logged[first]['step']:,} on"
    return (
        f"losses are not finite at {sum(broken):,} of {len(broken):,} logged steps, the first is step "
        f"{logged[first]['step']:,}"
    )


def run_names(folders: Sequence[str | Path]) -> list[str]:
    """Names of different runs, in their order: their paths from the folder that holds all of them."""
    paths = [Path(folder).resolve() for folder in folders]
    common = Path(os.path.commonpath([path.parent for path in paths]))
    return [path.relative_to(common).as_posix() for path in paths]


def run_folders(folders: Sequence[str | Path]) -> list[Path]:
    """The folders of runs, each once; a folder that only holds the runs of several seeds stands for these."""
    found: dict[Path, Path] = {}
    for folder in map(Path, folders):
        seeds = [path.parent for path in sorted(folder.glob("seed_*/metrics.jsonl"))]
        own = [folder] if (folder / "metrics.jsonl").is_file() or not seeds else seeds
        found |= {path.resolve(): path for path in own}
    return list(found.values())


def experts_of_pools(run: Path) -> dict[str, int]:
    """Experts of every pool, from the run's config.yaml; empty where that is missing or of another kind."""
    try:
        moe = parse_yaml((run / "config.yaml").read_text(encoding="utf-8"))["moe"]
        return {
            "text": int(moe["num_text_experts"]),
            "vision": int(moe["num_vision_experts"]),
            "shared": int(moe["num_vision_experts"]),
            "vl": int(moe["num_vl_experts"]),
        }
    except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError):
        return {}


def pools_of(rows: Sequence[Row]) -> list[str]:
    """The pools of experts that a run logged."""
    return _found(_POOL, rows)


def loss_names(rows: Sequence[Row]) -> list[str]:
    """The single losses of a run, in the order of `LOSSES`; a task has its own."""
    names = [name for name in _found(_NAME, rows) if name not in ("total", "vlm")]
    return sorted(names, key=lambda name: [*LOSSES, name].index(name))


def score_names(rows: Sequence[Row]) -> list[str]:
    """The scores of a downstream task that were ever logged, as `SPLIT/NAME`, in percent."""
    return [
        key
        for key in dict.fromkeys(itertools.chain.from_iterable(rows))
        if "/" in key
        and not key.startswith(_NO_SPLITS)
        and not key.endswith(_NO_SCORES)
        and last_value(rows, key) is not None
    ]


def logs_blocks(rows: Sequence[Row]) -> bool:
    """Whether a run logged its experts block by block (`log.moe_per_layer`)."""
    return bool(_found(_BLOCK, rows))


def _found(pattern: re.Pattern[str], rows: Sequence[Row]) -> list[str]:
    """The first group of a pattern in all keys that it matches, each once, in their order."""
    keys = dict.fromkeys(itertools.chain.from_iterable(rows))
    return list(dict.fromkeys(match[1] for key in keys if (match := pattern.fullmatch(key))))


@dataclass(frozen=True)
class Key:
    """An entry of a legend: what a colour and a line mean."""

    label: str
    color: str = "#555555"
    line: LineStyle = "-"
    marker: str = ""


@dataclass(frozen=True)
class Panel:
    """A small diagram over the steps of runs: its title, what its numbers are, and what draws it."""

    title: str
    unit: str
    draw: Callable[[Axes], None]


@dataclass(frozen=True)
class Section:
    """Panels that belong together, so many in a row, and their legend; those in a column share their scale if asked."""

    title: str
    panels: Sequence[Panel]
    columns: int = 4
    legend: Sequence[Key] = ()
    share: bool = False


def run_keys(runs: Runs) -> list[Key]:
    """The legend of colours of runs; nothing to say of one."""
    colors = itertools.cycle(_RUN_COLORS)
    return [Key(name, color) for name, color in zip(runs, colors)] if len(runs) > 1 else []


def _colored(runs: Runs) -> Iterator[tuple[str, Sequence[Row]]]:
    return zip(itertools.cycle(_RUN_COLORS), runs.values())


def _draw(axis: Axes, rows: Sequence[Row], key: str, scale: float = 1.0, **style: Any) -> None:
    """A line of a metric, with gaps where it is not finite, on an axis of all steps of the run.

    Values that a line would not show, because they have no neighbour, are dots.
    """
    lowest = style.pop("lowest", -math.inf)
    found = [(row["step"], row[key]) for row in rows if key in row]
    if not found:
        return
    values = np.array(
        [math.nan if value is None else max(scale * value, lowest) for _, value in found]
    )
    known = np.isfinite([math.nan, *values, math.nan])
    alone = np.flatnonzero(known[1:-1] & ~known[:-2] & ~known[2:])
    if alone.size:
        style = {"marker": ".", "markevery": list(alone), **style}
        if style["marker"] != ".":
            del style["markevery"]
    axis.plot([step for step, _ in found], values, **style)
    # Otherwise the axis would end with the finite values.
    axis.update_datalim([(rows[0]["step"], 0.0), (rows[-1]["step"], 0.0)], updatey=False)
    axis.autoscale_view(scaley=False)


def _say_not_finite(axis: Axes) -> None:
    """Says of lines that have gaps where these are, once for all lines of a colour."""
    first: dict[Any, tuple[float, int]] = {}
    for line in axis.get_lines():
        gaps = ~np.isfinite(np.asarray(line.get_ydata(), dtype=float))
        if gaps.any():
            place = int(gaps.argmax())
            # So many gaps, or 0 where all that follows is one.
            count = 0 if gaps[place:].all() else int(gaps.sum())
            own = (float(np.asarray(line.get_xdata())[place]), count)
            color = line.get_color()
            first[color] = min(own, first.get(color, own))
    texts: dict[str, list[Any]] = {}
    for color, (step, count) in first.items():
        words = (
            f"at {count} steps" if count > 1 else f"{'at' if count else 'from'} step {step:,.0f}"
        )
        texts.setdefault(f"{NOT_FINITE} {words}", []).append(color)
    for place, (words, colors) in enumerate(itertools.islice(texts.items(), 4)):
        axis.text(
            0.98,
            0.79 - 0.09 * place,
            words,
            transform=axis.transAxes,
            color=colors[0] if len(colors) == 1 else "black",
            ha="right",
            fontsize=8,
            bbox={"facecolor": "white", "alpha": 0.6, "edgecolor": "none", "pad": 1.0},
        )


def _from_zero(axis: Axes) -> None:
    """Shows the values from 0 on; if all are 0, up to 1. A line at 0 is not hidden by the frame."""
    top = 1.06 * max(_limits(axis)[1], 0.0) or 1.0
    axis.set_ylim(-0.02 * top, top)


def _limits(axis: Axes) -> tuple[float, float]:
    """The lowest and the highest value of all lines; 0 where there is none."""
    values = np.concatenate([[], *(np.asarray(line.get_ydata()) for line in axis.get_lines())])
    values = values[np.isfinite(values)]
    return (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)


def loss_section(runs: Runs) -> Section:
    """Training and held-out losses of runs, and what guessing by frequency would lose."""
    names = dict.fromkeys(itertools.chain.from_iterable(map(loss_names, runs.values())))

    def panel(loss: str) -> Panel:
        def draw(axis: Axes) -> None:
            for color, rows in _colored(runs):
                _draw(axis, rows, f"loss/{loss}", color=color, alpha=0.5, linewidth=1)
                _draw(axis, rows, f"eval/loss/{loss}", color=color, **_EVALUATED)
            # Runs on the same data have the same line.
            entropies = {last_value(rows, f"unigram/{loss}") for rows in runs.values()}
            for entropy in filter(None, entropies):
                axis.axhline(entropy, color="black", linestyle="--", linewidth=1)
            _from_zero(axis)

        return Panel(LOSSES.get(loss, loss), "nats", draw)

    legend = [
        key
        for start, key in (
            ("loss", Key("training")),
            ("eval/loss", Key("held out", marker="o")),
            ("unigram", Key("guessing by frequency", "black", "--")),
        )
        if any(_has(runs, f"{start}/{name}") for name in names)
    ]
    return Section("Losses", [panel(name) for name in names], legend=legend)


def evaluation_section(runs: Runs) -> Section:
    """Held-out accuracy of pretraining, of images in foreground and background apart, grounding, scores of tasks."""
    names = dict.fromkeys(itertools.chain.from_iterable(map(loss_names, runs.values())))
    scores = dict.fromkeys(itertools.chain.from_iterable(map(score_names, runs.values())))

    def panel(title: str, unit: str, key: str, scale: float, parts: Sequence[str]) -> Panel:
        def draw(axis: Axes) -> None:
            for color, rows in _colored(runs):
                for part, line in zip(parts, _LINES):
                    name = f"{key}{part}"
                    _draw(axis, rows, name, scale, color=color, linestyle=line, **_EVALUATED)
            if unit == "nats":
                axis.axhline(0.0, color="black", linewidth=0.8)
            else:
                _from_zero(axis)

        return Panel(title, unit, draw)

    panels = [
        panel(f"right: {LOSSES.get(name, name)}", "% of positions", f"acc/{name}", 100, [*_PARTS])
        for name in names
        if _has(runs, f"acc/{name}")
    ]
    panels += [panel(name, "%", name, 1, [""]) for name in scores]
    panels += [
        panel(f"grounding: {LOSSES.get(name, name)}", "nats", f"eval/grounding/{name}", 1, [""])
        for name in names
        if _has(runs, f"eval/grounding/{name}")
    ]
    legend = [
        Key(label, line=line, marker="o")
        for (part, label), line in zip(_PARTS.items(), _LINES)
        if any(_has(runs, f"acc/{name}_foreground") for name in names)
    ]
    columns = len(panels) if 4 < len(panels) <= 6 else 4
    return Section("Evaluation on held-out data", panels, columns, legend)


def _has(runs: Runs, key: str) -> bool:
    """Whether a metric was logged, be it finite or not."""
    return any(last_row(rows, key) for rows in runs.values())


def training_section(runs: Runs) -> Section:
    """Gradient norm, learning rate, speed and memory."""
    from matplotlib.ticker import LogLocator

    def panel(title: str, unit: str, key: str, scale: float) -> Panel:
        def draw(axis: Axes) -> None:
            for color, rows in _colored(runs):
                _draw(axis, rows, key, scale, color=color, linewidth=1.2)
            low, high = _limits(axis)
            if key == "grad_norm" and low > 0:
                # A spike is many times its usual size.
                axis.set_yscale("log", subs=[])
                axis.set_ylim(0.5 * low, 2 * high)
                axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            else:
                _from_zero(axis)
            axis.yaxis.set_major_formatter("{x:.3g}")

        return Panel(title, unit, draw)

    known = (
        ("gradient norm", "before clipping", "grad_norm", 1),
        ("learning rate", "of the next step", "lr", 1),
        ("speed", "1,000 token slots per second", "tokens_per_second", 1e-3),
        ("peak memory of rank 0", "GB", "memory_gb", 1),
    )
    return Section("Training", [panel(*entry) for entry in known if _has(runs, entry[2])])


@dataclass(frozen=True)
class _Strand:
    """One line in all panels of a pool: a block of a run, or all its blocks; `aux` are its losses by kind of line."""

    rows: Sequence[Row]
    prefix: str
    color: Any
    aux: Mapping[str, LineStyle]


def expert_section(runs: Runs, experts: Mapping[str, Mapping[str, int]]) -> Optional[Section]:
    """What the experts of runs did; None if none of them has experts.

    Of one run there is a line per block, where it logged them. Of several runs there is a line per run, with the load
    of the fullest and the emptiest expert of any block, and sums and means over blocks.

    Args:
        runs: those without experts take no part.
        experts: number of experts of the pools of every run, where it is known.
    """
    sparse = {name: rows for name, rows in runs.items() if pools_of(rows)}
    if not sparse:
        return None
    every = list(itertools.chain.from_iterable(sparse.values()))
    name, rows = next(iter(sparse.items()))
    keys = dict.fromkeys(itertools.chain.from_iterable(rows))
    blocks = sorted({(int(m[2]), m[1]) for key in keys if (m := _BLOCK.fullmatch(key))})
    strands: dict[str, list[_Strand]] = {pool: [] for pool in pools_of(every)}
    legend: list[Key] = []
    if len(runs) == 1 and blocks:
        title, unit = f"Experts of {name}, block by block", "without weight and coefficient"
        numbers = sorted({number for number, _ in blocks})
        terms = sorted({m[2] for key in keys if (m := _TERM.fullmatch(key))})
        lines = dict(zip(terms, itertools.cycle(_LINES)))
        colors = dict(zip(numbers, block_colors(len(numbers))))
        for number, pool in blocks:
            prefix = f"moe/{pool}/layer_{number}"
            aux = {f"{prefix}/aux/{term}": line for term, line in lines.items()}
            strands[pool].append(_Strand(rows, prefix, colors[number], aux))
        legend = [Key(f"block {number}", color) for number, color in colors.items()]
    else:
        title, unit, terms = "Experts, all blocks of a pool", "coefficient included", []
        for color, rows in _colored(runs):
            for pool in pools_of(rows):
                own = _Strand(rows, f"moe/{pool}", color, {f"loss/aux/{pool}": "-"})
                strands[pool].append(own)
    legend += [Key("fullest expert"), Key("emptiest expert", line=":")]
    if len(terms) > 1:
        legend += [Key(f"auxiliary loss: {term}", line=lines[term]) for term in terms]
    panels: list[Panel] = []
    for pool, lines_of_pool in strands.items():
        counts = {experts.get(name, {}).get(pool, 0) for name in sparse} - {0}
        panels += _pool_panels(pool, lines_of_pool, counts, unit)
    return Section(title, panels, columns=5, legend=legend, share=True)


def block_colors(count: int) -> list[str]:
    """From the first block to the last, dark to light; the lightest yellow is hard to see on white."""
    import matplotlib

    colors = matplotlib.colormaps["viridis"]
    places = [0.9 * place / max(count - 1, 1) for place in range(count)]
    return [matplotlib.colors.to_hex(colors(place)) for place in places]


def _pool_panels(
    pool: str, strands: Sequence[_Strand], counts: Collection[int], unit: str
) -> Iterator[Panel]:
    """Load, dropped tokens, router entropy, dead experts and auxiliary losses (in `unit`) of a pool.

    `counts` are the numbers of experts of its blocks that are known; strands may differ in it.
    """

    def draw(axis: Axes, metric: str, scale: float = 1.0, **style: Any) -> None:
        for own in strands:
            style |= {"color": own.color, "linewidth": 1.2}
            _draw(axis, own.rows, f"{own.prefix}/{metric}", scale, **style)

    def load(axis: Axes) -> None:
        draw(axis, "load_max")
        draw(axis, "load_min", linestyle=":", lowest=_LOWEST)
        axis.axhline(1.0, color="black", linestyle="--", linewidth=1)
        # A scale on which twice and half the mean are equally far from it.
        axis.set_yscale("log", base=2)
        low, high = axis.get_ylim()
        axis.set_ylim(min(low, 0.45), max(high, 2.2))
        axis.yaxis.set_major_formatter(_load_label)
        axis.minorticks_off()

    def dropped(axis: Axes) -> None:
        draw(axis, "dropped_fraction", 100.0)
        _from_zero(axis)

    def entropy(axis: Axes) -> None:
        draw(axis, "router_entropy")
        for count in sorted(counts):
            axis.axhline(math.log(count), color="black", linestyle="--", linewidth=1)
            axis.annotate(
                f"all {count} alike: log {count} = {math.log(count):.2f}",
                (0.99, math.log(count)),
                xycoords=("axes fraction", "data"),
                xytext=(0, 3),
                textcoords="offset points",
                va="bottom",
                ha="right",
                fontsize=8,
            )
        _from_zero(axis)
        axis.set_ylim(top=max([axis.get_ylim()[1], *(1.15 * math.log(n) for n in counts)]))

    def dead(axis: Axes) -> None:
        draw(axis, "dead_experts")
        _from_zero(axis)

    def aux(axis: Axes) -> None:
        for own in strands:
            for key, line in own.aux.items():
                _draw(axis, own.rows, key, color=own.color, linestyle=line, linewidth=1.2)
        # LIMoE's global entropy is negative.
        if _limits(axis)[0] >= 0.0:
            _from_zero(axis)
        axis.yaxis.set_major_formatter("{x:.3g}")

    yield Panel(f"{pool}: load of an expert", "mean = 1", load)
    yield Panel(f"{pool}: dropped", "% of assignments", dropped)
    yield Panel(f"{pool}: router entropy", "nats", entropy)
    yield Panel(f"{pool}: dead experts", "experts without a token", dead)
    yield Panel(f"{pool}: auxiliary losses", unit, aux)


def _load_label(load: float, _: object) -> str:
    label = f"1/{1 / load:.0f}" if load < 1.0 else f"{load:.0f}"
    return f"{label} or less" if load == _LOWEST else label


def sections_of(runs: Runs, experts: Mapping[str, Mapping[str, int]]) -> list[Section]:
    """Everything that there is to see of runs, from losses to experts; see `expert_section` for the arguments."""
    losses, evaluation = loss_section(runs), evaluation_section(runs)
    found: list[Optional[Section]] = [losses, evaluation]
    panels = [*losses.panels, *evaluation.panels]
    if len(panels) <= 4:
        legend = [*losses.legend, *evaluation.legend]
        found = [Section("Losses and evaluation", panels, legend=legend)]
    found += [training_section(runs), expert_section(runs, experts)]
    return [section for section in found if section is not None and section.panels]


def draw_runs(
    runs: Runs, experts: Mapping[str, Mapping[str, int]], output: Path, title: str = ""
) -> Path:
    """One picture of everything that there is to see of runs; returns the file.

    Raises:
        MetricsError: nothing was logged.
    """
    sections = sections_of(runs, experts)
    if not sections:
        raise MetricsError(f"{', '.join(runs)}: nothing logged yet")
    return draw_sections(title or ", ".join(runs), sections, run_keys(runs), output)


def draw_losses(runs: Runs, output: Path) -> Path:
    """Only the losses: training, evaluation and what guessing by frequency would lose; returns the file.

    Raises:
        MetricsError: nothing was logged.
    """
    named = dict(zip(run_names(list(runs)), runs.values()))
    section = replace(loss_section(named), columns=2)
    if not section.panels:
        raise MetricsError(f"{', '.join(named)}: nothing logged yet")
    title = f"Losses of {', '.join(named)}"
    return draw_sections(title, [section], run_keys(named), output)


def draw_experts(run: str, rows: Sequence[Row], experts: Mapping[str, int], output: Path) -> Path:
    """Only the experts of a run, a row of panels per pool; returns the file.

    The largest possible entropy is drawn for pools whose number of experts is known.

    Raises:
        MetricsError: the run has no experts.
    """
    name = run_names([run])[0]
    section = expert_section({name: rows}, {name: experts})
    if section is None:
        raise MetricsError(f"{run}: metrics.jsonl has no loads of experts: a dense run")
    return draw_sections(f"Experts of {name}", [section], [], output)


def panel_svg(panel: Panel) -> str:
    """A panel alone as an SVG element, to stand in a page; its texts take the fonts of whoever looks at it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(4.0, 2.9))
    axis = figure.add_axes((0.19, 0.16, 0.79, 0.74))
    draw_panel(panel, axis)
    axis.set_xlabel("step", fontsize=9)
    stream = io.StringIO()
    # Without what would make two drawings of the same differ.
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": panel.title}):
        figure.savefig(stream, format="svg", metadata=metadata, transparent=True)
    plt.close(figure)
    drawn = stream.getvalue()
    return drawn[drawn.index("<svg") :]


def draw_panel(panel: Panel, axis: Axes) -> None:
    """Draws a panel with its title and what its numbers are."""
    axis.set_title(panel.title, fontsize=10, loc="left")
    axis.set_ylabel(panel.unit, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
    panel.draw(axis)
    _say_not_finite(axis)


def draw_sections(
    title: str, sections: Sequence[Section], keys: Sequence[Key], output: Path
) -> Path:
    """All panels in one picture, sections from top to bottom; `keys` explain the colours of runs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [-(-len(section.panels) // section.columns) for section in sections]
    columns = min(max(section.columns for section in sections), 5)
    # Two in a row have more room.
    scale = 1.0 if columns > 2 else 1.3
    height = 1.0 + sum(2.6 * scale * count + 0.8 for count in rows)
    figure = plt.figure(figsize=(3.8 * scale * columns, height), layout="constrained")
    figure.suptitle(plain(title), fontsize=15)
    if keys:
        handles = [_handle(key) for key in keys]
        figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=10)
    heights = [count + 0.3 for count in rows]
    parts = figure.subfigures(len(sections), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, section, count in zip(parts, sections, rows):
        if len(sections) > 1:
            part.suptitle(plain(section.title), fontsize=12, x=0.01, ha="left")
        axes = part.subplots(count, section.columns, sharex=True, squeeze=False)
        for place, axis in enumerate(axes.flat):
            if place >= len(section.panels):
                axis.remove()
                continue
            draw_panel(section.panels[place], axis)
            if place + section.columns >= len(section.panels):
                axis.set_xlabel("step", fontsize=9)
                axis.tick_params(labelbottom=True)
        for column in axes.T if section.share else ():
            lows, highs = zip(*(axis.get_ylim() for axis in column))
            for axis in column:
                axis.set_ylim(min(lows), max(highs))
        if section.legend:
            handles = [_handle(key) for key in section.legend]
            part.legend(handles=handles, loc="outside lower center", ncols=8, fontsize=9)
    return save_figure(figure, output)


def _handle(key: Key) -> Line2D:
    from matplotlib.lines import Line2D

    handle = Line2D([], [], color=key.color, linestyle=key.line, marker=key.marker, markersize=4)
    handle.set_label(plain(key.label))
    return handle


def plain(text: str) -> str:
    """A text that is not read as a formula, nor as a label to be hidden."""
    return text.replace("$", r"\$").replace("_", "\N{ZERO WIDTH SPACE}_", text.startswith("_"))


def last_evaluation_table(run: str, rows: Sequence[Row]) -> str:
    """The last evaluation of a run as text.

    Of pretraining: loss on held-out data, loss of guessing by frequency, accuracy and, where they were evaluated,
    accuracy on patches of foreground and background, and grounding, all of the same step. Of a downstream task: its
    scores. Values that are not finite are named, and so is where losses are not.
    """
    columns = (
        ("held-out loss", "eval/loss/{}", "{:.3f}"),
        ("guessing by frequency", "unigram/{}", "{:.3f}"),
        ("accuracy", "acc/{}", "{:.1%}"),
        ("foreground", "acc/{}_foreground", "{:.1%}"),
        ("background", "acc/{}_background", "{:.1%}"),
        ("grounding", "eval/grounding/{}", "{:.3f}"),
    )
    lasts = {name: last_row(rows, f"eval/loss/{name}") for name in loss_names(rows)}
    lasts = {name: row for name, row in lasts.items() if row}
    shown = [
        column
        for place, column in enumerate(columns)
        if place < 3 or any(column[1].format(name) in row for name, row in lasts.items())
    ]
    scores = {name: last_row(rows, name) for name in score_names(rows)}
    steps = dict.fromkeys(row["step"] for row in (*lasts.values(), *scores.values()))
    at = f" (step {', '.join(f'{step:,}' for step in steps)})" if steps else ""
    lines = [f"{run}, last evaluation{at}"]
    if lasts or not scores:
        lines.append(
            f"  {'task':<26}" + "".join(f"{title:>{len(title) + 3}}" for title, *_ in shown)
        )
    for name, row in lasts.items():
        cells = [
            f"{_cell(row, key.format(name), form) if key.format(name) in row else '':>{len(title) + 3}}"
            for title, key, form in shown
        ]
        lines.append(f"  {LOSSES.get(name, name):<26}{''.join(cells)}".rstrip())
    lines += [f"  {name:<32}{_cell(row, name, '{:>8.2f} %')}" for name, row in scores.items()]
    if text := divergence(rows):
        lines.append(f"  {text}")
    return "\n".join(lines)


def _cell(row: Row, key: str, form: str) -> str:
    return NOT_FINITE if row[key] is None else form.format(row[key])
