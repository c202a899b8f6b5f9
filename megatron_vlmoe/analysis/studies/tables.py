"""table.md: a study's rows over seeds, the paper's beside them, what became of its claims, and every single run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from megatron_vlmoe.analysis.studies.claims import (
    CONFIDENCE,
    LEAST_SEEDS,
    Decision,
    Interval,
    SummaryRow,
    decide,
)
from megatron_vlmoe.analysis.studies.metrics import METRICS
from megatron_vlmoe.analysis.studies.study import Study


def metric_name(metric: str) -> str:
    """What stands above the column of a metric."""
    return METRICS[metric][0] if metric in METRICS else metric


def shown(metric: str, value: float) -> str:
    """A value as tables show it."""
    _, factor, digits = METRICS.get(metric, ("", 1.0, 2))
    return f"{factor * value:.3g}" if digits < 0 else f"{factor * value:.{digits}f}"


def by_label(summary: Mapping[str, Any], label: str) -> list[SummaryRow]:
    """The rows of a run, one per seed."""
    return [row for row in summary["rows"] if row["label"] == label]


def numbers_of(summary: Mapping[str, Any], label: str, metric: str) -> list[float]:
    """A metric of a run for every seed that has it."""
    values = [row["values"].get(metric) for row in by_label(summary, label)]
    return [float(value) for value in values if value is not None]


def table(study: Study, summary: Mapping[str, Any]) -> str:
    """The whole of table.md."""
    return "\n".join(_lines(study, summary)) + "\n"


def _lines(study: Study, summary: Mapping[str, Any]) -> Iterator[str]:
    yield f"# {study.title}"
    yield ""
    seeds = sorted({row["seed"] for row in summary["rows"]})
    yield (
        f"Scale {summary['scale']}, seeds {' '.join(map(str, seeds))}: `{summary['command']}`. "
        "Mean and standard deviation over seeds, of fewer seeds than the row has where a number in brackets says so; "
        "without a deviation there is a single seed, or all are equal."
    )
    yield ""
    measured = [
        name
        for name in study.columns
        if any(numbers_of(summary, label, name) for label in summary["labels"])
        or any(name in row.values for row in study.paper)
    ]
    yield from _markdown(
        ("run", "seeds", *map(metric_name, measured)),
        [
            *(_label_row(summary, label, measured) for label in summary["labels"]),
            *(
                (
                    f"*{row.label}*",
                    "",
                    *(
                        shown(name, row.values[name]) if name in row.values else ""
                        for name in measured
                    ),
                )
                for row in study.paper
            ),
        ],
    )
    if unknown := [name for name in study.columns if name not in measured]:
        yield ""
        yield f"Not measured: {', '.join(unknown)}."
    if study.paper:
        yield ""
        yield "Rows in italics are the numbers that the paper prints, for its own models and data."
    if study.claims:
        yield ""
        yield "## Claims"
        yield ""
        yield (
            f"A part is a difference, paired by seed, that the claim says is above zero; the {100 * CONFIDENCE:.0f} % "
            f"interval of its mean (Student's t) over at least {LEAST_SEEDS} seeds decides. A claim is reproduced if "
            "every part is above zero, not reproduced if one is below, else undecided."
        )
        yield ""
        yield from claim_lines(decide(claim, summary["rows"]) for claim in study.claims)
    yield ""
    yield "## Runs"
    yield ""
    yield from _markdown(
        ("run", "seed", "state", *map(metric_name, measured)),
        [
            (
                row["label"],
                str(row["seed"]),
                state_of(row),
                *(
                    shown(name, row["values"][name]) if name in row["values"] else ""
                    for name in measured
                ),
            )
            for row in summary["rows"]
        ],
    )
    yield ""
    yield from _environment_lines(summary)


def _label_row(summary: Mapping[str, Any], label: str, metrics: Sequence[str]) -> tuple[str, ...]:
    seeds = len([row for row in by_label(summary, label) if row["values"]])
    cells = [label, str(seeds)]
    for metric in metrics:
        numbers = numbers_of(summary, label, metric)
        cell = shown(metric, statistics.fmean(numbers)) if numbers else ""
        if len(set(numbers)) > 1:
            cell += f" ± {shown(metric, statistics.stdev(numbers))}"
        if 0 < len(numbers) < seeds:
            cell += f" ({len(numbers)})"
        cells.append(cell)
    return tuple(cells)


def state_of(row: SummaryRow) -> str:
    """`finished` if the run and all of its fine-tunings are, else what became of the others."""
    states = row["states"].values()
    others = dict.fromkeys(state.partition(":")[0] for state in states if state != "finished")
    if not others:
        return "finished"
    return ", ".join(
        f"{sum(state.startswith(other) for state in states)} of {len(states)} {other}"
        for other in others
    )


def claim_lines(decisions: Iterable[Decision]) -> Iterator[str]:
    """One bullet per claim with the numbers of its parts."""
    for decision in decisions:
        claim = decision.claim
        parts = "; ".join(f"{part.text}: {interval_text(own)}" for part, own in decision.parts)
        yield f"- **{decision.verdict}**: {claim.text} ({claim.source}). {parts}."


def interval_text(interval: Interval | None) -> str:
    """`+0.021 [0.010, 0.032], 3 seeds`."""
    if interval is None:
        return "no seed has all of these numbers"
    seeds = f"{interval.count} seed{'s' * (interval.count > 1)}"
    if math.isinf(interval.low):
        return f"{interval.mean:+.3g}, {seeds}"
    return f"{interval.mean:+.3g} [{interval.low:.3g}, {interval.high:.3g}], {seeds}"


def _environment_lines(summary: Mapping[str, Any]) -> Iterator[str]:
    # Rows may share a pretraining, the first of their runs.
    seconds = {
        next(iter(row["states"]), ""): row["values"].get("seconds", 0.0) for row in summary["rows"]
    }
    total = sum(seconds.values())
    yield f"Pretraining took {total / 60:.0f} minutes of training steps in sum."
    for environment in summary["environments"]:
        if environment:
            yield (
                "Ran on "
                + ", ".join(f"{name} {value}" for name, value in environment.items())
                + "."
            )


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(header) + " |"
    yield "|" + "|".join("---" if place == 0 else "---:" for place in range(len(header))) + "|"
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
