"""The sample corpus on disk, in the raw layouts of COCO, Karpathy's split, ImageNet, text and tasks."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

from megatron_vlmoe.config.errors import ConfigError, DataError
from megatron_vlmoe.sample_corpus.captions import coco_file, coco_id, coco_texts, make_flickr30k
from megatron_vlmoe.sample_corpus.imagenet import CLASS_NAMES, make_imagenet, synset_of
from megatron_vlmoe.sample_corpus.mnli import make_mnli
from megatron_vlmoe.sample_corpus.nlvr2 import make_nlvr2
from megatron_vlmoe.sample_corpus.paragraphs import write_paragraph
from megatron_vlmoe.sample_corpus.render import encode_picture
from megatron_vlmoe.sample_corpus.scene import Scene, Stream, sample_scene, split_of
from megatron_vlmoe.sample_corpus.task_files import FreshScenes, json_text
from megatron_vlmoe.sample_corpus.vqa import make_vqa

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
            _write_files(corpus, staging)
            (staging / MARKER).write_text(json_text(corpus.description()))
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


def _write_files(corpus: SampleCorpus, root: Path) -> None:
    seed, num_images = corpus.seed, corpus.num_images
    pictures, texts = pretraining_files(seed, num_images)
    task_pictures, task_texts = task_files(seed, num_images, [scene for scene, _ in pictures])
    readme = README.format(num_images=num_images, seed=seed)
    _draw([(scene, root / file) for scene, file in pictures + task_pictures], corpus.workers)
    for file, text in {**texts, **task_texts, Path("README.txt"): readme}.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(text)


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


def _draw(files: Sequence[PictureFile], workers: int) -> None:
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
    path.write_bytes(encode_picture(scene, path.suffix))
