"""The sample corpus on disk, in the raw layouts of COCO, Karpathy's split, ImageNet and JSONL text.

The downstream tasks, in layouts of their own, are in ``tasks.py``.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_vlmoe.config.errors import ConfigError, DataError
from megatron_vlmoe.sample_corpus.coco import coco_file, coco_id, write_caption_files
from megatron_vlmoe.sample_corpus.imagenet import class_names, synset_of
from megatron_vlmoe.sample_corpus.paragraphs import write_paragraph
from megatron_vlmoe.sample_corpus.render import render_jpeg, render_png
from megatron_vlmoe.sample_corpus.scene import Scene, Stream, sample_scene, split_of
from megatron_vlmoe.sample_corpus.tasks import make_tasks

MARKER = "corpus.json"
"""Written last; holds what the corpus was made with."""
FORMAT_VERSION = 3
PARAGRAPHS_PER_IMAGE = 2
POOL_THRESHOLD = 10_000
"""Fewer pictures than this are drawn faster than a process pool starts."""
README = """\
Sample corpus of generated pictures and texts: coloured shapes on a plain background.
Made by tools/make_sample_corpus.py with --num-images {num_images} --seed {seed}.

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

PictureFile = tuple[Scene, Path]
"""What to draw, and the file; the suffix says whether JPEG or PNG."""


@dataclass(frozen=True, kw_only=True)
class SampleCorpus:
    """What to make; equal values give equal bytes, however many workers."""

    output: Path
    num_images: int
    """Pictures with captions, and again as many without; a tenth of each is for validation."""
    seed: int = 0
    workers: int = 1

    def validate(self) -> None:
        """Raises ValueError on values that cannot work."""
        if self.num_images < 2:
            raise ConfigError(
                f"num_images must be at least 2 (one to train, one to validate), "
                f"got {self.num_images}"
            )
        if self.workers < 1:
            raise ConfigError(f"workers must be at least 1, got {self.workers}")

    def description(self) -> dict[str, int]:
        """What the marker file holds."""
        return {
            "format_version": FORMAT_VERSION,
            "num_images": self.num_images,
            "seed": self.seed,
        }


def make_sample_corpus(corpus: SampleCorpus) -> bool:
    """Writes the corpus beside ``output`` and renames it into place.

    Returns:
        False where ``output`` already holds exactly this corpus.

    Raises:
        ValueError: bad option, ``output`` holds something else, or it cannot be written.
    """
    corpus.validate()
    try:
        if _is_complete(corpus):
            return False
        with _staging_directory(corpus.output) as staging:
            _write_pictures_and_captions(corpus, staging)
            _write_texts(corpus, staging)
            readme = README.format(num_images=corpus.num_images, seed=corpus.seed)
            (staging / "README.txt").write_text(readme)
            (staging / MARKER).write_text(json.dumps(corpus.description()) + "\n")
    except OSError as error:
        where = error.filename or corpus.output
        raise DataError(f"cannot write {where}: {error.strerror or error}") from error
    return True


def _is_complete(corpus: SampleCorpus) -> bool:
    marker = corpus.output / MARKER
    if not corpus.output.exists() or (corpus.output.is_dir() and not any(corpus.output.iterdir())):
        return False
    if not corpus.output.is_dir():
        raise DataError(f"{corpus.output} is not a directory")
    if not marker.exists():
        raise DataError(f"{corpus.output} is not empty and holds no sample corpus")
    try:
        found = json.loads(marker.read_text())
    except ValueError as error:
        raise DataError(f"{marker} is not valid JSON: delete {corpus.output}") from error
    if found != corpus.description():
        raise DataError(
            f"{corpus.output} holds another sample corpus ({json.dumps(found)}, asked for "
            f"{json.dumps(corpus.description())}): delete it or choose another directory"
        )
    return True


@contextmanager
def _staging_directory(output: Path) -> Iterator[Path]:
    """A directory that becomes ``output`` on success and vanishes on failure."""
    output = output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
        # One sync of everything instead of one per picture.
        os.sync()
        staging.rename(output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_pictures_and_captions(corpus: SampleCorpus, root: Path) -> None:
    files: list[PictureFile] = []
    truth: list[dict[str, Any]] = []
    coco: list[tuple[int, Path, Scene]] = []
    for index in range(corpus.num_images):
        scene = sample_scene(corpus.seed, "pair", index)
        file = coco_file(index)
        coco.append((index, file, scene))
        files.append((scene, root / file))
        truth.append(_truth("pair", index, file, scene) | {"image_id": coco_id(index)})
    for index in range(corpus.num_images):
        scene = sample_scene(corpus.seed, "image", index)
        synset = synset_of(scene.shapes[0].color, scene.shapes[0].kind)
        file = Path("images", split_of(index), synset, f"{synset}_{index}.JPEG")
        files.append((scene, root / file))
        truth.append(_truth("image", index, file, scene) | {"class": synset})
    for split in ("train", "val"):
        (root / "images" / split).mkdir(parents=True)
    tasks = make_tasks(corpus.seed, corpus.num_images, [scene for scene, _ in files])
    files += [(picture.scene, root / "tasks" / picture.file) for picture in tasks.pictures]
    _draw(files, corpus.workers)
    write_caption_files(root / "coco", coco, corpus.seed)
    (root / "images" / "words.txt").write_text(class_names())
    _write_jsonl(root / "scenes.jsonl", truth)
    for path, text in tasks.texts.items():
        (root / "tasks" / path).parent.mkdir(parents=True, exist_ok=True)
        (root / "tasks" / path).write_text(text)


def _draw(files: list[PictureFile], workers: int) -> None:
    for directory in {path.parent for _, path in files}:
        directory.mkdir(parents=True, exist_ok=True)
    if workers == 1 or len(files) < POOL_THRESHOLD:
        for file in files:
            _draw_one(file)
        return
    # Spawned, because the caller may have threads that a fork would freeze.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        for _ in pool.map(_draw_one, files, chunksize=64):
            pass


def _draw_one(file: PictureFile) -> None:
    scene, path = file
    path.write_bytes(render_png(scene) if path.suffix == ".png" else render_jpeg(scene))


def _truth(stream: Stream, index: int, file: Path, scene: Scene) -> dict[str, Any]:
    return {
        "file": file.as_posix(),
        "stream": stream,
        "index": index,
        "split": split_of(index),
        "scene": asdict(scene),
    }


def _write_texts(corpus: SampleCorpus, root: Path) -> None:
    indices = range(PARAGRAPHS_PER_IMAGE * corpus.num_images)
    for split in ("train", "val"):
        chosen = (i for i in indices if split_of(i) == split)
        _write_jsonl(
            root / "text" / f"{split}.jsonl",
            ({"text": write_paragraph(corpus.seed, i)} for i in chosen),
        )


def _write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
