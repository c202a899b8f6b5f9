"""MultiNLI in GLUE's tables: premises that tell part of a scene, and claims about it.

A premise names every kind of shape of its scene once, with all shapes of that kind, and leaves out
colours, sizes, places and more at random. What it leaves out may be either way: a claim is entailed
if it holds in every picture of which the premise is true, contradicted if in none. Every hypothesis
occurs three times, each time with another label.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations, cycle, product
from pathlib import Path
from typing import Any, Literal

from megatron_vlmoe.sample_corpus.world import (
    BACKGROUNDS,
    CELL_PHRASES,
    COLORS,
    CONVERSE,
    GRID,
    KINDS,
    NAMES,
    NUMBERS,
    PICTURE_WORDS,
    RELATION_PHRASES,
    SIZE_WORDS,
    SIZES,
    Cell,
    Relation,
    TaskFiles,
    be,
    class_truth,
    counted,
    draw_scene,
    generator_for,
    guess_by,
    holds,
    inflected,
    listed,
    relation_between,
    sentence,
    with_article,
)

Label = Literal["entailment", "neutral", "contradiction"]
LABELS: tuple[Label, ...] = ("entailment", "neutral", "contradiction")
FORMS_IN_TURN = (
    *("background", "color", "size", "background", "color", "existence", "background", "color"),
    *("size", "background", "color", "relation", "background", "color", "existence"),
    *("background", "color", "size", "place", "number of shapes"),
)
"""As often as listed: mostly claims that name the colour of a shape or of the background.

A model of a few million parameters learns first whether a premise tells of such a thing at all. With
relations, places and denials in every other claim it does not even come that far in a few minutes.
"""
COLUMNS = (
    *("index", "promptID", "pairID", "genre", "sentence1_binary_parse", "sentence2_binary_parse"),
    *("sentence1_parse", "sentence2_parse", "sentence1", "sentence2"),
)
ANNOTATORS = {"train": 1, "dev": 5}
MAX_GROUPS = 2
SECOND_GROUP_SHARE = 0.3
"""Of the scenes with two groups, those that are used: most premises tell of one kind of shape."""
MAX_PREMISE_WORDS = 18
NEGATED_SHARE = 0.1
MIN_PREMISES = 300
"""With fewer, some hypotheses would find no premise of every label."""
MAX_LOOKED_AT = 500
"""Premises; a hypothesis that has not found all labels by then is given up."""


@dataclass(frozen=True)
class Form:
    """A sort of claim."""

    values: Sequence[Any]
    """What may be claimed. Of places all cells, of existence nothing but the kind of shape."""
    clauses: tuple[str, ...]
    wordings: Mapping[Any, Sequence[str]] = field(default_factory=dict)
    """Of the values that are not words themselves, or have synonyms."""


FORMS = {
    "color": Form(COLORS, ("the {kind} {is_} {said}", "the color of the {kind} {is_} {said}")),
    "size": Form(SIZES, ("the {kind} {is_} {said}",), SIZE_WORDS),
    "place": Form((), ("the {kind} {is_} {said}",), CELL_PHRASES),
    "relation": Form(tuple(CONVERSE), ("the {kind} {is_} {said} the {other}",), RELATION_PHRASES),
    "background": Form(
        BACKGROUNDS, ("the background {is_} {said}", "the color of the background {is_} {said}")
    ),
    "existence": Form((), ("there is {a} {kind}", "{one} shape is a {kind}")),
    "number of shapes": Form(("two", "three"), ("the number of {kinds} {is_} {said}",)),
}


@dataclass(frozen=True, kw_only=True)
class Genre:
    """How premises and hypotheses are put."""

    openings: tuple[str, ...]
    backgrounds: tuple[str, ...]
    closings: tuple[str, ...]
    hypotheses: tuple[str, ...]


MATCHED_GENRES = ("caption", "report")
MISMATCHED_GENRES = ("letter", "verbatim")
GENRES = {
    "caption": Genre(
        openings=("the {picture} shows {shapes}", "there {are} {shapes}"),
        backgrounds=("the background is {background}",),
        closings=("there is nothing else",),
        hypotheses=("{clause}",),
    ),
    "report": Genre(
        openings=(
            "{name} made {a_picture} of {shapes}",
            "in this {picture}, there {are} {shapes}",
        ),
        backgrounds=("the background is {background}", "{background} is the background"),
        closings=("there is nothing else in the {picture}", "nothing else is there"),
        hypotheses=("{clause}", "in the {picture}, {clause}"),
    ),
    "letter": Genre(
        openings=("dear {name}, I drew {shapes}", "dear {name}, I send you {shapes}"),
        backgrounds=("I made the background {background}",),
        closings=("I drew nothing else",),
        hypotheses=("you see that {clause}", "I know that {clause}"),
    ),
    "verbatim": Genre(
        openings=("I see {shapes}", "look, {shapes}"),
        backgrounds=("it has {a_background} background",),
        closings=("I see nothing else",),
        hypotheses=("it is true that {clause}", "look, {clause}"),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Mention:
    """What a premise tells of all shapes of a kind; None is left open."""

    kind: str
    color: str | None
    size: str | None
    texture: str | None
    cell: Cell | None
    """Told of single shapes only."""
    count: int | None
    """None is "some": two or three."""

    @property
    def definite(self) -> str:
        """As in "the circle" and "the stars"."""
        return f"the {inflected(self.kind, self.count or 2)}"


@dataclass(frozen=True, kw_only=True)
class Premise:
    """What a premise says."""

    mentions: tuple[Mention, ...]
    relation: Relation | None
    """Of the first mentioned to the second, where it is told."""
    background: str | None
    """Where it is told."""
    closed: bool
    """Whether it says that there is nothing else."""

    def mention(self, kind: str) -> Mention | None:
        """The mention of a kind, if there is one."""
        return next((m for m in self.mentions if m.kind == kind), None)

    @cached_property
    def arrangements(self) -> tuple[dict[str, tuple[Cell, ...]], ...]:
        """Every way to place the mentioned shapes that the premise allows: cells by kind."""
        options = [[(m.cell,)] if m.cell else _lines(m.count) for m in self.mentions]
        return tuple(
            {m.kind: line for m, line in zip(self.mentions, lines, strict=True)}
            for lines in product(*options)
            if (self.relation is None or holds(self.relation, lines[0], lines[1]))
            and len({cell for line in lines for cell in line}) == sum(map(len, lines))
        )


def _lines(count: int | None) -> list[tuple[Cell, ...]]:
    """Where one, two or three shapes of a kind may stand; two or three if None."""
    if count is None:
        return _lines(2) + _lines(3)
    rows = [[(row, column) for column in range(GRID)] for row in range(GRID)]
    if count == 1:
        return [(cell,) for row in rows for cell in row]
    return [
        line for whole in (*rows, *zip(*rows, strict=True)) for line in combinations(whole, count)
    ]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One thing that a hypothesis says, or, negated, denies."""

    form: str
    value: Any
    """One of the form's values; for a place a cell, for existence None."""
    kind: str
    """What it is about, unless that is the background."""
    other: str
    """The kind of shape to which ``kind`` stands in a relation."""
    negated: bool


def judge(premise: Premise, claim: Claim) -> Label | None:
    """What follows; None where a reader could argue, or where it takes several premises together."""
    told: Label | None = None
    mention = premise.mention(claim.kind)
    if claim.form == "background":
        told = _compare(premise.background, claim.value)
    elif mention is not None:
        told = _judge_mention(premise, mention, claim)
    elif claim.form == "existence":
        told = "contradiction" if premise.closed else "neutral"
    if claim.negated and told in ("entailment", "contradiction"):
        return "contradiction" if told == "entailment" else "entailment"
    return told


def _judge_mention(premise: Premise, mention: Mention, claim: Claim) -> Label | None:
    if claim.form == "number of shapes":
        told_count = NUMBERS[mention.count] if mention.count else None
        return _compare(told_count, claim.value) if mention.count != 1 else None
    if mention.count != 1:
        # The hypothesis speaks of one.
        return None
    match claim.form:
        case "existence":
            return "entailment"
        case "place":
            # A corner and a side that it belongs to may be mistaken: "top left" and "top".
            if mention.cell is not None and (1, 1) not in (mention.cell, claim.value):
                (row, column), (claimed_row, claimed_column) = mention.cell, claim.value
                if abs(row - claimed_row) + abs(column - claimed_column) == 1:
                    return None
            told = _compare(mention.cell, claim.value)
            found = {cells[claim.kind] == (claim.value,) for cells in premise.arrangements}
        case "relation":
            other = premise.mention(claim.other)
            if other is None or other.count != 1:
                return None
            told = "neutral"
            if premise.relation is not None:
                a, b = (mentioned.kind for mentioned in premise.mentions[:2])
                stated = {(a, b): premise.relation, (b, a): CONVERSE[premise.relation]}
                relation = stated.get((claim.kind, claim.other))
                if relation is not None and claim.value in (relation, CONVERSE[relation]):
                    told = _compare(relation, claim.value)
            found = {
                holds(claim.value, cells[claim.kind], cells[claim.other])
                for cells in premise.arrangements
            }
        case _:
            return _compare(getattr(mention, claim.form), claim.value)
    in_pictures: Label = "neutral"
    if len(found) == 1:
        in_pictures = "entailment" if True in found else "contradiction"
    return told if told == in_pictures else None


def _compare(told: object, claimed: object) -> Label:
    if told is None:
        return "neutral"
    return "entailment" if told == claimed else "contradiction"


def write_premise(premise: Premise, genre: str, rng: random.Random) -> str:
    """One to five sentences."""
    mentions, words = premise.mentions, GENRES[genre]
    picture = rng.choice(PICTURE_WORDS)
    # All shapes in a list and then a relation, or the first two in a relation and then the rest.
    phrases = []
    for mention in mentions:
        size = rng.choice(SIZE_WORDS[mention.size]) if mention.size else None
        noun = " ".join(filter(None, (size, mention.texture, mention.color, mention.kind)))
        if mention.count is None:
            phrases.append(f"some {inflected(noun, 2)}")
        else:
            phrases.append(
                with_article(noun) if mention.count == 1 else counted(mention.count, noun)
            )
    shapes = listed(phrases)
    more = []
    if premise.relation is not None:
        a, b = mentions[:2]
        relation = rng.choice(RELATION_PHRASES[premise.relation])
        if genre == "caption":
            shapes = f"{phrases[0]} {relation} " + ", and ".join(phrases[1:])
        else:
            more = [f"{a.definite} {be(a.count or 2)} {relation} {b.definite}"]
    opening = rng.choice(words.openings).format(
        shapes=shapes,
        are=be(mentions[0].count or 2),
        picture=picture,
        a_picture=with_article(picture),
        name=rng.choice(NAMES),
    )
    sentences = [opening, *more]
    sentences += [f"{m.definite} is {rng.choice(CELL_PHRASES[m.cell])}" for m in mentions if m.cell]
    if premise.background is not None:
        told = rng.choice(words.backgrounds)
        article = with_article(premise.background)
        sentences.append(told.format(background=premise.background, a_background=article))
    if premise.closed:
        sentences.append(rng.choice(words.closings).format(picture=picture))
    text = " ".join(map(sentence, sentences))
    # A field that begins with a quotation mark, as many of the real ones do.
    return f'"{text}"' if genre == "verbatim" else text


def write_hypothesis(claim: Claim, genre: str, rng: random.Random) -> str:
    """One sentence."""
    frame, form = rng.choice(GENRES[genre].hypotheses), FORMS[claim.form]
    said = rng.choice(form.wordings[claim.value]) if form.wordings else claim.value
    clause = rng.choice(form.clauses).format(
        kind=claim.kind,
        kinds=inflected(claim.kind, 2),
        is_="is not" if claim.negated else "is",
        a="no" if claim.negated else "a",
        one="no" if claim.negated else "one",
        said=said,
        other=claim.other,
    )
    return sentence(frame.format(clause=clause, picture=rng.choice(PICTURE_WORDS)))


@dataclass
class _Told:
    """A premise in words, and the labels that it already has."""

    number: int
    genre: str
    premise: Premise
    text: str
    labels: set[Label] = field(default_factory=set)


@dataclass(frozen=True)
class _Sample:
    told: _Told
    hypothesis: str
    label: Label


def make_mnli(seed: int, num_images: int) -> TaskFiles:
    """Twice ``num_images`` hypotheses to train; for either dev set a twentieth of ``num_images``.

    At least 30 each. A hypothesis alone says nothing about the label, negated or not, and a premise
    has each label at most once.
    """
    evaluation = max(30, num_images // 20)
    texts = {}
    cues = {}
    truth = {}
    for split, number, genres in (
        ("train", max(30, 2 * num_images), MATCHED_GENRES),
        ("dev_matched", evaluation, MATCHED_GENRES),
        ("dev_mismatched", evaluation, MISMATCHED_GENRES),
    ):
        samples = _draw_samples(seed, split, number, genres)
        texts[Path("mnli", f"{split}.tsv")] = _table(samples, seed, split)
        words = [
            (_words(sample.told.text), _words(sample.hypothesis), sample.label)
            for sample in samples
        ]
        # The cue is how many words of the hypothesis the premise does not have.
        cues[split] = [(len(hypothesis - premise), label) for premise, hypothesis, label in words]
        if split != "train":
            truth[split] = class_truth(sample.label for sample in samples) | {
                "guess_by_missing_words_percent": guess_by(cues["train"], cues[split])
            }
    return TaskFiles(pictures=(), texts=texts, truth=truth)


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def _draw_samples(seed: int, split: str, number: int, genres: Sequence[str]) -> list[_Sample]:
    rng = generator_for(seed, f"mnli-{split}", 0)
    # Three samples for each hypothesis, two for a premise on average.
    pool = _draw_premises(rng, max(MIN_PREMISES, 3 * number // 2), genres)
    samples: list[_Sample] = []
    for form in cycle(FORMS_IN_TURN):
        if len(samples) >= len(LABELS) * number:
            break
        kind, other = rng.sample(KINDS, 2)
        negated = rng.random() < NEGATED_SHARE
        value: Any = None
        if form == "place":
            value = (rng.randrange(GRID), rng.randrange(GRID))
        elif form != "existence":
            value = rng.choice(FORMS[form].values)
        claim = Claim(form=form, value=value, kind=kind, other=other, negated=negated)
        # For every label the first premise that has it, from a random place in the pool on.
        found: dict[Label, _Told] = {}
        start = rng.randrange(len(pool))
        for step in range(min(len(pool), MAX_LOOKED_AT)):
            told = pool[(start + step) % len(pool)]
            label = judge(told.premise, claim)
            if label is not None and label not in found and label not in told.labels:
                found[label] = told
                if len(found) == len(LABELS):
                    break
        else:
            continue
        hypothesis = write_hypothesis(claim, rng.choice(genres), rng)
        for label, told in found.items():
            told.labels.add(label)
            samples.append(_Sample(told, hypothesis, label))
    rng.shuffle(samples)
    return samples


def _draw_premises(rng: random.Random, number: int, genres: Sequence[str]) -> list[_Told]:
    """What to tell of as many scenes, no two in the same words."""
    pool: list[_Told] = []
    seen: set[str] = set()
    while len(pool) < number:
        scene = draw_scene(rng)
        groups = scene.groups
        kinds = {group.kind for group in groups}
        if len(kinds) < len(groups) or len(kinds) > MAX_GROUPS:
            continue
        if len(kinds) > 1 and rng.random() >= SECOND_GROUP_SHARE:
            continue
        relation = relation_between(*groups[:2]) if len(groups) > 1 else None
        premise = Premise(
            mentions=tuple(
                Mention(
                    kind=group.kind,
                    color=group.color if rng.random() < 0.6 else None,
                    size=group.size if rng.random() < 0.35 else None,
                    texture=group.texture
                    if group.texture != "solid" and rng.random() < 0.2
                    else None,
                    cell=group.cells[0] if group.count == 1 and rng.random() < 0.25 else None,
                    count=group.count if group.count == 1 or rng.random() < 0.6 else None,
                )
                for group in groups
            ),
            relation=relation if rng.random() < 0.6 else None,
            background=scene.background if rng.random() < 0.6 else None,
            closed=rng.random() < 0.25,
        )
        genre = rng.choice(genres)
        text = write_premise(premise, genre, rng)
        if len(text.split()) <= MAX_PREMISE_WORDS and text not in seen:
            seen.add(text)
            pool.append(_Told(len(pool), genre, premise, text))
    return pool


def _table(samples: Sequence[_Sample], seed: int, split: str) -> str:
    """Header and rows, separated by tabs, without quoting."""
    people = ANNOTATORS[split.split("_")[0]]
    labels = [f"label{number}" for number in range(1, people + 1)]
    lines = [(*COLUMNS, *labels, "gold_label")]
    rng = generator_for(seed, f"mnli-{split}-annotators", 0)
    for index, sample in enumerate(samples):
        premise, hypothesis = sample.told.text, sample.hypothesis
        pair = f"{sample.told.number}{sample.label[0]}"
        said: list[str] = [sample.label] * people
        if people > 1 and rng.random() < 0.3:
            said[rng.randrange(people)] = rng.choice(LABELS)
        # No parser made the parse columns: all words in one bracket.
        parses = [f"( {text} )" for text in (premise, hypothesis)] * 2
        row = (str(index), str(sample.told.number), pair, sample.told.genre)
        lines.append((*row, *parses, premise, hypothesis, *said, sample.label))
    return "".join("\t".join(line) + "\n" for line in lines)
