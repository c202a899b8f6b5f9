"""A comparison for people and for programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from megatron_vlmoe.convert.compare import Comparison
from megatron_vlmoe.convert.inspect_report import number, to_json
from megatron_vlmoe.convert.statistics import Distance
from megatron_vlmoe.convert.tensor_source import TensorSource
from megatron_vlmoe.planning.dry_run import table

_NUMBERS = ("max abs", "relative", "cosine")


def comparison_lines(comparison: Comparison, top: int) -> list[str]:
    """The report as text.

    Args:
        comparison: what was found.
        top: most lines of a list; 0 prints all.
    """
    left, right = comparison.left, comparison.right
    options = [f"{o.name}: {o.left} | {o.right}" for o in comparison.options]
    shapes = [f"{name}: {list(a)} | {list(b)}" for name, (a, b) in comparison.shapes.items()]
    sections = (
        [f"A  {_title(left)}", f"B  {_title(right)}"],
        _listed("Options that differ (A | B)", options, 0),
        _listed("Only in A", comparison.only_left, top),
        _listed("Only in B", comparison.only_right, top),
        _listed("Shapes that differ (A | B)", shapes, top),
        _pair_lines(comparison, top),
        _part_lines(comparison),
        [_verdict(comparison)],
    )
    return "\n\n".join("\n".join(lines) for lines in sections if lines).split("\n")


def comparison_json(comparison: Comparison) -> str:
    """Everything, equal tensors included."""
    content = {
        "left": str(comparison.left.path),
        "right": str(comparison.right.path),
        "equal": comparison.equal,
        "options": [dataclasses.asdict(option) for option in comparison.options],
        "only_left": list(comparison.only_left),
        "only_right": list(comparison.only_right),
        "shapes": [
            {"name": name, "left": a, "right": b} for name, (a, b) in comparison.shapes.items()
        ],
        "tensors": [
            {
                "name": pair.name,
                "shape": pair.shape,
                "left_type": pair.left_type,
                "right_type": pair.right_type,
                "equal": pair.equal,
                **_numbers(pair.distance),
            }
            for pair in comparison.pairs
        ],
        "parts": [
            {
                "part": part.part,
                "tensors": part.tensors,
                "equal": part.equal,
                **_numbers(part.distance),
            }
            for part in comparison.parts
        ],
    }
    return to_json(content)


def _numbers(found: Distance) -> dict[str, Any]:
    return {
        "different": found.different,
        "not_finite": found.not_finite,
        "max_abs": found.largest,
        "relative": found.relative,
        "cosine": found.cosine,
    }


def _title(source: TensorSource) -> str:
    if source.reader is None:
        return f"{source.path} (Hugging Face folder)"
    return f"{source.path} (step {source.reader.train_state.step})"


def _listed(title: str, entries: Sequence[str], top: int) -> list[str]:
    if not entries:
        return []
    shown = entries[:top] if top else entries
    lines = [title, *(f"  {entry}" for entry in shown)]
    return lines + (
        [f"  and {len(entries) - len(shown)} more"] if len(shown) < len(entries) else []
    )


def _cells(found: Distance) -> tuple[str, ...]:
    return number(found.largest), number(found.relative), f"{found.cosine:.6f}"


def _pair_lines(comparison: Comparison, top: int) -> list[str]:
    different = [pair for pair in comparison.pairs if not pair.equal]
    if not different:
        return []
    shown = different[:top] if top else different
    rows = []
    for pair in shown:
        types = pair.left_type
        if pair.left_type != pair.right_type:
            types = f"{pair.left_type} | {pair.right_type}"
        count = f"{pair.distance.different:,}"
        if pair.distance.not_finite:
            count += f" ({pair.distance.not_finite:,} not finite)"
        rows.append((pair.name, str(list(pair.shape)), types, count, *_cells(pair.distance)))
    title = f"Tensors that differ: {len(different)} of {len(comparison.pairs)}"
    if len(shown) < len(different):
        title += f"; the {len(shown)} that differ most"
    return [title, *table(("tensor", "shape", "type", "values", *_NUMBERS), rows)]


def _part_lines(comparison: Comparison) -> list[str]:
    rows = [
        (part.part, f"{part.equal} of {part.tensors}", *_cells(part.distance))
        for part in comparison.parts
    ]
    return ["Parts", *table(("part", "equal", *_NUMBERS), rows)] if rows else []


def _verdict(comparison: Comparison) -> str:
    if comparison.equal:
        return f"Equal: all {len(comparison.pairs)} tensors, in every value."
    differ = sum(not pair.equal for pair in comparison.pairs)
    return (
        f"Different: {differ} of {len(comparison.pairs)} tensors, {len(comparison.shapes)} shapes, "
        f"{len(comparison.only_left)} only in A, {len(comparison.only_right)} only in B."
    )
