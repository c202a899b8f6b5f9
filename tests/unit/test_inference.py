"""Inference without a model: what callers may give, what is said about it, and the records of `predict`."""

from __future__ import annotations

import io
import math
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, Sequence

import numpy as np
import pytest
from PIL import Image

from megatron_vlmoe.commands import predict as command
from megatron_vlmoe.config.errors import ConfigError, DataError
from megatron_vlmoe.data.task_labels import Labels
from megatron_vlmoe.inference.answers import Scored, decisions, ranked
from megatron_vlmoe.inference.inputs import (
    Item,
    UnknownTextWarning,
    aligned,
    pixels,
    read_image,
    tokens,
)
from megatron_vlmoe.inference.model import VLMoE
from megatron_vlmoe.inference.records import Record, read_records, text_lines


def picture(width: int = 5, height: int = 3) -> np.ndarray:
    """Different values at every place."""
    return np.arange(width * height * 3, dtype=np.uint8).reshape(height, width, 3)


def encoded(array: np.ndarray, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, form)
    return buffer.getvalue()


class Words:
    """A tokenizer of single letters; "_" is nothing to it, "?" is what it does not know."""

    unk_id = ord("?")

    def __init__(self) -> None:
        self.seen: list[str] = []

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        self.seen += texts
        return [[ord(letter) for letter in text if letter != "_"] for text in texts]


def test_single_items_go_with_lists() -> None:
    assert aligned(image="a", text="b") == (True, [[Item("image", "a")], [Item("text", "b")]])
    single, columns = aligned(image="a", text=("b", "c"))
    assert not single
    assert columns == [[Item("image", "a")] * 2, [Item("text 0", "b"), Item("text 1", "c")]]
    assert aligned(image=[], text="b") == (False, [[], []])
    with pytest.raises(DataError, match="image 1, text 2"):
        aligned(image=["a"], text=["b", "c"])


def test_every_way_to_give_an_image(tmp_path: Path) -> None:
    array, path = picture(), tmp_path / "a.png"
    path.write_bytes(encoded(array))
    mirrored = np.ascontiguousarray(array[:, ::-1])[:, ::-1]
    for value in (
        *(str(path), path, path.read_bytes(), bytearray(path.read_bytes())),
        *(Image.open(path), Image.fromarray(array), array, mirrored),
    ):
        image = read_image(Item("image", value))
        assert image.mode == "RGB" and np.array_equal(np.asarray(image), array), type(value)


def test_images_of_other_kinds_become_rgb() -> None:
    deep = Image.fromarray(np.array([[0, 65535]], dtype=np.uint16))
    assert np.asarray(read_image(Item("image", deep))).tolist() == [[[0] * 3, [255] * 3]]
    bitmap = read_image(Item("image", encoded(picture(), "BMP")))
    assert bitmap.size == (5, 3)


def test_whole_images_are_resized_to_a_square() -> None:
    flat = np.full((4, 10, 3), (10, 20, 30), dtype=np.uint8)
    flat[:, :5] = (200, 150, 100)
    made = pixels([Item("image 0", flat), Item("image 1", picture())], 8)
    assert made.shape == (2, 3, 8, 8) and made.dtype == np.uint8
    # Left and right edge are those of the whole image: nothing is cropped.
    assert made[0, :, 0, 0].tolist() == [200, 150, 100]
    assert made[0, :, 7, 7].tolist() == [10, 20, 30]
    expected = Image.fromarray(picture()).resize((8, 8), Image.Resampling.BICUBIC)
    assert np.array_equal(made[1].transpose(1, 2, 0), np.asarray(expected))


def torn(tmp_path: Path) -> Image.Image:
    """A file whose end is missing, opened by the caller."""
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / "torn.jpg"
    path.write_bytes(encoded(noise, "JPEG")[:1500])
    return Image.open(path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"", "image 3: empty file"),
        (b"no image", "image 3: not an image of a known format"),
        ("no/such/file", "no/such/file: not found"),
        ("a\0b", "embedded null byte"),
        (".", "Is a directory"),
        (7, "image 3: expected a Pillow image, path, bytes or array, got int"),
        (picture().astype(float), r"image 3: an array of float64 \[3, 5, 3\] is not uint8"),
        (picture()[..., :1], r"uint8 \[3, 5, 1\] is not uint8 \[H, W, 3\]"),
        (np.zeros((0, 4, 3), np.uint8), r"\[0, 4, 3\]"),
        (torn, "image 3: damaged image"),
    ],
)
def test_images_that_cannot_be_used(value: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        pixels([Item("image 3", value(tmp_path) if callable(value) else value)], 8)


def test_texts_are_stripped() -> None:
    words: Any = Words()
    found = tokens([Item("text 0", " ab\n"), Item("text 1", "c")], words)
    assert [ids.tolist() for ids in found] == [[97, 98], [99]]
    assert words.seen == ["ab", "c"]


def test_unknown_texts_are_warned_of() -> None:
    words: Any = Words()
    known, half = Item("text 0", "a" * 99 + "?"), Item("text 1", "?b")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a share of 1% is not above it
        assert len(tokens([known], words)[0]) == 100
    message = r"text 1: 50% of its tokens are unknown to the text tokenizer, .*\(1 of 2 texts\)"
    with pytest.warns(UnknownTextWarning, match=message):
        tokens([known, half], words)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (" \n", "question: empty text"),
        (None, "question: text is not a string"),
        ("\ud800", "question: invalid Unicode"),
        ("_", "question: no token in it"),
    ],
)
def test_texts_that_cannot_be_used(value: Any, message: str) -> None:
    words: Any = Words()
    with pytest.raises(DataError, match=message):
        tokens([Item("question", value)], words)


def test_answers_have_probabilities_of_their_own() -> None:
    labels = Labels("vqa", ("red", "two", "no"))
    logits = np.array([[0.0, math.log(3.0), math.log(3.0)]], dtype=np.float32)
    (best,) = ranked("vqa", logits, labels, 2)
    # 3 / (1 + 3) each; of equals the first.
    assert [item.label for item in best] == ["two", "no"]
    assert [item.score for item in best] == pytest.approx([0.75, 0.75], abs=1e-6)


def test_classes_share_one_probability() -> None:
    labels = Labels("imagenet", ("n1", "n2"), ("cat", "dog"))
    logits = np.array([[0.0, math.log(3.0)]], dtype=np.float32)
    (best,) = ranked("imagenet", logits, labels, 9)
    assert [item[:2] for item in best] == [("n2", "dog"), ("n1", "cat")]
    assert [item.score for item in best] == pytest.approx([0.75, 0.25], abs=1e-6)
    (decision,) = decisions("mnli", logits, Labels("mnli", ("yes", "no")))
    assert decision.label == "no" and decision.score == pytest.approx(0.75, abs=1e-6)
    assert decision.scores == pytest.approx({"yes": 0.25, "no": 0.75}, abs=1e-6)


def test_rows_for_people() -> None:
    classes = [{"label": "n1", "name": "cat", "score": 0.5}, {"label": "n2", "score": 0.25}]
    assert text_lines({"most_likely": classes}) == ["0.5000  n1  cat", "0.2500  n2"]
    assert text_lines({"score": -0.125}) == ["-0.1250  score"]
    assert Scored("a", "b", 1.0) == ("a", "b", 1.0)


def test_records_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"premise": "a", "hypothesis": "b", "id": 4}\n\n{"premise": "c"}')
    first, second = read_records(path)
    assert first == Record(f"{path}:1", {"premise": "a", "hypothesis": "b", "id": 4})
    first.check("mnli")
    with pytest.raises(DataError, match=r"in.jsonl:3: hypothesis: missing: mnli reads premise, "):
        second.check("mnli")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"a": 1}\n{"a": ', r"in.jsonl:2: invalid JSON: Expecting value"),
        (b"\n[1]", "in.jsonl:2: not a JSON object"),
        (b'{"a": "\xff"}', "in.jsonl:1: invalid UTF-8 at byte 7"),
        (b"[" * 100_000, "in.jsonl:1: invalid JSON"),
        (b'{"premise": "a", "from": ["\\ud800"]}', "in.jsonl:1: invalid Unicode"),
        (b"\n \n", "in.jsonl: no record in it"),
    ],
)
def test_files_without_records(text: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(text)
    with pytest.raises(DataError, match=message):
        read_records(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"image": "x", "question": 3}, "F:1: image: x: no such file"),
        ({"image": __file__, "question": 3}, "F:1: question: not a string"),
        ({"image": __file__, "question": " "}, "F:1: question: empty"),
        ({"question": "a"}, "F:1: image: missing: vqa reads image, question"),
    ],
)
def test_records_that_cannot_be_asked(content: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Record("F:1", content).check("vqa")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--load"),
        (["--load", "x"], "no input: give --input FILE or the inputs of a task"),
        (["--load", "x", "--top-k", "0", "--image", "y"], "--top-k 0: must be at least 1"),
        (["--load", "x", "--task", "coco"], "--task coco: expected one of vqa, "),
        (["--load", "x", "--imag", "y"], "unknown option --imag; did you mean --image?"),
        (["--load", "x", "--input", "no"], "--input no: No such file or directory"),
        (["--load", "x", "--input", "no", "--text", "a"], "--text does not go with --input"),
        (["--load", "x", "--task", "imagenet", "--image", "no.jpg"], "--image: no.jpg: no such"),
        (["--load", "x", "--task", "mnli", "--premise", "a"], "--hypothesis: missing: mnli reads"),
        (
            ["--load", "x", "--task", "mnli", *"--premise a --hypothesis b --text c".split()],
            "--text: no input of mnli, which reads premise, hypothesis",
        ),
        (["--load", "x", "--image", "y", "--output", "tests"], "--output tests: is a folder"),
        (
            ["--load", "x", "--image", "y", "--output", f"{__file__}/o"],
            "/o: .*py is a file, not a folder",
        ),
    ],
)
def test_wrong_command_lines(words: list[str], message: str, monkeypatch: Any) -> None:
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    with pytest.raises(ConfigError, match=message):
        command.main(words)


def test_capacity_is_a_number() -> None:
    with pytest.raises(ConfigError, match="capacity_factor=nan: not a finite number"):
        VLMoE.from_checkpoint("x", capacity_factor=float("nan"))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"exif": "rotate"}, "exif='rotate' must be turn or keep"),
        ({"alpha": "grey"}, "alpha='grey' must be white, black or drop"),
    ],
)
def test_rules_for_images_are_known_ones(option: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}$"):
        VLMoE.from_checkpoint("x", **option)  # type: ignore[arg-type]


@pytest.mark.process
def test_help_needs_no_torch() -> None:
    code = (
        "import sys\nfrom megatron_vlmoe.commands.main import main\n"
        "try: main(['predict', '--help'])\nexcept SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "mnli: --premise --hypothesis" in " ".join(done.stdout.split())
