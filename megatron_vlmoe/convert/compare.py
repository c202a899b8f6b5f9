"""Two checkpoints, of any layouts and formats, tensor by tensor; a pair of tensors is in memory at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vlmoe.config.command_line import flat_options
from megatron_vlmoe.convert.parts import part_of, part_order
from megatron_vlmoe.convert.statistics import Distance, distance
from megatron_vlmoe.convert.tensor_source import TensorSource, open_source, optimizer_key
from megatron_vlmoe.convert.tensors import LazyTensor, with_progress


@dataclass(frozen=True)
class OptionDifference:
    """An option that is not the same, with both values; None where a side does not have it."""

    name: str
    left: Any
    right: Any


@dataclass(frozen=True)
class Pair:
    """A tensor that both sides have in the same shape.

    Args:
        name: its key.
        shape: its shape.
        left_type: type on the left.
        right_type: type on the right.
        distance: how far the values are apart.
    """

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
    """The tensors of one part of the model together.

    Args:
        part: its name.
        tensors: how many there are.
        equal: how many of them are equal.
        distance: of all of them as one vector.
    """

    part: str
    tensors: int
    equal: int
    distance: Distance


@dataclass(frozen=True)
class Comparison:
    """Everything that two checkpoints differ in.

    Args:
        left: the first.
        right: the second.
        options: options of the configuration that differ; they do not make checkpoints different.
        only_left: tensors that only the first has.
        only_right: tensors that only the second has.
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
    """Compares run, checkpoint, iteration or Hugging Face folders.

    Args:
        left: the first.
        right: the second.
        with_optimizer: compares the optimizer state too.

    Raises:
        ConvertError: one of them is not there or cannot be read.
    """
    first, second = open_source(left), open_source(right)
    exported = first.reader is None or second.reader is None
    ours, theirs = (_tensors(source, with_optimizer, exported) for source in (first, second))
    common = [name for name in ours if name in theirs]
    shapes = {
        name: (ours[name].shape, theirs[name].shape)
        for name in common
        if ours[name].shape != theirs[name].shape
    }
    same_shape = [name for name in common if name not in shapes]
    progress = with_progress(same_shape, len(same_shape), "compare")
    pairs = [_pair(name, ours[name], theirs[name]) for name in progress]
    return Comparison(
        first,
        second,
        options=tuple(_option_differences(first, second)),
        only_left=tuple(name for name in ours if name not in theirs),
        only_right=tuple(name for name in theirs if name not in ours),
        shapes=shapes,
        pairs=tuple(sorted(pairs, key=_unlikeness, reverse=True)),
        parts=_by_part(pairs),
    )


def _tensors(source: TensorSource, with_optimizer: bool, exported: bool) -> dict[str, LazyTensor]:
    tensors = source.without_padding() if exported else source.tensors
    return {**tensors, **(source.optimizer_tensors if with_optimizer else {})}


def _pair(name: str, left: LazyTensor, right: LazyTensor) -> Pair:
    types = [str(tensor.dtype).removeprefix("torch.") for tensor in (left, right)]
    found = distance(left.read(), right.read())
    return Pair(name, left.shape, types[0], types[1], found)


def _unlikeness(pair: Pair) -> tuple[bool, float, float, bool]:
    found = pair.distance
    return (found.not_finite > 0, found.relative, found.largest, not pair.equal)


def _by_part(pairs: list[Pair]) -> tuple[PartDistance, ...]:
    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        kind, key = optimizer_key(pair.name)
        part = part_of(key or pair.name)
        groups.setdefault(f"{part}, {kind}" if kind else part, []).append(pair)
    names = sorted(groups, key=lambda name: ("," in name, part_order(name.partition(",")[0])))
    return tuple(
        PartDistance(
            name,
            len(groups[name]),
            sum(pair.equal for pair in groups[name]),
            sum((pair.distance for pair in groups[name]), Distance()),
        )
        for name in names
    )


def _option_differences(left: TensorSource, right: TensorSource) -> list[OptionDifference]:
    a, b = (flat_options(dataclasses.asdict(source.config)) for source in (left, right))
    if left.reader is None or right.reader is None:
        # How a run trains does not travel with an export.
        a, b = _architecture(a), _architecture(b)
    names = [*a, *(name for name in b if name not in a)]
    return [
        OptionDifference(name, a.get(name), b.get(name))
        for name in names
        if a.get(name) != b.get(name)
    ]


def _architecture(options: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in options.items()
        if name.startswith(("model.", "moe.")) or name in ("task.name", "task.num_classes")
    }
