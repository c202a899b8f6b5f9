"""What the routers of a run did: load of the experts, dropped tokens and entropy of every block, as a picture."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, Mapping, Sequence

import yaml

from megatron_vlmoe.analysis.figures import save_figure
from megatron_vlmoe.analysis.losses import Row, series
from megatron_vlmoe.config.errors import MetricsError

_KEY = re.compile(r"moe/(\w+)/layer_(\d+)/load_max")
# The emptiest load that is drawn; below it, an expert that gets nothing would be infinitely far down.
_LOWEST = 1 / 64


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


def draw_experts(run: str, rows: Sequence[Row], experts: Mapping[str, int], output: Path) -> None:
    """One column per pool of experts; load, dropped tokens and router entropy over the steps, a line per block.

    Args:
        run: name of the run.
        rows: its metrics.
        experts: experts by pool, for the largest possible entropy; may be empty.
        output: PNG file.

    Raises:
        MetricsError: the run has no metrics of single blocks.
    """
    found = {match.groups() for row in rows for key in row if (match := _KEY.fullmatch(key))}
    names = sorted({pool for pool, _ in found})
    pools = {pool: sorted(int(block) for own, block in found if own == pool) for pool in names}
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
    _label_loads(load)
    drops.set_ylabel("dropped assignments, %")
    drops.set_ylim(bottom=0)
    entropy.set_ylabel("router entropy, nats")
    low, high = entropy.get_ylim()
    entropy.set_ylim(0, max(high, 1.15 * max(math.log(experts.get(pool) or 1) for pool in pools)))
    lines = [Line2D([], [], color=color, label=f"block {block}") for block, color in colors.items()]
    lines.append(Line2D([], [], color="gray", label="fullest expert"))
    lines.append(Line2D([], [], color="gray", linestyle=":", label="emptiest expert"))
    figure.legend(handles=lines, loc="outside lower center", ncols=7, fontsize=9)
    save_figure(figure, output)


def _label_loads(axis: Any) -> None:
    """A scale on which twice and half the mean are equally far from it."""
    axis.set_yscale("log", base=2)
    low, high = axis.get_ylim()
    axis.set_ylim(min(low, 0.5), max(high, 2.0))
    low, high = axis.get_ylim()
    ticks = [2.0**power for power in range(-6, 7) if low <= 2.0**power <= high]
    names = [f"1/{1 / tick:.0f}" if tick < 1.0 else f"{tick:.0f}" for tick in ticks]
    if ticks[0] == _LOWEST:
        names[0] += " or less"
    axis.set_yticks(ticks, names)
    axis.minorticks_off()
    axis.set_ylabel("load of an expert, mean = 1")
