"""The grammar that captions and paragraphs share: noun phrases, places, relations, agreement."""

from __future__ import annotations

import random
from collections.abc import Sequence

from megatron_vlmoe.sample_corpus.scene import Cell, Group, Relation

NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
PICTURE_WORDS = ("picture", "image", "drawing")
DRAWN_WORDS = ("drawn", "placed", "painted", "shown")
LETTER_PHRASES = ("with the letter {} on it", "marked with the letter {}")
RELATION_PHRASES: dict[Relation, tuple[str, ...]] = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
}
SIDE_PHRASES: dict[Relation, tuple[str, ...]] = {
    "left": ("to {} left", "on {} left"),
    "right": ("to {} right", "on {} right"),
    "above": ("above {}",),
    "below": ("below {}", "under {}"),
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


def plural(kind: str) -> str:
    """Plural of a kind of shape."""
    return kind + ("es" if kind.endswith("ss") else "s")


def be(count: int) -> str:
    """Is or are."""
    return "is" if count == 1 else "are"


def with_article(words: str) -> str:
    """``words`` behind "a" or "an"."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def counted(count: int, noun: str, plural_noun: str | None = None) -> str:
    """As in "one circle" and "three circles"."""
    return f"{NUMBERS[count]} {noun if count == 1 else plural_noun or plural(noun)}"


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
    words.append(group.color)
    words.append(group.kind if group.count == 1 else plural(group.kind))
    noun = " ".join(words)
    phrase = with_article(noun) if group.count == 1 else f"{NUMBERS[group.count]} {noun}"
    if full and group.letter is not None:
        phrase += " " + rng.choice(LETTER_PHRASES).format(group.letter)
    return phrase


def definite(group: Group) -> str:
    """As in "the red circle" and "the blue stars": colour and kind single a group out."""
    return f"the {group.color} {group.kind if group.count == 1 else plural(group.kind)}"


def relation_phrase(relation: Relation, rng: random.Random) -> str:
    """A preposition: X is ... Y."""
    return rng.choice(RELATION_PHRASES[relation])


def side_phrase(relation: Relation, of: Group, rng: random.Random) -> str:
    """An adverbial for what stands in ``relation`` to ``of``: "to its left", "above them"."""
    horizontal = relation in ("left", "right")
    singular, several = ("its", "their") if horizontal else ("it", "them")
    return rng.choice(SIDE_PHRASES[relation]).format(singular if of.count == 1 else several)


def place_phrase(group: Group, rng: random.Random) -> str:
    """Where on the grid: "in the upper left corner", "in the middle row"."""
    if group.count == 1:
        return rng.choice(CELL_PHRASES[group.cells[0]])
    rows = {row for row, _ in group.cells}
    if len(rows) == 1:
        return f"in the {ROW_NAMES[rows.pop()]} row"
    return f"in the {COLUMN_NAMES[group.cells[0][1]]} column"


def background_phrase(background: str) -> str:
    """As in "on a white background"."""
    return f"on {with_article(background)} background"
