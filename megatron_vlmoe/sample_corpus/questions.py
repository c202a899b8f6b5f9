"""Questions about one picture, each with the answer that the scene gives.

A form is a way to ask whose answers are all equally good guesses: which of them is right only the
picture tells.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from megatron_vlmoe.sample_corpus.language import (
    CELL_PHRASES,
    PICTURE_WORDS,
    be,
    definite,
    relation_phrase,
)
from megatron_vlmoe.sample_corpus.scene import (
    BACKGROUNDS,
    COLORS,
    CONVERSE,
    KINDS,
    SIZES,
    Cell,
    Scene,
    Shape,
    relation_between,
)
from megatron_vlmoe.sample_corpus.things import COLOR_THINGS, KIND_THINGS, NAMED_THINGS, Thing

PLACE_NAMES: Mapping[Cell, str] = MappingProxyType(
    {
        (0, 0): "top left",
        (0, 1): "top",
        (0, 2): "top right",
        (1, 0): "left",
        (1, 1): "center",
        (1, 2): "right",
        (2, 0): "bottom left",
        (2, 1): "bottom",
        (2, 2): "bottom right",
    }
)
YES_NO = ("yes", "no")


@dataclass(frozen=True)
class Question:
    """A question and its true answer."""

    form: str
    text: str
    answer: str


@dataclass(frozen=True)
class Form:
    """How often a form is asked, what may be the answer, and what it asks of a scene."""

    weight: int
    answers: tuple[str, ...]
    ask: Callable[[Scene, random.Random], Iterator[tuple[str, str]]]
    """Yields (question, answer)."""

    @property
    def answer_type(self) -> str:
        """As in VQA: "yes/no", "number" or "other"."""
        if self.answers == YES_NO:
            return "yes/no"
        return "number" if self.answers[0].isdigit() else "other"


def questions_about(scene: Scene, rng: random.Random) -> list[Question]:
    """All that can be asked, in random phrasings and random order."""
    found = [
        Question(name, text, answer)
        for name, form in FORMS.items()
        for text, answer in form.ask(scene, rng)
    ]
    rng.shuffle(found)
    return found


def _color_of_kind(scene: Scene, rng: random.Random) -> Iterator[tuple[str, str]]:
    for thing in KIND_THINGS:
        shapes = thing.found_in(scene)
        if len({shape.color for shape in shapes}) == 1:
            yield _what_color(thing, len(shapes)), shapes[0].color


def _what_color(thing: Thing, count: int) -> str:
    return f"What color {be(count)} the {thing.noun(count)}?"


def _kind_of_color(scene: Scene, rng: random.Random) -> Iterator[tuple[str, str]]:
    for thing in COLOR_THINGS:
        if len(shapes := thing.found_in(scene)) == 1:
            texts = (
                f"What shape is {thing.color}?",
                f"Which shape is {thing.color}?",
                f"What is the {thing.noun()}?",
            )
            yield rng.choice(texts), shapes[0].kind


def _places(scene: Scene, rng: random.Random) -> Iterator[tuple[str, Shape]]:
    """Places that cannot be mistaken: "at the top" only where both upper corners are empty."""
    filled = {shape.cell for shape in scene.shapes}
    for shape in scene.shapes:
        if not filled & _corners_beside(shape.cell):
            yield rng.choice(CELL_PHRASES[shape.cell]), shape


def _corners_beside(cell: Cell) -> set[Cell]:
    row, column = cell
    if (row == 1) == (column == 1):
        return set()
    if row == 1:
        return {(0, column), (2, column)}
    return {(row, 0), (row, 2)}


def _kind_at_place(scene: Scene, rng: random.Random) -> Iterator[tuple[str, str]]:
    for place, shape in _places(scene, rng):
        yield rng.choice((f"What shape is {place}?", f"What is {place}?")), shape.kind


def _color_at_place(scene: Scene, rng: random.Random) -> Iterator[tuple[str, str]]:
    for place, shape in _places(scene, rng):
        yield f"What color is the shape {place}?", shape.color


def _count_all(scene: Scene, rng: random.Random) -> Iterator[tuple[str, str]]:
    yield _how_many("shapes", rng), str(len(scene.shapes))


def _count_kind(scene: Scene, rng: random.Random) -> Iterator[tuple[str, str]]:
    for thing in KIND_THINGS:
        yield _how_many(thing.noun(2), rng), str(len(thing.found_in(scene)))


def _count_color(scene: Scene, rng: random.Random) -> Iterator[tuple[str, str]]:
    for thing in COLOR_THINGS:
        count = len(thing.found_in(scene))
        if count < 4:
            yield _how_many(thing.noun(2), rng), str(count)


def _how_many(nouns: str, rng: random.Random) -> str:
    where = rng.choice(("there", f"in the {rng.choice(PICTURE_WORDS)}"))
    return f"How many {nouns} are {where}?"


def _existence(scene: Scene, rng: random.Random) -> Iterator[tuple[str, str]]:
    """Of kind, colour and both, one that is there and one that is not."""
    chosen = []
    for things in (KIND_THINGS, COLOR_THINGS, NAMED_THINGS):
        present = [thing for thing in things if thing.found_in(scene)]
        absent = [thing for thing in things if not thing.found_in(scene)]
        if things is NAMED_THINGS and rng.random() < 0.5:
            # Colour or kind is there, but not together.
            parts = {part for shape in scene.shapes for part in (shape.color, shape.kind)}
            absent = [thing for thing in absent if parts & {thing.color, thing.kind}]
        chosen += [rng.choice(present), rng.choice(absent)]
    for thing in chosen:
        picture = rng.choice(PICTURE_WORDS)
        texts = (
            f"Is there {thing.indefinite()}?",
            f"Is there {thing.indefinite()} in the {picture}?",
            f"Are there any {thing.noun(2)}?",
            f"Can you see {thing.indefinite()}?",
        )
        yield rng.choice(texts), _yes_no(bool(thing.found_in(scene)))


def _relation(scene: Scene, rng: random.Random) -> Iterator[tuple[str, str]]:
    """No is the answer where the converse holds."""
    for a in scene.groups:
        for b in scene.groups:
            if (relation := relation_between(a, b)) is None:
                continue
            for asked, answer in ((relation, "yes"), (CONVERSE[relation], "no")):
                verb = be(a.count).capitalize()
                text = f"{verb} {definite(a)} {relation_phrase(asked, rng)} {definite(b)}?"
                yield text, answer


def _place(scene: Scene, rng: random.Random) -> Iterator[tuple[str, str]]:
    for things in (KIND_THINGS, NAMED_THINGS):
        for thing in things:
            if len(shapes := thing.found_in(scene)) == 1:
                yield f"Where is the {thing.noun()}?", PLACE_NAMES[shapes[0].cell]


def _background(scene: Scene, rng: random.Random) -> Iterator[tuple[str, str]]:
    texts = ("What color is the background?", "What is the color of the background?")
    yield rng.choice(texts), scene.background


def _size(scene: Scene, rng: random.Random) -> Iterator[tuple[str, str]]:
    kinds = [group.kind for group in scene.groups]
    for group in scene.groups:
        unique = kinds.count(group.kind) == 1
        noun = f"the {Thing(None, group.kind).noun(group.count)}" if unique else definite(group)
        yield f"{be(group.count).capitalize()} {noun} large or small?", group.size


def _yes_no(answer: bool) -> str:
    return "yes" if answer else "no"


FORMS: Mapping[str, Form] = MappingProxyType(
    {
        "color of kind": Form(4, COLORS, _color_of_kind),
        "color at place": Form(2, COLORS, _color_at_place),
        "kind of color": Form(4, KINDS, _kind_of_color),
        "kind at place": Form(2, KINDS, _kind_at_place),
        "count all": Form(2, ("1", "2", "3", "4"), _count_all),
        "count kind": Form(2, ("0", "1", "2", "3"), _count_kind),
        "count color": Form(1, ("0", "1", "2", "3"), _count_color),
        "existence": Form(4, YES_NO, _existence),
        "relation": Form(2, YES_NO, _relation),
        "place": Form(3, tuple(PLACE_NAMES.values()), _place),
        "background": Form(2, BACKGROUNDS, _background),
        "size": Form(2, SIZES, _size),
    }
)
