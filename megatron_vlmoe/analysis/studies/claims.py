"""Whether a study bears a claim out: one rule for all, by arithmetic on the runs of a study alone.

A part of a claim is a number that should be above zero, computed for every seed that has all the runs it needs; runs of
one seed see the same data in the same order, so that the seed's own share cancels. With three seeds or more, the 95 %
confidence interval of the mean (Student's t) decides: above zero, below zero, or neither. The claim is reproduced if
all of its parts are above zero, not reproduced if any is below, and else undecided.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron_vlmoe.analysis.studies.study import Claim, Part

Verdict = Literal["reproduced", "not reproduced", "undecided"]

# Fewer say nothing about the spread.
LEAST_SEEDS = 3
CONFIDENCE = 0.95

SummaryRow = Mapping[str, Any]
"""A run and seed of a summary: `label`, `seed`, `values`, `curve`, ..."""


@dataclass(frozen=True)
class Interval:
    """Mean of paired numbers with its confidence interval; infinite bounds for fewer than two."""

    mean: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Interval:
        """The 95 % interval of the mean by Student's t. Raises ValueError if there are no numbers."""
        count = len(numbers)
        if not count:
            raise ValueError("no numbers")
        mean = statistics.fmean(numbers)
        if count == 1:
            return cls(mean, -math.inf, math.inf, count)
        half = t_quantile((1 + CONFIDENCE) / 2, count - 1) * statistics.stdev(numbers)
        half /= math.sqrt(count)
        return cls(mean, mean - half, mean + half, count)

    @property
    def verdict(self) -> Verdict:
        """What it says of a number that should be above zero."""
        if self.count >= LEAST_SEEDS and self.low > 0.0:
            return "reproduced"
        if self.count >= LEAST_SEEDS and self.high < 0.0:
            return "not reproduced"
        return "undecided"


@dataclass(frozen=True)
class Decision:
    """A claim, what is to be said of it, and the numbers by part."""

    claim: Claim
    verdict: Verdict
    parts: tuple[tuple[Part, Interval | None], ...]


def decide(claim: Claim, rows: Sequence[SummaryRow]) -> Decision:
    """Applies the rule to the rows of a study's summary; a part without any seed has no interval."""
    parts: list[tuple[Part, Interval | None]] = []
    for part in claim.parts:
        numbers = paired_numbers(part, rows)
        parts.append((part, Interval.of(numbers) if numbers else None))
    verdicts = [interval.verdict if interval else "undecided" for _, interval in parts]
    verdict: Verdict = "undecided"
    if "not reproduced" in verdicts:
        verdict = "not reproduced"
    elif verdicts and all(each == "reproduced" for each in verdicts):
        verdict = "reproduced"
    return Decision(claim, verdict, tuple(parts))


def paired_numbers(part: Part, rows: Sequence[SummaryRow]) -> list[float]:
    """The number of a part for every seed whose runs all have what it asks for, in order of the seeds."""
    labels = {label for _, _, label in part.terms}
    numbers = []
    for seed in sorted({row["seed"] for row in rows}):
        own = {row["label"]: row for row in rows if row["seed"] == seed and row["label"] in labels}
        if set(own) != labels:
            continue
        values = [value_of(own[label], metric, part, own) for _, metric, label in part.terms]
        known = [value for value in values if value is not None]
        if len(known) == len(values):
            numbers.append(sum(term[0] * value for term, value in zip(part.terms, known)))
    return numbers


def value_of(
    row: SummaryRow, metric: str, part: Part, compared: Mapping[str, SummaryRow]
) -> float | None:
    """A metric of a run; at equal FLOPs, read from its curve where the cheapest of the compared runs has ended."""
    if not part.equal_flops:
        value = row["values"].get(metric)
        return None if value is None else float(value)
    if any(not other["curve"].get("flops") for other in compared.values()):
        return None
    flops = min(other["curve"]["flops"][-1] for other in compared.values())
    return interpolate(row["curve"]["flops"], row["curve"].get(metric, ()), flops)


def interpolate(xs: Sequence[float], ys: Sequence[float | None], x: float) -> float | None:
    """The value at x on the straight lines between points in ascending order; None outside of them."""
    points = [(a, b) for a, b in zip(xs, ys) if b is not None]
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x0 <= x <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return None


def t_quantile(probability: float, degrees: int) -> float:
    """The quantile of Student's t distribution with a whole number of degrees of freedom.

    By bisection of the distribution function, whose closed forms for odd and even degrees are Abramowitz and Stegun
    26.7.3 and 26.7.4.

    Raises:
        ValueError: the probability is not in (0.5, 1), or there are no degrees of freedom.
    """
    if not 0.5 < probability < 1.0 or degrees < 1:
        raise ValueError(f"t quantile of {probability} with {degrees} degrees of freedom")
    low, high = 0.0, 1.0
    while _t_distribution(high, degrees) < probability:
        high *= 2.0
    for _ in range(100):
        middle = (low + high) / 2
        if _t_distribution(middle, degrees) < probability:
            low = middle
        else:
            high = middle
    return high


def _t_distribution(t: float, degrees: int) -> float:
    """The probability of a value up to t >= 0."""
    angle = math.atan2(t, math.sqrt(degrees))
    cosine = math.cos(angle)
    # cos + 2/3 cos^3 + 2*4/(3*5) cos^5 ..., or 1 + 1/2 cos^2 + 1*3/(2*4) cos^4 ..., up to cos^(degrees - 2).
    power = degrees % 2
    term, total = cosine**power, 0.0
    while power <= degrees - 2:
        total += term
        term *= (power + 1) / (power + 2) * cosine**2
        power += 2
    inside = total * math.sin(angle)
    if degrees % 2:
        inside = (angle + inside) * 2 / math.pi
    return 0.5 + inside / 2
