"""Premises and claims in words; each genre has its own way to put them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from megatron_vlmoe.sample_corpus.entailment import Claim, Mention, Premise
from megatron_vlmoe.sample_corpus.language import (
    CELL_PHRASES,
    NUMBERS,
    PICTURE_WORDS,
    SIZE_WORDS,
    be,
    listed,
    plural,
    relation_phrase,
    sentence,
    with_article,
)
from megatron_vlmoe.sample_corpus.paragraphs import NAMES

MATCHED_GENRES = ("caption", "report")
MISMATCHED_GENRES = ("letter", "verbatim")
OPENINGS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "caption": ("the {picture} shows {shapes}", "there {are} {shapes}"),
        "report": (
            "{name} made {a_picture} of {shapes}",
            "in this {picture}, there {are} {shapes}",
        ),
        "letter": ("dear {name}, I drew {shapes}", "dear {name}, I send you {shapes}"),
        "verbatim": ("I see {shapes}", "look, {shapes}"),
    }
)
BACKGROUNDS_TOLD: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "caption": ("the background is {background}",),
        "report": ("the background is {background}", "{background} is the background"),
        "letter": ("I made the background {background}",),
        "verbatim": ("it has {a_background} background",),
    }
)
CLOSINGS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "caption": ("there is nothing else",),
        "report": ("there is nothing else in the {picture}", "nothing else is there"),
        "letter": ("I drew nothing else",),
        "verbatim": ("I see nothing else",),
    }
)
HYPOTHESIS_FRAMES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "caption": ("{clause}",),
        "report": ("{clause}", "in the {picture}, {clause}"),
        "letter": ("you see that {clause}", "I know that {clause}"),
        "verbatim": ("it is true that {clause}", "look, {clause}"),
    }
)


def write_premise(premise: Premise, genre: str, rng: random.Random) -> str:
    """One to five sentences."""
    mentions = premise.mentions
    picture = rng.choice(PICTURE_WORDS)
    sentences = _shapes_told(premise, genre, picture, rng)
    sentences += [
        f"{_the(m)} is {rng.choice(CELL_PHRASES[m.group.cells[0]])}" for m in mentions if m.place
    ]
    if premise.background is not None:
        told = rng.choice(BACKGROUNDS_TOLD[genre])
        article = with_article(premise.background)
        sentences.append(told.format(background=premise.background, a_background=article))
    if premise.closed:
        sentences.append(rng.choice(CLOSINGS[genre]).format(picture=picture))
    text = " ".join(map(sentence, sentences))
    # A field that begins with a quotation mark, as many of the real ones do.
    return f'"{text}"' if genre == "verbatim" else text


def _shapes_told(premise: Premise, genre: str, picture: str, rng: random.Random) -> list[str]:
    """All groups in a list and then a relation, or the first two in a relation and then the rest."""
    phrases = [_indefinite(m, rng) for m in premise.mentions]
    shapes = listed(phrases)
    more = []
    if premise.relation is not None:
        a, b = premise.mentions[:2]
        relation = relation_phrase(premise.relation, rng)
        if genre == "caption":
            shapes = f"{phrases[0]} {relation} " + ", and ".join(phrases[1:])
        else:
            more = [f"{_the(a)} {be(a.group.count)} {relation} {_the(b)}"]
    opening = rng.choice(OPENINGS[genre]).format(
        shapes=shapes,
        are=be(premise.mentions[0].group.count),
        picture=picture,
        a_picture=with_article(picture),
        name=rng.choice(NAMES),
    )
    return [opening, *more]


def _indefinite(mention: Mention, rng: random.Random) -> str:
    """As in "a large circle" and "some red stars": only what is told."""
    group = mention.group
    words = [rng.choice(SIZE_WORDS[group.size])] if mention.size else []
    words += [group.texture] if mention.texture else []
    words += [group.color] if mention.color else []
    words.append(group.kind if group.count == 1 else plural(group.kind))
    noun = " ".join(words)
    if group.count == 1:
        return with_article(noun)
    return f"{NUMBERS[group.count] if mention.count else 'some'} {noun}"


def _the(mention: Mention) -> str:
    group = mention.group
    return f"the {group.kind if group.count == 1 else plural(group.kind)}"


def write_hypothesis(claim: Claim, genre: str, rng: random.Random) -> str:
    """One sentence."""
    frame = rng.choice(HYPOTHESIS_FRAMES[genre])
    clause = rng.choice(_clauses(claim, rng))
    return sentence(frame.format(clause=clause, picture=rng.choice(PICTURE_WORDS)))


def _clauses(claim: Claim, rng: random.Random) -> Sequence[str]:
    """The wordings of a claim."""
    verb = "is not" if claim.negated else "is"
    the = f"the {claim.kind}"
    match claim.form:
        case "color":
            return f"{the} {verb} {claim.word}", f"the color of {the} {verb} {claim.word}"
        case "size":
            assert claim.word is not None
            return (f"{the} {verb} {rng.choice(SIZE_WORDS[claim.word])}",)
        case "place":
            assert claim.cell is not None
            return (f"{the} {verb} {rng.choice(CELL_PHRASES[claim.cell])}",)
        case "relation":
            assert claim.relation is not None
            return (f"{the} {verb} {relation_phrase(claim.relation, rng)} the {claim.other}",)
        case "background":
            return (
                f"the background {verb} {claim.word}",
                f"the color of the background {verb} {claim.word}",
            )
        case "existence":
            assert claim.kind is not None
            if claim.negated:
                return f"there is no {claim.kind}", f"no shape is a {claim.kind}"
            return f"there is a {claim.kind}", f"one shape is a {claim.kind}"
        case "number of shapes":
            assert claim.number is not None and claim.kind is not None
            return (f"the number of {plural(claim.kind)} {verb} {NUMBERS[claim.number]}",)
