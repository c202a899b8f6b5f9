"""Paragraphs of plain text: descriptions of one scene, and what follows from them.

A paragraph opens, names every group, and then adds sentences of mixed sorts. Each function from
``_relations`` on lists true sentences of one sort.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator

from megatron_vlmoe.sample_corpus.world import (
    COLORS,
    CONVERSE,
    DRAWN_WORDS,
    KINDS,
    NAMES,
    NUMBERS,
    PICTURE_WORDS,
    Group,
    Relation,
    Scene,
    be,
    counted,
    definite,
    generator_for,
    holds,
    indefinite,
    inflected,
    listed,
    place_phrase,
    relation_between,
    relation_phrase,
    sample_scene,
    sentence,
    with_article,
)

MIN_WORDS, MAX_WORDS = 40, 120
OCCASIONS = (
    "yesterday",
    "on Monday",
    "on a rainy Sunday",
    "this morning",
    "after lunch",
    "at school",
    "during the break",
    "in the garden",
    "before dinner",
)
KIND_FACTS = {
    "circle": ("a circle is round and has no corners", "a circle looks the same from every side"),
    "square": ("a square has four equal sides", "the four corners of a square are alike"),
    "triangle": ("a triangle has three sides and three corners", "no triangle is round"),
    "diamond": ("a diamond stands on one of its corners", "a diamond is higher than it is wide"),
    "star": ("a star has five points", "the points of a star are sharp"),
    "cross": ("a cross looks like a plus sign", "a cross has four arms of the same length"),
}
COLOR_FACTS = {
    "red": ("red is the color of ripe tomatoes", "red, yellow and blue are primary colors"),
    "green": ("green is a mix of blue and yellow", "green is the color of grass"),
    "blue": ("blue is the color of the sky", "red, yellow and blue are primary colors"),
    "yellow": ("yellow is the color of lemons", "red, yellow and blue are primary colors"),
    "orange": ("orange is a mix of red and yellow", "orange is the color of carrots"),
    "purple": ("purple is a mix of red and blue", "purple is the color of ripe plums"),
}


def write_paragraph(seed: int, index: int) -> str:
    """Paragraph ``index``, 40 to 120 words about scene ``index`` of stream "text"; pure."""
    scene = sample_scene(seed, "text", index)
    rng = generator_for(seed, "paragraph", index)
    picture = rng.choice(PICTURE_WORDS)
    number = len(scene.shapes)
    shapes, is_are = counted(number, "shape"), be(number)
    background = f"on {with_article(scene.background)} background"
    name, occasion, drawn = rng.choice(NAMES), rng.choice(OCCASIONS), rng.choice(DRAWN_WORDS)
    openings = (
        f"this {picture} has {shapes} {background}",
        f"there {is_are} {shapes} in this {picture}, and the background is {scene.background}",
        f"{occasion} {name} made {with_article(picture)} with {shapes} {background}",
        f"{name} made this {picture} {occasion}, with {shapes} {background}",
        f"in the {picture} that {name} made, {shapes} {is_are} {drawn} {background}",
        f"look at this {picture}: it shows {shapes} {background}",
    )
    sentences = [sentence(rng.choice(openings))]
    for group in rng.sample(scene.groups, len(scene.groups)):
        phrase, place = indefinite(group, rng), place_phrase(group, rng)
        is_are, drawn = be(group.count), rng.choice(DRAWN_WORDS)
        descriptions = (
            f"{place} there {is_are} {phrase}",
            f"there {is_are} {phrase} {place}",
            f"{phrase} {is_are} {drawn} {place}",
            f"{place} you can see {phrase}",
            f"{place} {is_are} {phrase}",
        )
        sentences.append(sentence(rng.choice(descriptions)))
    num_words = sum(len(s.split()) for s in sentences)
    wanted = rng.randint(MIN_WORDS + 10, MAX_WORDS - 20)
    for words in _mixed(scene, picture, rng):
        if num_words >= wanted:
            break
        length = len(words.split())
        if num_words + length <= MAX_WORDS:
            sentences.append(words if words[-1] in ".?" else sentence(words))
            num_words += length
    return " ".join(sentences)


def _mixed(scene: Scene, picture: str, rng: random.Random) -> Iterator[str]:
    """All further sentences about a scene: one of each sort in turn, relations before the rest."""
    *sorts, relations = (
        [*dict.fromkeys(facts)]
        for facts in (
            _counts(scene, picture),
            _changes(scene, rng),
            _contrasts(scene),
            _absences(scene, picture, rng),
            _questions(scene, rng),
            _knowledge(scene, rng),
            _relations(scene, rng),
        )
    )
    for facts in (relations, *sorts):
        rng.shuffle(facts)
    rng.shuffle(sorts)
    sorts.insert(0, relations)
    while any(sorts):
        for facts in sorts:
            if facts:
                yield facts.pop()


def _relations(scene: Scene, rng: random.Random) -> Iterator[str]:
    """A relation and its converse; three in a line."""

    def states(a: Group, relation: Relation, b: Group) -> str:
        return f"{definite(a)} {be(a.count)} {relation_phrase(relation, rng)} {definite(b)}"

    for a, relation, b in scene.relations():
        first, second = states(a, relation, b), states(b, CONVERSE[relation], a)
        yield rng.choice(
            (
                f"{first}, so {second}",
                f"{first}, and therefore {second}",
                f"because {first}, {second}",
                f"if {first}, then {second}",
                f"{first}, which means that {second}",
            )
        )
        for c in scene.groups:
            if relation_between(b, c) == relation and holds(relation, a.cells, c.cells):
                yield f"{first} and {states(b, relation, c)}, so {states(a, relation, c)}"


def _counts(scene: Scene, picture: str) -> Iterator[str]:
    shapes = counted(len(scene.shapes), "shape")
    kinds = Counter(shape.kind for shape in scene.shapes)
    colors = Counter(shape.color for shape in scene.shapes)
    letters = sum(shape.letter is not None for shape in scene.shapes)
    if len(kinds) > 1:
        parts = [(kind, kinds[kind]) for kind in KINDS if kind in kinds]
        listing = listed([counted(count, kind) for kind, count in parts])
        yield f"there {be(parts[0][1])} {listing}, so there are {shapes} in total"
        yield f"{listing} make {shapes}"
    for color in COLORS:
        if 0 < colors[color] < len(scene.shapes):
            yield f"{NUMBERS[colors[color]]} of the {shapes} {be(colors[color])} {color}"
        elif colors[color] > 1:
            yield f"all {shapes} are {color}"
    if letters:
        yield f"the {picture} has {counted(letters, 'letter')} in it"


def _changes(scene: Scene, rng: random.Random) -> Iterator[str]:
    """Arithmetic: one shape more, one group fewer."""
    total = len(scene.shapes)
    verb = rng.choice(("draws", "adds", "paints"))
    more = counted(total + 1, "shape")
    yield f"if {rng.choice(NAMES)} {verb} one more {rng.choice(KINDS)}, there will be {more}"
    for group in scene.groups:
        left = total - group.count
        verb = rng.choice(("removes", "takes away"))
        remaining = f"{counted(left, 'shape')} {'remains' if left == 1 else 'remain'}"
        yield f"when {rng.choice(NAMES)} {verb} {definite(group)}, {remaining}"


def _contrasts(scene: Scene) -> Iterator[str]:
    """Size, texture and letter, between two groups."""
    for number, a in enumerate(scene.groups):
        the_a, is_a = definite(a), be(a.count)
        for b in scene.groups[:number]:
            the_b, is_b = definite(b), be(b.count)
            if a.size == b.size:
                yield f"{the_a} and {the_b} have the same size, for both are {a.size}"
            elif a.size == "large":
                yield f"{the_a} {is_a} larger than {the_b}, so {the_b} {is_b} smaller"
            else:
                yield f"{the_b} {is_b} larger than {the_a}, so {the_a} {is_a} smaller"
            if a.texture == b.texture:
                yield f"{the_a} and {the_b} are {a.texture}"
            else:
                yield f"{the_a} {is_a} {a.texture}, but {the_b} {is_b} {b.texture}"
        if a.letter is not None:
            yield f"the letter {a.letter} is written on {the_a}"
        if len(scene.groups) == 1:
            yield f"{the_a} {is_a} {a.size} and {a.texture}"


def _absences(scene: Scene, picture: str, rng: random.Random) -> Iterator[str]:
    for color in rng.sample(COLORS, 4):
        if all(s.color != color for s in scene.shapes):
            yield f"nothing in the {picture} is {color}"
    for kind in rng.sample(KINDS, 4):
        if all(s.kind != kind for s in scene.shapes):
            yield f"there is no {kind} in the {picture}"
    for texture in ("striped", "dotted"):
        if all(s.texture != texture for s in scene.shapes):
            yield f"no shape is {texture}"
    if all(s.letter is None for s in scene.shapes):
        yield "no shape has a letter on it"


def _questions(scene: Scene, rng: random.Random) -> Iterator[str]:
    for kind in KINDS:
        colors = [shape.color for shape in scene.shapes if shape.kind == kind]
        noun, is_are = inflected(kind, len(colors)), be(len(colors))
        if colors:
            yield f"How many {inflected(kind, 2)} are there? There {is_are} {NUMBERS[len(colors)]}."
        if len(set(colors)) == 1:
            answer = "It is" if len(colors) == 1 else "They are"
            yield f"What color {is_are} the {noun}? {answer} {colors[0]}."
    for a, relation, b in scene.relations():
        where, answer = relation_phrase(relation, rng), sentence(f"{definite(a)} {be(a.count)}")
        yield f"What is {where} {definite(b)}? {answer}"


def _knowledge(scene: Scene, rng: random.Random) -> Iterator[str]:
    """What holds in every picture, about the kinds and colours of this one."""
    lead = ("", "remember that ", "everybody knows that ")
    for group in scene.groups:
        for fact in (*KIND_FACTS[group.kind], *COLOR_FACTS[group.color]):
            yield rng.choice(lead) + fact
