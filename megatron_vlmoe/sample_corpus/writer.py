"""The sample corpus on disk, in the raw layouts of COCO, Karpathy's split, ImageNet, text and tasks.

Pictures are drawn at three times the size with Pillow, then averaged down.
"""

from __future__ import annotations

import io
import json
import math
import multiprocessing
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from megatron_vlmoe.config.errors import ConfigError, DataError
from megatron_vlmoe.runtime.helper_processes import end_with_parent, without_interrupts
from megatron_vlmoe.sample_corpus.mnli import make_mnli
from megatron_vlmoe.sample_corpus.nlvr2 import make_nlvr2
from megatron_vlmoe.sample_corpus.texts import (
    coco_file,
    coco_id,
    coco_texts,
    make_flickr30k,
    write_paragraph,
)
from megatron_vlmoe.sample_corpus.vqa import make_vqa
from megatron_vlmoe.sample_corpus.world import (
    COLORS,
    GRID,
    KINDS,
    SHAPE_NAMES,
    FreshScenes,
    Picture,
    Scene,
    Shape,
    ShapeName,
    Stream,
    TaskFiles,
    class_truth,
    draw_object_scene,
    generator_for,
    json_text,
    sample_scene,
    split_of,
)

Rgb = tuple[int, int, int]
Point = tuple[float, float]

SUPERSAMPLING = 3
JPEG_QUALITY = 90
COLOR_VALUES: dict[str, Rgb] = {
    "red": (214, 32, 38),
    "green": (40, 156, 56),
    "blue": (36, 84, 214),
    "yellow": (246, 214, 28),
    "orange": (246, 130, 20),
    "purple": (140, 56, 178),
}
BACKGROUND_VALUES: dict[str, Rgb] = {
    "white": (250, 250, 250),
    "gray": (158, 160, 162),
    "black": (22, 22, 24),
    "beige": (232, 214, 180),
}
RADII = {"small": 0.29, "large": 0.44}
"""As a fraction of the smaller side of a grid cell."""
ARM = 0.32
"""Half the width of a cross's arm."""
CORNERS: dict[str, Sequence[Point]] = {
    # In the box from (-1, -1), top left, to (1, 1).
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": [(0, -0.95), (1, 0.85), (-1, 0.85)],
    "diamond": [(0, -1), (0.75, 0), (0, 1), (-0.75, 0)],
    "cross": [
        (x * c - y * s, x * s + y * c)
        # Each arm is the one before turned by 90 degrees.
        for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))
        for x, y in ((ARM, -1.0), (ARM, -ARM), (1.0, -ARM))
    ],
    "star": [
        (length * math.cos(math.pi * (k / 5 - 0.5)), length * math.sin(math.pi * (k / 5 - 0.5)))
        for k, length in enumerate((1.0, 0.42) * 5)
    ],
}
LETTER_STROKES: dict[str, Sequence[tuple[Point, Point]]] = {
    # In the same box; drawn here so that no font file decides.
    "A": (((-0.9, 1), (0, -1)), ((0, -1), (0.9, 1)), ((-0.5, 0.3), (0.5, 0.3))),
    "E": (((-0.7, -1), (-0.7, 1)), ((-0.7, -1), (0.8, -1)), ((-0.7, 0), (0.6, 0)))
    + (((-0.7, 1), (0.8, 1)),),
    "H": (((-0.8, -1), (-0.8, 1)), ((0.8, -1), (0.8, 1)), ((-0.8, 0), (0.8, 0))),
    "L": (((-0.6, -1), (-0.6, 1)), ((-0.6, 1), (0.8, 1))),
    "T": (((-0.9, -1), (0.9, -1)), ((0, -1), (0, 1))),
    "X": (((-0.8, -1), (0.8, 1)), ((0.8, -1), (-0.8, 1))),
}
MARKER = "corpus.json"
"""Holds what the corpus was made with."""
FORMAT_VERSION = 3
PARAGRAPHS_PER_IMAGE = 2
POOL_THRESHOLD = 10_000
"""Fewer pictures than this are drawn faster than a process pool starts."""
README = """\
Sample corpus of generated pictures and texts: coloured shapes on a plain background.
Made by vlmoe sample-corpus with --num-images {num_images} --seed {seed}.

coco/annotations/captions_{{train,val}}2014.json   captions in the layout of COCO 2014
coco/{{train,val}}2014/*.jpg                       the pictures they describe
coco/dataset_coco.json                           the same captions as a Karpathy split
images/{{train,val}}/CLASS/*.JPEG                  pictures without text, in ImageNet folders
images/words.txt                                 what the classes are called
text/{{train,val}}.jsonl                           paragraphs about other scenes, key "text"
scenes.jsonl                                     what each picture shows

tasks/ holds five downstream tasks; each folder is what the real data set would be unpacked to.
Their pictures show other scenes than those above. Sizes grow with --num-images.
tasks/vqa/          VQA v2: v2_*.json, {{train,val}}2014/, test2015/; answers_test2015.json is the secret
tasks/nlvr2/        NLVR2: data/{{train,dev,test1}}.json, images/
tasks/flickr30k/    Flickr30K: dataset_flickr30k.json (Karpathy), flickr30k-images/
tasks/imagenet/     ImageNet: {{train,val}}/CLASS/*.JPEG, equally many of every class; words.txt
tasks/mnli/         MultiNLI as in GLUE: train.tsv, dev_matched.tsv, dev_mismatched.tsv
tasks/truth.json    samples, labels and the score of guessing, by task and evaluation split
tasks/scenes.jsonl  what each picture shows
"""


def synset_of(name: ShapeName) -> str:
    """Folder name of a class, formed like a WordNet id: n00CCCKKK."""
    color, kind = name
    return f"n{(COLORS.index(color) + 1) * 1000 + KINDS.index(kind) + 1:08d}"


CLASS_NAMES = "".join(f"{synset_of(name)}\t{' '.join(name)}\n" for name in SHAPE_NAMES)
"""Content of words.txt, which says what the classes are called."""
PictureFile = tuple[Scene, Path]
"""What to draw, and the file; the suffix says whether JPEG or PNG."""
Files = tuple[list[PictureFile], dict[Path, str]]
"""Pictures, and the content of every other file by path."""


@dataclass(frozen=True, kw_only=True)
class SampleCorpus:
    """What to make; equal values give equal bytes, however many workers."""

    output: Path
    num_images: int
    """Pictures with captions, and again as many without; a tenth of each is for validation."""
    seed: int = 0
    workers: int = 1


def make_sample_corpus(corpus: SampleCorpus) -> bool:
    """Writes the corpus beside ``output`` and renames it into place.

    Returns:
        False where ``output`` already holds exactly this corpus.

    Raises:
        ValueError: bad option, ``output`` holds something else, or it cannot be written.
    """
    seed, num_images, output = corpus.seed, corpus.num_images, corpus.output
    if num_images < 2:
        raise ConfigError(
            f"num_images must be at least 2 (one to train, one to validate), got {num_images}"
        )
    if corpus.workers < 1:
        raise ConfigError(f"workers must be at least 1, got {corpus.workers}")
    made_with = {"format_version": FORMAT_VERSION, "num_images": num_images, "seed": seed}
    whole = output.absolute()
    staging = whole.with_name(f".{whole.name}.{os.getpid()}.tmp")
    try:
        if _is_complete(output, made_with):
            return False
        whole.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        pictures, texts = pretraining_files(seed, num_images)
        task_pictures, task_texts = task_files(seed, num_images, [scene for scene, _ in pictures])
        texts |= task_texts
        texts[Path("README.txt")] = README.format(num_images=num_images, seed=seed)
        texts[Path(MARKER)] = json_text(made_with)
        _draw([(scene, staging / file) for scene, file in pictures + task_pictures], corpus.workers)
        for file, text in texts.items():
            (staging / file).parent.mkdir(parents=True, exist_ok=True)
            (staging / file).write_text(text)
        # One sync of everything instead of one per picture.
        os.sync()
        staging.rename(whole)
    except OSError as error:
        # The user knows the files by the names that they would have had.
        where = str(error.filename or output).replace(str(staging), str(output))
        raise DataError(f"cannot write {where}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return True


def _is_complete(output: Path, made_with: dict[str, int]) -> bool:
    marker = output / MARKER
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    if not output.is_dir():
        raise DataError(f"{output} is not a directory")
    if not marker.exists():
        raise DataError(f"{output} is not empty and holds no sample corpus")
    try:
        found = json.loads(marker.read_text())
    except ValueError as error:
        raise DataError(f"{marker} is not valid JSON: delete {output}") from error
    if found != made_with:
        raise DataError(
            f"{output} holds another sample corpus ({json.dumps(found)}, asked for "
            f"{json.dumps(made_with)}): delete it or choose another directory"
        )
    return True


def pretraining_files(seed: int, num_images: int) -> Files:
    """Pictures with captions, pictures in class folders, paragraphs, and what the pictures show."""
    pictures: list[PictureFile] = []
    truth = []
    streams: tuple[Stream, ...] = ("pair", "image")
    for stream, index in product(streams, range(num_images)):
        scene, split = sample_scene(seed, stream, index), split_of(index)
        more: dict[str, object]
        if stream == "pair":
            file, more = coco_file(index), {"image_id": coco_id(index)}
        else:
            synset = synset_of(scene.shapes[0].name)
            file = Path("images", split, synset, f"{synset}_{index}.JPEG")
            more = {"class": synset}
        pictures.append((scene, file))
        known = {"file": file.as_posix(), "stream": stream, "index": index, "split": split}
        truth.append({**known, "scene": asdict(scene), **more})
    texts = coco_texts((scene for scene, _ in pictures[:num_images]), seed)
    texts[Path("images", "words.txt")] = CLASS_NAMES
    for split in ("train", "val"):
        indices = (i for i in range(PARAGRAPHS_PER_IMAGE * num_images) if split_of(i) == split)
        paragraphs = ({"text": write_paragraph(seed, index)} for index in indices)
        texts[Path("text", f"{split}.jsonl")] = "".join(map(json_text, paragraphs))
    texts[Path("scenes.jsonl")] = "".join(map(json_text, truth))
    return pictures, texts


def task_files(seed: int, num_images: int, known: Sequence[Scene]) -> Files:
    """All downstream tasks, in scenes of their own: none looks like one of ``known``."""
    fresh = FreshScenes(seed, known)
    tasks = {
        "vqa": make_vqa(fresh, seed, num_images),
        "nlvr2": make_nlvr2(fresh, seed, num_images),
        "flickr30k": make_flickr30k(fresh, seed, num_images),
        "imagenet": make_imagenet(fresh, seed, num_images),
        "mnli": make_mnli(seed, num_images),
    }
    root = Path("tasks")
    pictures: list[PictureFile] = []
    texts: dict[Path, str] = {}
    scenes = []
    for name, task in tasks.items():
        texts |= {root / file: text for file, text in task.texts.items()}
        for picture in task.pictures:
            pictures.append((picture.scene, root / picture.file))
            about = {"file": picture.file.as_posix(), "task": name, "split": picture.split}
            scenes.append({**about, "scene": asdict(picture.scene)})
    truth = {name: task.truth for name, task in tasks.items()}
    texts[root / "truth.json"] = json.dumps(truth, indent=1) + "\n"
    texts[root / "scenes.jsonl"] = "".join(map(json_text, scenes))
    return pictures, texts


def make_imagenet(fresh: FreshScenes, seed: int, num_images: int) -> TaskFiles:
    """Half as many pictures as ``num_images`` to train, and a fifth of that to validate."""
    numbers = {
        "train": max(2, num_images // (2 * len(SHAPE_NAMES))),
        "val": max(1, num_images // (10 * len(SHAPE_NAMES))),
    }
    pictures: list[Picture] = []
    for split, number in numbers.items():
        mains = [name for name in SHAPE_NAMES for _ in range(number)]
        # So that the numbers of validation pictures tell no classes.
        generator_for(seed, f"imagenet-{split}-order", 0).shuffle(mains)
        for index, main in enumerate(mains):
            synset = synset_of(main)
            stem = f"{synset}_{index}" if split == "train" else f"ILSVRC2012_val_{index + 1:08d}"
            pictures.append(
                Picture(
                    split=split,
                    file=Path("imagenet", split, synset, f"{stem}.JPEG"),
                    scene=fresh.take(f"imagenet-{split}", partial(draw_object_scene, main=main)),
                )
            )
    return TaskFiles(
        pictures=tuple(pictures),
        texts={Path("imagenet", "words.txt"): CLASS_NAMES},
        truth={"val": class_truth(p.file.parent.name for p in pictures if p.split == "val")},
    )


def _draw(files: Sequence[PictureFile], workers: int) -> None:
    for directory in {path.parent for _, path in files}:
        directory.mkdir(parents=True, exist_ok=True)
    if workers == 1 or len(files) < POOL_THRESHOLD:
        for file in files:
            _draw_one(file)
        return
    # Spawned, because the caller may have threads that a fork would freeze.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, end_with_parent, (os.getpid(),)) as pool:
        with without_interrupts():
            drawn = pool.map(_draw_one, files, chunksize=64)
        for _ in drawn:
            pass


def _draw_one(file: PictureFile) -> None:
    scene, path = file
    path.write_bytes(encode_picture(scene, path.suffix))


def encode_picture(scene: Scene, suffix: str) -> bytes:
    """The picture as a PNG where ``suffix`` is ".png", as a JPEG otherwise.

    It has ``scene.width`` x ``scene.height`` pixels.
    """
    buffer = io.BytesIO()
    how: dict[str, Any] = (
        {"format": "PNG"} if suffix == ".png" else {"format": "JPEG", "quality": JPEG_QUALITY}
    )
    render_picture(scene).save(buffer, **how)
    return buffer.getvalue()


def render_picture(scene: Scene) -> Image.Image:
    """The picture, RGB, ``scene.width`` x ``scene.height`` pixels."""
    size = (scene.width * SUPERSAMPLING, scene.height * SUPERSAMPLING)
    canvas = Image.new("RGB", size, BACKGROUND_VALUES[scene.background])
    for shape in scene.shapes:
        _draw_shape(canvas, shape)
    return canvas.reduce(SUPERSAMPLING)


def shape_map(scene: Scene) -> Image.Image:
    """Which shape every pixel of the picture shows: 0 for the background, n for the n-th shape (mode L)."""
    whole = Image.new("L", (scene.width * SUPERSAMPLING, scene.height * SUPERSAMPLING))
    for number, shape in enumerate(scene.shapes, start=1):
        mask, corner, _, _ = _outline(shape, whole.size)
        whole.paste(number, (*corner, corner[0] + mask.width, corner[1] + mask.height), mask)
    return whole.resize((scene.width, scene.height), Image.Resampling.NEAREST)


def _outline(
    shape: Shape, size: tuple[int, int]
) -> tuple[Image.Image, tuple[int, int], float, float]:
    """The shape as a square mask, where its upper left corner lies on a canvas of this size, its radius and centre in
    the mask."""
    cell_width, cell_height = size[0] / GRID, size[1] / GRID
    unit = min(cell_width, cell_height)
    center_x = (shape.column + 0.5) * cell_width + shape.shift[0] * unit
    center_y = (shape.row + 0.5) * cell_height + shape.shift[1] * unit
    radius = RADII[shape.size] * unit
    side = 2 * math.ceil(radius) + 1
    mask = Image.new("1", (side, side))
    center = side / 2
    if shape.kind == "circle":
        box = [center - radius, center - radius, center + radius, center + radius]
        ImageDraw.Draw(mask).ellipse(box, fill=1)
    else:
        points = [(center + x * radius, center + y * radius) for x, y in CORNERS[shape.kind]]
        ImageDraw.Draw(mask).polygon(points, fill=1)
    return mask, (round(center_x - center), round(center_y - center)), radius, center


def _draw_shape(canvas: Image.Image, shape: Shape) -> None:
    mask, corner, radius, center = _outline(shape, canvas.size)
    side = mask.width
    red, green, blue = COLOR_VALUES[shape.color]
    fill = Image.new("RGB", (side, side), (red, green, blue))
    draw, dark = ImageDraw.Draw(fill), (red * 2 // 5, green * 2 // 5, blue * 2 // 5)
    # Coarser on small shapes, or a resized picture would lose it.
    repeats = 4 if shape.size == "large" else 3
    period = side / repeats
    if shape.texture == "striped":
        for number in range(repeats):
            top = (number + 0.3) * period
            draw.rectangle([0, top, side, top + 0.45 * period], fill=dark)
    elif shape.texture == "dotted":
        dot = 0.27 * period
        for row, column in product(range(repeats), range(repeats + 1)):
            x, y = (column + 0.5 * (row % 2)) * period, (row + 0.5) * period
            draw.ellipse([x - dot, y - dot, x + dot, y + dot], fill=dark)
    if shape.letter is not None:
        scale = 0.5 * radius if shape.kind in ("circle", "square") else 0.36 * radius
        # A triangle is widest below its middle.
        middle = center + (0.28 * radius if shape.kind == "triangle" else 0.0)
        for (x0, y0), (x1, y1) in LETTER_STROKES[shape.letter]:
            start = (center + x0 * scale, middle + y0 * scale)
            end = (center + x1 * scale, middle + y1 * scale)
            draw.line([start, end], fill=(0, 0, 0), width=max(2, round(0.15 * radius)))
    canvas.paste(fill, corner, mask)
