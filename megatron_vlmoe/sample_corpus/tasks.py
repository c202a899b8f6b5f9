"""The five downstream tasks, each in the raw layout of its real counterpart, below ``tasks/``.

| Task      | Raw folder       | Layout                                                              |
|-----------|------------------|---------------------------------------------------------------------|
| VQA v2    | tasks/vqa        | question and annotation files, train2014/ val2014/ test2015/        |
| NLVR2     | tasks/nlvr2      | data/*.json, images/train/N/ images/dev/ images/test1/              |
| Flickr30K | tasks/flickr30k  | dataset_flickr30k.json, flickr30k-images/                           |
| ImageNet  | tasks/imagenet   | train/CLASS/ val/CLASS/                                             |
| MNLI      | tasks/mnli       | train.tsv, dev_matched.tsv, dev_mismatched.tsv                      |

Beside them ``truth.json``: by task and evaluation split the number of samples, how often each label
occurs, and what guessing scores; and ``scenes.jsonl``: what each picture shows. Every task has
scenes of its own, none of which looks like one that the corpus trains on elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from megatron_vlmoe.sample_corpus.flickr30k import make_flickr30k
from megatron_vlmoe.sample_corpus.imagenet import make_imagenet
from megatron_vlmoe.sample_corpus.mnli import make_mnli
from megatron_vlmoe.sample_corpus.nlvr2 import make_nlvr2
from megatron_vlmoe.sample_corpus.scene import Scene
from megatron_vlmoe.sample_corpus.task_files import FreshScenes, Picture, TaskFiles, json_text
from megatron_vlmoe.sample_corpus.vqa import make_vqa


def make_tasks(seed: int, num_images: int, known: Iterable[Scene]) -> TaskFiles:
    """Pictures and files of all tasks.

    Args:
        seed: of the corpus.
        num_images: of the corpus; the tasks grow with it.
        known: what the pictures for pretraining show.
    """
    fresh = FreshScenes(seed, known)
    tasks = {
        "vqa": make_vqa(fresh, seed, num_images),
        "nlvr2": make_nlvr2(fresh, seed, num_images),
        "flickr30k": make_flickr30k(fresh, seed, num_images),
        "imagenet": make_imagenet(fresh, seed, num_images),
        "mnli": make_mnli(seed, num_images),
    }
    texts: dict[Path, str] = {}
    for task in tasks.values():
        texts |= task.texts
    truth = {name: task.truth for name, task in tasks.items()}
    texts[Path("truth.json")] = json.dumps(truth, indent=1) + "\n"
    texts[Path("scenes.jsonl")] = "".join(
        _scene_line(name, picture) for name, task in tasks.items() for picture in task.pictures
    )
    pictures = tuple(picture for task in tasks.values() for picture in task.pictures)
    return TaskFiles(pictures=pictures, texts=texts, truth=truth)


def _scene_line(task: str, picture: Picture) -> str:
    return json_text(
        {
            "file": picture.file.as_posix(),
            "task": task,
            "split": picture.split,
            "scene": asdict(picture.scene),
        }
    )
