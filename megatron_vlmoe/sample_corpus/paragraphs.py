"""Paragraphs of plain text: descriptions of one scene, and what follows from them.

Each function from ``_relations`` on lists true sentences of one sort; a paragraph opens, names every
group, and then adds sentences of mixed sorts.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from megatron_vlmoe.sample_corpus.language import (
    DRAWN_WORDS,
    NUMBERS,
    PICTURE_WORDS,
    background_phrase,
    be,
    counted,
    definite,
    indefinite,
    listed,
    place_phrase,
    plural,
    relation_phrase,
    sentence,
    with_article,
)
from megatron_vlmoe.sample_corpus.scene import (
    COLORS,
    CONVERSE,
    KINDS,
    Group,
    Relation,
    Scene,
    generator_for,
    holds,
    relation_between,
    sample_scene,
)

MIN_WORDS, MAX_WORDS = 40, 120
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Iris", "Jonas")
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
    sentences = [sentence(_opening(scene, picture, rng))]
    sentences += [sentence(_description(group, rng)) for group in _shuffled(scene.groups, rng)]
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


def _shuffled(groups: tuple[Group, ...], rng: random.Random) -> list[Group]:
    return rng.sample(groups, len(groups))


def _mixed(scene: Scene, picture: str, rng: random.Random) -> Iterator[str]:
    """All further sentences about a scene: one of each sort in turn, relations before the rest."""
    sorts = [
        [*dict.fromkeys(facts)]
        for facts in (
            _counts(scene, picture),
            _changes(scene, rng),
            _contrasts(scene),
            _absences(scene, picture, rng),
            _questions(scene, rng),
            _knowledge(scene, rng),
        )
    ]
    relations = [*dict.fromkeys(_relations(scene, rng))]
    for facts in (relations, *sorts):
        rng.shuffle(facts)
    rng.shuffle(sorts)
    sorts.insert(0, relations)
    while any(sorts):
        for facts in sorts:
            if facts:
                yield facts.pop()


def _opening(scene: Scene, picture: str, rng: random.Random) -> str:
    number = len(scene.shapes)
    shapes, is_are = counted(number, "shape"), be(number)
    background = background_phrase(scene.background)
    name, occasion, drawn = rng.choice(NAMES), rng.choice(OCCASIONS), rng.choice(DRAWN_WORDS)
    return rng.choice(
        (
            f"this {picture} has {shapes} {background}",
            f"there {is_are} {shapes} in this {picture}, and the background is {scene.background}",
            f"{occasion} {name} made {with_article(picture)} with {shapes} {background}",
            f"{name} made this {picture} {occasion}, with {shapes} {background}",
            f"in the {picture} that {name} made, {shapes} {is_are} {drawn} {background}",
            f"look at this {picture}: it shows {shapes} {background}",
        )
    )


def _description(group: Group, rng: random.Random) -> str:
    phrase, place = indefinite(group, rng), place_phrase(group, rng)
    is_are, drawn = be(group.count), rng.choice(DRAWN_WORDS)
    return rng.choice(
        (
            f"{place} there {is_are} {phrase}",
            f"there {is_are} {phrase} {place}",
            f"{phrase} {is_are} {drawn} {place}",
            f"{place} you can see {phrase}",
            f"{place} {is_are} {phrase}",
        )
    )


def _relations(scene: Scene, rng: random.Random) -> Iterator[str]:
    """A relation and its converse; three in a line."""
    for a in scene.groups:
        for b in scene.groups:
            relation = relation_between(a, b)
            if relation is None:
                continue
            first = _states(a, relation, b, rng)
            second = _states(b, CONVERSE[relation], a, rng)
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
                    yield (
                        f"{first} and {_states(b, relation, c, rng)}, "
                        f"so {_states(a, relation, c, rng)}"
                    )


def _states(a: Group, relation: Relation, b: Group, rng: random.Random) -> str:
    return f"{definite(a)} {be(a.count)} {relation_phrase(relation, rng)} {definite(b)}"


def _counts(scene: Scene, picture: str) -> Iterator[str]:
    total = len(scene.shapes)
    by_kind = [(kind, sum(s.kind == kind for s in scene.shapes)) for kind in KINDS]
    parts = [(kind, count) for kind, count in by_kind if count]
    if len(parts) > 1:
        listing = listed([counted(count, kind) for kind, count in parts])
        yield f"there {be(parts[0][1])} {listing}, so there are {counted(total, 'shape')} in total"
        yield f"{listing} make {counted(total, 'shape')}"
    for color in COLORS:
        count = sum(s.color == color for s in scene.shapes)
        if 0 < count < total:
            yield f"{NUMBERS[count]} of the {counted(total, 'shape')} {be(count)} {color}"
        elif count == total > 1:
            yield f"all {counted(total, 'shape')} are {color}"
    letters = [s.letter for s in scene.shapes if s.letter is not None]
    if letters:
        noun = "letter" if len(letters) == 1 else "letters"
        yield f"the {picture} has {counted(len(letters), noun, noun)} in it"


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
        for b in scene.groups[:number]:
            pair = f"{definite(a)} and {definite(b)}"
            if a.size == b.size:
                yield f"{pair} have the same size, for both are {a.size}"
            else:
                large, small = (a, b) if a.size == "large" else (b, a)
                yield (
                    f"{definite(large)} {be(large.count)} larger than {definite(small)}, "
                    f"so {definite(small)} {be(small.count)} smaller"
                )
            if a.texture == b.texture:
                yield f"{pair} are {a.texture}"
            else:
                yield (
                    f"{definite(a)} {be(a.count)} {a.texture}, "
                    f"but {definite(b)} {be(b.count)} {b.texture}"
                )
        if a.letter is not None:
            yield f"the letter {a.letter} is written on {definite(a)}"
    if len(scene.groups) == 1:
        group = scene.groups[0]
        yield f"{definite(group)} {be(group.count)} {group.size} and {group.texture}"


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
        count = sum(s.kind == kind for s in scene.shapes)
        if count:
            yield f"How many {plural(kind)} are there? {sentence(_there_are(count))}"
        if (colors := {s.color for s in scene.shapes if s.kind == kind}) and len(colors) == 1:
            verb, it = ("is", "it is") if count == 1 else ("are", "they are")
            noun = kind if count == 1 else plural(kind)
            yield f"What color {verb} the {noun}? {sentence(f'{it} {colors.pop()}')}"
    for a in scene.groups:
        for b in scene.groups:
            if (relation := relation_between(a, b)) is not None:
                where = relation_phrase(relation, rng)
                yield f"What is {where} {definite(b)}? {sentence(f'{definite(a)} {be(a.count)}')}"


def _there_are(count: int) -> str:
    return f"there {be(count)} {NUMBERS[count]}"


def _knowledge(scene: Scene, rng: random.Random) -> Iterator[str]:
    """What holds in every picture, about the kinds and colours of this one."""
    lead = ("", "remember that ", "everybody knows that ")
    for group in scene.groups:
        for fact in (*KIND_FACTS[group.kind], *COLOR_FACTS[group.color]):
            yield rng.choice(lead) + fact
