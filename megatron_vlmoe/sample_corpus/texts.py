"""What is written about a scene: captions of COCO and Flickr30K, and paragraphs of plain text.

Every caption names all groups of a scene with colour, kind, texture and where they are; its files have the layout of
COCO, and that of a Karpathy split. A paragraph opens, names every group, and then adds sentences of mixed sorts: each
function from ``_relations`` on lists true sentences of one sort.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_vlmoe.sample_corpus.world import (
    COLORS,
    CONVERSE,
    DRAWN_WORDS,
    KINDS,
    NAMES,
    NUMBERS,
    PICTURE_WORDS,
    RELATION_PHRASES,
    VALIDATION_PERIOD,
    FreshScenes,
    Group,
    Picture,
    Relation,
    Scene,
    ShapeName,
    TaskFiles,
    be,
    counted,
    generator_for,
    holds,
    inflected,
    json_text,
    listed,
    percent,
    relation_between,
    sample_scene,
    sentence,
    split_of,
    with_article,
)

CAPTIONS_PER_IMAGE = 5
MAX_FLICKR30K_EVALUATION = 1000
"""Pictures of val and of test, as in the real split: more could not be kept distinct."""

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
SIDE_PHRASES: dict[Relation, tuple[str, ...]] = {
    "left": ("to {} left", "on {} left"),
    "right": ("to {} right", "on {} right"),
    "above": ("above {}",),
    "below": ("below {}", "under {}"),
}
"""Where a group stands, for one that was named before: "to its left", "above them"."""
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


def write_captions(scene: Scene, seed: int, index: int, purpose: str = "captions") -> list[str]:
    """Five captions of one scene in different phrasings; pure in its arguments."""
    rng = generator_for(seed, purpose, index)
    captions = []
    for template in rng.sample(
        SINGLE_TEMPLATES if len(scene.groups) == 1 else PAIR_TEMPLATES, CAPTIONS_PER_IMAGE
    ):
        a, *others = rng.sample(scene.groups, len(scene.groups))
        # Sizes and letters of three or four groups would make a caption too long to read.
        full = len(others) <= 1
        picture = rng.choice(PICTURE_WORDS)
        slots = {
            "a": a.indefinite(rng, full=full),
            "is_a": be(a.count),
            "place": a.place(rng),
            "picture": picture,
            "picture_of": with_article(picture) + " of",
            "drawn": rng.choice(DRAWN_WORDS),
            "shape": inflected("shape", a.count),
            "background": with_article(scene.background) + " background",
        }
        if others:
            b, *rest = others
            relation = relation_between(a, b)
            assert relation is not None
            its, it = ("its", "it") if b.count == 1 else ("their", "them")
            slots |= {
                "b": b.indefinite(rng, full=full),
                "is_b": be(b.count),
                "relation": rng.choice(RELATION_PHRASES[relation]),
                "side_of_b": rng.choice(SIDE_PHRASES[relation]).format(
                    its if relation in ("left", "right") else it
                ),
                "rest": _rest(rest, rng.choice(LIST_CONNECTIVES), rng),
                "rest_with": _rest(rest, "with", rng),
                "rest_clause": _rest(rest, rng.choice(CLAUSE_CONNECTIVES), rng),
            }
        captions.append(sentence(template.format(**slots)))
    return captions


def _rest(groups: Sequence[Group], connective: str, rng: random.Random) -> str:
    if not groups:
        return ""
    items = []
    for group in groups:
        phrase = group.indefinite(rng, full=False)
        verb = f" {be(group.count)}" if connective in CLAUSE_CONNECTIVES else ""
        items.append(f"{phrase}{verb} {group.place(rng)}")
    return f", {connective} {listed(items)}"


def coco_id(index: int) -> int:
    """COCO's image id; with gaps, as the real ones, so that nobody takes it for a position."""
    return 100 + 3 * index


def coco_file(index: int) -> Path:
    """Path of a picture below the corpus."""
    folder = f"{split_of(index)}2014"
    return Path("coco", folder, f"COCO_{folder}_{coco_id(index):012d}.jpg")


def coco_texts(scenes: Iterable[Scene], seed: int) -> dict[Path, str]:
    """The files of COCO's captions, and of the same captions as a Karpathy split, by path."""
    contents: dict[str, dict[str, Any]] = {
        split: {
            "info": {"description": "sample corpus", "year": 2014, "version": "1.0"},
            "licenses": [],
            "images": [],
            "annotations": [],
        }
        for split in ("train", "val")
    }
    karpathy = []
    for index, scene in enumerate(scenes):
        file, image_id, split = coco_file(index), coco_id(index), split_of(index)
        sentences = _sentences(index, write_captions(scene, seed, index), first_id=1)
        contents[split]["images"].append(
            {
                "id": image_id,
                "file_name": file.name,
                "height": scene.height,
                "width": scene.width,
            }
        )
        contents[split]["annotations"] += [
            {"id": s["sentid"], "image_id": image_id, "caption": s["raw"]} for s in sentences
        ]
        # Of val2014, Karpathy's split gives a part to each of val, test and further training.
        parts = ("val", "test", "val", "test", "restval")
        karpathy.append(
            {
                "filepath": file.parent.name,
                "sentids": [s["sentid"] for s in sentences],
                "filename": file.name,
                "imgid": index,
                "split": parts[index // VALIDATION_PERIOD % 5] if split == "val" else split,
                "sentences": sentences,
                "cocoid": image_id,
            }
        )
    for content in contents.values():
        # As in the original, the captions of a picture do not stand together.
        content["annotations"].sort(key=lambda a: ((a["id"] - 1) % CAPTIONS_PER_IMAGE, a["id"]))
    texts = {
        Path("coco", "annotations", f"captions_{split}2014.json"): json.dumps(content)
        for split, content in contents.items()
    }
    whole = {"images": karpathy, "dataset": "coco"}
    return texts | {Path("coco", "dataset_coco.json"): json.dumps(whole)}


def _sentences(index: int, captions: Sequence[str], first_id: int) -> list[dict[str, Any]]:
    """The captions of picture ``index`` as Karpathy's splits have them."""
    return [
        {
            "tokens": re.findall(r"\w+", caption.lower()),
            "raw": caption,
            "imgid": index,
            "sentid": number,
        }
        for number, caption in enumerate(captions, start=CAPTIONS_PER_IMAGE * index + first_id)
    ]


def make_flickr30k(fresh: FreshScenes, seed: int, num_images: int) -> TaskFiles:
    """Half as many pictures as ``num_images`` to train, a tenth of that for each of val and test."""
    evaluation = min(MAX_FLICKR30K_EVALUATION, max(10, num_images // 20))
    numbers = {"train": max(20, num_images // 2), "val": evaluation, "test": evaluation}
    pictures: list[Picture] = []
    entries = []
    for split, number in numbers.items():
        named: list[set[ShapeName]] = []

        def is_distinct(scene: Scene, others: Sequence[set[ShapeName]] = named) -> bool:
            """Whether the scene names neither all that another one names nor only a part of that.

            A caption names every group of its picture, so it can then be true of no other picture. A
            scene of one group says too little for that.
            """
            names = {shape.name for shape in scene.shapes}
            return len(names) > 1 and not any(names <= own or own <= names for own in others)

        for _ in range(number):
            if split == "train":
                scene = fresh.take("flickr30k-train")
            else:
                scene = fresh.take(f"flickr30k-{split}", accept=is_distinct)
                named.append({shape.name for shape in scene.shapes})
            index = len(pictures)
            file = Path("flickr30k", "flickr30k-images", f"{1_000_000_000 + 7919 * index}.jpg")
            pictures.append(Picture(split=split, file=file, scene=scene))
            captions = write_captions(scene, seed, index, "flickr30k-captions")
            sentences = _sentences(index, captions, first_id=0)
            entries.append(
                {
                    "sentids": [s["sentid"] for s in sentences],
                    "imgid": index,
                    "sentences": sentences,
                    "split": split,
                    "filename": file.name,
                }
            )
    content = {"images": entries, "dataset": "flickr30k"}
    truth = {
        "samples": evaluation * CAPTIONS_PER_IMAGE,
        "images": evaluation,
        # In either direction: one of ``evaluation`` pictures is right.
        "guess_percent": percent(1 / evaluation),
    }
    return TaskFiles(
        pictures=tuple(pictures),
        texts={Path("flickr30k", "dataset_flickr30k.json"): json_text(content)},
        truth={"val": truth, "test": truth},
    )


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
        phrase, place = group.indefinite(rng), group.place(rng)
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
        return f"{a.definite} {be(a.count)} {rng.choice(RELATION_PHRASES[relation])} {b.definite}"

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
        yield f"when {rng.choice(NAMES)} {verb} {group.definite}, {remaining}"


def _contrasts(scene: Scene) -> Iterator[str]:
    """Size, texture and letter, between two groups."""
    for number, a in enumerate(scene.groups):
        the_a, is_a = a.definite, be(a.count)
        for b in scene.groups[:number]:
            the_b, is_b = b.definite, be(b.count)
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
        where, answer = (
            rng.choice(RELATION_PHRASES[relation]),
            sentence(f"{a.definite} {be(a.count)}"),
        )
        yield f"What is {where} {b.definite}? {answer}"


def _knowledge(scene: Scene, rng: random.Random) -> Iterator[str]:
    """What holds in every picture, about the kinds and colours of this one."""
    lead = ("", "remember that ", "everybody knows that ")
    for group in scene.groups:
        for fact in (*KIND_FACTS[group.kind], *COLOR_FACTS[group.color]):
            yield rng.choice(lead) + fact
