"""Pictures and tables of what a run logged: its losses, and the load, dropped tokens and entropy of its experts."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Mapping, Optional, Sequence

import yaml

from megatron_vlmoe.config.errors import MetricsError
from megatron_vlmoe.runtime.files import open_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOSSES = {
    "mlm": "masked language (texts)",
    "mim": "masked image (images)",
    "vlm_text": "masked captions (pairs)",
    "vlm_image": "masked patches (pairs)",
}

Row = Mapping[str, Any]

_EXPERT_KEY = re.compile(r"moe/(\w+)/layer_(\d+)/load_max")
# The emptiest load that is drawn; below it, an expert that gets nothing would be infinitely far down.
_LOWEST = 1 / 64


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
    with open_atomic(target) as file:
        figure.savefig(file, format=target.suffix[1:], dpi=110)
    plt.close(figure)
    return target


def read_metrics(run: Path) -> list[Row]:
    """The logged steps of a run folder.

    Raises:
        MetricsError: if there is no metrics.jsonl, or a line is not JSON.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise MetricsError(f"{path}: no such file")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise MetricsError(f"{path}: line {number} is not JSON") from None
    return rows


def series(rows: Sequence[Row], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of a metric where it was logged."""
    found = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return [step for step, _ in found], [value for _, value in found]


def draw_losses(runs: Mapping[str, Sequence[Row]], output: Path) -> Path:
    """One panel per loss: training, evaluation and what guessing by frequency would lose; returns the file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 8), sharex=True, constrained_layout=True)
    names = [Path(run).name for run in runs]
    figure.suptitle(f"Losses of {', '.join(names)}")
    colors = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    for axis, (loss, title) in zip(axes.flat, LOSSES.items()):
        for color, name, rows in zip(itertools.cycle(colors), names, runs.values()):
            steps, values = series(rows, f"loss/{loss}")
            axis.plot(
                steps, values, color=color, alpha=0.45, linewidth=1, label=f"{name}, training"
            )
            steps, values = series(rows, f"eval/loss/{loss}")
            axis.plot(steps, values, "o-", color=color, markersize=4, label=f"{name}, held out")
        # Runs on the same data have the same line.
        for entropy in dict.fromkeys(_last(rows, f"unigram/{loss}") for rows in runs.values()):
            if entropy is not None:
                label = "guessing by frequency"
                known = axis.get_legend_handles_labels()[1]
                label = "_nolegend_" if label in known else label
                axis.axhline(entropy, color="black", linestyle="--", linewidth=1, label=label)
        axis.set_title(title)
        axis.set_ylabel("nats per masked position")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    for axis in axes[1]:
        axis.set_xlabel("step")
    return save_figure(figure, output)


def last_evaluation_table(run: str, rows: Sequence[Row]) -> str:
    """The last evaluation of a run as text: loss on held-out data, loss of guessing by frequency, and accuracy."""
    lines = [
        f"{run}, last evaluation",
        f"  {'task':<26}{'held-out loss':>15}{'guessing by frequency':>24}{'accuracy':>10}",
    ]
    for loss, title in LOSSES.items():
        value = _last(rows, f"eval/loss/{loss}")
        if value is not None:
            guess, accuracy = _last(rows, f"unigram/{loss}"), _last(rows, f"acc/{loss}")
            lines.append(f"  {title:<26}{value:15.3f}{guess:24.3f}{accuracy:10.1%}")
    return "\n".join(lines)


def _last(rows: Sequence[Row], key: str) -> Optional[float]:
    """The last value of a metric; None where it was never logged."""
    return next((row[key] for row in reversed(rows) if row.get(key) is not None), None)


def experts_of_pools(run: Path) -> dict[str, int]:
    """Experts of every pool, from the run's config.yaml; empty where that is missing or of another kind."""
    try:
        moe = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["moe"]
        return {
            "text": int(moe["num_text_experts"]),
            "vision": int(moe["num_vision_experts"]),
            "shared": int(moe["num_vision_experts"]),
            "vl": int(moe["num_vl_experts"]),
        }
    except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError):
        return {}


def draw_experts(run: str, rows: Sequence[Row], experts: Mapping[str, int], output: Path) -> Path:
    """One column per pool of experts; load, dropped tokens and router entropy over the steps, a line per block.

    The largest possible entropy is drawn for pools whose number of experts is known. Returns the file.

    Raises:
        MetricsError: the run has no metrics of single blocks.
    """
    found = {match.groups() for row in rows for key in row if (match := _EXPERT_KEY.fullmatch(key))}
    pools = {
        pool: sorted(int(block) for own, block in found if own == pool)
        for pool in sorted({pool for pool, _ in found})
    }
    if not pools:
        raise MetricsError(
            f"{run}: metrics.jsonl has no loads of experts: a dense run, or one with log.moe_per_layer=false"
        )
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    every = sorted(set().union(*pools.values()))
    # From the first block to the last, dark to light; the lightest yellow is hard to see on white.
    places = [0.9 * place / max(len(every) - 1, 1) for place in range(len(every))]
    colors = dict(zip(every, plt.get_cmap("viridis")(places)))
    figure, axes = plt.subplots(
        *(3, len(pools)),
        figsize=(6.5 * len(pools), 10.0),
        sharex=True,
        sharey="row",
        squeeze=False,
        constrained_layout=True,
    )
    figure.suptitle(f"Experts of {Path(run).name}")
    for column, (pool, blocks) in enumerate(pools.items()):
        count = experts.get(pool, 0)
        load, drops, entropy = axes[:, column]
        for block in blocks:
            key, color = f"moe/{pool}/layer_{block}", colors[block]
            load.plot(*series(rows, f"{key}/load_max"), color=color, linewidth=1.2)
            steps, emptiest = series(rows, f"{key}/load_min")
            emptiest = [max(value, _LOWEST) for value in emptiest]
            load.plot(steps, emptiest, color=color, linewidth=1.2, linestyle=":")
            steps, dropped = series(rows, f"{key}/dropped_fraction")
            drops.plot(steps, [100 * value for value in dropped], color=color, linewidth=1.2)
            entropy.plot(*series(rows, f"{key}/router_entropy"), color=color, linewidth=1.2)
        load.set_title(f"{pool}: {count} experts per block" if count else pool)
        load.axhline(1.0, color="black", linestyle="--", linewidth=1)
        if count > 1:
            entropy.axhline(math.log(count), color="black", linestyle="--", linewidth=1)
            entropy.annotate(
                f"all {count} alike: log {count} = {math.log(count):.2f}",
                (0.99, math.log(count)),
                xycoords=("axes fraction", "data"),
                xytext=(0, 3),
                textcoords="offset points",
                va="bottom",
                ha="right",
                fontsize=8,
            )
        entropy.set_xlabel("step")
        for axis in axes[:, column]:
            axis.grid(alpha=0.3)
    load, drops, entropy = axes[:, 0]
    # A scale on which twice and half the mean are equally far from it.
    load.set_yscale("log", base=2)
    low, high = load.get_ylim()
    low, high = load.set_ylim(min(low, 0.5), max(high, 2.0))
    ticks = [2.0**power for power in range(-6, 7) if low <= 2.0**power <= high]
    labels = [f"1/{1 / tick:.0f}" if tick < 1.0 else f"{tick:.0f}" for tick in ticks]
    if ticks[0] == _LOWEST:
        labels[0] += " or less"
    load.set_yticks(ticks, labels)
    load.minorticks_off()
    load.set_ylabel("load of an expert, mean = 1")
    drops.set_ylabel("dropped assignments, %")
    drops.set_ylim(bottom=0)
    entropy.set_ylabel("router entropy, nats")
    highest = 1.15 * max(math.log(experts.get(pool) or 1) for pool in pools)
    entropy.set_ylim(0, max(entropy.get_ylim()[1], highest))
    lines = [
        *(Line2D([], [], color=color, label=f"block {block}") for block, color in colors.items()),
        Line2D([], [], color="gray", label="fullest expert"),
        Line2D([], [], color="gray", linestyle=":", label="emptiest expert"),
    ]
    figure.legend(handles=lines, loc="outside lower center", ncols=7, fontsize=9)
    return save_figure(figure, output)
