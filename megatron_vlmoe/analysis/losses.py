"""Loss curves of runs."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, Mapping, Optional, Sequence

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
    """One panel per loss: training, evaluation and what guessing by frequency would lose."""
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
    save_figure(figure, output)


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
