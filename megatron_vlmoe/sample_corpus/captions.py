"""Captions in the layouts of COCO and Flickr30K, each also as a Karpathy split.

Every caption names all groups of a scene with colour, kind, texture and where they are.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_vlmoe.sample_corpus.task_files import (
    FreshScenes,
    Picture,
    TaskFiles,
    json_text,
    percent,
)
from megatron_vlmoe.sample_corpus.world import (
    DRAWN_WORDS,
    PICTURE_WORDS,
    VALIDATION_PERIOD,
    Group,
    Relation,
    Scene,
    ShapeName,
    be,
    generator_for,
    indefinite,
    inflected,
    listed,
    place_phrase,
    relation_between,
    relation_phrase,
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
            "a": indefinite(a, rng, full=full),
            "is_a": be(a.count),
            "place": place_phrase(a, rng),
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
                "b": indefinite(b, rng, full=full),
                "is_b": be(b.count),
                "relation": relation_phrase(relation, rng),
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
        phrase = indefinite(group, rng, full=False)
        verb = f" {be(group.count)}" if connective in CLAUSE_CONNECTIVES else ""
        items.append(f"{phrase}{verb} {place_phrase(group, rng)}")
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
