"""Two checkpoints, of any layouts and formats, tensor by tensor; a pair of tensors is in memory at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_vlmoe.config.command_line import flat_options
from megatron_vlmoe.config.errors import ConvertError
from megatron_vlmoe.convert.inspect import TensorSource, number, open_source, optimizer_key, to_json
from megatron_vlmoe.convert.statistics import Distance, distance
from megatron_vlmoe.convert.tensors import type_name, with_progress
from megatron_vlmoe.planning.dry_run import table
from megatron_vlmoe.planning.parameters import part_of, part_order
from megatron_vlmoe.runtime.sums import SUMS_FILE


class OptionDifference(NamedTuple):
    """An option that is not the same, with both values; None where a side does not have it."""

    name: str
    left: Any
    right: Any


@dataclass(frozen=True)
class Pair:
    """A tensor that both sides have in the same shape: its key, type on either side, and how far values are apart."""

    name: str
    shape: tuple[int, ...]
    left_type: str
    right_type: str
    distance: Distance

    @property
    def equal(self) -> bool:
        """Same type and same values."""
        return self.left_type == self.right_type and self.distance.equal


@dataclass(frozen=True)
class PartDistance:
    """The tensors of one part of the model: how many, how many equal, and the distance of all as one vector."""

    part: str
    tensors: int
    equal: int
    distance: Distance


@dataclass(frozen=True)
class Comparison:
    """Everything that two checkpoints differ in.

    Args:
        options: options of the configuration that differ; they do not make checkpoints different.
        shapes: tensors of different shapes, with both.
        pairs: all other tensors, the least alike first.
        parts: the same by part of the model.
    """

    left: TensorSource
    right: TensorSource
    options: tuple[OptionDifference, ...]
    only_left: tuple[str, ...]
    only_right: tuple[str, ...]
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    pairs: tuple[Pair, ...]
    parts: tuple[PartDistance, ...]

    @property
    def equal(self) -> bool:
        """Same names, shapes, types and values."""
        names = self.only_left or self.only_right or self.shapes
        return not names and all(pair.equal for pair in self.pairs)


def compare_checkpoints(
    left: str | Path, right: str | Path, with_optimizer: bool = False
) -> Comparison:
    """Compares run, checkpoint, iteration or Hugging Face folders, with the optimizer state only if asked for.

    Raises:
        ConvertError: one of them is not there, cannot be read, or has a damaged file.
    """
    first, second = open_source(left), open_source(right)
    for source in (first, second):
        for problem in source.problems:
            if problem.kind == "checksum" or problem.name == SUMS_FILE:
                raise ConvertError(f"{source.path / problem.name}: damaged: {problem.detail}")
    readers = [source.reader for source in (first, second) if source.reader is not None]
    formats = [reader.optimizer_format for reader in readers if reader.optimizer_tensors]
    if with_optimizer and len(set(formats)) > 1:
        raise ConvertError(
            f"--optimizer: the state is {formats[0]} in {first.path} and {formats[1]} in {second.path}, "
            "which have no names in common; the weights alone can be compared"
        )
    exported = first.reader is None or second.reader is None
    ours, theirs = (
        {
            **(source.without_padding() if exported else source.tensors),
            **(source.optimizer_tensors if with_optimizer else {}),
        }
        for source in (first, second)
    )
    common = [name for name in ours if name in theirs]
    shapes = {
        name: (ours[name].shape, theirs[name].shape)
        for name in common
        if ours[name].shape != theirs[name].shape
    }
    same_shape = [name for name in common if name not in shapes]
    pairs = []
    groups: dict[str, list[Pair]] = {}
    for name in with_progress(same_shape, len(same_shape), "compare"):
        a, b = ours[name], theirs[name]
        found = distance(a.read(), b.read())
        pairs.append(Pair(name, a.shape, type_name(a.dtype), type_name(b.dtype), found))
        kind, key = optimizer_key(name)
        part = part_of(key or name)
        groups.setdefault(f"{part}, {kind}" if kind else part, []).append(pairs[-1])

    def likeness(pair: Pair) -> tuple[bool, float, float, bool]:
        found = pair.distance
        return (found.not_finite == 0, -found.relative, -found.largest, pair.equal)

    # How a run trains does not travel with an export.
    compared = ("model.", "moe.", "task.name", "task.num_classes") if exported else ("",)
    left_options, right_options = (
        flat_options(dataclasses.asdict(source.config)) for source in (first, second)
    )
    return Comparison(
        first,
        second,
        options=tuple(
            OptionDifference(name, left_options.get(name), right_options.get(name))
            for name in {**left_options, **right_options}
            if left_options.get(name) != right_options.get(name) and name.startswith(compared)
        ),
        only_left=tuple(name for name in ours if name not in theirs),
        only_right=tuple(name for name in theirs if name not in ours),
        shapes=shapes,
        pairs=tuple(sorted(pairs, key=likeness)),
        parts=tuple(
            PartDistance(
                part,
                len(group),
                sum(pair.equal for pair in group),
                sum((pair.distance for pair in group), Distance()),
            )
            for part, group in sorted(
                groups.items(),
                key=lambda item: ("," in item[0], part_order(item[0].partition(",")[0])),
            )
        ),
    )


_NUMBERS = ("max abs", "relative", "cosine")


def comparison_lines(comparison: Comparison, top: int) -> list[str]:
    """The report as text, with no more than `top` lines of a list; 0 prints all."""
    titles = []
    for letter, source in (("A", comparison.left), ("B", comparison.right)):
        where = f"step {source.reader.train_state.step}" if source.reader else "Hugging Face folder"
        titles.append(f"{letter}  {source.path} ({where})")
    parts = [
        (part.part, f"{part.equal} of {part.tensors}", *_cells(part.distance))
        for part in comparison.parts
    ]
    count = len(comparison.pairs)
    verdict = f"Equal: all {count} tensors, in every value."
    if not comparison.equal:
        differ = sum(not pair.equal for pair in comparison.pairs)
        verdict = (
            f"Different: {differ} of {count} tensors, {len(comparison.shapes)} shapes, "
            f"{len(comparison.only_left)} only in A, {len(comparison.only_right)} only in B."
        )
    options = [f"{o.name}: {o.left} | {o.right}" for o in comparison.options]
    shapes = [f"{name}: {list(a)} | {list(b)}" for name, (a, b) in comparison.shapes.items()]
    sections = (
        titles,
        _listed("Options that differ (A | B)", options, 0),
        _listed("Only in A", comparison.only_left, top),
        _listed("Only in B", comparison.only_right, top),
        _listed("Shapes that differ (A | B)", shapes, top),
        _pair_lines(comparison, top),
        ["Parts", *table(("part", "equal", *_NUMBERS), parts)] if parts else [],
        [verdict],
    )
    return "\n\n".join("\n".join(lines) for lines in sections if lines).split("\n")


def comparison_json(comparison: Comparison) -> str:
    """Everything, equal tensors included."""
    content = {
        "left": str(comparison.left.path),
        "right": str(comparison.right.path),
        "equal": comparison.equal,
        "options": [option._asdict() for option in comparison.options],
        "only_left": list(comparison.only_left),
        "only_right": list(comparison.only_right),
        "shapes": [
            {"name": name, "left": a, "right": b} for name, (a, b) in comparison.shapes.items()
        ],
        "tensors": [
            {**_told(pair), "equal": pair.equal, **_numbers(pair.distance)}
            for pair in comparison.pairs
        ],
        "parts": [{**_told(part), **_numbers(part.distance)} for part in comparison.parts],
    }
    return to_json(content)


def _told(entry: Pair | PartDistance) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(entry) if field.name != "distance"]
    return {name: getattr(entry, name) for name in names}


def _numbers(found: Distance) -> dict[str, Any]:
    return {
        "different": found.different,
        "not_finite": found.not_finite,
        "max_abs": found.largest,
        "relative": found.relative,
        "cosine": found.cosine,
    }


def _listed(title: str, entries: Sequence[str], top: int) -> list[str]:
    if not entries:
        return []
    shown = entries[:top] if top else entries
    lines = [title, *(f"  {entry}" for entry in shown)]
    if len(shown) < len(entries):
        lines.append(f"  and {len(entries) - len(shown)} more")
    return lines


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
