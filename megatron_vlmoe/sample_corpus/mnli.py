"""MultiNLI in GLUE's tables: every hypothesis three times, each time with another label."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_vlmoe.sample_corpus.entailment import (
    LABELS,
    Claim,
    ClaimForm,
    Label,
    Mention,
    Premise,
    judge,
)
from megatron_vlmoe.sample_corpus.entailment_texts import (
    MATCHED_GENRES,
    MISMATCHED_GENRES,
    write_hypothesis,
    write_premise,
)
from megatron_vlmoe.sample_corpus.scene import (
    BACKGROUNDS,
    COLORS,
    CONVERSE,
    GRID,
    KINDS,
    SIZES,
    Scene,
    draw_scene,
    generator_for,
    relation_between,
)
from megatron_vlmoe.sample_corpus.task_files import TaskFiles, class_truth, guess_by

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
FORMS: tuple[ClaimForm, ...] = (
    *("background", "color", "size", "background", "color", "existence", "background", "color"),
    *("size", "background", "color", "relation", "background", "color", "existence"),
    *("background", "color", "size", "place", "number of shapes"),
)
"""In turn; as often as listed: mostly claims that name the colour of a shape or of the background.

A model of a few million parameters learns first whether a premise tells of such a thing at all. With
relations, places and denials in every other claim it does not even come that far in a few minutes.
"""


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
    drawn = {}
    for split, number, genres in (
        ("train", max(30, 2 * num_images), MATCHED_GENRES),
        ("dev_matched", evaluation, MATCHED_GENRES),
        ("dev_mismatched", evaluation, MISMATCHED_GENRES),
    ):
        drawn[split] = _draw_samples(seed, split, number, genres)
        texts[Path("mnli", f"{split}.tsv")] = _table(drawn[split], seed, split)
    train = drawn.pop("train")
    truth = {split: _truth(train, samples) for split, samples in drawn.items()}
    return TaskFiles(pictures=(), texts=texts, truth=truth)


def _truth(train: Sequence[_Sample], held_out: Sequence[_Sample]) -> dict[str, Any]:
    """Another guess: by how many words of the hypothesis the premise does not have."""
    train_cues, cues = (
        [(_missing_words(sample), sample.label) for sample in samples]
        for samples in (train, held_out)
    )
    return {
        **class_truth(sample.label for sample in held_out),
        "guess_by_missing_words_percent": guess_by(train_cues, cues),
    }


def _missing_words(sample: _Sample) -> int:
    premise, hypothesis = (
        set(re.findall(r"\w+", text.lower())) for text in (sample.told.text, sample.hypothesis)
    )
    return len(hypothesis - premise)


def _draw_samples(seed: int, split: str, number: int, genres: Sequence[str]) -> list[_Sample]:
    rng = generator_for(seed, f"mnli-{split}", 0)
    # Three samples for each hypothesis, two for a premise on average.
    pool = _draw_premises(rng, max(MIN_PREMISES, 3 * number // 2), genres)
    samples: list[_Sample] = []
    tries = 0
    while len(samples) < len(LABELS) * number:
        claim = _draw_claim(FORMS[tries % len(FORMS)], rng)
        tries += 1
        found = _find_premises(claim, pool, rng)
        if len(found) < len(LABELS):
            continue
        hypothesis = write_hypothesis(claim, rng.choice(genres), rng)
        for label, told in found.items():
            told.labels.add(label)
            samples.append(_Sample(told, hypothesis, label))
    rng.shuffle(samples)
    return samples


def _find_premises(claim: Claim, pool: Sequence[_Told], rng: random.Random) -> dict[Label, _Told]:
    """For every label the first premise that has it, from a random place in the pool on."""
    found: dict[Label, _Told] = {}
    start = rng.randrange(len(pool))
    for step in range(min(len(pool), MAX_LOOKED_AT)):
        told = pool[(start + step) % len(pool)]
        label = judge(told.premise, claim)
        if label is not None and label not in found and label not in told.labels:
            found[label] = told
            if len(found) == len(LABELS):
                break
    return found


def _draw_premises(rng: random.Random, number: int, genres: Sequence[str]) -> list[_Told]:
    pool: list[_Told] = []
    seen: set[str] = set()
    while len(pool) < number:
        scene = draw_scene(rng)
        kinds = {group.kind for group in scene.groups}
        if len(kinds) < len(scene.groups) or len(kinds) > MAX_GROUPS:
            continue
        if len(kinds) > 1 and rng.random() >= SECOND_GROUP_SHARE:
            continue
        premise = _draw_premise(scene, rng)
        genre = rng.choice(genres)
        text = write_premise(premise, genre, rng)
        if len(text.split()) <= MAX_PREMISE_WORDS and text not in seen:
            seen.add(text)
            pool.append(_Told(len(pool), genre, premise, text))
    return pool


def _draw_premise(scene: Scene, rng: random.Random) -> Premise:
    """What to tell of a scene."""
    groups = scene.groups
    relation = relation_between(*groups[:2]) if len(groups) > 1 else None
    return Premise(
        mentions=tuple(
            Mention(
                group=group,
                color=rng.random() < 0.6,
                size=rng.random() < 0.35,
                texture=group.texture != "solid" and rng.random() < 0.2,
                place=group.count == 1 and rng.random() < 0.25,
                count=group.count == 1 or rng.random() < 0.6,
            )
            for group in groups
        ),
        relation=relation if rng.random() < 0.6 else None,
        background=scene.background if rng.random() < 0.6 else None,
        closed=rng.random() < 0.25,
    )


def _draw_claim(form: ClaimForm, rng: random.Random) -> Claim:
    kind, other = rng.sample(KINDS, 2)
    negated = rng.random() < NEGATED_SHARE
    match form:
        case "color":
            return Claim(form=form, kind=kind, word=rng.choice(COLORS), negated=negated)
        case "size":
            return Claim(form=form, kind=kind, word=rng.choice(SIZES), negated=negated)
        case "place":
            cell = (rng.randrange(GRID), rng.randrange(GRID))
            return Claim(form=form, kind=kind, cell=cell, negated=negated)
        case "relation":
            relation = rng.choice(tuple(CONVERSE))
            return Claim(form=form, kind=kind, relation=relation, other=other, negated=negated)
        case "background":
            return Claim(form=form, word=rng.choice(BACKGROUNDS), negated=negated)
        case "existence":
            return Claim(form=form, kind=kind, negated=negated)
        case "number of shapes":
            return Claim(form=form, kind=kind, number=rng.choice((2, 3)), negated=negated)


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
