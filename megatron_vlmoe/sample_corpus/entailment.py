"""Premises that tell part of a scene, claims about it, and what follows.

A premise names every kind of shape of its scene once, with all shapes of that kind, and leaves out
colours, sizes, places and more at random. What it leaves out may be either way: a claim is entailed
if it holds in every picture of which the premise is true, contradicted if in none.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Literal

from megatron_vlmoe.sample_corpus.scene import CONVERSE, GRID, Cell, Group, Relation, holds

Label = Literal["entailment", "neutral", "contradiction"]
LABELS: tuple[Label, ...] = ("entailment", "neutral", "contradiction")
ClaimForm = Literal[
    "color", "size", "place", "relation", "background", "existence", "number of shapes"
]


@dataclass(frozen=True, kw_only=True)
class Mention:
    """A group in a premise, and which parts of it are told."""

    group: Group
    color: bool
    size: bool
    texture: bool
    place: bool
    """Told of single shapes only."""
    count: bool
    """If not, several are "some"."""

    @property
    def told_count(self) -> int | None:
        """Number of shapes; None for "some", two or three."""
        return self.group.count if self.count or self.group.count == 1 else None


@dataclass(frozen=True, kw_only=True)
class Premise:
    """What a premise says."""

    mentions: tuple[Mention, ...]
    relation: Relation | None
    """Of the first group to the second, where it is told."""
    background: str | None
    """Where it is told."""
    closed: bool
    """Whether it says that there is nothing else."""

    def mention(self, kind: str | None) -> Mention | None:
        """The mention of a kind, if there is one."""
        return next((m for m in self.mentions if m.group.kind == kind), None)

    @cached_property
    def arrangements(self) -> tuple[dict[str, tuple[Cell, ...]], ...]:
        """Every way to place the mentioned shapes that the premise allows: cells by kind."""
        kinds = [m.group.kind for m in self.mentions]
        options = [[m.group.cells] if m.place else _lines(m.told_count) for m in self.mentions]
        return tuple(
            dict(zip(kinds, cells, strict=True))
            for cells in product(*options)
            if (self.relation is None or holds(self.relation, cells[0], cells[1]))
            and len({cell for line in cells for cell in line}) == sum(map(len, cells))
        )


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One thing that a hypothesis says, or, negated, denies."""

    form: ClaimForm
    kind: str | None = None
    """What it is about; None: the background."""
    word: str | None = None
    """Colour, size or background."""
    cell: Cell | None = None
    relation: Relation | None = None
    other: str | None = None
    """The kind of shape to which ``kind`` stands in ``relation``."""
    number: int | None = None
    negated: bool = False


def judge(premise: Premise, claim: Claim) -> Label | None:
    """What follows; None where a reader could argue, or where it takes several premises together."""
    told: Label | None
    if claim.form == "background":
        told = _compare(premise.background, claim.word)
    elif claim.form == "existence":
        told = _judge_existence(premise, claim)
    else:
        mention = premise.mention(claim.kind)
        if mention is None:
            return None
        told = _judge_mention(premise, mention, claim)
    if told is None or not claim.negated:
        return told
    opposite: dict[Label, Label] = {"entailment": "contradiction", "contradiction": "entailment"}
    return opposite.get(told, "neutral")


def _judge_mention(premise: Premise, mention: Mention, claim: Claim) -> Label | None:
    group = mention.group
    if claim.form == "number of shapes":
        if group.count == 1:
            return None
        return _compare(mention.told_count, claim.number)
    if group.count > 1:
        # The hypothesis speaks of one.
        return None
    match claim.form:
        case "color":
            return _compare(group.color if mention.color else None, claim.word)
        case "size":
            return _compare(group.size if mention.size else None, claim.word)
        case "place":
            return _judge_place(premise, mention, claim)
        case "relation":
            return _judge_relation(premise, mention, claim)
    raise AssertionError(claim.form)


def _compare(told: object, claimed: object) -> Label:
    if told is None:
        return "neutral"
    return "entailment" if told == claimed else "contradiction"


def _judge_existence(premise: Premise, claim: Claim) -> Label | None:
    mention = premise.mention(claim.kind)
    if mention is not None:
        return "entailment" if mention.group.count == 1 else None
    return "contradiction" if premise.closed else "neutral"


def _judge_place(premise: Premise, mention: Mention, claim: Claim) -> Label | None:
    assert claim.kind is not None and claim.cell is not None
    cell = mention.group.cells[0]
    if mention.place and may_be_mistaken(cell, claim.cell):
        return None
    told = _compare(cell if mention.place else None, claim.cell)
    found = (cells[claim.kind] == (claim.cell,) for cells in premise.arrangements)
    return told if told == _in_all_or_none(found) else None


def may_be_mistaken(a: Cell, b: Cell) -> bool:
    """Whether one is a corner and the other a side that it belongs to: "top left" and "top"."""
    if a == b or (1, 1) in (a, b):
        return False
    is_side = [cell for cell in (a, b) if 1 in cell]
    return len(is_side) == 1 and (a[0] == b[0] or a[1] == b[1])


def _judge_relation(premise: Premise, mention: Mention, claim: Claim) -> Label | None:
    kind, other, relation = claim.kind, claim.other, claim.relation
    assert kind is not None and other is not None and relation is not None
    other_mention = premise.mention(other)
    if other_mention is None or other_mention.group.count > 1:
        return None
    told: Label = "neutral"
    pair = [m.group.kind for m in premise.mentions[:2]]
    if premise.relation is not None and sorted(pair) == sorted((kind, other)):
        stated = premise.relation if pair[0] == kind else CONVERSE[premise.relation]
        if relation == stated:
            told = "entailment"
        elif relation == CONVERSE[stated]:
            told = "contradiction"
    found = (holds(relation, cells[kind], cells[other]) for cells in premise.arrangements)
    return told if told == _in_all_or_none(found) else None


def _in_all_or_none(found: Iterable[bool]) -> Label:
    seen: set[bool] = set()
    for value in found:
        seen.add(value)
        if len(seen) == 2:
            return "neutral"
    return "entailment" if True in seen else "contradiction"


def _lines(count: int | None) -> list[tuple[Cell, ...]]:
    """Where a group of one, two or three shapes may stand; of two or three if None."""
    if count is None:
        return _lines(2) + _lines(3)
    cells = [(row, column) for row in range(GRID) for column in range(GRID)]
    if count == 1:
        return [(cell,) for cell in cells]
    lines = [[c for c in cells if c[axis] == place] for axis in (0, 1) for place in range(GRID)]
    if count == GRID:
        return [tuple(line) for line in lines]
    return [tuple(c for c in line if c != left_out) for line in lines for left_out in line]
