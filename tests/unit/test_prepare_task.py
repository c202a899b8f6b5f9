"""Downstream tasks from hand-made raw folders: rows, targets, splits, bad input, and opening."""

import json
import os
import pickle
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from PIL import Image
from test_preprocess import ROOT, encoded, files_of, picture, rejects_of, tool, write_tokenizer

from megatron_vlmoe.data.errors import DataError
from megatron_vlmoe.data.indexed import IndexedReader
from megatron_vlmoe.data.manifest import (
    FileRecord,
    check_dataset,
    file_sha256,
    load_manifest,
    write_manifest,
)
from megatron_vlmoe.data.prepare_task import sample_chunks
from megatron_vlmoe.data.readers.records import ImageFile
from megatron_vlmoe.data.readers.tasks.records import TaskSample, chosen
from megatron_vlmoe.data.task_dataset import Labels, TaskDataset, TaskRow, load_labels
from megatron_vlmoe.data.task_labels import write_labels
from megatron_vlmoe.data.task_samples import SamplesWriter
from megatron_vlmoe.tokenizers.text import TextTokenizer

main = tool("prepare_task")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "t.model")


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    (tmp_path / "raw").mkdir()
    return tmp_path / "raw"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out" / "p"


@pytest.fixture
def prepare(raw: Path, out: Path, model: str) -> Callable[..., int]:
    """Runs the tool on ``raw``."""

    def run(task: str, *options: str) -> int:
        words = ["--task", task, "--raw", str(raw), "--output-prefix", str(out)]
        words += [] if task == "imagenet" else ["--tokenizer-model", model]
        return main([*words, *options])

    return run


def put(path: Path, content: object) -> None:
    """Writes a file: bytes, text, or anything else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))


def rows(data: TaskDataset) -> list[TaskRow]:
    return [data.row(i) for i in range(len(data))]


def ids(data: TaskDataset) -> list[str]:
    return [row.id for row in rows(data)]


def opened(out: Path, split: str, task: str, model: str | None = None) -> TaskDataset:
    """The split, with all checksums verified and all tokens compared with the raw texts."""
    check_dataset(f"{out}_{split}", task, checksums=True)
    fingerprint = TextTokenizer(model).fingerprint if model else None
    data = TaskDataset.open(f"{out}_{split}", task, fingerprint)
    if model:
        encode = sentencepiece.SentencePieceProcessor(model_file=model).encode
        texts = {text: raw for row in rows(data) for text, raw in zip(row.texts, row.raw)}
        assert sorted(texts) == list(range(data.num_texts))
        for text, words in texts.items():
            assert data.tokens(text).tolist() == encode(words)
    used = list(dict.fromkeys(image for row in rows(data) for image in row.images))
    assert used == list(range(data.num_images))  # each once, in order of first use
    return data


def stored_images(data: TaskDataset) -> list[bytes]:
    return [data.image_bytes(i).tobytes() for i in range(data.num_images)]


def failed(capfd: pytest.CaptureFixture[str]) -> str:
    """The one error line of a run that failed."""
    (line,) = (e for e in capfd.readouterr().err.splitlines() if not e.endswith(" classes"))
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


# VQA ---------------------------------------------------------------------------------------------


def question(number: int, image: int, text: object = "is it red") -> dict[str, Any]:
    return {"image_id": image, "question": text, "question_id": number}


def annotation(number: int, main_answer: str, answers: dict[str, int]) -> dict[str, Any]:
    said = [{"answer": text} for text, count in answers.items() for _ in range(count)]
    return {"question_id": number, "multiple_choice_answer": main_answer, "answers": said}


def vqa_image(raw: Path, part: str, image: int) -> bytes:
    data = encoded(picture(image))
    put(raw / part / f"COCO_{part}_{image:012d}.jpg", data)
    return data


# Main answers, with the least count 2: "yes" 3 times (once spelled otherwise), "2" twice (once
# as a word), "star" twice, "blue" once; by first appearance 2, yes, star.
TRAIN_QUESTIONS = [
    (question(11, 1, "how many stars"), annotation(11, "two", {"2": 2, "two": 7, "3": 1})),
    (question(12, 1), annotation(12, "Yes.", {"yes": 3, "no": 6, "star": 1})),
    (question(21, 2), annotation(21, "blue", {"blue": 10})),  # no class of these answers
    (question(13, 1, " a star "), annotation(13, "yes", {"no": 5, "star": 1, "yes": 4})),
]
VAL_QUESTIONS = [
    (question(31, 3), annotation(31, "2", {"2": 9, "yes": 1})),
    (question(41, 4), annotation(41, "star", {"yes": 2, "star": 8})),
    (question(42, 4), annotation(42, "star", {"Star": 10})),  # raw answers are not normalised
    (question(51, 5), annotation(51, "yes", {"yes": 10})),
]
EXPECTED_TARGETS = {
    "11": {0: 0.6},
    "12": {1: 0.9, 2: 0.3},
    "13": {1: 1.0, 2: 0.3},
    "31": {0: 1.0, 1: 0.3},
    "41": {1: 0.6, 2: 1.0},
    "42": {},
    "51": {1: 1.0},
}


@pytest.fixture
def vqa(raw: Path) -> dict[tuple[str, int], bytes]:
    """Raw VQAv2: annotations in a subfolder, questions beside the images; the images by name."""
    for part, found in (("train2014", TRAIN_QUESTIONS), ("val2014", VAL_QUESTIONS)):
        write_questions(raw, part, [q for q, _ in found])
        notes = {"annotations": [a for _, a in found]}
        put(raw / "annotations" / f"v2_mscoco_{part}_annotations.json", notes)
    write_questions(raw, "test2015", [question(61, 6), question(71, 7), question(62, 6)])
    write_questions(raw, "test-dev2015", [question(71, 7)])
    names = {1: "train2014", 2: "train2014", 3: "val2014", 4: "val2014", 5: "val2014"}
    names |= {6: "test2015", 7: "test2015"}
    return {(part, image): vqa_image(raw, part, image) for image, part in names.items()}


def write_questions(raw: Path, part: str, questions: list[dict[str, Any]]) -> None:
    name = f"v2_OpenEnded_mscoco_{part}_questions.json"
    put(raw / name, {"questions": questions})


VQA_OPTIONS = ("--min-answer-count", "2", "--num-val-images", "1")


def test_vqa_rows_targets_and_splits(
    vqa: dict[tuple[str, int], bytes],
    prepare: Callable[..., int],
    out: Path,
    model: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert prepare("vqa", *VQA_OPTIONS) == 0
    messages = capfd.readouterr().err
    labels = load_labels(str(out))
    assert labels == Labels("vqa", ("2", "yes", "star"))
    data = {s: opened(out, s, "vqa", model) for s in ("train", "val", "test", "test-dev")}
    assert ids(data["test"]) == ["61", "71", "62"] and ids(data["test-dev"]) == ["71"]
    (held_out,) = chosen([3, 4, 5], 1, 0)
    val = [str(q["question_id"]) for q, _ in VAL_QUESTIONS if q["image_id"] == held_out]
    rest = ["11", "12", "13", "31", "41", "51"]  # 42 has no class: left out unless held out
    assert ids(data["val"]) == val
    assert ids(data["train"]) == [number for number in rest if number not in val]
    answers = {str(a["question_id"]): a for _, a in (*TRAIN_QUESTIONS, *VAL_QUESTIONS)}
    for row in (*rows(data["train"]), *rows(data["val"])):
        targets = dict(zip(row.labels, np.float32(row.scores).tolist(), strict=True))
        assert targets == {k: float(np.float32(v)) for k, v in EXPECTED_TARGETS[row.id].items()}
        assert list(row.answers) == [a["answer"] for a in answers[row.id]["answers"]]
    first, second, third = rows(data["test"])
    assert first == TaskRow("61", (0,), (0,), ("is it red",))
    assert (second.images, third.images, third.texts) == ((1,), (0,), (2,))
    assert stored_images(data["test"]) == [vqa["test2015", 6], vqa["test2015", 7]]
    assert stored_images(data["train"])[0] == vqa["train2014", 1]
    assert data["train"].row(2).raw == ("a star",)
    for one in data.values():
        assert one.labels_sha256 == labels.sha256
    manifest = data["train"].manifest
    omitted = 1 + (held_out != 4)
    assert manifest.omitted == {"no answer in the vocabulary": omitted}
    assert f"vqa train: {omitted} samples left out: no answer in the vocabulary\n" in messages
    assert manifest.samples == len(data["train"]) and manifest.rejects == 0
    assert manifest.documents == data["train"].num_images
    assert manifest.tokens == int(data["train"].text_lengths().sum())


def test_vqa_holds_out_questions_without_a_class(
    vqa: dict[tuple[str, int], bytes], prepare: Callable[..., int], out: Path, model: str
) -> None:
    seed = next(seed for seed in range(50) if chosen([3, 4, 5], 1, seed) == {4})
    assert prepare("vqa", *VQA_OPTIONS, "--seed", str(seed), "--splits", "val", "train") == 0
    val = opened(out, "val", "vqa", model)
    assert [(row.id, row.labels) for row in rows(val)] == [("41", (1, 2)), ("42", ())]
    assert ids(opened(out, "train", "vqa", model)) == ["11", "12", "13", "31", "51"]
    assert not Path(f"{out}_test.json").exists()


def test_at_most_half_of_the_val_images_are_held_out(
    vqa: dict[tuple[str, int], bytes], prepare: Callable[..., int], out: Path, model: str
) -> None:
    options = ("--min-answer-count", "2", "--splits", "val")  # 1,000 of 3 images
    assert prepare("vqa", *options) == 0
    assert opened(out, "val", "vqa", model).num_images == 1


def test_choice_depends_on_nothing_but_seed_and_items() -> None:
    script = (
        "from megatron_vlmoe.data.readers.tasks.records import chosen\n"
        "print(sorted(chosen(set(map(str, range(99))), 9, 1)), sorted(chosen(range(99), 9, 1)))"
    )
    texts, numbers = chosen(map(str, range(98, -1, -1)), 9, 1), chosen(range(98, -1, -1), 9, 1)
    assert texts == {str(n) for n in numbers} and len(numbers) == 9
    assert numbers != chosen(range(99), 9, 2)
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    command = [sys.executable, "-c", script]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert found.stdout.strip() == f"{sorted(texts)} {sorted(numbers)}"
    counts = Counter(n for seed in range(200) for n in chosen(range(10), 5, seed))
    assert min(counts.values()) > 60  # 100 on average, standard deviation 7


def test_bad_vqa_records(
    vqa: dict[tuple[str, int], bytes],
    raw: Path,
    prepare: Callable[..., int],
    out: Path,
    model: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    bad = [
        question(81, 1, "?\ud800"),
        question(82, 1, " "),
        question(83, 1, None),
        question(84, 99),
        question(85, 1),
        {"question": "x", "question_id": 86},
    ]
    write_questions(raw, "train2014", [*bad, *(q for q, _ in TRAIN_QUESTIONS)])
    notes = [
        annotation(q["question_id"], "yes", {"yes": 10}) for q in bad if q["question_id"] != 85
    ]
    notes.append({"question_id": 87, "multiple_choice_answer": "yes", "answers": [{}]})
    notes += [a for _, a in TRAIN_QUESTIONS]
    path = raw / "annotations" / "v2_mscoco_train2014_annotations.json"
    put(path, {"annotations": notes})
    questions = raw / "v2_OpenEnded_mscoco_train2014_questions.json"
    assert prepare("vqa", *VQA_OPTIONS, "--splits", "train") == 1
    where = f"{path}: annotation entry 5: "
    assert failed(capfd) == f"{where}answers are not a list of objects with an answer"
    assert files_of(out.parent) == []
    missing = raw / "train2014" / f"COCO_train2014_{99:012d}.jpg"
    assert prepare("vqa", *VQA_OPTIONS, "--splits", "train", "--on-error", "skip") == 0
    assert rejects_of(Path(f"{out}_train")) == [
        ("annotation entry 5", "answers are not a list of objects with an answer"),
        ("question 81", "invalid Unicode"),
        ("question 82", "empty text"),
        ("question 83", "text is not a string"),
        ("question 84", f"no such image file: {missing}"),
        ("question 85", f"no annotation in {path}"),
        ("question entry 5", "no whole question_id and image_id"),
        ("annotation of question 86", f"no such question in {questions}"),
    ]
    assert ids(opened(out, "train", "vqa", model))[:3] == ["11", "12", "13"]
    assert load_manifest(f"{out}_train").rejects == 8
    assert "8 rejected" in capfd.readouterr().err


def test_bad_image_takes_all_its_samples(
    vqa: dict[tuple[str, int], bytes],
    raw: Path,
    prepare: Callable[..., int],
    out: Path,
    model: str,
) -> None:
    path = raw / "test2015" / f"COCO_test2015_{6:012d}.jpg"
    path.write_bytes(path.read_bytes()[:300])
    assert prepare("vqa", *VQA_OPTIONS, "--splits", "test", "--on-error", "skip") == 0
    assert ids(opened(out, "test", "vqa", model)) == ["71"]
    found = rejects_of(Path(f"{out}_test"))
    assert [record for record, _ in found] == ["question 61", "question 62"]
    assert all(reason.startswith("corrupt image") and str(path) in reason for _, reason in found)


def test_missing_vqa_files_are_told_before_any_work(
    vqa: dict[tuple[str, int], bytes],
    raw: Path,
    prepare: Callable[..., int],
    out: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (raw / "v2_OpenEnded_mscoco_test2015_questions.json").unlink()
    assert prepare("vqa", *VQA_OPTIONS, "--splits", "train", "test") == 1
    assert "v2_OpenEnded_mscoco_test2015_questions.json: no such file" in failed(capfd)
    (raw / "train2014").rename(raw / "train")
    assert prepare("vqa", *VQA_OPTIONS) == 1
    assert failed(capfd).startswith(f"{raw / 'train2014'}: no such folder")
    (raw / "train").rename(raw / "train2014")
    assert prepare("vqa") == 1
    assert failed(capfd).endswith("no answer occurs 9 times: lower --min-answer-count")
    assert prepare("vqa", "--splits", "dev") == 1
    assert "no split 'dev': one of train, val, test, test-dev" in failed(capfd)
    assert not out.parent.exists()


# NLVR2 -------------------------------------------------------------------------------------------


def nlvr2_image(folder: Path, stem: str) -> list[bytes]:
    found = [encoded(picture(len(stem) + side), "PNG") for side in (0, 1)]
    for side, data in enumerate(found):
        put(folder / f"{stem}-img{side}.png", data)
    return found


def sentence(identifier: str, label: object, **more: Any) -> str:
    row = {"sentence": "two stars", "label": label, "identifier": identifier, **more}
    return json.dumps(row) + "\n"


@pytest.fixture
def nlvr2(raw: Path) -> list[bytes]:
    """Raw NLVR2; the two images of the pair that train and dev share in name."""
    train = [
        sentence("train-1-0-0", "True", directory=7),
        sentence("train-1-0-1", "False", directory=7),
        sentence("train-22-3-1", "True", directory=7, query="q"),
    ]
    put(raw / "data" / "train.json", "".join(train))
    put(raw / "data" / "dev.json", sentence("dev-1-0-0", "False"))
    put(raw / "data" / "test1.json", sentence("test1-1-0-0", "True") + "\n")
    found = nlvr2_image(raw / "images" / "train" / "7", "train-1-0")
    nlvr2_image(raw / "images" / "train" / "7", "train-22-3")
    nlvr2_image(raw / "images" / "dev", "dev-1-0")
    nlvr2_image(raw / "images" / "test1", "test1-1-0")
    return found


def test_nlvr2(
    nlvr2: list[bytes], raw: Path, prepare: Callable[..., int], out: Path, model: str
) -> None:
    assert prepare("nlvr2") == 0
    assert load_labels(str(out)).labels == ("False", "True")
    data = opened(out, "train", "nlvr2", model)
    first = TaskRow("train-1-0-0", (0, 1), (0,), ("two stars",), (1,), (1.0,))
    second = replace(first, id="train-1-0-1", texts=(1,), labels=(0,))
    third = replace(first, id="train-22-3-1", images=(2, 3), texts=(2,))
    assert rows(data) == [first, second, third]
    assert stored_images(data)[:2] == nlvr2  # left, right
    assert ids(opened(out, "dev", "nlvr2", model)) == ["dev-1-0-0"]
    assert ids(opened(out, "test", "nlvr2", model)) == ["test1-1-0-0"]
    # The layout of the repository, with the images unpacked beside it.
    for name in ("train", "dev", "test1"):
        (raw / "images" / name).rename(raw / name)
    (raw / "nlvr2").mkdir()
    (raw / "data").rename(raw / "nlvr2" / "data")
    before = Path(f"{out}_train_samples.arrow").read_bytes()
    assert prepare("nlvr2", "--splits", "train", "--workers", "2") == 0
    assert Path(f"{out}_train_samples.arrow").read_bytes() == before


def test_bad_nlvr2_records(
    nlvr2: list[bytes],
    raw: Path,
    prepare: Callable[..., int],
    out: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path, images = raw / "data" / "dev.json", raw / "images" / "dev"
    (images / "dev-1-0-img1.png").rename(images / "dev-2-0-img0.png")
    nlvr2_image(images, "dev-3-0")
    lines = [
        sentence("dev-3-0-0", "True"),
        '{"sentence": \n',
        sentence("dev-3-0-1", "maybe"),
        sentence("dev-3-0-2", None),
        sentence("dev-1-0-0", "True"),  # without its right image
        sentence("dev-2-0-0", "True"),
        sentence("dev", "True"),
        sentence("dev-3-0-3", "False"),
    ]
    put(path, "".join(lines))
    assert prepare("nlvr2", "--splits", "dev") == 1
    assert failed(capfd).startswith(f"{path}: line 2: invalid JSON")
    put(path, "".join([*lines[:1], *lines[2:]]))
    assert prepare("nlvr2", "--splits", "dev", "--workers", "2") == 1
    expected = f"{path}: line 2 (dev-3-0-1): label 'maybe' is neither True nor False"
    assert failed(capfd) == expected
    assert files_of(out.parent) == []
    assert prepare("nlvr2", "--splits", "dev", "--on-error", "skip") == 0
    assert rejects_of(Path(f"{out}_dev")) == [
        ("line 2 (dev-3-0-1)", "label 'maybe' is neither True nor False"),
        ("line 3 (dev-3-0-2)", "label None is neither True nor False"),
        ("line 4 (dev-1-0-0)", f"no such image file: {images / 'dev-1-0-img1.png'}"),
        ("line 5 (dev-2-0-0)", f"no such image file: {images / 'dev-2-0-img1.png'}"),
        ("line 6", "no identifier of the form split-set-pair-sentence"),
    ]
    data = TaskDataset.open(f"{out}_dev", "nlvr2", None)
    assert [(row.id, row.images) for row in rows(data)] == [
        ("dev-3-0-0", (0, 1)),
        ("dev-3-0-3", (0, 1)),
    ]
    assert data.num_images == 2  # the good left image of a bad pair is not stored
    (raw / "images" / "test1").rename(raw / "images" / "test")
    capfd.readouterr()
    assert prepare("nlvr2") == 1
    assert failed(capfd).startswith(f"{raw / 'images' / 'test1'}: no such folder")


# Retrieval ---------------------------------------------------------------------------------------


def karpathy(split: str, name: str, captions: list[str], **more: str) -> dict[str, Any]:
    entry = {"filename": name, "split": split, "sentences": [{"raw": c} for c in captions]}
    return entry | more


def test_retrieval(raw: Path, prepare: Callable[..., int], out: Path, model: str) -> None:
    images = [
        karpathy("test", "c.jpg", ["a star"]),
        karpathy("train", "a.jpg", ["a red circle", "two", " ", "a square "]),
        karpathy("val", "d.jpg", ["the left"]),
        karpathy("restval", "b.jpg", ["two"]),
    ]
    put(raw / "dataset_flickr30k.json", {"images": images})
    data = {n: encoded(picture(i)) for i, n in enumerate("abcd")}
    for name, content in data.items():
        put(raw / "flickr30k-images" / f"{name}.jpg", content)
    assert prepare("retrieval") == 1  # the blank caption
    assert prepare("retrieval", "--on-error", "skip") == 0
    expected = [("image 1 (a.jpg), caption 2", "empty caption")]
    assert rejects_of(Path(f"{out}_train")) == expected
    train = opened(out, "train", "retrieval", model)
    assert rows(train) == [
        TaskRow("a.jpg#0", (0,), (0,), ("a red circle",)),
        TaskRow("a.jpg#1", (0,), (1,), ("two",)),
        TaskRow("a.jpg#3", (0,), (2,), ("a square",)),
        TaskRow("b.jpg#0", (1,), (3,), ("two",)),
    ]
    assert train.image_of_text().tolist() == [0, 0, 0, 1]
    assert train.image_of_text().dtype == np.int64
    assert stored_images(train) == [data["a"], data["b"]]
    captions = IndexedReader(f"{out}_train_text")
    assert captions.num_documents == 2 and len(captions.document(0)) == 3
    assert ids(opened(out, "test", "retrieval", model)) == ["c.jpg#0"]
    assert ids(opened(out, "val", "retrieval", model)) == ["d.jpg#0"]
    assert train.labels_sha256 is None and not Path(f"{out}_labels.json").exists()


def test_retrieval_on_coco(
    raw: Path,
    prepare: Callable[..., int],
    out: Path,
    model: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    images = [
        karpathy("test", "x.jpg", ["a star"], filepath="val2014"),
        karpathy("test", "y.jpg", [" ", ""], filepath="val2014"),
    ]
    put(raw / "dataset_coco.json", {"images": images})
    put(raw / "val2014" / "x.jpg", encoded(picture(0)))
    put(raw / "val2014" / "y.jpg", encoded(picture(1)))
    assert prepare("retrieval", "--splits", "test", "--on-error", "skip") == 0
    data = opened(out, "test", "retrieval", model)
    assert (data.num_images, data.num_texts) == (1, 1)  # y.jpg has no usable caption
    capfd.readouterr()
    assert prepare("retrieval") == 1
    where = raw / "dataset_coco.json"
    assert failed(capfd) == f"{where}: no image of split train, restval; it has test"
    put(raw / "dataset_flickr30k.json", {"images": []})
    assert prepare("retrieval") == 1
    assert "choose one with --annotations" in failed(capfd)
    option = ("--annotations", str(where), "--splits", "test", "--on-error", "skip")
    assert prepare("retrieval", *option) == 0
    where.unlink()
    (raw / "dataset_flickr30k.json").unlink()
    capfd.readouterr()
    assert prepare("retrieval") == 1
    assert "no dataset_coco.json or dataset_flickr30k.json in it" in failed(capfd)


# ImageNet ----------------------------------------------------------------------------------------


@pytest.fixture
def imagenet(raw: Path) -> dict[str, bytes]:
    """Raw ImageNet of two classes, one of them a tar; the images by name."""
    names = [f"train/n02/{c}.JPEG" for c in "ba"] + [f"val/n0{i}/v{i}.JPEG" for i in (2, 1)]
    data = {name: encoded(picture(i)) for i, name in enumerate(names)}
    for name, content in data.items():
        put(raw / name, content)
    data["train/n01/c.JPEG"] = encoded(picture(9))
    put(raw / "c.JPEG", data["train/n01/c.JPEG"])
    with tarfile.open(raw / "train" / "n01.tar", "w") as archive:
        archive.add(raw / "c.JPEG", "c.JPEG")
    put(raw / "words.txt", "n02\tcat, tom\nn09\tdog\n")
    return data


def test_imagenet(
    imagenet: dict[str, bytes], raw: Path, prepare: Callable[..., int], out: Path
) -> None:
    assert prepare("imagenet", "--workers", "2") == 0
    assert load_labels(str(out)) == Labels("imagenet", ("n01", "n02"), ("n01", "cat, tom"))
    train, val = (opened(out, split, "imagenet") for split in ("train", "val"))
    assert rows(train) == [
        TaskRow("n01/c.JPEG", (0,), labels=(0,), scores=(1.0,)),
        TaskRow("n02/a.JPEG", (1,), labels=(1,), scores=(1.0,)),
        TaskRow("n02/b.JPEG", (2,), labels=(1,), scores=(1.0,)),
    ]
    assert [(row.id, row.labels) for row in rows(val)] == [
        ("n01/v1.JPEG", (0,)),
        ("n02/v2.JPEG", (1,)),
    ]
    assert stored_images(train) == [imagenet[f"train/{row.id}"] for row in rows(train)]
    assert (train.num_texts, train.manifest.tokens, train.manifest.documents) == (0, 0, 3)
    # Of no account for a task without text.
    assert len(TaskDataset.open(f"{out}_val", "imagenet", "any")) == 2
    assert not Path(f"{out}_val_text.bin").exists()
    with pytest.raises(ValueError, match="no captions"):
        train.image_of_text()


def test_flat_imagenet_val(
    imagenet: dict[str, bytes],
    raw: Path,
    prepare: Callable[..., int],
    out: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for i in (1, 2):
        (raw / "val" / f"n0{i}" / f"v{i}.JPEG").rename(raw / "val" / f"v{i}.JPEG")
        (raw / "val" / f"n0{i}").rmdir()
    assert prepare("imagenet") == 1
    assert failed(capfd).endswith("images without folders need --val-labels")
    table = raw / "labels"
    for content, expected in (
        ("n02\nn01\n", [("v1.JPEG", (1,)), ("v2.JPEG", (0,))]),
        ("ImageId,PredictionString\nv2,n02 1 2 3 4\nv1,n01 1 2 3 4 n01 5 6 7 8\n",
         [("v1.JPEG", (0,)), ("v2.JPEG", (1,))]),
    ):  # fmt: skip
        put(table, content)
        assert prepare("imagenet", "--val-labels", str(table), "--splits", "val") == 0
        found = [(row.id, row.labels) for row in rows(opened(out, "val", "imagenet"))]
        assert found == expected
    capfd.readouterr()
    for content, message in (
        ("n02\n", f"{table}: 1 classes for 2 images in {raw / 'val'}"),
        ("490\n361\n", "class numbers of the development kit"),
        ("n02\nn05\n", f"{raw / 'val'}: v2.JPEG: class n05 is not in {raw / 'train'}"),
        ("ImageId,PredictionString\nv1,n01 1\n", f"v2.JPEG: not in {table}"),
        ("", f"{table}: empty file"),
    ):
        put(table, content)
        assert prepare("imagenet", "--val-labels", str(table), "--splits", "val") == 1
        assert message in failed(capfd)


def test_bad_imagenet_folders(
    imagenet: dict[str, bytes],
    raw: Path,
    prepare: Callable[..., int],
    out: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (raw / "val" / "n03").mkdir()
    assert prepare("imagenet", "--splits", "val") == 1
    assert failed(capfd) == f"{raw / 'val' / 'n03'}: class n03 is not in {raw / 'train'}"
    assert prepare("imagenet", "--splits", "val", "--on-error", "skip") == 0
    assert load_manifest(f"{out}_val").rejects == 1
    capfd.readouterr()
    (raw / "train" / "n03").mkdir()
    assert prepare("imagenet", "--splits", "train") == 1
    assert failed(capfd) == f"{raw / 'train' / 'n03'}: no image in it"
    assert prepare("imagenet", "--val-fraction", "0.5") == 1
    assert "must not be given" in failed(capfd)
    put(raw / "other.txt", "n77 bird\n")
    assert prepare("imagenet", "--words", str(raw / "other.txt")) == 1
    assert "names none of the 3 classes" in failed(capfd)
    (raw / "train").rename(raw / "old")
    assert prepare("imagenet") == 1
    assert failed(capfd) == f"{raw / 'train'}: no such folder"


def test_held_out_share_of_each_class(
    raw: Path, prepare: Callable[..., int], out: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for wnid, count in (("n1", 10), ("n2", 1), ("n3", 4)):
        for i in range(count):
            put(raw / wnid / f"{i}.JPEG", encoded(picture(i, 8, 8)))
    assert prepare("imagenet") == 1
    assert "--val-fraction holds images of train out" in failed(capfd)
    assert prepare("imagenet", "--val-fraction", "0.3") == 0
    train, val = (ids(opened(out, split, "imagenet")) for split in ("train", "val"))
    assert not set(train) & set(val) and len(train) + len(val) == 15
    assert Counter(name[:2] for name in val) == {"n1": 3, "n3": 1}  # 3, 0.3 and 1.2 rounded
    before = val
    assert prepare("imagenet", "--val-fraction", "0.3", "--seed", "5", "--splits", "val") == 0
    assert ids(opened(out, "val", "imagenet")) != before


# MNLI --------------------------------------------------------------------------------------------


def tsv(*lines: str) -> str:
    return "".join("\t".join(line.split("|")) + "\n" for line in lines)


HEADER = "index|genre|sentence1|sentence2|label1|gold_label"


def test_mnli(
    raw: Path,
    prepare: Callable[..., int],
    out: Path,
    model: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    train = [
        "0|g|a red circle|two|x|neutral",
        '1|g|the "star|left|x|-',
        '2|g|the "star|left"|x|contradiction',
        "3|g|under|two|entailment|entailment",
    ]
    put(raw / "train.tsv", tsv(HEADER, *train))
    put(raw / "dev_matched.tsv", tsv(HEADER, train[3]).replace("\n", "\r\n"))
    put(raw / "dev_mismatched.tsv", tsv(HEADER, train[0]))
    put(raw / "test_matched.tsv", tsv("genre|sentence1|sentence2", "g|two|star"))
    put(raw / "diagnostic.tsv", "x")
    assert prepare("mnli") == 0
    assert "mnli train: 1 samples left out: gold_label is -" in capfd.readouterr().err
    assert load_labels(str(out)).labels == ("entailment", "neutral", "contradiction")
    data = opened(out, "train", "mnli", model)
    assert rows(data) == [
        TaskRow("0", (), (0, 1), ("a red circle", "two"), (1,), (1.0,)),
        TaskRow("2", (), (2, 3), ('the "star', 'left"'), (2,), (1.0,)),
        TaskRow("3", (), (4, 5), ("under", "two"), (0,), (1.0,)),
    ]
    texts = IndexedReader(f"{out}_train_text")
    assert (texts.num_documents, texts.num_sequences, data.num_images) == (3, 6, 0)
    assert data.manifest.omitted == {"gold_label is -": 1} and data.manifest.rejects == 0
    assert rows(opened(out, "test_matched", "mnli", model)) == [
        TaskRow("line 2", (), (0, 1), ("two", "star"))
    ]
    assert rows(opened(out, "dev_matched", "mnli", model))[0].labels == (0,)
    assert not Path(f"{out}_diagnostic.json").exists()
    with pytest.raises(IndexError, match="no images"):
        data.image_bytes(0)


def test_other_tables_of_sentence_pairs(
    raw: Path, prepare: Callable[..., int], out: Path, model: str
) -> None:
    put(raw / "dev.tsv", tsv("index|question|sentence|label", "0|is it|a star|not_entailment"))
    options = ["--splits", "dev", "--sentence1", "question", "--sentence2", "sentence"]
    options += ["--label", "label", "--class-names", "entailment", "not_entailment"]
    assert prepare("mnli", *options) == 0
    assert rows(opened(out, "dev", "mnli", model))[0].labels == (1,)


def test_bad_tables(
    raw: Path,
    prepare: Callable[..., int],
    out: Path,
    model: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = raw / "train.tsv"
    lines = [
        HEADER,
        "0|g|two|star|x",
        "1|g|two|star|x|neutral|more",
        "2|g|two|star|x|",
        "3|g|| star|x|neutral",
        "4|g|two|  |x|neutral",
        "5|g|two|star|x|neutral",
        "",
    ]
    path.write_bytes(tsv(*lines).encode() + b"6\tg\t\xff\tstar\tx\tneutral\n")
    assert prepare("mnli", "--splits", "train") == 1
    assert failed(capfd) == f"{path}: line 2: 5 columns, but 'gold_label' is column 6"
    assert prepare("mnli", "--splits", "train", "--on-error", "skip") == 0
    assert rejects_of(Path(f"{out}_train")) == [
        ("line 2", "5 columns, but 'gold_label' is column 6"),
        ("line 3", "7 columns, but the header names 6"),
        ("line 4", "class '' is none of entailment, neutral, contradiction"),
        ("line 5, text 1", "empty text"),
        ("line 6, text 2", "empty text"),
        ("line 9", "invalid UTF-8 at byte 4"),
    ]
    assert ids(opened(out, "train", "mnli", model)) == ["5"]
    capfd.readouterr()
    assert prepare("mnli") == 1
    assert failed(capfd) == f"{raw / 'dev_matched.tsv'}: no such file"
    put(path, tsv("sentence1|sentence2", "a|b"))
    assert prepare("mnli", "--splits", "train") == 1
    assert failed(capfd) == f"{path}: no column 'gold_label'; it has sentence1, sentence2"
    put(path, tsv(HEADER))
    assert prepare("mnli", "--splits", "train") == 1
    assert failed(capfd) == f"no usable record in split train of {raw}"
    put(path, "")
    assert prepare("mnli", "--splits", "train") == 1
    assert failed(capfd) == f"{path}: empty file"
    assert ids(opened(out, "train", "mnli", model)) == ["5"]  # failed runs replaced nothing


# The tool ----------------------------------------------------------------------------------------


def test_workers_do_not_change_the_bytes(
    vqa: dict[tuple[str, int], bytes],
    raw: Path,
    prepare: Callable[..., int],
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Several chunks, with images that come again later.
    many = [question(1000 + i, 6 + i % 7 % 2) for i in range(100)]
    write_questions(raw, "test2015", many)
    options = (*VQA_OPTIONS, "--splits", "test")
    assert prepare("vqa", *options) == 0
    files = [path for path in out.parent.iterdir() if path.name != "p_test.json"]
    before = {path: path.read_bytes() for path in files}
    assert len(before) == 6
    assert prepare("vqa", *options, "--workers", "2") == 0
    assert {path: path.read_bytes() for path in files} == before


def test_images_are_found_once_and_memory_stays_small() -> None:
    def sample(number: int, image: int) -> TaskSample:
        file = ImageFile("s", "r", f"{image}.jpg")
        return TaskSample("s", "r", str(number), (file, file))

    items = [sample(i, i // 3) for i in range(9)]
    names = [[image.path for image in c.images] for c in sample_chunks(items, 4, shared=True)]
    assert names == [["0.jpg", "1.jpg"], ["2.jpg"], []]
    names = [[image.path for image in c.images] for c in sample_chunks(items, 4, shared=False)]
    assert names == [["0.jpg", "1.jpg"], ["1.jpg", "2.jpg"], ["2.jpg"]]


def test_full_disk_leaves_nothing(
    raw: Path,
    prepare: Callable[..., int],
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    put(raw / "train.tsv", tsv(HEADER, "0|g|two|star|x|neutral"))
    real = os.fsync
    for place in ("samples.arrow", "labels.json"):

        def full(handle: int, place: str = place) -> None:
            if f"{place}.tmp" in os.readlink(f"/proc/self/fd/{handle}"):
                raise OSError(28, os.strerror(28))
            real(handle)

        monkeypatch.setattr(os, "fsync", full)
        assert prepare("mnli", "--splits", "train") == 1
        line = failed(capfd)
        assert place in line and line.endswith("No space left on device")
        assert files_of(out.parent) == []


def test_options_of_other_tasks_are_refused(
    raw: Path, out: Path, model: str, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["--raw", str(raw), "--output-prefix", str(out)]
    for options, message in (
        (["--task", "vqa"], "--task vqa needs --tokenizer-model"),
        (["--task", "imagenet", "--label", "x"], "--label is no option of --task imagenet"),
        (["--task", "nlvr2", "--tokenizer-model", model, "--seed", "0"], "--seed is no option"),
    ):
        with pytest.raises(SystemExit) as status:
            main([*options, *words])
        assert status.value.code == 2 and message in capfd.readouterr().err
    words[1] = str(raw / "no")
    assert main(["--task", "imagenet", *words]) == 1
    assert failed(capfd) == f"{raw / 'no'}: not a folder"


def test_inspect_shows_a_split(
    nlvr2: list[bytes],
    prepare: Callable[..., int],
    out: Path,
    model: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert prepare("nlvr2") == 0
    inspect, png = tool("inspect_dataset"), tmp_path / "sheet.png"
    shown = [f"{out}_train", "--tokenizer-model", model, "--png", str(png), "--checksums"]
    assert inspect([*shown, "--num-samples", "2"]) == 0
    text = capfd.readouterr().out
    assert "3 samples, 4 images, 3 texts" in text and "2 classes" in text
    assert "[0] train-1-0-0 | PNG 48x32 RGB | PNG 48x32 RGB | two stars | True\n" in text
    pixels = np.asarray(Image.open(png).convert("L"), float)
    assert pixels[10:30, 10:40].std() > 10  # the first picture, which is noise
    assert (pixels[195:215, :150] < 128).any()  # its text
    merge = tool("merge_datasets")
    assert merge(["--input", f"{out}_dev", f"{out}_test", "--output-prefix", f"{out}_both"]) == 1
    assert failed(capfd) == f"{out}_dev.json: splits of a task (nlvr2) are not merged"


# Opening -----------------------------------------------------------------------------------------


@pytest.fixture
def split(nlvr2: list[bytes], prepare: Callable[..., int], out: Path) -> str:
    """A prepared split."""
    assert prepare("nlvr2", "--splits", "train") == 0
    return f"{out}_train"


def test_opened_split_pickles_small_and_works_after(split: str) -> None:
    data = TaskDataset.open(split, "nlvr2", None)
    expected = rows(data)
    data.tokens(0), data.image_bytes(0)
    copy = pickle.loads(pickle.dumps(data))
    assert len(pickle.dumps(data)) < 4000
    assert rows(copy) == expected and len(copy) == 3
    assert np.array_equal(copy.image_bytes(3), data.image_bytes(3))
    assert np.array_equal(copy.tokens(2), data.tokens(2))
    for wrong in (-1, 3):
        with pytest.raises(IndexError):
            copy.row(wrong)
        with pytest.raises(IndexError):
            copy.tokens(wrong)


def test_rows_of_several_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_vlmoe.data.task_samples._BATCH_ROWS", 3)
    from megatron_vlmoe.data.task_samples import SamplesReader

    written = [TaskRow(str(i), (i,), labels=(i, 7), scores=(0.5, 1.0)) for i in range(8)]
    writer = SamplesWriter(str(tmp_path / "p"), "imagenet")
    for row in written:
        writer.add(row)
    assert writer.finish().size > 0
    writer.publish()
    reader = SamplesReader(str(tmp_path / "p"), "imagenet")
    assert [reader.row(i) for i in range(reader.num_rows)] == written
    assert reader.column("labels").tolist() == [x for i in range(8) for x in (i, 7)]
    reader.check(8, 0)
    with pytest.raises(DataError, match="damaged: images 6 to 7 of 7"):
        reader.check(7, 0)


def test_splits_that_are_not_what_they_should_be(split: str, model: str) -> None:
    def message(task: str = "nlvr2", fingerprint: str | None = None) -> str:
        with pytest.raises(DataError) as error:
            TaskDataset.open(split, task, fingerprint)
        return str(error.value)

    assert message("nlvr") == "unknown task 'nlvr': one of vqa, nlvr2, retrieval, imagenet, mnli"
    assert message("vqa") == f"{split}.json: a dataset of nlvr2, but one of vqa is wanted"
    assert "made with another tokenizer" in message(fingerprint="0" * 64)
    assert len(TaskDataset.open(split, "nlvr2", TextTokenizer(model).fingerprint)) == 3
    for suffix in ("_image.bin", "_text.bin", "_text.idx", "_samples.arrow"):
        path = Path(split + suffix)
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        assert message().startswith(f"{path}: {len(content) - 1} bytes, but its manifest says")
        path.unlink()
        assert message() == f"{path}: No such file or directory"
        path.write_bytes(content)
    manifest = load_manifest(split)
    write_manifest(split, replace(manifest, samples=2))
    assert message() == f"{split}.json: 2 samples, but the table has 3"
    files = {k: v for k, v in manifest.files.items() if k != "_samples.arrow"}
    write_manifest(split, replace(manifest, files=files))
    assert message().endswith("no record of _samples.arrow)")
    Path(f"{split}.json").unlink()
    assert "preprocessing did not end" in message()


def rewritten(split: str, table: bytes) -> None:
    """Puts another table of samples into a split, as its manifest says."""
    path = Path(f"{split}_samples.arrow")
    path.write_bytes(table)
    manifest = load_manifest(split)
    record = FileRecord(len(table), file_sha256(path))
    write_manifest(split, replace(manifest, files={**manifest.files, "_samples.arrow": record}))


def test_damaged_tables_are_found(split: str, tmp_path: Path) -> None:
    path = Path(f"{split}_samples.arrow")
    content = path.read_bytes()

    def refused(reason: str) -> None:
        with pytest.raises(DataError, match=rf"p_train_samples\.arrow: {reason}"):
            TaskDataset.open(split, "nlvr2", None)

    for place in (0, len(content) // 2, len(content) - 1):
        broken = bytearray(content)
        broken[place] ^= 1
        path.write_bytes(broken)
        refused("damaged: contents differ from the checksum")
    # Tables that are what the manifest says, and wrong nevertheless.
    rewritten(split, content[:-12] + b"\xff" * 12)
    refused("damaged: ")
    rewritten(split, b"")
    refused("damaged: ")
    number = content.index(np.array([0, 1, 0, 1, 2, 3], "<i4").tobytes())  # the images
    broken = bytearray(content)
    broken[number] = 99
    rewritten(split, bytes(broken))
    refused("damaged: images 0 to 99 of 4")
    for name, (task, row) in {
        "another": ("vqa", TaskRow("0", (0,), (0,), ("two",))),
        "one image": ("nlvr2", TaskRow("0", (0,), (0,), ("two",))),
        "one score": ("nlvr2", TaskRow("0", (0, 1), (0,), ("two",), (0, 1), (1.0,))),
    }.items():
        writer = SamplesWriter(str(tmp_path / name), task)
        writer.add(row)
        writer.finish()
        writer.publish()
        rewritten(split, (tmp_path / f"{name}_samples.arrow").read_bytes())
        write_manifest(split, replace(load_manifest(split), samples=1))
        refused("not the samples of task nlvr2" if task == "vqa" else "damaged: a sample with")


def test_labels_files(tmp_path: Path) -> None:
    prefix = tmp_path / "p"
    labels = Labels("vqa", ("né", "no"))
    write_labels(prefix, labels)
    assert load_labels(str(prefix)) == labels
    # Words do not change what a label means; another order, or another task, does.
    assert replace(labels, names=("a", "b")).sha256 == labels.sha256
    assert replace(labels, labels=("no", "né")).sha256 != labels.sha256
    assert replace(labels, task="mnli").sha256 != labels.sha256
    path = tmp_path / "p_labels.json"
    for content, message in (
        ("{", "damaged"),
        ('{"labels": ["a"]}', "no task is named"),
        ('{"task": "vqa", "labels": []}', "labels are not a list of different texts"),
        ('{"task": "vqa", "labels": ["a", "a"]}', "labels are not"),
        ('{"task": "vqa", "labels": ["a", 1]}', "labels are not"),
        ('{"task": "vqa", "labels": ["a"], "names": []}', "names are not"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=message):
            load_labels(str(prefix))
    path.unlink()
    with pytest.raises(DataError, match=r"p_labels\.json: not found"):
        load_labels(str(prefix))
