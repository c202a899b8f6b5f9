"""Statements about two pictures, left and right, and whether they hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

from megatron_vlmoe.sample_corpus.language import be, counted, with_article
from megatron_vlmoe.sample_corpus.scene import BACKGROUNDS, Scene, ShapeName
from megatron_vlmoe.sample_corpus.things import Thing

MAX_NAMED_TOTAL = 4
"""Numbers that a statement about both pictures together names, from 1 on."""
BACKGROUNDS_BY_BRIGHTNESS = ("black", "gray", "beige", "white")
"""The darkest first."""

Truth = Callable[[Scene, Scene], bool]
"""Of a left and a right picture."""


@dataclass(frozen=True)
class Statement:
    """One claim in several wordings."""

    form: str
    wordings: tuple[str, ...]
    holds: Truth
    needs_both: Truth
    """Whether one picture alone leaves it open. Pairs of which this is false give the label away.

    Asked for in statements about shapes only: those about backgrounds are meant to be easy.
    """


def statements(names: Sequence[ShapeName]) -> Iterator[Statement]:
    """Everything that can be stated about pictures whose shapes all have one of these names.

    Statements about backgrounds have one wording each: a model of a few million parameters that
    sees a few thousand of them must not spend its time on synonyms.
    """
    kinds = dict.fromkeys(kind for _, kind in names)
    colors = dict.fromkeys(color for color, _ in names)
    things = [Thing(None, kind) for kind in kinds] + [Thing(color, None) for color in colors]
    things += [Thing(color, kind) for color, kind in names]
    for thing in things:
        yield from _existence(thing)
        for other in things:
            if other != thing:
                yield _one_each(thing, other)
        for total in range(1, MAX_NAMED_TOTAL + 1):
            yield _total(thing, total)
    yield from _comparisons_of_numbers()
    yield from _comparisons_of_backgrounds()
    for background in BACKGROUNDS:
        yield from _named_background(background)


def _existence(thing: Thing) -> Iterator[Statement]:
    """How many of the pictures show it."""
    a = thing.indefinite()
    one, both, none = ({1}, {2}, {0})
    yield Statement(
        "both",
        (
            f"Both pictures show {a}.",
            f"There is {a} in both pictures.",
            f"Each of the two pictures shows {a}.",
        ),
        partial(_shown_in, thing, both),
        partial(_shown_in, thing, one | both),
    )
    yield Statement(
        "exactly one",
        (
            f"There is {a} in exactly one of the pictures.",
            f"Only one of the two pictures shows {a}.",
            f"One picture shows {a} and the other one does not.",
        ),
        partial(_shown_in, thing, one),
        _always,
    )
    yield Statement(
        "neither",
        (
            f"Neither picture shows {a}.",
            f"There is no {thing.noun()} in the two pictures.",
            f"No picture has {a} in it.",
        ),
        partial(_shown_in, thing, none),
        partial(_shown_in, thing, none | one),
    )
    yield Statement(
        "at least one",
        (f"At least one of the pictures shows {a}.", f"There is {a} in one picture or in both."),
        partial(_shown_in, thing, one | both),
        partial(_shown_in, thing, none | one),
    )


def _one_each(left: Thing, right: Thing) -> Statement:
    a, b = left.indefinite(), right.indefinite()
    return Statement(
        "one each",
        (
            f"The left picture shows {a} and the right one shows {b}.",
            f"There is {a} in the left picture and {b} in the right one.",
        ),
        partial(_shown_on, all, left, right),
        partial(_shown_on, any, left, right),
    )


def _total(thing: Thing, total: int) -> Statement:
    phrase = counted(total, thing.noun(), thing.noun(2))
    return Statement(
        "total",
        (
            f"There {be(total)} exactly {phrase} in the two pictures together.",
            f"The two pictures together have exactly {phrase}.",
        ),
        partial(_is_total, thing, total),
        _always,
    )


def _comparisons_of_numbers() -> Iterator[Statement]:
    for one, other in (("left", "right"), ("right", "left")):
        yield Statement(
            "more",
            (
                f"The {one} picture has more shapes than the {other} one.",
                f"There are more shapes in the {one} picture than in the {other} one.",
                f"There are fewer shapes in the {other} picture than in the {one} one.",
            ),
            partial(_has_more, one),
            _always,
        )
    yield Statement(
        "same number",
        (
            "Both pictures have the same number of shapes.",
            "There are as many shapes in the left picture as in the right one.",
        ),
        lambda left, right: len(left.shapes) == len(right.shapes),
        _always,
    )


def _comparisons_of_backgrounds() -> Iterator[Statement]:
    for side in ("left", "right"):
        for adjective in ("darker", "lighter"):
            yield Statement(
                f"{side} {adjective}",
                (f"The {side} picture has the {adjective} background.",),
                partial(_is_darker, (side == "left") == (adjective == "darker")),
                _always,
            )
    for adjective, equal in (("the same background", True), ("different backgrounds", False)):
        yield Statement(
            adjective,
            (f"The two pictures have {adjective}.",),
            partial(_has_backgrounds, equal),
            _always,
        )


def _named_background(background: str) -> Iterator[Statement]:
    """How many of the pictures have it."""
    a = f"{with_article(background)} background"
    for number, wording, numbers in (
        ("both", f"Both pictures have {a}.", {2}),
        ("exactly one", f"Exactly one picture has {a}.", {1}),
        ("neither", f"Neither picture has {a}.", {0}),
        ("at least one", f"At least one picture has {a}.", {1, 2}),
    ):
        holds = partial(_is_background_of, background, numbers)
        yield Statement(f"{number}, background", (wording,), holds, _always)


def _always(left: Scene, right: Scene) -> bool:
    return True


def _shown_in(thing: Thing, numbers: Set[int], left: Scene, right: Scene) -> bool:
    """Whether the number of pictures that show it is one of ``numbers``."""
    return sum(bool(thing.found_in(scene)) for scene in (left, right)) in numbers


def _shown_on(
    combine: Callable[[Iterable[bool]], bool], a: Thing, b: Thing, left: Scene, right: Scene
) -> bool:
    return combine((bool(a.found_in(left)), bool(b.found_in(right))))


def _has_more(side: str, left: Scene, right: Scene) -> bool:
    more, fewer = (left, right) if side == "left" else (right, left)
    return len(more.shapes) > len(fewer.shapes)


def _has_backgrounds(equal: bool, left: Scene, right: Scene) -> bool:
    return (left.background == right.background) == equal


def _is_darker(left_is: bool, left: Scene, right: Scene) -> bool:
    """Whether the left (the right) background is the darker one; false of equal ones."""
    a, b = (BACKGROUNDS_BY_BRIGHTNESS.index(scene.background) for scene in (left, right))
    return a < b if left_is else b < a


def _is_background_of(background: str, numbers: Set[int], left: Scene, right: Scene) -> bool:
    """Whether the number of pictures that have it is one of ``numbers``."""
    return sum(scene.background == background for scene in (left, right)) in numbers


def _is_total(thing: Thing, total: int, left: Scene, right: Scene) -> bool:
    return len(thing.found_in(left)) + len(thing.found_in(right)) == total


WEIGHTS: Mapping[str, int] = MappingProxyType(
    {
        "left darker": 30,
        "right darker": 18,
        "left lighter": 1,
        "right lighter": 1,
        "the same background": 8,
        "different backgrounds": 2,
        "both, background": 8,
        "exactly one, background": 2,
        "neither, background": 8,
        "at least one, background": 4,
        "both": 4,
        "exactly one": 3,
        "neither": 3,
        "at least one": 3,
        "one each": 4,
        "more": 2,
        "same number": 1,
        "total": 1,
    }
)
"""How often a form should be used.

Three of four statements are about backgrounds, and half of all ask which one is darker: that is a
difference of two things seen, which a small model learns first and builds upon. With forms that
all need a conjunction or an "exactly", no cue leads anywhere, and it learns none. That the left
picture is asked about more often is such a cue: who sees the pictures and not the sentence is
right a little more often than not.
"""
