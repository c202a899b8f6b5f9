"""The grammar that all texts share: noun phrases, places, relations, agreement."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vlmoe.sample_corpus.scene import (
    COLORS,
    KINDS,
    SHAPE_NAMES,
    Cell,
    Group,
    Relation,
    Scene,
    Shape,
)

NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
PICTURE_WORDS = ("picture", "image", "drawing")
DRAWN_WORDS = ("drawn", "placed", "painted", "shown")
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Iris", "Jonas")
LETTER_PHRASES = ("with the letter {} on it", "marked with the letter {}")
RELATION_PHRASES: dict[Relation, tuple[str, ...]] = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
}
CELL_PHRASES: dict[Cell, tuple[str, ...]] = {
    (0, 0): ("in the upper left corner", "at the top left"),
    (0, 1): ("at the top",),
    (0, 2): ("in the upper right corner", "at the top right"),
    (1, 0): ("on the left side",),
    (1, 1): ("in the center", "in the middle"),
    (1, 2): ("on the right side",),
    (2, 0): ("in the lower left corner", "at the bottom left"),
    (2, 1): ("at the bottom",),
    (2, 2): ("in the lower right corner", "at the bottom right"),
}
ROW_NAMES = ("top", "middle", "bottom")
COLUMN_NAMES = ("left", "middle", "right")


def inflected(noun: str, count: int) -> str:
    """Singular or plural of a noun, given the singular: "circle" and "red crosses"."""
    if count == 1:
        return noun
    return noun + ("es" if noun.endswith("ss") else "s")


def counted(count: int, noun: str) -> str:
    """As in "one circle" and "three circles"."""
    return f"{NUMBERS[count]} {inflected(noun, count)}"


def be(count: int) -> str:
    """Is or are."""
    return "is" if count == 1 else "are"


def with_article(words: str) -> str:
    """``words`` behind "a" or "an"."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def listed(items: Sequence[str]) -> str:
    """As in "a", "a and b", "a, b and c"."""
    if len(items) == 1:
        return items[0]
    return f"{', '.join(items[:-1])} and {items[-1]}"


def sentence(words: str) -> str:
    """Capital and full stop."""
    return words[0].upper() + words[1:] + "."


def indefinite(group: Group, rng: random.Random, *, full: bool = True) -> str:
    """As in "a large striped red circle" and "two small blue stars".

    Solid texture goes unsaid; without ``full`` so do size and letter.
    """
    words = [rng.choice(SIZE_WORDS[group.size])] if full else []
    if group.texture != "solid":
        words.append(group.texture)
    noun = " ".join([*words, *group.name])
    phrase = with_article(noun) if group.count == 1 else counted(group.count, noun)
    if full and group.letter is not None:
        phrase += " " + rng.choice(LETTER_PHRASES).format(group.letter)
    return phrase


def definite(group: Group) -> str:
    """As in "the red circle" and "the blue stars": colour and kind single a group out."""
    return f"the {inflected(' '.join(group.name), group.count)}"


def relation_phrase(relation: Relation, rng: random.Random) -> str:
    """A preposition: X is ... Y."""
    return rng.choice(RELATION_PHRASES[relation])


def place_phrase(group: Group, rng: random.Random) -> str:
    """Where on the grid: "in the upper left corner", "in the middle row"."""
    row, column = group.cells[0]
    if group.count == 1:
        return rng.choice(CELL_PHRASES[row, column])
    if all(cell[0] == row for cell in group.cells):
        return f"in the {ROW_NAMES[row]} row"
    return f"in the {COLUMN_NAMES[column]} column"


@dataclass(frozen=True)
class Thing:
    """What a question or statement is about: the shapes of a colour, of a kind, or of both."""

    color: str | None
    """None leaves it open."""
    kind: str | None
    """None leaves it open."""

    def found_in(self, scene: Scene) -> list[Shape]:
        """The shapes of a scene that it names."""
        return [
            shape
            for shape in scene.shapes
            if self.color in (None, shape.color) and self.kind in (None, shape.kind)
        ]

    def noun(self, count: int = 1) -> str:
        """As in "red circle", "stars" and "blue shapes"."""
        return inflected(" ".join(filter(None, (self.color, self.kind or "shape"))), count)

    def indefinite(self) -> str:
        """As in "an orange circle"."""
        return with_article(self.noun())


KIND_THINGS = tuple(Thing(None, kind) for kind in KINDS)
COLOR_THINGS = tuple(Thing(color, None) for color in COLORS)
NAMED_THINGS = tuple(Thing(color, kind) for color, kind in SHAPE_NAMES)
