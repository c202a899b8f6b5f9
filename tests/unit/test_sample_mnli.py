"""MNLI of the sample corpus: labels are checked by building pictures of which the premise is true."""

from __future__ import annotations

import math
import random
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from test_sample_corpus import BIG, PLACES, RELATIONS, fits, one_of

from megatron_vlmoe.sample_corpus.entailment import Claim, Mention, Premise, judge, may_be_mistaken
from megatron_vlmoe.sample_corpus.mnli import make_mnli
from megatron_vlmoe.sample_corpus.scene import BACKGROUNDS, COLORS, KINDS, Cell, Group

COLOR, KIND, PLACE, RELATION = map(one_of, (COLORS, KINDS, PLACES, RELATIONS))
BACKGROUND, SIZE = one_of(BACKGROUNDS), one_of(BIG)
NUMBERS = {"a": (1,), "an": (1,), "two": (2,), "three": (3,), "some": (2, 3)}
NOUN = re.compile(
    rf"\b(an?|two|three|some) (?:{SIZE} )?(?:(?:striped|dotted) )?(?:{COLOR} )?{KIND}(e?s)?\b"
)
CELLS = [(row, column) for row in range(3) for column in range(3)]
Row = dict[str, str]


@pytest.fixture(scope="module")
def texts() -> dict[Path, str]:
    return dict(make_mnli(4, 600).texts)


def rows(texts: dict[Path, str], split: str) -> list[Row]:
    lines = [line.split("\t") for line in texts[Path("mnli", f"{split}.tsv")].splitlines()]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]


@dataclass
class Named:
    """What a premise says of one kind of shape; None and all: anything."""

    counts: tuple[int, ...]
    color: str | None
    size: str | None
    cell: Cell | None = None


@dataclass
class Reading:
    """What a premise says."""

    named: dict[str, Named] = field(default_factory=dict)
    relation: tuple[str, str, str] | None = None
    background: str | None = None
    closed: bool = False


def read_premise(text: str) -> Reading:
    """Every sentence must say something that is understood."""
    reading = Reading()
    for part in re.findall(r"[A-Z][^.]*(?=\.)", text.strip('"')):
        sentence = part[0].lower() + part[1:]
        if match := re.fullmatch(rf"the {KIND} is {PLACE}", sentence):
            (reading.named[match[1]].cell,) = PLACES[match[2]]
        elif match := re.fullmatch(
            rf"the {KIND}(e?s)? (is|are) {RELATION} the {KIND}(e?s)?", sentence
        ):
            many = max(reading.named[match[1]].counts) > 1
            assert (match[3] == "are") == bool(match[2]) == many, text
            assert bool(match[6]) == (max(reading.named[match[5]].counts) > 1), text
            reading.relation = match[1], RELATIONS[match[4]], match[5]
        elif "nothing else" in sentence:
            reading.closed = True
        elif "background" in sentence:
            (reading.background,) = re.findall(rf"\b{BACKGROUND}\b", sentence)
        else:
            read_shapes(sentence, reading)
    assert reading.named
    return reading


def read_shapes(sentence: str, reading: Reading) -> None:
    found = list(NOUN.finditer(sentence))
    assert found and not reading.named, sentence
    for match in found:
        counts = NUMBERS[match[1]]
        assert bool(match[5]) == (counts != (1,)), sentence
        assert match[4] not in reading.named
        size = BIG[match[2]] if match[2] else None
        reading.named[match[4]] = Named(counts, match[3], size)
    if match := re.search(rf"{NOUN.pattern} {RELATION} {NOUN.pattern}", sentence):
        reading.relation = match[4], RELATIONS[match[6]], match[10]
    if match := re.search(rf"there (is|are) {NOUN.pattern}", sentence):
        assert (match[1] == "are") == bool(match[6]), sentence


@dataclass
class World:
    """A picture: cells, colour and size by kind of shape."""

    cells: dict[str, list[Cell]]
    colors: dict[str, str]
    sizes: dict[str, str]
    background: str


def build_world(reading: Reading, hypothesis: str, rng: random.Random) -> World | None:
    """One picture of which the premise is true; what it leaves open is often as claimed, or None."""

    def pick(words: tuple[str, ...]) -> str:
        claimed = [word for word in words if re.search(rf"\b{word}\b", hypothesis)]
        return rng.choice(claimed if claimed and rng.random() < 0.5 else words)

    place = re.search(PLACE, hypothesis)
    claimed_cells = PLACES[place[0]] if place else CELLS
    named = dict(reading.named)
    if not reading.closed:
        others = [kind for kind in KINDS if kind not in named and rng.random() < 0.3]
        named |= {kind: Named((1,), None, None) for kind in others}
    world = World({}, {}, {}, reading.background or pick(BACKGROUNDS))
    sizes = ("large", "small")
    for kind, told in named.items():
        count = rng.choice(told.counts)
        if told.cell is not None:
            cells = [told.cell]
        elif count == 1:
            cells = [rng.choice(claimed_cells if rng.random() < 0.4 else CELLS)]
        else:
            axis, fixed = rng.randrange(2), rng.randrange(3)
            cells = rng.sample([c for c in CELLS if c[axis] == fixed], count)
        world.cells[kind] = cells
        world.colors[kind] = told.color or pick(COLORS)
        world.sizes[kind] = told.size or pick(sizes)
    everything = [cell for cells in world.cells.values() for cell in cells]
    if len(set(everything)) < len(everything):
        return None
    if reading.relation is not None:
        a, relation, b = reading.relation
        if not fits(relation, world.cells[a], world.cells[b]):
            return None
    return world


def claim_holds(world: World, hypothesis: str) -> bool:
    text = hypothesis[0].lower() + hypothesis[1:].removesuffix(".")
    frame = r"(?:in the \w+, |you see that |i know that |it is true that |look, )?"
    text = re.sub(f"^{frame}", "", text)
    verb = r"is( not)?"
    if match := re.fullmatch(rf"the (?:color of the )?background {verb} {BACKGROUND}", text):
        return (world.background == match[2]) != bool(match[1])
    if match := re.fullmatch(rf"(?:there is a|one shape is a) {KIND}", text):
        return match[1] in world.cells
    if match := re.fullmatch(rf"(?:there is no|no shape is a) {KIND}", text):
        return match[1] not in world.cells
    if match := re.fullmatch(rf"the number of {KIND}e?s {verb} (two|three)", text):
        return (len(world.cells[match[1]]) == NUMBERS[match[3]][0]) != bool(match[2])
    match = re.fullmatch(rf"the (?:color of the )?{KIND} {verb} (.*)", text)
    assert match is not None, hypothesis
    kind, negated, rest = match[1], bool(match[2]), match[3]
    assert len(world.cells[kind]) == 1
    if rest in COLORS:
        return (world.colors[kind] == rest) != negated
    if rest in BIG:
        return (world.sizes[kind] == BIG[rest]) != negated
    if rest in PLACES:
        return (world.cells[kind] == PLACES[rest]) != negated
    related = re.fullmatch(rf"{RELATION} the {KIND}", rest)
    assert related is not None, hypothesis
    assert len(world.cells[related[2]]) == 1
    return fits(RELATIONS[related[1]], world.cells[kind], world.cells[related[2]]) != negated


def label_by_worlds(premise: str, hypothesis: str, rng: random.Random) -> str:
    reading = read_premise(premise)
    found: Counter[bool] = Counter()
    tries = 0
    while found.total() < 40 or (len(found) == 1 and found.total() < 150 and tries < 3000):
        tries += 1
        assert tries < 20000, premise
        world = build_world(reading, hypothesis, rng)
        if world is not None:
            found[claim_holds(world, hypothesis)] += 1
    if len(found) == 2:
        return "neutral"
    return "entailment" if True in found else "contradiction"


@pytest.mark.parametrize("split", ["dev_matched", "dev_mismatched"])
def test_labels_are_what_all_possible_pictures_say(texts: dict[Path, str], split: str) -> None:
    rng = random.Random(0)
    for row in rows(texts, split):
        label = label_by_worlds(row["sentence1"], row["sentence2"], rng)
        assert label == row["gold_label"], (row["sentence1"], row["sentence2"])


def test_worlds_notice_a_wrong_label() -> None:
    rng = random.Random(1)
    premise = "There is a red star above a circle. The circle is in the center."
    for hypothesis, label in (
        ("The star is red.", "entailment"),
        ("The circle is red.", "neutral"),
        ("The circle is not in the middle.", "contradiction"),
        ("The circle is over the star.", "contradiction"),
        ("The star is left of the circle.", "neutral"),
        ("There is no cross.", "neutral"),
    ):
        assert label_by_worlds(premise, hypothesis, rng) == label
    closed = premise + " There is nothing else."
    assert label_by_worlds(closed, "No shape is a cross.", rng) == "entailment"


def test_columns(texts: dict[Path, str]) -> None:
    header = (
        "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse"
        " sentence2_parse sentence1 sentence2"
    ).split()
    for split, number, genres in (
        ("train", 3600, {"caption", "report"}),
        ("dev_matched", 90, {"caption", "report"}),
        ("dev_mismatched", 90, {"letter", "verbatim"}),
    ):
        people = ["label1"] if split == "train" else [f"label{i}" for i in range(1, 6)]
        text = texts[Path("mnli", f"{split}.tsv")]
        assert text.splitlines()[0].split("\t") == [*header, *people, "gold_label"]
        found = rows(texts, split)
        assert [row["index"] for row in found] == [str(i) for i in range(number)]
        assert len({row["pairID"] for row in found}) == number
        assert {row["genre"] for row in found} == genres
        for row in found:
            assert row["pairID"] == row["promptID"] + row["gold_label"][0]
            assert Counter(row[p] for p in people)[row["gold_label"]] * 2 > len(people)
    quoted = [r["sentence1"] for r in rows(texts, "dev_mismatched") if r["genre"] == "verbatim"]
    assert all(text.startswith('"') for text in quoted)


def test_hypothesis_alone_says_nothing(texts: dict[Path, str]) -> None:
    for split in ("train", "dev_matched", "dev_mismatched"):
        labels: dict[str, Counter[str]] = defaultdict(Counter)
        for row in rows(texts, split):
            labels[row["sentence2"]][row["gold_label"]] += 1
        for counts in labels.values():
            assert len(counts) == 3 and len(set(counts.values())) == 1
        negated = [t for t in labels if re.search(r"\b(not|no)\b", t)]
        assert 0.03 < len(negated) / len(labels) < 0.3


def test_words_of_the_premise_say_next_to_nothing(texts: dict[Path, str]) -> None:
    """A naive Bayes classifier of the premise's words and word pairs stays near a third."""

    def features(row: Row) -> set[str]:
        words = re.findall(r"\w+", row["sentence1"].lower())
        return {*words, *map(" ".join, zip(words, words[1:]))}

    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows(texts, "train"):
        seen[row["gold_label"]].update(features(row))
    total = len(rows(texts, "train")) / 3
    right = number = 0
    for row in rows(texts, "dev_matched") + rows(texts, "dev_mismatched"):
        scores = {
            label: sum(math.log((counts[f] + 1) / (total + 2)) for f in features(row))
            for label, counts in seen.items()
        }
        right += max(scores, key=lambda label: scores[label]) == row["gold_label"]
        number += 1
    assert right / number < 0.43


def test_truth_says_what_missing_words_give_away() -> None:
    task = make_mnli(4, 100)

    def cues(split: str) -> list[tuple[int, str]]:
        return [
            (
                len(
                    {*re.findall(r"\w+", row["sentence2"].lower())}
                    - {*re.findall(r"\w+", row["sentence1"].lower())}
                ),
                row["gold_label"],
            )
            for row in rows(dict(task.texts), split)
        ]

    most: dict[int, str] = {}
    train = cues("train")
    for number in {cue for cue, _ in train}:
        labels = [label for cue, label in train if cue == number]
        most[number] = max(sorted(set(labels)), key=labels.count)
    for split in ("dev_matched", "dev_mismatched"):
        right = [most.get(cue, "contradiction") == label for cue, label in cues(split)]
        percent = task.truth[split]["guess_by_missing_words_percent"]
        assert percent == pytest.approx(100 * sum(right) / len(right), abs=0.006)
        assert percent < 66


def mention(kind: str, *cells: Cell, **told: bool) -> Mention:
    group = Group(
        kind=kind, color="red", size="large", texture="solid", letter=None, cells=cells or ((1, 1),)
    )
    values = dict.fromkeys(("color", "size", "texture", "place", "count"), False) | told
    return Mention(group=group, **values)


def test_judge() -> None:
    star, circle = mention("star", (0, 1), color=True), mention("circle", place=True)
    premise = Premise(
        mentions=(star, circle, mention("cross", (2, 0), (2, 1))),
        relation="above",
        background=None,
        closed=True,
    )
    expected = {
        Claim(form="color", kind="star", word="red"): "entailment",
        Claim(form="color", kind="star", word="red", negated=True): "contradiction",
        Claim(form="color", kind="star", word="blue", negated=True): "entailment",
        Claim(form="color", kind="circle", word="red", negated=True): "neutral",
        Claim(form="color", kind="square", word="red"): None,
        Claim(form="color", kind="cross", word="red"): None,
        Claim(form="background", word="white"): "neutral",
        Claim(form="existence", kind="square"): "contradiction",
        Claim(form="existence", kind="square", negated=True): "entailment",
        Claim(form="existence", kind="star"): "entailment",
        Claim(form="existence", kind="cross"): None,
        Claim(form="number of shapes", kind="cross", number=2): "neutral",
        Claim(form="relation", kind="star", relation="above", other="circle"): "entailment",
        Claim(form="relation", kind="circle", relation="above", other="star"): "contradiction",
        Claim(form="relation", kind="star", relation="left", other="circle"): "neutral",
        Claim(form="place", kind="circle", cell=(1, 1)): "entailment",
        Claim(form="place", kind="star", cell=(0, 1)): "neutral",
        # Follows, but only from place and relation together.
        Claim(form="place", kind="star", cell=(2, 1)): None,
    }
    assert {claim: judge(premise, claim) for claim in expected} == expected
    corner = Premise(
        mentions=(mention("star", (0, 0), place=True),),
        relation=None,
        background=None,
        closed=False,
    )
    labels = [judge(corner, Claim(form="place", kind="star", cell=c)) for c in ((0, 1), (0, 2))]
    assert labels == [None, "contradiction"]


def test_a_corner_may_be_taken_for_its_side() -> None:
    assert may_be_mistaken((0, 0), (0, 1)) and may_be_mistaken((1, 2), (2, 2))
    assert not may_be_mistaken((0, 0), (0, 2)) and not may_be_mistaken((0, 1), (2, 0))
    assert not may_be_mistaken((1, 1), (0, 1)) and not may_be_mistaken((0, 1), (1, 0))
    assert not may_be_mistaken((0, 0), (0, 0))
