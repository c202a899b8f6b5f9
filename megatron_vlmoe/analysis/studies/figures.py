"""figure.png: the panels of a study, from its summary alone."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vlmoe.analysis.plots import save_figure
from megatron_vlmoe.analysis.studies.metrics import METRICS
from megatron_vlmoe.analysis.studies.study import Panel, Study
from megatron_vlmoe.analysis.studies.tables import by_label, metric_name, numbers_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which most colour-blind readers tell apart; then again with other lines and markers.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
LINES, MARKERS = ("-", "--", ":"), ("o", "s", "^")
AXES = {"flops": "training FLOPs", "seconds": "seconds of training steps", "step": "step"}
_COLUMNS = 3
_LEGEND_COLUMNS = 4


def draw_study(study: Study, summary: Mapping[str, Any], output: Path) -> Path:
    """Draws every panel; returns the file. Panels without any value say so.

    Seeds are small points, or thin lines of training curves; lines and bars are means over seeds; error bars, and the
    bands of training curves, reach one standard deviation to both sides.

    Raises:
        FileError: the file cannot be written.
        MetricsError: a format that matplotlib does not know.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.text import Text

    columns = min(_COLUMNS, len(study.panels))
    rows = math.ceil(len(study.panels) / columns)
    figure, axes = plt.subplots(
        *(rows, columns),
        figsize=(4.6 * columns, 3.4 * rows + 0.9),
        squeeze=False,
        constrained_layout=True,
    )
    seeds = len({row["seed"] for row in summary["rows"]})
    figure.suptitle(f"{study.title}\nscale {summary['scale']}, {seeds} seed(s)", fontsize=11)
    styles = {
        label: (
            COLORS[place % len(COLORS)],
            LINES[place // len(COLORS) % len(LINES)],
            MARKERS[place // len(COLORS) % len(MARKERS)],
        )
        for place, label in enumerate(summary["labels"])
    }
    draw = {"curve": _curve, "training": _training, "values": _values, "blocks": _blocks}
    for panel, axis in zip(study.panels, axes.flat):
        labels = [name for name in summary["labels"] if name in (panel.labels or summary["labels"])]
        axis.set_title(panel.title or metric_name(panel.metrics[0]), fontsize=10)
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=8)
        if labels:
            draw[panel.kind](axis, panel, summary, labels, styles)
        if not axis.has_data():
            axis.text(0.5, 0.5, "nothing measured", ha="center", transform=axis.transAxes)
    for axis in list(axes.flat)[len(study.panels) :]:
        axis.set_visible(False)
    if any(panel.kind in ("curve", "training") or len(panel.metrics) > 1 for panel in study.panels):
        lines = [
            Line2D([], [], color=color, ls=line, marker=marker, markersize=4, label=label)
            for label, (color, line, marker) in styles.items()
        ]
        figure.legend(handles=lines, loc="outside lower center", ncols=_LEGEND_COLUMNS, fontsize=8)
    # Names of a user's own may have dollar signs.
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # type: ignore[attr-defined]
    return save_figure(figure, output)


Styles = Mapping[str, tuple[str, str, str]]
# Of as many as there are runs in a panel, at every evaluation.
_THIN_BARS: Mapping[str, Any] = {"fmt": "none", "elinewidth": 0.7, "capsize": 2.0, "capthick": 0.7}


def _means(
    seeds: Sequence[Mapping[float, tuple[float, float]]],
) -> tuple[list[float], list[float], list[float]]:
    """Mean x, mean y and standard deviation of y over seeds, at the steps that all of them have.

    Args:
        seeds: x and y of each by step.
    """
    steps = [step for step in seeds[0] if all(step in own for own in seeds)] if seeds else []
    xs = [statistics.fmean(own[step][0] for own in seeds) for step in steps]
    values = [[own[step][1] for own in seeds] for step in steps]
    return xs, list(map(statistics.fmean, values)), list(map(_spread, values))


def _spread(numbers: Sequence[float]) -> float:
    """Standard deviation; 0 of a single number."""
    return statistics.stdev(numbers) if len(numbers) > 1 else 0.0


def _curve(
    axis: Axes, panel: Panel, summary: Mapping[str, Any], labels: Sequence[str], styles: Styles
) -> None:
    """Held-out loss after step 0: points of seeds, and the line of their means at steps that all seeds have, with
    error bars of one deviation."""
    metric = panel.metrics[0]
    for label in labels:
        color, line, marker = styles[label]
        curves = [
            {
                step: (x, y)
                for step, x, y in zip(curve["step"], curve[panel.x], curve[metric])
                if y is not None and step > 0
            }
            for row in by_label(summary, label)
            if metric in (curve := row["curve"])
        ]
        curves = [points for points in curves if points]
        for points in curves:
            axis.plot(*zip(*points.values()), marker, color=color, markersize=2, alpha=0.35)
        xs, ys, spreads = _means(curves)
        if xs:
            axis.plot(xs, ys, color=color, linestyle=line, linewidth=1.2)
        if any(spreads):
            axis.errorbar(xs, ys, spreads, color=color, alpha=0.6, **_THIN_BARS)
    axis.set_xlabel(AXES[panel.x], fontsize=8)
    axis.set_ylabel("nats", fontsize=8)


def _training(
    axis: Axes, panel: Panel, summary: Mapping[str, Any], labels: Sequence[str], styles: Styles
) -> None:
    """Training loss: a thin line per seed, and a thick one of their means in a band of one deviation."""
    metric = panel.metrics[0]
    for label in labels:
        color, line, _ = styles[label]
        rows = [row["training"] for row in by_label(summary, label) if row["training"].get(metric)]
        for own in rows:
            axis.plot(own["step"], own[metric], color=color, linewidth=0.5, alpha=0.4)
        steps, means, spreads = _means(
            [{step: (step, loss) for step, loss in zip(own["step"], own[metric])} for own in rows]
        )
        if steps:
            axis.plot(steps, means, color=color, linestyle=line, linewidth=1.4)
        if any(spreads):
            low = [mean - spread for mean, spread in zip(means, spreads)]
            high = [mean + spread for mean, spread in zip(means, spreads)]
            axis.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
    axis.set_xlabel(AXES["step"], fontsize=8)
    axis.set_ylabel("nats, without auxiliary losses", fontsize=8)


def _values(
    axis: Axes, panel: Panel, summary: Mapping[str, Any], labels: Sequence[str], styles: Styles
) -> None:
    """Of one metric a column per run; of several a group per metric. Points are seeds, error bars one deviation."""
    groups = panel.metrics
    width = 0.8 / len(labels)
    for number, metric in enumerate(groups):
        factor = METRICS.get(metric, ("", 1.0, 0))[1]
        for place, label in enumerate(labels):
            numbers = [factor * value for value in numbers_of(summary, label, metric)]
            if not numbers:
                continue
            color, _, marker = styles[label]
            x = (
                float(place)
                if len(groups) == 1
                else number + width * (place - (len(labels) - 1) / 2)
            )
            axis.plot([x] * len(numbers), numbers, marker, color=color, markersize=4, alpha=0.5)
            mean, spread = statistics.fmean(numbers), _spread(numbers)
            axis.errorbar(x, mean, spread, fmt="_", color=color, markersize=14, capsize=3)
    ticks = labels if len(groups) == 1 else [metric_name(metric).split(",")[0] for metric in groups]
    long = max(map(len, ticks)) * len(ticks) > 30
    axis.set_xticks(range(len(ticks)), ticks, fontsize=7)
    for tick in axis.get_xticklabels() if long else ():
        tick.set(rotation=40, ha="right", rotation_mode="anchor")
    axis.set_xlim(-0.6, len(ticks) - 0.4)
    unit = metric_name(groups[0]).rpartition(", ")[2] if "," in metric_name(groups[0]) else ""
    axis.set_ylabel("%" if METRICS.get(groups[0], ("", 1.0, 0))[1] == 100.0 else unit, fontsize=8)


def _blocks(
    axis: Axes, panel: Panel, summary: Mapping[str, Any], labels: Sequence[str], styles: Styles
) -> None:
    """Dropped tokens by block: a line per kind of token, of the first run; points are seeds, error bars a deviation."""
    rows = [row["values"] for label in labels[:1] for row in by_label(summary, label)]
    for place, prefix in enumerate(panel.metrics):
        color, marker = COLORS[place % len(COLORS)], MARKERS[place % len(MARKERS)]
        pattern = re.compile(rf"{re.escape(prefix)}/block_(\d+)")
        blocks = sorted(
            {
                int(match[1])
                for values in rows
                for key in values
                if (match := pattern.fullmatch(key))
            }
        )
        points = {
            block: [100 * v[key] for v in rows if (key := f"{prefix}/block_{block}") in v]
            for block in blocks
        }
        for block, numbers in points.items():
            axis.plot([block] * len(numbers), numbers, marker, color=color, markersize=3, alpha=0.5)
        if blocks:
            means = [statistics.fmean(points[block]) for block in blocks]
            axis.plot(blocks, means, color=color, label=metric_name(prefix))
            spreads = [_spread(points[block]) for block in blocks]
            if any(spreads):
                axis.errorbar(blocks, means, spreads, color=color, alpha=0.6, **_THIN_BARS)
            axis.set_xticks(blocks)
    axis.set_xlabel("block", fontsize=8)
    axis.set_ylabel("%", fontsize=8)
    if axis.has_data():
        axis.legend(fontsize=7)
