"""Loss curves of runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Mapping, Sequence

from megatron_vlmoe.analysis.figures import save_figure
from megatron_vlmoe.config.errors import MetricsError

LOSSES = {
    "mlm": "masked language (texts)",
    "mim": "masked image (images)",
    "vlm_text": "masked captions (pairs)",
    "vlm_image": "masked patches (pairs)",
}

Row = Mapping[str, Any]


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


def draw_losses(runs: Mapping[str, Sequence[Row]], output: Path) -> None:
    """One panel per loss: training, evaluation and the unigram entropy."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), sharex=True, constrained_layout=True)
    colors = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    for axis, (name, title) in zip(axes.flat, LOSSES.items()):
        for color, (run, rows) in zip(colors, runs.items()):
            label = Path(run).name
            steps, values = series(rows, f"loss/{name}")
            axis.plot(steps, values, color=color, alpha=0.45, linewidth=1)
            steps, values = series(rows, f"eval/loss/{name}")
            axis.plot(steps, values, "o-", color=color, markersize=4, label=f"{label}, held out")
            _, entropy = series(rows, f"unigram/{name}")
            if entropy:
                axis.axhline(entropy[-1], color=color, linestyle="--", linewidth=1)
        axis.plot([], [], "k--", linewidth=1, label="guessing by frequency")
        axis.set_title(title)
        axis.set_ylabel("nats per masked position")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    for axis in axes[1]:
        axis.set_xlabel("step")
    save_figure(figure, output)


def last_evaluation_table(run: str, rows: Sequence[Row]) -> str:
    """The last evaluation of a run as text: held-out loss, unigram entropy and accuracy."""
    lines = [f"{run}: {'loss':>24} {'held out':>9} {'unigram':>8} {'accuracy':>9}"]
    for name, title in LOSSES.items():
        steps, values = series(rows, f"eval/loss/{name}")
        if not values:
            continue
        entropy = series(rows, f"unigram/{name}")[1][-1]
        accuracy = series(rows, f"acc/{name}")[1][-1]
        lines.append(
            f"{'':{len(run)}}  {title:>24} {values[-1]:9.3f} {entropy:8.3f} {accuracy:9.1%}"
        )
    return "\n".join(lines)
