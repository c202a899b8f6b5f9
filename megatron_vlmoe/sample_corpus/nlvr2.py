"""NLVR2's layout: sets of four pairs of pictures, and statements that hold for two of the four."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

from megatron_vlmoe.sample_corpus.world import (
    BACKGROUNDS,
    COLORS,
    KINDS,
    FreshScenes,
    Picture,
    Scene,
    ShapeName,
    TaskFiles,
    Thing,
    be,
    class_truth,
    counted,
    draw_scene,
    generator_for,
    guess_by,
    json_text,
    with_article,
)

PAIRS_PER_SET = 4
STATEMENTS_PER_SET = 2
TRAIN_DIRECTORIES = 10
"""Training pictures are spread over numbered folders; the real data set has a hundred."""
PALETTES = ((2, 3), (3, 2))
"""Colours and kinds of a set: few, so that a statement can be true of one pair and false of another."""
NUMBERS_OF_BACKGROUNDS = (2, 3)
"""In a set, few for the same reason."""
SINGLE_SHAPE_SHARE = 0.5
"""Of the pictures that must show one shape only; few of the others do."""
MAX_NAMED_TOTAL = 4
"""Numbers that a statement about both pictures together names, from 1 on."""
BACKGROUNDS_BY_BRIGHTNESS = ("black", "gray", "beige", "white")
"""The darkest first."""

Pair = tuple[Scene, Scene]
"""A left and a right picture."""
Sample = tuple[dict[str, Any], Pair]
"""A record of the file and the pictures that it is about."""


@dataclass(frozen=True)
class Form:
    """A way to state something about two pictures, of which a number is taken (see `statements`)."""

    weight: int
    """How often it should be used."""
    true_of: set[int]
    """The numbers of which it is true."""
    wordings: tuple[str, ...]
    asked_of: set[int] | None = None
    """The numbers that one picture alone leaves open; None: all. Others would give the label away.

    Asked for in statements about shapes only: those about backgrounds are meant to be easy.
    """


LESS, EQUAL, MORE = -1, 0, 1
"""How one picture compares with the other."""
FORMS = {
    "left darker": Form(30, {LESS}, ("The left picture has the darker background.",)),
    "right darker": Form(18, {LESS}, ("The right picture has the darker background.",)),
    "left lighter": Form(1, {MORE}, ("The left picture has the lighter background.",)),
    "right lighter": Form(1, {MORE}, ("The right picture has the lighter background.",)),
    "same": Form(8, {EQUAL}, ("The two pictures have the same background.",)),
    "different": Form(2, {LESS, MORE}, ("The two pictures have different backgrounds.",)),
    "both have": Form(8, {2}, ("Both pictures have {a} background.",)),
    "exactly one has": Form(2, {1}, ("Exactly one picture has {a} background.",)),
    "neither has": Form(8, {0}, ("Neither picture has {a} background.",)),
    "at least one has": Form(4, {1, 2}, ("At least one picture has {a} background.",)),
    "both show": Form(
        4,
        {2},
        (
            "Both pictures show {a}.",
            "There is {a} in both pictures.",
            "Each of the two pictures shows {a}.",
        ),
        asked_of={1, 2},
    ),
    "exactly one shows": Form(
        3,
        {1},
        (
            "There is {a} in exactly one of the pictures.",
            "Only one of the two pictures shows {a}.",
            "One picture shows {a} and the other one does not.",
        ),
    ),
    "neither shows": Form(
        3,
        {0},
        (
            "Neither picture shows {a}.",
            "There is no {noun} in the two pictures.",
            "No picture has {a} in it.",
        ),
        asked_of={0, 1},
    ),
    "at least one shows": Form(
        3,
        {1, 2},
        ("At least one of the pictures shows {a}.", "There is {a} in one picture or in both."),
        asked_of={0, 1},
    ),
    "one each": Form(
        4,
        {2},
        (
            "The left picture shows {a} and the right one shows {b}.",
            "There is {a} in the left picture and {b} in the right one.",
        ),
        asked_of={1, 2},
    ),
    "more": Form(
        2,
        {MORE},
        (
            "The {one} picture has more shapes than the {other} one.",
            "There are more shapes in the {one} picture than in the {other} one.",
            "There are fewer shapes in the {other} picture than in the {one} one.",
        ),
    ),
    "same number": Form(
        1,
        {EQUAL},
        (
            "Both pictures have the same number of shapes.",
            "There are as many shapes in the left picture as in the right one.",
        ),
    ),
    "total": Form(
        1,
        {0},
        (
            "There {are} exactly {counted} in the two pictures together.",
            "The two pictures together have exactly {counted}.",
        ),
    ),
}
"""Three of four statements are about backgrounds, and half of all ask which one is darker: that is a
difference of two things seen, which a small model learns first and builds upon. With forms that
all need a conjunction or an "exactly", no cue leads anywhere, and it learns none. That the left
picture is asked about more often is such a cue: who sees the pictures and not the sentence is
right a little more often than not.

Statements about backgrounds have one wording each: a model of a few million parameters that sees a
few thousand of them must not spend its time on synonyms.
"""


@dataclass(frozen=True)
class Statement:
    """One claim: a form, what fills its wordings, and the number that decides."""

    form: str
    slots: Mapping[str, str]
    number: Callable[[Scene, Scene], int]
    """Of a left and a right picture."""

    def splits(self, pairs: Sequence[Pair]) -> bool:
        """Whether it is true of half of the pairs, and may be asked of all."""
        form = FORMS[self.form]
        numbers = [self.number(*pair) for pair in pairs]
        is_half = sum(number in form.true_of for number in numbers) == len(pairs) // 2
        return is_half and (form.asked_of is None or form.asked_of >= set(numbers))


def statements(names: Sequence[ShapeName]) -> Iterator[Statement]:
    """Everything that can be stated about pictures whose shapes all have one of these names."""
    things = [Thing(None, kind) for kind in dict.fromkeys(kind for _, kind in names)]
    things += [Thing(color, None) for color in dict.fromkeys(color for color, _ in names)]
    things += [Thing(color, kind) for color, kind in names]
    for thing in things:
        a = thing.indefinite()
        shown = partial(_pictures_showing, thing, thing)
        for form in ("both show", "exactly one shows", "neither shows", "at least one shows"):
            yield Statement(form, {"a": a, "noun": thing.noun()}, shown)
        for second in things:
            if second != thing:
                slots = {"a": a, "b": second.indefinite()}
                yield Statement("one each", slots, partial(_pictures_showing, thing, second))
        for total in range(1, MAX_NAMED_TOTAL + 1):
            slots = {"are": be(total), "counted": counted(total, thing.noun())}
            yield Statement("total", slots, partial(_shapes_beyond, total, thing))
    for one, other in (("left", "right"), ("right", "left")):
        yield Statement("more", {"one": one, "other": other}, partial(_compare, _shapes_of, one))
    yield Statement("same number", {}, partial(_compare, _shapes_of, "left"))
    for side in ("left", "right"):
        for form in (f"{side} darker", f"{side} lighter"):
            yield Statement(form, {}, partial(_compare, _brightness_of, side))
    for form in ("same", "different"):
        yield Statement(form, {}, partial(_compare, _brightness_of, "left"))
    for background in BACKGROUNDS:
        slots, with_it = {"a": with_article(background)}, partial(_pictures_with, background)
        for form in ("both have", "exactly one has", "neither has", "at least one has"):
            yield Statement(form, slots, with_it)


def _pictures_showing(a: Thing, b: Thing, left: Scene, right: Scene) -> int:
    """Whether ``a`` is in the left picture, plus whether ``b`` is in the right one."""
    return bool(a.found_in(left)) + bool(b.found_in(right))


def _shapes_beyond(total: int, thing: Thing, left: Scene, right: Scene) -> int:
    """Number of such shapes in the two pictures, less ``total``."""
    return len(thing.found_in(left)) + len(thing.found_in(right)) - total


def _pictures_with(background: str, left: Scene, right: Scene) -> int:
    return (left.background == background) + (right.background == background)


def _compare(key: Callable[[Scene], int], side: str, left: Scene, right: Scene) -> int:
    """Whether the picture on that side has more of it than the other: LESS, EQUAL or MORE."""
    one, other = (key(left), key(right)) if side == "left" else (key(right), key(left))
    return (one > other) - (one < other)


def _shapes_of(scene: Scene) -> int:
    return len(scene.shapes)


def _brightness_of(scene: Scene) -> int:
    return BACKGROUNDS_BY_BRIGHTNESS.index(scene.background)


def make_nlvr2(fresh: FreshScenes, seed: int, num_images: int) -> TaskFiles:
    """About twice ``num_images`` training pictures and as many training sentences.

    A sentence comes with four pairs and is true of two of them, so it alone says nothing about
    the label. (The authors of the real sentences were asked to do the same.)
    """
    evaluation = max(2, num_images // 40)
    numbers = {"train": max(4, num_images // 4), "dev": evaluation, "test1": evaluation}
    pictures: list[Picture] = []
    texts: dict[Path, str] = {}
    samples: dict[str, list[Sample]] = {}
    for split, number in numbers.items():
        used: Counter[str] = Counter()
        samples[split] = []
        for set_number in range(number):
            rng = generator_for(seed, f"nlvr2-{split}", set_number)
            pairs, stated = _draw_set(fresh, split, used, rng)
            directory = {"directory": set_number % TRAIN_DIRECTORIES} if split == "train" else {}
            folder = Path("nlvr2", "images", split, *map(str, directory.values()))
            for pair_number, pair in enumerate(pairs):
                stem = f"{split}-{set_number}-{pair_number}"
                pictures += [
                    Picture(split=split, file=folder / f"{stem}-img{place}.png", scene=scene)
                    for place, scene in enumerate(pair)
                ]
                for number_in_set, (text, statement) in enumerate(stated):
                    holds = statement.number(*pair) in FORMS[statement.form].true_of
                    record = {
                        "sentence": text,
                        "label": str(holds),
                        "identifier": f"{stem}-{number_in_set}",
                    }
                    samples[split].append((record | directory, pair))
        generator_for(seed, f"nlvr2-{split}-order", 0).shuffle(samples[split])
        lines = (json_text(record) for record, _ in samples[split])
        texts[Path("nlvr2", "data", f"{split}.json")] = "".join(lines)
    truth = {split: _truth(samples["train"], samples[split]) for split in ("dev", "test1")}
    return TaskFiles(pictures=tuple(pictures), texts=texts, truth=truth)


def _truth(train: Sequence[Sample], held_out: Sequence[Sample]) -> dict[str, Any]:
    """Three guesses more: by the two backgrounds alone, and by the sentence with one picture's."""
    cues = {
        "backgrounds": itemgetter(1, 2),
        "sentence_and_left_background": itemgetter(0, 1),
        "sentence_and_right_background": itemgetter(0, 2),
    }
    truth = class_truth(record["label"] for record, _ in held_out)
    for name, cue in cues.items():
        seen, asked = (
            [
                (cue((record["sentence"], left.background, right.background)), record["label"])
                for record, (left, right) in samples
            ]
            for samples in (train, held_out)
        )
        truth[f"guess_by_{name}_percent"] = guess_by(seen, asked)
    return truth


def _draw_set(
    fresh: FreshScenes, split: str, used: Counter[str], rng: random.Random
) -> tuple[list[Pair], list[tuple[str, Statement]]]:
    """Pairs and worded statements of a set, of the forms that are most behind; counts them."""
    num_colors, num_kinds = rng.choice(PALETTES)
    colors, kinds = rng.sample(COLORS, num_colors), rng.sample(KINDS, num_kinds)
    names = [(color, kind) for color in colors for kind in kinds]
    backgrounds = rng.sample(BACKGROUNDS, rng.choice(NUMBERS_OF_BACKGROUNDS))

    def draw(rng: random.Random) -> Scene:
        single = rng.random() < SINGLE_SHAPE_SHARE
        scene = draw_scene(rng, names)
        while single and len(scene.shapes) > 1:
            scene = draw_scene(rng, names)
        return replace(scene, background=rng.choice(backgrounds))

    def behind(form: str) -> float:
        return used[form] / FORMS[form].weight

    possible = list(statements(names))
    wanted = min(FORMS, key=behind)
    while True:
        scenes = [fresh.take(f"nlvr2-{split}", draw) for _ in range(2 * PAIRS_PER_SET)]
        pairs = list(zip(scenes[::2], scenes[1::2], strict=True))
        if not any(s.splits(pairs) for s in possible if s.form == wanted):
            continue
        fitting: dict[str, list[Statement]] = {}
        for statement in possible:
            if statement.splits(pairs):
                fitting.setdefault(statement.form, []).append(statement)
        if len(fitting) >= STATEMENTS_PER_SET:
            break
    rarest = sorted(fitting, key=behind)[:STATEMENTS_PER_SET]
    used.update(rarest)
    chosen = [rng.choice(fitting[form]) for form in rarest]
    rng.shuffle(chosen)
    stated = []
    for statement in chosen:
        # In turn, so that the rarest forms have all of their wordings too.
        wordings = FORMS[statement.form].wordings
        wording = wordings[used[statement.form] % len(wordings)]
        stated.append((wording.format(**statement.slots), statement))
    return pairs, stated
