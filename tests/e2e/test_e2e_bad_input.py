"""What is wrong with data or checkpoints ends a run with one line that names it; nothing is half-written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Callable

import pytest
from commands import Outcome, run_many, tool
from conftest import Run
from small_corpus import Corpus


def truncate(path: Path, share: float = 0.6) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def blank(path: Path) -> None:
    """Zeros of the same number; sizes are as the manifest says."""
    path.write_bytes(bytes(path.stat().st_size))


def flip(path: Path) -> None:
    """A bit of the length of every sequence but the last, in the body of an index."""
    content = bytearray(path.read_bytes())
    number = int.from_bytes(content[18:26], "little")
    for sequence in range(number - 1):
        content[34 + 4 * sequence + 1] ^= 1
    path.write_bytes(content)


def _nothing(folder: Path) -> None:
    """The damage is in the options."""


DAMAGE: dict[str, tuple[Callable[[Path], object], str, list[str]]] = {
    "truncated text .bin": (
        lambda f: truncate(f / "text_train_text_document.bin"),
        "",
        ["text_train_text_document.bin"],
    ),
    "truncated text .idx": (
        lambda f: truncate(f / "text_train_text_document.idx"),
        "",
        ["text_train_text_document.idx"],
    ),
    "truncated image .bin": (
        lambda f: truncate(f / "images_train_image.bin"),
        "",
        ["images_train_image.bin"],
    ),
    "empty caption .idx": (
        lambda f: (f / "pairs_train_text.idx").write_bytes(b""),
        "",
        ["pairs_train_text.idx"],
    ),
    "body of text .idx": (
        lambda f: flip(f / "text_train_text_document.idx"),
        "",
        ["text_train_text_document.idx", "damaged"],
    ),
    "body of caption .idx": (
        lambda f: flip(f / "pairs_train_text.idx"),
        "",
        ["pairs_train_text.idx", "damaged"],
    ),
    "damaged images": (
        lambda f: blank(f / "images_train_image.bin"),
        "",
        ["images_train_image.bin: image"],
    ),
    # A step has four.
    "too many damaged images": (
        lambda f: blank(f / "images_train_image.bin"),
        "--data.on_bad_image replace --data.max_bad_images 4 --train.eval_steps 0",
        ["step 2: 8 images could not be decoded", "data.max_bad_images=4"],
    ),
    "no .bin": (lambda f: (f / "pairs_train_image.bin").unlink(), "", ["pairs_train_image.bin"]),
    "no .json": (lambda f: (f / "text_train.json").unlink(), "", ["text_train"]),
    "damaged .json": (lambda f: truncate(f / "text_train.json"), "", ["text_train.json"]),
    "missing dataset": (_nothing, "--data.images nowhere/images", ["nowhere/images"]),
    "another kind of dataset": (_nothing, "--data.images text_train", ["text_train"]),
    "bad blend": (_nothing, "--data.text 0.7 text_train 0.3", ["data.text"]),
    "missing text tokenizer": (_nothing, "--data.text_tokenizer no.model", ["no.model"]),
    "missing image tokenizer": (_nothing, "--data.image_tokenizer no_folder", ["no_folder"]),
    "damaged text tokenizer": (lambda f: truncate(f / "text.model", 0.2), "", ["text.model"]),
    "damaged image tokenizer": (
        lambda f: truncate(f / "image_tokenizer" / "model.safetensors"),
        "",
        ["image_tokenizer"],
    ),
    "another text tokenizer": (
        _nothing,
        "--data.text_tokenizer other.model",
        ["text_train", "tokenizer"],
    ),
    "no dataset": (_nothing, "--data.text", ["data.text"]),
    "tokenizer's grid": (_nothing, "--model.image_size 48", ["image_tokenizer"]),
    "no such checkpoint": (_nothing, "--load nowhere/run", ["nowhere/run"]),
    "checkpoint of another model": (
        _nothing,
        "--load {run} --model.hidden_size 64 --model.ffn_hidden_size 128",
        ["hidden_size"],
    ),
    "checkpoint with other experts": (
        _nothing,
        "--load {run} --moe.num_vision_experts 8",
        ["num_vision_experts"],
    ),
    "half a checkpoint": (
        _nothing,  # done by the fixture, which knows the checkpoint
        "--load half",
        ["half"],
    ),
}


@pytest.fixture(scope="module")
def damaged(
    corpus: Corpus, unbroken: Run, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Outcome]:
    """Each damage done to a copy of the datasets of its own, and what a run on it says."""
    root = tmp_path_factory.mktemp("damaged")
    line = "--input raw/text/train.jsonl --vocab-size 150 --output-prefix other"
    tool("train_text_tokenizer", *line.split(), cwd=corpus.folder).succeeded()
    folders, lines = [], []
    for number, (damage, options, _) in enumerate(DAMAGE.values()):
        folder = root / str(number)
        shutil.copytree(
            corpus.folder, folder, ignore=shutil.ignore_patterns("raw", "runs", "coded")
        )
        if options == "--load half":
            shutil.copytree(unbroken.folder, folder / "half")
            # The last bytes of a file are missing, as after a full disk.
            truncate(sorted((folder / "half").rglob("iter_0000006/*.distcp"))[0], 0.3)
        else:
            damage(folder)
        options = options.replace("{run}", str(unbroken.folder))
        folders.append(str(folder))
        lines.append(corpus.words("run", 2, *options.split()))
    return dict(zip(DAMAGE, run_many(lines, folders)))


@pytest.mark.parametrize("name", DAMAGE)
def test_one_line_names_it(damaged: dict[str, Outcome], name: str) -> None:
    damaged[name].refused(*DAMAGE[name][2])


def test_output_folder_that_cannot_be_made(corpus: Corpus) -> None:
    (corpus.folder / "taken").write_text("a file")
    lines = [corpus.words(folder, 2) for folder in ("taken", "/proc/vlmoe-run")]
    taken, forbidden = run_many(lines, corpus.folder)
    taken.refused("taken")
    forbidden.refused("/proc/vlmoe-run")


def test_corrupt_images_and_captions_are_skipped_or_named(corpus: Corpus, tmp_path: Path) -> None:
    good = sorted((corpus.folder / "raw" / "coco" / "train2014").iterdir())[:3]
    images = tmp_path / "images"
    images.mkdir()
    for path in good:
        shutil.copy(path, images)
    truncate(images / good[1].name, 0.4)
    captions = [
        {"image": good[0].name, "caption": "ein rotes Viereck — 赤い四角 🟥"},
        {"image": good[1].name, "caption": "a corrupt file"},
        {"image": good[2].name, "caption": "   "},
        {"image": "missing.jpg", "caption": "a file that is not there"},
        {"image": good[2].name, "caption": "a blue circle " * 2000},
        {"image": good[2].name, "caption": "a blue circle"},
    ]
    annotations = tmp_path / "captions.jsonl"
    annotations.write_text("".join(json.dumps(record) + "\n" for record in captions))
    with annotations.open("ab") as file:
        file.write(b'{"image": "x.jpg", "caption": "\xff\xfe"}\n')
        file.write(b'{"image": "x.jpg", "capt\n')
    line = [
        *["--format", "jsonl", "--annotations", annotations, "--images", images],
        *["--tokenizer-model", corpus.folder / "text.model", "--workers", "1"],
    ]
    stopped = tool("preprocess_pairs", *line, "--output-prefix", tmp_path / "stop")
    message = stopped.refused(code=1)
    assert good[1].name in message or "captions.jsonl" in message
    assert not list(tmp_path.glob("stop*")), "nothing half-written is left"
    skipped = tool(
        "preprocess_pairs", *line, "--output-prefix", tmp_path / "skip", "--on-error", "skip"
    )
    skipped.succeeded()
    rejects = (tmp_path / "skip.rejects.jsonl").read_text().splitlines()
    lines = {json.loads(reject)["record"].split(",")[0] for reject in rejects}
    assert lines == {f"line {number}" for number in (2, 3, 4, 5, 7, 8)}
    text = "\n".join(rejects)
    for word in (good[1].name, "missing.jpg"):
        assert word in text
    assert str(len(rejects)) in skipped.stdout + skipped.stderr, skipped.text
    manifest = json.loads((tmp_path / "skip.json").read_text())
    assert manifest["documents"] == 2 and manifest["rejects"] == len(rejects)
    shown = tool(
        "inspect_dataset", tmp_path / "skip", "--tokenizer-model", corpus.folder / "text.model"
    )
    assert "2 documents" in shown.succeeded().stdout


@pytest.mark.parametrize(
    "name, line, named",
    [
        (
            "preprocess_text",
            "--input missing.jsonl --output-prefix out --tokenizer-model {model}",
            "missing.jsonl",
        ),
        (
            "preprocess_text",
            "--input empty.jsonl --output-prefix out --tokenizer-model {model}",
            "empty.jsonl",
        ),
        (
            "preprocess_text",
            "--input bad.jsonl --output-prefix out --tokenizer-model {model}",
            "bad.jsonl",
        ),
        (
            "preprocess_text",
            "--input bad.txt --output-prefix out --tokenizer-model {model}",
            "bad.txt",
        ),
        (
            "preprocess_text",
            "--input good.txt --output-prefix out --tokenizer-model no.model",
            "no.model",
        ),
        ("preprocess_images", "--input empty --output-prefix out", "empty"),
        ("preprocess_images", "--input bomb --output-prefix out", "bomb.png"),
        ("preprocess_images", "--input nowhere --output-prefix out", "nowhere"),
        (
            "preprocess_pairs",
            "--format coco --annotations bad.jsonl --images empty --output-prefix out --tokenizer-model {model}",
            "bad.jsonl",
        ),
        (
            "train_text_tokenizer",
            "--input empty.jsonl --vocab-size 100 --output-prefix out",
            "empty.jsonl",
        ),
        ("train_image_tokenizer", "--images nowhere --output out --preset tiny", "nowhere"),
        ("merge_datasets", "--input nowhere {text} --output-prefix out", "nowhere"),
        ("merge_datasets", "--input {images} {text} --output-prefix out", "text_train"),
        ("inspect_dataset", "nowhere", "nowhere"),
        ("encode_images", "--images nowhere --tokenizer {codes}", "nowhere"),
        ("plot_losses", "--run nowhere --output out.png", "nowhere"),
    ],
)
def test_tools_name_what_is_wrong(
    corpus: Corpus, tmp_path: Path, name: str, line: str, named: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (tmp_path / "bad.txt").write_bytes(b"fine\n\xff\xfe\xfd\n")
    (tmp_path / "good.txt").write_text("fine\n")
    (tmp_path / "bomb").mkdir()
    (tmp_path / "bomb" / "bomb.png").write_bytes(huge_png(60000, 60000))
    places = {
        "model": corpus.folder / "text.model",
        "images": corpus.folder / "images_train",
        "text": corpus.folder / "text_train",
        "codes": corpus.folder / "image_tokenizer",
    }
    before = sorted(tmp_path.rglob("*"))
    outcome = tool(name, *line.format(**places).split(), cwd=tmp_path)
    outcome.refused(named)
    assert sorted(tmp_path.rglob("*")) == before, "it left something behind"


def huge_png(width: int, height: int) -> bytes:
    """A PNG that claims to be large and holds next to nothing."""
    import struct
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )
