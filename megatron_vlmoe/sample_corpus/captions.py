"""Captions: every one names all groups of a scene with colour, kind, texture and where they are."""

from __future__ import annotations

import random
from collections.abc import Sequence

from megatron_vlmoe.sample_corpus import language
from megatron_vlmoe.sample_corpus.scene import Group, Scene, generator_for, relation_between

CAPTIONS_PER_IMAGE = 5

SINGLE_TEMPLATES = (
    "{a} {place}",
    "there {is_a} {a} {place}",
    "{place}, there {is_a} {a}",
    "{place} {is_a} {a}",
    "{a} {is_a} {drawn} {place} of the {picture}",
    "the {picture} shows {a} {place}",
    "{picture_of} {a} {place}",
    "the only {shape} in the {picture} {is_a} {a} {place}",
    "{a} on {background}, {drawn} {place}",
    "on {background}, {a} {is_a} {place}",
)
PAIR_TEMPLATES = (
    "{a} {relation} {b}{rest_with}",
    "{a} {is_a} {relation} {b}{rest_clause}",
    "there {is_a} {a} {relation} {b}{rest}",
    "{a} {is_a} {drawn} {relation} {b}{rest_clause}",
    "{relation} {b} {is_a} {a}{rest_clause}",
    "the {picture} shows {a} {relation} {b}{rest}",
    "{a} that {is_a} {relation} {b}{rest_with}",
    "{b} with {a} {side_of_b}{rest}",
    "the {picture} shows {b} and, {side_of_b}, {a}{rest}",
    "there {is_b} {b} and, {side_of_b}, {a}{rest}",
    "on {background}, {a} {is_a} {relation} {b}{rest_clause}",
    "you can see {a} {relation} {b}{rest}, all on {background}",
)
"""The rest are the groups beyond the first two. Each template takes the form that cannot be read
as part of the relation ("a star is left of a square, as well as a circle" would be)."""
LIST_CONNECTIVES = ("along with", "as well as", "together with")
CLAUSE_CONNECTIVES = ("and", "while")


def write_captions(scene: Scene, seed: int, index: int, purpose: str = "captions") -> list[str]:
    """Five captions of one scene in different phrasings; pure in its arguments."""
    rng = generator_for(seed, purpose, index)
    groups = scene.groups
    templates = SINGLE_TEMPLATES if len(groups) == 1 else PAIR_TEMPLATES
    return [
        language.sentence(template.format(**_slots(scene, rng.sample(groups, len(groups)), rng)))
        for template in rng.sample(templates, CAPTIONS_PER_IMAGE)
    ]


def _slots(scene: Scene, groups: Sequence[Group], rng: random.Random) -> dict[str, str]:
    """What fills the templates, with the first of ``groups`` as the subject."""
    # Sizes and letters of three or four groups would make a caption too long to read.
    full = len(groups) <= 2
    a = groups[0]
    picture = rng.choice(language.PICTURE_WORDS)
    slots = {
        "a": language.indefinite(a, rng, full=full),
        "is_a": language.be(a.count),
        "place": language.place_phrase(a, rng),
        "picture": picture,
        "picture_of": language.with_article(picture) + " of",
        "drawn": rng.choice(language.DRAWN_WORDS),
        "shape": "shape" if a.count == 1 else "shapes",
        "background": language.with_article(scene.background) + " background",
    }
    if len(groups) > 1:
        b = groups[1]
        relation = relation_between(a, b)
        assert relation is not None
        slots |= {
            "b": language.indefinite(b, rng, full=full),
            "is_b": language.be(b.count),
            "relation": language.relation_phrase(relation, rng),
            "side_of_b": language.side_phrase(relation, b, rng),
            "rest": _rest(groups[2:], rng.choice(LIST_CONNECTIVES), rng),
            "rest_with": _rest(groups[2:], "with", rng),
            "rest_clause": _rest(groups[2:], rng.choice(CLAUSE_CONNECTIVES), rng),
        }
    return slots


def _rest(groups: Sequence[Group], connective: str, rng: random.Random) -> str:
    if not groups:
        return ""
    items = []
    for group in groups:
        phrase = language.indefinite(group, rng, full=False)
        verb = f" {language.be(group.count)}" if connective in CLAUSE_CONNECTIVES else ""
        items.append(f"{phrase}{verb} {language.place_phrase(group, rng)}")
    return f", {connective} {language.listed(items)}"
