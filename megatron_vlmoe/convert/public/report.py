"""What became of every tensor of an import, for people and as JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from itertools import groupby

Shape = tuple[int, ...]
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
