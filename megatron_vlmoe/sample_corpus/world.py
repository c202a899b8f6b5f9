"""The world: a picture is one to four shapes on a 3 x 3 grid. All that is true of it, the words for it, and tasks.

What every task of the sample corpus is made of: fresh scenes, pictures, files and known truth.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import combinations, permutations
from pathlib import Path
from typing import Any, Literal

Stream = Literal["pair", "image", "text"]
Relation = Literal["left", "right", "above", "below"]

KINDS = ("circle", "square", "triangle", "diamond", "star", "cross")
COLORS = ("red", "green", "blue", "yellow", "orange", "purple")
SIZES = ("small", "large")
TEXTURES = ("solid", "striped", "dotted")
BACKGROUNDS = ("white", "gray", "black", "beige")
LETTERS = ("A", "E", "H", "L", "T", "X")
LETTERED_KINDS = ("circle", "square", "triangle", "diamond")
"""Kinds wide enough in the middle to carry a letter."""
PICTURE_SIZES = ((96, 96), (120, 96), (96, 120), (128, 96), (128, 128), (160, 120), (120, 160))
GRID = 3
VALIDATION_PERIOD = 10
"""Every tenth picture and paragraph, from number 0 on, is held out."""
CONVERSE: dict[Relation, Relation] = {
    "left": "right",
    "right": "left",
    "above": "below",
    "below": "above",
}

Cell = tuple[int, int]
"""(row, column), both 0..2 from the top left."""
ShapeName = tuple[str, str]
"""(colour, kind)."""
SHAPE_NAMES: tuple[ShapeName, ...] = tuple((color, kind) for color in COLORS for kind in KINDS)

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


@dataclass(frozen=True, kw_only=True)
class _Looks:
    kind: str
    color: str
    size: str
    texture: str
    letter: str | None

    @property
    def name(self) -> ShapeName:
        """Colour and kind: what singles a group out."""
        return self.color, self.kind


@dataclass(frozen=True, kw_only=True)
class Shape(_Looks):
    """One shape of a picture."""

    row: int
    column: int
    shift: tuple[float, float]
    """Of the centre from the cell's centre, (x, y), as a fraction of the smaller cell side."""

    @property
    def cell(self) -> Cell:
        """Its place on the grid."""
        return self.row, self.column


@dataclass(frozen=True, kw_only=True)
class Group(_Looks):
    """All shapes of a scene that share colour and kind; they share everything but the place."""

    cells: tuple[Cell, ...]

    @property
    def count(self) -> int:
        """Number of shapes, 1 to 3; several always fill part of one row or one column."""
        return len(self.cells)

    @property
    def definite(self) -> str:
        """As in "the red circle" and "the blue stars": colour and kind single a group out."""
        return f"the {inflected(' '.join(self.name), self.count)}"

    def indefinite(self, rng: random.Random, *, full: bool = True) -> str:
        """As in "a large striped red circle" and "two small blue stars".

        Solid texture goes unsaid; without ``full`` so do size and letter.
        """
        words = [rng.choice(SIZE_WORDS[self.size])] if full else []
        if self.texture != "solid":
            words.append(self.texture)
        noun = " ".join([*words, *self.name])
        phrase = with_article(noun) if self.count == 1 else counted(self.count, noun)
        if full and self.letter is not None:
            phrase += " " + rng.choice(LETTER_PHRASES).format(self.letter)
        return phrase

    def place(self, rng: random.Random) -> str:
        """Where on the grid: "in the upper left corner", "in the middle row"."""
        row, column = self.cells[0]
        if self.count == 1:
            return rng.choice(CELL_PHRASES[row, column])
        if all(cell[0] == row for cell in self.cells):
            return f"in the {ROW_NAMES[row]} row"
        return f"in the {COLUMN_NAMES[column]} column"


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a picture shows; pictures and texts are both drawn from it."""

    width: int
    """Pixels."""
    height: int
    """Pixels."""
    background: str
    shapes: tuple[Shape, ...]

    @property
    def groups(self) -> tuple[Group, ...]:
        """The shapes by name, in order of first appearance."""
        members: dict[ShapeName, list[Shape]] = {}
        for shape in self.shapes:
            members.setdefault(shape.name, []).append(shape)
        return tuple(
            Group(
                **{field.name: getattr(shapes[0], field.name) for field in fields(_Looks)},
                cells=tuple(shape.cell for shape in shapes),
            )
            for shapes in members.values()
        )

    def relations(self) -> Iterator[tuple[Group, Relation, Group]]:
        """Of every two groups, both ways round, how the first stands to the second."""
        for a, b in permutations(self.groups, 2):
            relation = relation_between(a, b)
            assert relation is not None, "groups are placed apart"
            yield a, relation, b


def holds(relation: Relation, a: Sequence[Cell], b: Sequence[Cell]) -> bool:
    """Whether every cell of ``a`` is left of (right of, above, below) every cell of ``b``."""
    axis = 1 if relation in ("left", "right") else 0
    if relation in ("right", "below"):
        a, b = b, a
    return max(cell[axis] for cell in a) < min(cell[axis] for cell in b)


def relation_between(a: Group, b: Group) -> Relation | None:
    """The relation of ``a`` to ``b`` along the axis where they are farther apart.

    Both axes alike: the horizontal one. None where they overlap on both; `sample_scene` makes no
    such scene.
    """
    best: Relation | None = None
    best_gap = 0
    for relation in CONVERSE:
        if holds(relation, a.cells, b.cells):
            axis = 1 if relation in ("left", "right") else 0
            gap = min(abs(p[axis] - q[axis]) for p in a.cells for q in b.cells)
            if gap > best_gap:
                best, best_gap = relation, gap
    return best


def generator_for(seed: int, purpose: str, index: int) -> random.Random:
    """A random generator that depends on nothing but its key."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{index}".encode()).digest()
    return random.Random(int.from_bytes(digest[:16], "big"))


def split_of(index: int) -> Literal["train", "val"]:
    """Whether picture or paragraph ``index`` is for training or held out."""
    return "val" if index % VALIDATION_PERIOD == 0 else "train"


def sample_scene(seed: int, stream: Stream, index: int) -> Scene:
    """Scene ``index`` of a stream: a pure function of its arguments.

    Streams "pair" and "text" may hold two or three equal shapes. In stream "image" the first shape
    is the only large one: its kind and colour are the picture's class.
    """
    rng = generator_for(seed, f"{stream}-scene", index)
    return draw_object_scene(rng) if stream == "image" else draw_scene(rng)


def draw_scene(rng: random.Random, names: Sequence[ShapeName] = SHAPE_NAMES) -> Scene:
    """One to four shapes, each group with another of ``names``, of which there are at least four."""
    picture_size = rng.choice(PICTURE_SIZES)
    total = rng.choices((1, 2, 3, 4), weights=(2, 5, 4, 2))[0]
    counts = [1] * total
    if total > 1 and rng.random() >= 0.7:
        several = rng.randint(2, min(3, total))
        counts = [several] + [1] * (total - several)
        rng.shuffle(counts)
    return _compose(rng, picture_size, rng.sample(names, len(counts)), counts)


def draw_object_scene(rng: random.Random, main: ShapeName | None = None) -> Scene:
    """One large shape, of name ``main`` or any, and up to three small ones of other names."""
    picture_size = rng.choice(PICTURE_SIZES)
    total = rng.choices((1, 2, 3, 4), weights=(3, 3, 3, 2))[0]
    names = rng.sample(SHAPE_NAMES, total)
    if main is not None:
        names = [main, *(name for name in names if name != main)][:total]
    return _compose(rng, picture_size, names, [1] * total, first_is_main=True)


def _compose(
    rng: random.Random,
    picture_size: tuple[int, int],
    names: Sequence[ShapeName],
    counts: Sequence[int],
    *,
    first_is_main: bool = False,
) -> Scene:
    """Draws everything but the picture's size, the names and how many there are of each."""
    shapes: list[Shape] = []
    for number, ((color, kind), cells) in enumerate(zip(names, _place(rng, counts), strict=True)):
        if first_is_main:
            size = "large" if number == 0 else "small"
        else:
            size = rng.choice(SIZES)
        texture = rng.choices(TEXTURES, weights=(4, 1, 1))[0]
        letter = None
        can_carry = size == "large" and texture == "solid" and kind in LETTERED_KINDS
        if can_carry and len(cells) == 1 and rng.random() < 0.4:
            letter = rng.choice(LETTERS)
        shapes.extend(
            Shape(
                kind=kind,
                color=color,
                size=size,
                texture=texture,
                letter=letter,
                row=row,
                column=column,
                shift=(round(rng.uniform(-0.05, 0.05), 3), round(rng.uniform(-0.05, 0.05), 3)),
            )
            for row, column in cells
        )
    width, height = picture_size
    background = rng.choice(BACKGROUNDS)
    return Scene(width=width, height=height, background=background, shapes=tuple(shapes))


def _place(rng: random.Random, counts: Sequence[int]) -> list[tuple[Cell, ...]]:
    """Cells of each group, in a line, such that any two groups are apart along a row or a column."""
    while True:
        placed: list[tuple[Cell, ...]] = []
        for count in counts:
            fixed = rng.randrange(GRID)
            along = sorted(rng.sample(range(GRID), count))
            in_row = rng.random() < 0.5
            placed.append(tuple((fixed, n) if in_row else (n, fixed) for n in along))
        if all(any(holds(r, a, b) for r in CONVERSE) for a, b in combinations(placed, 2)):
            return placed


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


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture to be drawn for one split of a task."""

    split: str
    file: Path
    """Below the folder of all tasks; the suffix says whether JPEG or PNG."""
    scene: Scene


@dataclass(frozen=True, kw_only=True)
class TaskFiles:
    """All that one task consists of."""

    pictures: tuple[Picture, ...]
    texts: Mapping[Path, str]
    """Content of every other file, by path below the folder of all tasks."""
    truth: Mapping[str, Any]
    """For each evaluation split the samples, how often each label occurs, and what guessing scores."""


class FreshScenes:
    """Gives out scenes that look like none before, not even with their shapes moved a little.

    So no picture of an evaluation split is in any training split, and a picture that a model was
    pretrained on is in no task.
    """

    def __init__(self, seed: int, known: Iterable[Scene] = ()) -> None:
        self._seed = seed
        self._given: set[Scene] = set(map(_centered, known))
        self._drawn: Counter[str] = Counter()

    def take(
        self,
        stream: str,
        draw: Callable[[random.Random], Scene] = draw_scene,
        accept: Callable[[Scene], bool] = lambda scene: True,
    ) -> Scene:
        """The next scene of a stream that is acceptable and new; every try has its own generator."""
        while True:
            scene = draw(generator_for(self._seed, f"{stream}-scene", self._drawn[stream]))
            self._drawn[stream] += 1
            centered = _centered(scene)
            if centered not in self._given and accept(scene):
                self._given.add(centered)
                return scene


def _centered(scene: Scene) -> Scene:
    """The same with all shapes in the middle of their cells."""
    shapes = tuple(replace(shape, shift=(0.0, 0.0)) for shape in scene.shapes)
    return replace(scene, shapes=shapes)


def class_truth(labels: Iterable[str]) -> dict[str, Any]:
    """Truth of a classification split, of which always saying the most frequent label is a guess."""
    counts = Counter(labels)
    total = counts.total()
    return {
        "samples": total,
        "labels": dict(sorted(counts.items())),
        "guess_percent": percent(max(counts.values()) / total),
    }


def guess_by(
    train: Iterable[tuple[Hashable, str]], held_out: Iterable[tuple[Hashable, str]]
) -> float:
    """Percent right for a reader who is told one cue of a sample and nothing else.

    Args:
        train: cue and label of the training samples. The reader says the label that is most frequent
            with a cue there, of equally frequent ones the first in the alphabet; to an unknown cue
            the one that is most frequent overall.
        held_out: cue and label of the samples that are judged.
    """
    overall: Counter[str] = Counter()
    by_cue: dict[Hashable, Counter[str]] = {}
    for cue, label in train:
        overall[label] += 1
        by_cue.setdefault(cue, Counter())[label] += 1
    right = [label == most_frequent(by_cue.get(cue, overall)) for cue, label in held_out]
    return percent(sum(right) / len(right))


def most_frequent(counts: Mapping[str, int]) -> str:
    """Of equally frequent ones the first in the alphabet."""
    return min(counts, key=lambda label: (-counts[label], label))


def percent(fraction: float) -> float:
    """Rounded as results are reported."""
    return round(100 * fraction, 2)


def json_text(content: object) -> str:
    """One line of JSON."""
    return json.dumps(content) + "\n"
