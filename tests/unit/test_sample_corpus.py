"""The sample corpus: texts and pictures are read back by other means and held against the truth."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megatron_vlmoe.sample_corpus import writer
from megatron_vlmoe.sample_corpus.texts import (
    COLOR_FACTS,
    KIND_FACTS,
    write_captions,
    write_paragraph,
)
from megatron_vlmoe.sample_corpus.world import (
    COLORS,
    KINDS,
    Cell,
    FreshScenes,
    Scene,
    Shape,
    draw_object_scene,
    sample_scene,
)
from megatron_vlmoe.sample_corpus.writer import (
    BACKGROUND_VALUES,
    COLOR_VALUES,
    SampleCorpus,
    make_sample_corpus,
    render_picture,
    task_files,
)

ROOT = Path(__file__).resolve().parents[2]
NUMBERS = {"no": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "a": 1, "an": 1}
BIG = {"small": "small", "little": "small", "large": "large", "big": "large"}
RELATIONS = {
    **dict.fromkeys(("to the left of", "left of"), "left"),
    **dict.fromkeys(("to the right of", "right of"), "right"),
    **dict.fromkeys(("above", "over"), "above"),
    **dict.fromkeys(("below", "under", "beneath"), "below"),
}
SIDES = {
    f"{preposition} {pronoun} {side}": side
    for preposition in ("to", "on")
    for pronoun in ("its", "their")
    for side in ("left", "right")
} | {
    f"{word} {pronoun}": RELATIONS[word]
    for word in ("above", "below", "under")
    for pronoun in ("it", "them")
}
PLACES: dict[str, list[Cell]] = {"in the center": [(1, 1)], "in the middle": [(1, 1)]}
for row, upper, top in ((0, "upper", "top"), (2, "lower", "bottom")):
    PLACES[f"at the {top}"] = [(row, 1)]
    for column, left in ((0, "left"), (2, "right")):
        PLACES[f"in the {upper} {left} corner"] = [(row, column)]
        PLACES[f"at the {top} {left}"] = [(row, column)]
        PLACES[f"on the {left} side"] = [(1, column)]
for line, top, left in ((0, "top", "left"), (1, "middle", "middle"), (2, "bottom", "right")):
    PLACES[f"in the {top} row"] = [(line, column) for column in range(3)]
    PLACES[f"in the {left} column"] = [(row, line) for row in range(3)]


def one_of(words: Any) -> str:
    return "(" + "|".join(sorted(words, key=len, reverse=True)) + ")"


RELATION, SIDE, PLACE = one_of(RELATIONS), one_of(SIDES), one_of(PLACES)
COLOR = one_of(COLORS)
KIND = f"{one_of(KINDS)}(?:es|s)?"
NOUN = re.compile(
    rf"\b(an?|two|three) (?:{one_of(BIG)} )?(?:(striped|dotted) )?{COLOR} {KIND}"
    r"(?: (?:marked )?with the letter ([A-Z])(?: on it)?)?\b"
)
BACKGROUND = re.compile(r"on an? (\w+) background")


def gap(relation: str, a: Sequence[Cell], b: Sequence[Cell]) -> int:
    """How far all of ``a`` is on that side of all of ``b``; below 1 where some is not."""
    axis = 1 if relation in ("left", "right") else 0
    sign = 1 if relation in ("left", "above") else -1
    return min(sign * (q[axis] - p[axis]) for p in a for q in b)


def fits(relation: str, a: Sequence[Cell], b: Sequence[Cell]) -> bool:
    return gap(relation, a, b) > 0


def find(scene: Scene, color: str, kind: str) -> list[Shape]:
    return [s for s in scene.shapes if (s.color, s.kind) == (color, kind)]


def cells(shapes: list[Shape]) -> list[Cell]:
    return [shape.cell for shape in shapes]


def check_noun(scene: Scene, match: re.Match[str]) -> list[Shape]:
    number, size, texture, color, kind, letter = match.groups()
    shapes = find(scene, color, kind)
    assert len(shapes) == NUMBERS[number], match[0]
    assert match[0].split(" with ")[0].removesuffix(" marked").endswith("s") == (
        len(shapes) > 1 or kind == "cross"
    ), match[0]
    assert {s.texture for s in shapes} == {texture or "solid"}, match[0]
    if size:
        assert {s.size for s in shapes} == {BIG[size]}, match[0]
        assert {s.letter for s in shapes} == {letter}, match[0]
    if len(shapes) == 1:
        first = match[0].split()[1]
        assert (match[0].split()[0] == "an") == (first[0] in "aeiou"), match[0]
    return shapes


def check_places(scene: Scene, named: list[list[Shape]], masked: str) -> int:
    """ "N0 (is drawn) in the center" and "in the center (is) N0"."""
    found = re.findall(rf"N(\d)(?: on B,)?(?: (?:is|are))?(?: \w+n| \w+ed)? {PLACE}\b", masked)
    first = re.match(rf"{PLACE},? (?:there )?(?:is|are|you can see) N(\d)", masked)
    if first:
        found.append((first[2], first[1]))
    for number, place in found:
        assert set(cells(named[int(number)])) <= set(PLACES[place]), (masked, place)
    return len(found)


def check_caption(scene: Scene, caption: str) -> None:
    assert re.fullmatch(r"[A-Z][^.]*\.", caption), caption
    text = caption[0].lower() + caption[1:-1]
    for background in BACKGROUND.findall(text):
        assert background == scene.background
    text = BACKGROUND.sub("on B", text).replace("a B", "B")
    named = [check_noun(scene, match) for match in NOUN.finditer(text)]
    # Every group once: the picture tells the whole caption, the caption the whole picture.
    pairs = [(shapes[0].color, shapes[0].kind) for shapes in named]
    assert sorted(pairs) == sorted({(s.color, s.kind) for s in scene.shapes}), caption
    numbers = iter(range(10))
    masked = NOUN.sub(lambda _: f"N{next(numbers)}", text)
    if len(named) == 1:
        assert check_places(scene, named, masked) == 1, masked
        return
    verb = r"(?: that)?(?: (?:is|are))?(?: (?:drawn|placed|painted|shown))?"
    claims = [
        *((a, r, b) for a, r, b in re.findall(rf"N(\d){verb} {RELATION} N(\d)", masked)),
        *((a, r, b) for r, b, a in re.findall(rf"^{RELATION} N(\d) (?:is|are) N(\d)", masked)),
        *((a, s, b) for b, a, s in re.findall(rf"N(\d) with N(\d) {SIDE}\b", masked)),
        *((a, s, b) for b, s, a in re.findall(rf"N(\d) and, {SIDE}, N(\d)", masked)),
    ]
    assert len(claims) == 1, masked
    a, words, b = claims[0]
    gaps = {
        relation: gap(relation, cells(named[int(a)]), cells(named[int(b)]))
        for relation in ("left", "right", "above", "below")
    }
    # Along the longer way; where both are alike, the horizontal one.
    assert (RELATIONS | SIDES)[words] == max(gaps, key=lambda r: gaps[r]), caption
    assert check_places(scene, named, masked) == len(named) - 2, masked
    # A clause needs its verb, a list must have none.
    for clause, rest in re.findall(
        r", (?:(and|while)|along with|as well as|together with) (.*)", masked
    ):
        assert bool(clause) == bool(re.search(r"N\d (is|are)", rest)), caption
    # The subject stands behind the verb where the relation opens the sentence.
    inverted = re.match(rf"{RELATION} N\d (is|are) N(\d)(.*)", masked)
    agreements = [(inverted[3], inverted[2])] if inverted else []
    tail = inverted[4] if inverted else masked
    agreements += re.findall(r"N(\d)(?: that)? (is|are)\b", tail)
    agreements += [(n, verb) for verb, n in re.findall(r"there (is|are) N(\d)", masked)]
    for number, verb in agreements:
        assert (verb == "is") == (len(named[int(number)]) == 1), caption


def test_every_claim_of_every_caption_holds() -> None:
    phrasings: Counter[str] = Counter()
    for index in range(400):
        scene = sample_scene(3, "pair", index)
        captions = write_captions(scene, 3, index)
        assert len(captions) == 5
        for caption in captions:
            check_caption(scene, caption)
            phrasings[re.sub(rf"{COLOR} {KIND}", "X", caption.split(",")[0])] += 1
        assert len(set(captions)) == 5
    assert len(phrasings) > 200


def test_caption_check_notices_a_lie() -> None:
    scene, diamond, circle = (
        sample_scene(3, "pair", 1),
        "big dotted red diamond",
        "large red circle",
    )
    circle += " marked with the letter A"
    check_caption(scene, f"A {diamond} left of a {circle}.")
    for lie in (
        f"A {circle} left of a {diamond}.",
        f"A {diamond} above a {circle}.",
        f"A {diamond} left of two large red circles marked with the letter A.",
        f"A {diamond} left of a {circle} on a pink background.",
    ):
        with pytest.raises(AssertionError):
            check_caption(scene, lie)


THE = rf"the {COLOR} {KIND}"
Check = Callable[[Scene, re.Match[str]], bool]


def count_of(scene: Scene, **wanted: str) -> int:
    return sum(all(getattr(s, k) == v for k, v in wanted.items()) for s in scene.shapes)


def in_relation(scene: Scene, names: Sequence[str], words: str) -> bool:
    a, b = find(scene, *names[:2]), find(scene, *names[2:])
    return bool(a and b) and fits(RELATIONS[words], cells(a), cells(b))


def check_relations(scene: Scene, match: re.Match[str]) -> bool:
    claims = re.findall(rf"{THE} (is|are) {RELATION} {THE}", match[0])
    right = all(in_relation(scene, (c, k, c2, k2), r) for c, k, _, r, c2, k2 in claims)
    agree = all((be == "is") == (len(find(scene, c, k)) == 1) for c, k, be, *_ in claims)
    return len(claims) in (2, 3) and right and agree


def check_listing(scene: Scene, match: re.Match[str]) -> bool:
    parts = re.findall(rf"(one|two|three|four) {KIND}", match[0])
    listed = {kind: NUMBERS[n] for n, kind in parts}
    total = sum(listed.values())
    named = re.search(r"(\w+) shapes", match[0])
    assert named is not None
    return listed == Counter(s.kind for s in scene.shapes) and total == NUMBERS[named[1]] == len(
        scene.shapes
    )


def alike(scene: Scene, names: Sequence[str], key: str, values: Sequence[str]) -> bool:
    """Whether the two named groups have these values."""
    groups = find(scene, *names[:2]), find(scene, *names[2:4])
    return [{getattr(s, key) for s in shapes} for shapes in groups] == [{v} for v in values]


def check_description(scene: Scene, match: re.Match[str]) -> bool:
    named = [check_noun(scene, m) for m in NOUN.finditer(match[0])]
    numbers = iter(range(10))
    masked = NOUN.sub(lambda _: f"N{next(numbers)}", match[0])
    return len(named) == 1 and check_places(scene, named, masked) == 1


def check_opening(scene: Scene, match: re.Match[str]) -> bool:
    (number,) = re.findall(r"(\w+) shapes?\b", match[0])
    (background,) = BACKGROUND.findall(match[0]) + re.findall(r"background is (\w+)", match[0])
    return (NUMBERS[number], background) == (len(scene.shapes), scene.background)


FACT = one_of(fact for facts in (KIND_FACTS | COLOR_FACTS).values() for fact in facts)
PICTURE = "(?:picture|image|drawing)"
PATTERNS: dict[str, tuple[str, Check]] = {
    "opening": (rf"(?=.*\b{PICTURE}\b)(?=.*\bshapes?\b)(?=.*background).*", check_opening),
    "relation": (rf"(?:because |if )?{THE} (?:is|are) {RELATION} {THE}\W.*", check_relations),
    "listing": (r"(?:there (?:is|are) )?.*(?:make \w+ shapes|shapes in total)", check_listing),
    "some color": (
        rf"(\w+) of the (\w+) shapes (?:is|are) {COLOR}",
        lambda s, m: (count_of(s, color=m[3]), len(s.shapes)) == (NUMBERS[m[1]], NUMBERS[m[2]]),
    ),
    "all color": (
        rf"all (\w+) shapes are {COLOR}",
        lambda s, m: count_of(s, color=m[2]) == len(s.shapes) == NUMBERS[m[1]],
    ),
    "letters": (
        rf"the {PICTURE} has (\w+) letters? in it",
        lambda s, m: sum(x.letter is not None for x in s.shapes) == NUMBERS[m[1]],
    ),
    "one more": (
        r"if \w+ (?:draws|adds|paints) one more \w+, there will be (\w+) shapes",
        lambda s, m: NUMBERS[m[1]] == len(s.shapes) + 1,
    ),
    "removed": (
        rf"when \w+ (?:removes|takes away) {THE}, (\w+) shapes? remains?",
        lambda s, m: NUMBERS[m[3]] == len(s.shapes) - len(find(s, m[1], m[2])) < len(s.shapes),
    ),
    "same size": (
        rf"{THE} and {THE} have the same size, for both are (large|small)",
        lambda s, m: alike(s, m.groups(), "size", [m[5], m[5]]),
    ),
    "same texture": (
        rf"{THE} and {THE} are (solid|striped|dotted)",
        lambda s, m: alike(s, m.groups(), "texture", [m[5], m[5]]),
    ),
    "larger": (
        rf"{THE} (?:is|are) larger than {THE}, so {THE} (?:is|are) smaller",
        lambda s, m: (
            alike(s, m.groups(), "size", ["large", "small"]) and m.groups()[2:4] == m.groups()[4:]
        ),
    ),
    "contrast": (
        rf"{THE} (?:is|are) (\w+), but {THE} (?:is|are) (\w+)",
        lambda s, m: m[3] != m[6] and alike(s, (m[1], m[2], m[4], m[5]), "texture", [m[3], m[6]]),
    ),
    "size and texture": (
        rf"{THE} (?:is|are) (large|small) and (\w+)",
        lambda s, m: {(x.size, x.texture) for x in find(s, m[1], m[2])} == {(m[3], m[4])},
    ),
    "letter": (
        rf"the letter (\w) is written on {THE}",
        lambda s, m: [x.letter for x in find(s, m[2], m[3])] == [m[1]],
    ),
    "no color": (
        rf"nothing in the {PICTURE} is {COLOR}",
        lambda s, m: count_of(s, color=m[1]) == 0,
    ),
    "no kind": (
        rf"there is no {KIND} in the {PICTURE}",
        lambda s, m: count_of(s, kind=m[1]) == 0,
    ),
    "no texture": (r"no shape is (\w+)", lambda s, m: count_of(s, texture=m[1]) == 0),
    "no letter": (
        r"no shape has a letter on it",
        lambda s, m: all(x.letter is None for x in s.shapes),
    ),
    "how many": (
        rf"how many {KIND} are there\? there (?:is|are) (\w+)",
        lambda s, m: count_of(s, kind=m[1]) == NUMBERS[m[2]],
    ),
    "what color": (
        rf"what color (?:is|are) the {KIND}\? (?:it is|they are) {COLOR}",
        lambda s, m: {x.color for x in s.shapes if x.kind == m[1]} == {m[2]},
    ),
    "what is": (
        rf"what is {RELATION} {THE}\? {THE} (?:is|are)",
        lambda s, m: in_relation(s, (m[4], m[5], m[2], m[3]), m[1]),
    ),
    "description": (rf".*{NOUN.pattern}.*", check_description),
    "knowledge": (
        rf"(?:remember that |everybody knows that )?{FACT}",
        lambda s, m: any(m[1] in KIND_FACTS[x.kind] + COLOR_FACTS[x.color] for x in s.shapes),
    ),
}


def test_every_sentence_of_every_paragraph_holds() -> None:
    seen: Counter[str] = Counter()
    for index in range(300):
        scene = sample_scene(5, "text", index)
        paragraph = write_paragraph(5, index)
        assert 40 <= len(paragraph.split()) <= 120, paragraph
        # A question and its answer make one claim.
        for sentence in re.findall(r"[A-Z][^.]*\.", paragraph):
            text = re.sub(r"\? (\w)", lambda m: m[0].lower(), sentence[:-1])
            text = text[0].lower() + text[1:]
            matches = (
                (name, match, check)
                for name, (pattern, check) in PATTERNS.items()
                if (match := re.fullmatch(pattern, text))
            )
            name, match, check = next(matches, ("unknown", None, None))
            assert match is not None and check is not None, f"no pattern knows: {sentence}"
            assert check(scene, match), f"{name}: {sentence}\n{scene}"
            seen[name] += 1
    assert seen.keys() == PATTERNS.keys()
    assert min(seen.values()) >= 5, seen


def test_language_is_neither_degenerate_nor_unbounded() -> None:
    texts = [write_paragraph(0, i) for i in range(600)]
    for i in range(300):
        texts += write_captions(sample_scene(0, "pair", i), 0, i)
    words = Counter(re.findall(r"\w+", " ".join(texts).lower()))
    assert 150 <= len(words) <= 400
    assert words.most_common(1)[0][1] < 0.15 * words.total()


def test_scenes_are_pure_and_well_formed() -> None:
    counts: Counter[int] = Counter()
    for index in range(300):
        scene = sample_scene(1, "pair", index)
        assert scene == sample_scene(1, "pair", index)
        assert scene != sample_scene(2, "pair", index)
        assert scene != sample_scene(1, "text", index)
        places = cells([*scene.shapes])
        assert len(set(places)) == len(places) <= 4
        counts[len(places)] += 1
        assert sum(group.count for group in scene.groups) == len(places)
        related = [
            (a, b) for a, relation, b in scene.relations() if fits(relation, a.cells, b.cells)
        ]
        assert len(set(related)) == len(scene.groups) * (len(scene.groups) - 1)
    assert set(counts) == {1, 2, 3, 4}


def test_image_stream_shows_one_large_shape() -> None:
    classes = set()
    for index in range(400):
        first, *others = sample_scene(0, "image", index).shapes
        assert first.size == "large"
        assert all(s.size == "small" for s in others)
        classes.add((first.color, first.kind))
    assert len(classes) == 36


def distance(pixel: Any, color: tuple[int, int, int]) -> int:
    return max(abs(p - c) for p, c in zip(pixel, color, strict=True))


def test_pictures_show_the_scene() -> None:
    for index in range(150):
        scene = sample_scene(4, "pair", index)
        picture = render_picture(scene)
        assert picture.size == (scene.width, scene.height)
        by_cell = {shape.cell: shape for shape in scene.shapes}
        for row, column in product(range(3), range(3)):
            x, y = scene.width * (2 * column + 1) // 6, scene.height * (2 * row + 1) // 6
            pixels = [picture.getpixel((x + d, y + e)) for d in (-4, 0, 4) for e in (-4, 0, 4)]
            shape = by_cell.get((row, column))
            if shape is None:
                background = BACKGROUND_VALUES[scene.background]
                assert all(distance(p, background) <= 2 for p in pixels), scene
            else:
                near = sum(distance(p, COLOR_VALUES[shape.color]) <= 40 for p in pixels)
                assert near >= 1, (shape, pixels)


def silhouette(**changes: Any) -> Image.Image:
    looks = {"kind": "circle", "color": "red", "size": "large", "texture": "solid", "letter": None}
    shape = Shape(**(looks | changes), row=1, column=1, shift=(0.0, 0.0))
    return render_picture(Scene(width=96, height=96, background="white", shapes=(shape,)))


def test_what_words_tell_apart_looks_different() -> None:
    pictures = [
        *(silhouette(kind=kind) for kind in KINDS),
        *(silhouette(texture=texture) for texture in ("striped", "dotted")),
        *(silhouette(letter=letter) for letter in "AEHLTX"),
        silhouette(size="small"),
        silhouette(color="blue"),
    ]
    for a, b in combinations(pictures, 2):
        pairs = zip(a.tobytes(), b.tobytes(), strict=True)
        assert sum(abs(x - y) > 30 for x, y in pairs) > 25


def digest(root: Path) -> dict[str, str]:
    files = sorted(p for p in root.rglob("*") if p.is_file())
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("corpora") / "nested" / "sample"
    assert make_sample_corpus(SampleCorpus(output=output, num_images=60, seed=7))
    return output


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("corpora") / "small"
    assert make_sample_corpus(SampleCorpus(output=output, num_images=20, seed=7))
    return output


def load(path: Path) -> Any:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    return json.loads(path.read_text())


def test_coco_layout(corpus: Path) -> None:
    truth = load(corpus / "scenes.jsonl")
    by_file = {Path(t["file"]).name: t for t in truth if t["stream"] == "pair"}
    assert len(by_file) == 60
    captions: dict[int, list[str]] = {}
    for split, expected in (("train", 54), ("val", 6)):
        content = load(corpus / "coco" / "annotations" / f"captions_{split}2014.json")
        assert len(content["images"]) == expected
        assert len(content["annotations"]) == 5 * expected
        for annotation in content["annotations"]:
            captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
        ids = [a["image_id"] for a in content["annotations"]]
        assert ids[0] != ids[1], "captions of a picture should not stand together"
        for image in content["images"]:
            assert image["file_name"] == f"COCO_{split}2014_{image['id']:012d}.jpg"
            path = corpus / "coco" / f"{split}2014" / image["file_name"]
            with Image.open(path) as picture:
                picture.load()
                assert (picture.format, picture.size) == ("JPEG", (image["width"], image["height"]))
            entry = by_file[image["file_name"]]
            scene = sample_scene(7, "pair", entry["index"])
            assert entry["scene"] == json.loads(json.dumps(asdict(scene)))
            assert entry["split"] == split
            for caption in captions[image["id"]]:
                check_caption(scene, caption)
    assert all(len(c) == 5 for c in captions.values())
    karpathy = load(corpus / "coco" / "dataset_coco.json")["images"]
    splits = Counter(image["split"] for image in karpathy)
    assert splits == {"train": 54, "val": 3, "test": 2, "restval": 1}
    sentence_ids = []
    for image in karpathy:
        assert (corpus / "coco" / image["filepath"] / image["filename"]).exists()
        assert [s["raw"] for s in image["sentences"]] == captions[image["cocoid"]]
        assert image["sentids"] == [s["sentid"] for s in image["sentences"]]
        sentence_ids += image["sentids"]
        first = image["sentences"][0]
        assert " ".join(first["tokens"]) == re.sub(r"[.,]", "", first["raw"]).lower()
    assert len(set(sentence_ids)) == 300


def test_image_folders_and_texts(corpus: Path) -> None:
    lines = (corpus / "images" / "words.txt").read_text().splitlines()
    words = dict(line.split("\t") for line in lines)
    assert len(words) == 36
    entries = [t for t in load(corpus / "scenes.jsonl") if t["stream"] == "image"]
    files = {str(p.relative_to(corpus)) for p in (corpus / "images").rglob("*.JPEG")}
    assert files == {t["file"] for t in entries}
    assert Counter(f.split("/")[1] for f in files) == {"train": 54, "val": 6}
    for entry in entries:
        folder = Path(entry["file"]).parent.name
        assert re.fullmatch(r"n\d{8}", folder)
        main = entry["scene"]["shapes"][0]
        assert words[folder] == f"{main['color']} {main['kind']}"
    train, val = (load(corpus / "text" / f"{split}.jsonl") for split in ("train", "val"))
    assert (len(train), len(val)) == (108, 12)
    assert val[1] == {"text": write_paragraph(7, 10)}
    assert len({record["text"] for record in train + val}) == 120


def is_picture(path: str | Path) -> bool:
    return Path(path).suffix in (".jpg", ".png", ".JPEG")


@pytest.mark.process
def test_same_arguments_give_same_bytes(
    corpus: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = digest(small)
    monkeypatch.setattr(writer, "POOL_THRESHOLD", 1)
    make_sample_corpus(SampleCorpus(output=tmp_path / "a", num_images=20, seed=7, workers=2))
    assert digest(tmp_path / "a") == first
    monkeypatch.undo()
    make_sample_corpus(SampleCorpus(output=tmp_path / "b", num_images=20, seed=8))
    other = digest(tmp_path / "b")
    changed = [n for n in other if n in first and other[n] != first[n] and n.endswith(".jpg")]
    assert len(changed) > 50
    # A larger corpus begins with the same pictures.
    longer = digest(corpus)
    pictures = [n for n in first if is_picture(n) and not n.startswith("tasks/")]
    assert len(pictures) == 40
    assert all(longer[n] == first[n] for n in pictures)


def test_task_files_on_disk(small: Path) -> None:
    """Layouts, and no picture twice in all of the corpus."""
    root = small / "tasks"
    lines = load(root / "scenes.jsonl")
    on_disk = {p.relative_to(root).as_posix() for p in root.rglob("*") if is_picture(p)}
    assert on_disk == {line["file"] for line in lines}
    known = [sample_scene(7, stream, i) for stream in ("pair", "image") for i in range(20)]
    pictures, texts = task_files(7, 20, known)
    assert [line["scene"] for line in lines] == [
        json.loads(json.dumps(asdict(scene))) for scene, _ in pictures
    ]
    assert all((small / file).read_text() == text for file, text in texts.items())
    for line in lines[:: len(lines) // 20]:
        with Image.open(root / line["file"]) as picture:
            assert picture.format == ("PNG" if line["task"] == "nlvr2" else "JPEG")
            assert picture.size == (line["scene"]["width"], line["scene"]["height"])
    for example in (
        "vqa/train2014/COCO_train2014_000000000100.jpg",
        "nlvr2/images/train/0/train-0-0-img0.png",
        "nlvr2/images/train/3/train-3-3-img1.png",
        "nlvr2/images/dev/dev-1-3-img1.png",
        "nlvr2/images/test1/test1-0-0-img0.png",
        "flickr30k/flickr30k-images/1000000000.jpg",
    ):
        assert (root / example).exists(), example
    train, val = ({p.name for p in (root / "imagenet" / s).iterdir()} for s in ("train", "val"))
    assert train == val
    digests = [value for name, value in digest(small).items() if is_picture(name)]
    assert len(set(digests)) == len(digests) == len(on_disk) + 40


def test_no_scene_is_given_out_twice() -> None:
    known = [sample_scene(3, "pair", index) for index in range(40)]
    moved = [
        replace(s, shapes=tuple(replace(shape, shift=(0.01, 0.0)) for shape in s.shapes))
        for s in known
    ]
    fresh = FreshScenes(3, known[5:])
    # Known ones and repetitions are passed over, moved or not.
    order = iter([known[7], moved[0], known[0], moved[9], known[1], known[0], known[3], known[2]])
    taken = [fresh.take("x", lambda rng: next(order)) for _ in range(2)]
    assert taken == [moved[0], known[1]]
    assert fresh.take("y", lambda rng: next(order), lambda s: s != known[3]) == known[2]
    a, b = (FreshScenes(3).take("z", draw_object_scene) for _ in range(2))
    assert a == b


@pytest.mark.process
def test_second_run_changes_nothing(corpus: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in corpus.rglob("*")}
    assert not make_sample_corpus(SampleCorpus(output=corpus, num_images=60, seed=7, workers=3))
    assert {p: p.stat().st_mtime_ns for p in corpus.rglob("*")} == before
    with pytest.raises(ValueError, match=r"sample holds another sample corpus .*\"seed\": 7"):
        make_sample_corpus(SampleCorpus(output=corpus, num_images=60, seed=9))
    assert {p: p.stat().st_mtime_ns for p in corpus.rglob("*")} == before


def test_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def fail(scene: Scene, suffix: str) -> bytes:
        drawn.append(scene)
        if len(drawn) > 3:
            raise OSError(28, "No space left on device", "some/file")
        return b"x"

    monkeypatch.setattr(writer, "encode_picture", fail)
    with pytest.raises(ValueError, match="cannot write some/file: No space left"):
        make_sample_corpus(SampleCorpus(output=tmp_path / "sample", num_images=5))
    assert len(drawn) == 4
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()

    def refuse(path: Path, **more: bool) -> None:
        # The folders above are there; that of the corpus has another name until it is complete.
        if path.suffix == ".tmp":
            raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ValueError, match=f"^cannot write {tmp_path}/new: Permission denied$"):
        make_sample_corpus(SampleCorpus(output=tmp_path / "new", num_images=5))


def test_bad_arguments(tmp_path: Path) -> None:
    for options, message in (
        ({"num_images": 1}, "num_images must be at least 2"),
        ({"num_images": 5, "workers": 0}, "workers must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            make_sample_corpus(SampleCorpus(output=tmp_path / "x", **options))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match="full is not empty and holds no sample corpus"):
        make_sample_corpus(SampleCorpus(output=tmp_path / "full", num_images=2))
    with pytest.raises(ValueError, match=r"precious\.txt is not a directory"):
        make_sample_corpus(SampleCorpus(output=tmp_path / "full" / "precious.txt", num_images=2))
    (tmp_path / "empty").mkdir()
    assert make_sample_corpus(SampleCorpus(output=tmp_path / "empty", num_images=2))
    assert (tmp_path / "empty" / "corpus.json").exists()


@pytest.mark.process
def test_tool(small: Path, tmp_path: Path) -> None:
    """Also in a process where sets have another order."""
    output = tmp_path / "s"

    def run(num_images: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "tools/make_sample_corpus.py", "--num-images", str(num_images)]
        command += ["--seed", "7", "--output", str(output)]
        environment = {**os.environ, "PYTHONHASHSEED": "5"}
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )

    for expected in ("wrote sample corpus", "nothing to do"):
        result = run(20)
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith(expected)
    assert digest(output) == digest(small)
    result = run(4)
    assert result.returncode == 1
    assert re.fullmatch(r"error: .*/s holds another sample corpus .*\n", result.stderr)
