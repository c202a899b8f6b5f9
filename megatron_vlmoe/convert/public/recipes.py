"""Which tensors of a source make which of a checkpoint, planned by shapes before anything is read, and a report."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Optional

import torch
from torch import Tensor

from megatron_vlmoe.config.errors import ConvertError
from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.convert.public.torch_files import PublicState
from megatron_vlmoe.convert.tensors import LazyTensor
from megatron_vlmoe.model.initial_values import full_initial_value
from megatron_vlmoe.planning.parameters import Shape, checkpoint_shapes

# Names in a line of the summary; the JSON file has all.
SHOWN = 3


@dataclass(frozen=True)
class Taken:
    """A tensor of the new checkpoint that comes from the source.

    Args:
        ours: its key.
        sources: names there.
        how: what was done besides moving values; empty if nothing was.
    """

    ours: str
    sources: tuple[str, ...]
    how: str = ""


@dataclass(frozen=True)
class Left:
    """A tensor of the source that is not used.

    Args:
        name: its name.
        shape: its shape.
        why: what that means.
        known: whether the importer expects it; false is a tensor that it does not know.
    """

    name: str
    shape: Shape
    why: str
    known: bool = True


@dataclass(frozen=True)
class New:
    """A tensor of the new checkpoint without a counterpart in the source.

    Args:
        ours: its key.
        shape: its shape.
        how: its values.
    """

    ours: str
    shape: Shape
    how: str


@dataclass(frozen=True)
class ImportReport:
    """The fate of every tensor on both sides.

    Args:
        source: file or folder.
        what: which model it is, in a few words.
        taken: used as they are (rows may be reordered, axes added).
        adapted: used after a change of values.
        left: not used.
        new: not in the source.
        remarks: what a reader must know besides.
    """

    source: str
    what: str
    taken: tuple[Taken, ...]
    adapted: tuple[Taken, ...]
    left: tuple[Left, ...]
    new: tuple[New, ...]
    remarks: tuple[str, ...] = ()

    @property
    def unknown(self) -> tuple[Left, ...]:
        """Tensors of the source that the importer does not know."""
        return tuple(left for left in self.left if not left.known)

    def lines(self) -> list[str]:
        """For people: counts, and one line per kind of change, loss or addition."""
        lines = [f"{self.source}: {self.what}", f"taken as they are: {len(self.taken)} tensors"]
        lines.append(f"adapted: {len(self.adapted)} tensors")
        lines += _grouped([(entry.how, entry.ours) for entry in self.adapted])
        lines.append(f"left: {len(self.left)} tensors")
        lines += _grouped([(entry.why, entry.name) for entry in self.left])
        lines.append(f"new: {len(self.new)} tensors")
        lines += _grouped([(entry.how, entry.ours) for entry in self.new])
        return lines + [f"note: {remark}" for remark in self.remarks]

    def to_json(self) -> str:
        """Everything, as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n"


def _grouped(entries: list[tuple[str, str]]) -> list[str]:
    """Names by what is said of them, in the order of the first of each."""
    order = {text: index for index, (text, _) in reversed(list(enumerate(entries)))}
    lines = []
    for text, group in groupby(sorted(entries, key=lambda e: order[e[0]]), key=lambda e: e[0]):
        names = [name for _, name in group]
        shown = ", ".join(names[:SHOWN])
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        lines.append(f"  {shown}{more}: {text}")
    return lines


Make = Callable[[Sequence[Tensor]], Tensor]
INITIAL = "initial values"


def only(tensors: Sequence[Tensor]) -> Tensor:
    """The one tensor, as it is."""
    (tensor,) = tensors
    return tensor


@dataclass(frozen=True)
class Recipe:
    """How a tensor of the checkpoint is made.

    Args:
        ours: its key.
        sources: tensors of the source, in the order that `make` takes them.
        make: makes it from them, in fp32; without sources from nothing.
        how: what changes besides the place of values; empty if nothing does.
    """

    ours: str
    sources: tuple[str, ...]
    make: Make
    how: str = ""


class Planner:
    """Collects the recipes of one import; `tensors` and `report` are its result.

    What no recipe speaks of has initial values here, and is left there.

    Args:
        source: what is imported.
        config: of the checkpoint that is made.
    """

    def __init__(self, source: PublicState, config: RunConfig) -> None:
        self.source = source
        self.config = config
        self.model = config.model
        self.shapes = checkpoint_shapes(config)
        self.remarks: list[str] = []
        self._recipes: dict[str, Recipe] = {}
        self._known: list[tuple[re.Pattern[str], str]] = []
        self._measures: list[Callable[[], str]] = []

    def wants(self, ours: str) -> bool:
        """Whether the checkpoint has such a tensor."""
        return ours in self.shapes

    def has(self, *names: str) -> bool:
        """Whether the source has all these tensors."""
        return all(name in self.source.tensors for name in names)

    def take(
        self,
        ours: str,
        *names: str,
        make: Make = only,
        how: str = "",
        planned: Optional[Shape] = None,
    ) -> None:
        """Makes a tensor from tensors of the source.

        Args:
            ours: key of the tensor.
            *names: tensors of the source.
            make: makes it from them.
            how: see `Recipe`.
            planned: shape of the result, where `make` cannot be tried on shapes alone.

        Raises:
            ConvertError: a tensor is missing there, or the result does not fit.
        """
        shapes = [self.source.shape(name) for name in names]
        result = planned if planned is not None else _tried(make, shapes)
        if result != self.shapes[ours]:
            listed = ", ".join(f"{name} {list(shape)}" for name, shape in zip(names, shapes))
            raise ConvertError(
                f"{self.source.path}: {listed} cannot become {ours} {list(self.shapes[ours])}"
            )
        self._recipes[ours] = Recipe(ours, names, make, how)

    def zero(self, ours: str, why: str) -> None:
        """Starts a tensor at zero instead of at initial values."""
        shape = self.shapes[ours]
        self._recipes[ours] = Recipe(ours, (), lambda _: torch.zeros(shape), f"zero: {why}")

    def leave(self, why: str, *patterns: str) -> None:
        """Says what it means that tensors of the source are left, if they are.

        Args:
            why: the meaning.
            *patterns: regular expressions of whole names.
        """
        self._known += [(re.compile(pattern), why) for pattern in patterns]

    def measure(self, remark: Callable[[], str]) -> None:
        """Adds a remark that needs the values of tensors, made when the report is."""
        self._measures.append(remark)

    def initial(self, ours: str) -> Tensor:
        """Initial values of a tensor."""
        return full_initial_value(ours, self.shapes[ours], self.model, self.config.train.seed)

    def tensors(self) -> dict[str, LazyTensor]:
        """The whole checkpoint in fp32, made tensor by tensor when it is written."""
        return {
            key: LazyTensor(shape, torch.float32, partial(self._make, key))
            for key, shape in self.shapes.items()
        }

    def left(self) -> tuple[Left, ...]:
        """Tensors of the source that no recipe uses."""
        used = {name for recipe in self._recipes.values() for name in recipe.sources}
        found = []
        for name, tensor in self.source.tensors.items():
            if name not in used:
                why = next((why for keys, why in self._known if keys.fullmatch(name)), None)
                unknown = "unknown to this importer"
                found.append(Left(name, tensor.shape, why or unknown, known=why is not None))
        return tuple(found)

    def report(self, what: str) -> ImportReport:
        """The fate of every tensor.

        Args:
            what: which model the source is.
        """
        recipes = [self._recipes[key] for key in self.shapes if key in self._recipes]
        entries = [Taken(r.ours, r.sources, r.how) for r in recipes if r.sources]
        without = {key: r.how for key, r in self._recipes.items() if not r.sources}
        new = [
            New(key, shape, without.get(key, INITIAL))
            for key, shape in self.shapes.items()
            if key in without or key not in self._recipes
        ]
        remarks = [*self.remarks, *(measure() for measure in self._measures)]
        if self.source.skipped:
            remarks.append(
                f"objects that are not tensors were skipped: {', '.join(self.source.skipped)}"
            )
        return ImportReport(
            source=str(self.source.path),
            what=what,
            taken=tuple(entry for entry in entries if not entry.how),
            adapted=tuple(entry for entry in entries if entry.how),
            left=self.left(),
            new=tuple(new),
            remarks=tuple(remarks),
        )

    def _make(self, key: str) -> Tensor:
        recipe = self._recipes.get(key)
        if recipe is None:
            return self.initial(key)
        return recipe.make([self.source.tensors[name].read().float() for name in recipe.sources])


def _tried(make: Make, shapes: Sequence[Shape]) -> Shape:
    """Shape of what is made of tensors of these shapes; empty if they do not go together."""
    try:
        return tuple(make([torch.empty(shape, device="meta") for shape in shapes]).shape)
    except (RuntimeError, ValueError, IndexError):
        return ()
