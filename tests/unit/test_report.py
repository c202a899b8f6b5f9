"""The evaluation report: one well-formed page, everything escaped, pictures inside, nothing outside."""

from __future__ import annotations

import base64
import io
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
from pages import Page
from PIL import Image

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.finetune.results import (
    LONGER_SIDE,
    CountRow,
    Counts,
    Example,
    Report,
    write_report,
)

NASTY = '<script>alert("x")</script> & \'quoted\' "double"'


def pictures(page: Page) -> list[Image.Image]:
    found = []
    for tag, name, value in page.attributes:
        if (tag, name) == ("img", "src"):
            assert value is not None
            head, content = value.split(",")
            assert head == "data:image/jpeg;base64"
            found.append(Image.open(io.BytesIO(base64.b64decode(content))))
    return found


def encoded(width: int, height: int, form: str = "PNG", mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, form)
    return stream.getvalue()


@pytest.fixture
def page(tmp_path: Path) -> tuple[str, Page]:
    path = tmp_path / "new" / "report.html"
    examples = [
        Example((encoded(640, 400, "JPEG"),), (("question", NASTY), ("answer", "2")), True),
        Example((encoded(20, 30), encoded(300, 900)), (("statement", "left & right"),), False),
        Example((encoded(40, 40, mode="P"),), (("premise", "ünïcode"),), None),
        Example((), (("premise", "No picture."),), True),
    ]
    report = Report(
        title=f"VQA {NASTY}",
        facts=[("checkpoint", "runs/a/iter_0000100"), ("note", NASTY)],
        metrics={"accuracy": 71.2345, "samples": 1000, "open": float("nan")},
        examples=examples,
    )
    write_report(path, report)
    source = path.read_text(encoding="utf-8")
    return source, Page(source)


def test_texts_are_escaped(page: tuple[str, Page]) -> None:
    source, parsed = page
    assert "script" not in parsed.tags and "<script" not in source
    # Title, heading, a fact and a question come back as they were given.
    assert [text for text in parsed.texts if NASTY in text] == [
        f"VQA {NASTY}",
        f"VQA {NASTY}",
        NASTY,
        NASTY,
    ]
    assert "left & right" in parsed.texts and "ünïcode" in parsed.texts


def test_scores_are_shown(page: tuple[str, Page]) -> None:
    texts = page[1].texts
    for name, value in (("accuracy", "71.23"), ("samples", "1000"), ("open", "–")):
        assert texts[texts.index(name) + 1] == value


def test_right_and_wrong_are_said_in_words(page: tuple[str, Page]) -> None:
    marks = [text for text in page[1].texts if text in ("✓ right", "✗ wrong", "not scored")]
    assert marks == ["✓ right", "✗ wrong", "not scored", "✓ right"]
    classes = [value for tag, name, value in page[1].attributes if (tag, name) == ("p", "class")]
    assert classes == ["mark right", "mark wrong", "mark open", "mark right"]


def test_what_a_reader_wants_first_comes_first(tmp_path: Path) -> None:
    """Score, guess and model before the answers, these before the examples; settings are folded."""
    rows = [CountRow("yes", 3, 1), CountRow("a <b>", 0, 2)]
    report = Report(
        title="vqa",
        headlines=[("val/vqa_official, percent", 9.98, "guessing: 11.37; 500 samples")],
        notes=["Model: runs/vqa/best"],
        counts=[Counts("Answers of val", "How often.", ("predicted", "true"), rows)],
        chosen=["val: 1 of 3 right."],
        examples=[Example((encoded(9, 9),), (("question", "Is it?"),), 0.3, ("left",))],
        metrics={"val/samples": 500},
        facts=[("seed", "1234")],
    )
    write_report(tmp_path / "a.html", report)
    page = Page((tmp_path / "a.html").read_text(encoding="utf-8"))
    assert page.texts == [
        *("vqa", "vqa", "val/vqa_official, percent", "9.98", "guessing: 11.37; 500 samples"),
        *("Model: runs/vqa/best", "Answers of val", "How often.", "predicted", "true"),
        *("yes", "3 / 1", "a <b>", "0 / 2", "Examples (1)", "val: 1 of 3 right."),
        *("left", "question", "Is it?", "0.3 of 1", "All scores", "val/samples", "500"),
        *("Settings", "seed", "1234"),
    ]
    widths = [value for _, name, value in page.attributes if name == "style"]
    assert widths == ["width: 100.0%", "width: 33.3%", "width: 66.7%"], "no bar where nothing is"
    assert page.tags.count("details") == 2


def test_pictures_are_inside_and_small(page: tuple[str, Page]) -> None:
    assert [picture.size for picture in pictures(page[1])] == [
        (LONGER_SIDE, 200),
        (20, 30),
        (107, LONGER_SIDE),
        (40, 40),
    ]
    assert sum(name == "alt" and bool(value) for _, name, value in page[1].attributes) == 4


def test_nothing_is_fetched_from_elsewhere(page: tuple[str, Page]) -> None:
    source, parsed = page
    assert not re.search(r"https?:|url\(|@import|//[a-z]", re.sub(r"base64,[^\"]*", "", source))
    assert not {"script", "link", "iframe"} & set(parsed.tags)
    assert "prefers-color-scheme: dark" in source


def test_a_page_may_be_empty(tmp_path: Path) -> None:
    write_report(tmp_path / "a.html", Report(title="nothing"))
    assert Page((tmp_path / "a.html").read_text()).texts == ["nothing", "nothing"]


def test_a_broken_picture_is_named_and_nothing_written(tmp_path: Path) -> None:
    examples = [Example((encoded(9, 9),), (), None), Example((encoded(9, 9), b"no"), (), None)]
    with pytest.raises(DataError, match="Picture 2 of example 2: not a readable image"):
        write_report(tmp_path / "a.html", Report(title="t", examples=examples))
    assert not list(tmp_path.iterdir())


def test_an_installed_package_has_the_template() -> None:
    root = Path(__file__).resolve().parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())
    data = project["tool"]["setuptools"]["package-data"]
    for file in ("finetune/report.html.j2", "analysis/report.html.j2", "runtime/page.css"):
        path = root / "megatron_vlmoe" / file
        assert any(
            path in path.parent.glob(own) for own in data[f"megatron_vlmoe.{path.parent.name}"]
        )
