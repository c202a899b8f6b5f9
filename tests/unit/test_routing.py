"""The routing explorer: what it says equals a recount from its raw trace, and what its page shows does too."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import Page, browser, missing_browser
from commands import run
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from small_checkpoints import MODEL, random_tensors, save

from megatron_vlmoe.analysis import routing, routing_figures, routing_page
from megatron_vlmoe.analysis.routing_inputs import find_sources
from megatron_vlmoe.commands.routing import main
from megatron_vlmoe.config.errors import DataError, UserError
from megatron_vlmoe.config.schema import ModelConfig, MoEConfig, RunConfig
from megatron_vlmoe.convert.exporting import export_checkpoint
from megatron_vlmoe.data.image_files import ImageRules
from megatron_vlmoe.data.samples import foreground
from megatron_vlmoe.sample_corpus.truth import known_scenes, patch_truth
from megatron_vlmoe.sample_corpus.writer import (
    BACKGROUND_VALUES,
    MARKER,
    encode_picture,
    pretraining_files,
    render_picture,
    shape_map,
)
from megatron_vlmoe.tokenizers.text import TextTokenizer

# As browsers number them (WebDriver).
ARROW_RIGHT = "\ue014"
GRID = 4
MODEL_LENGTHS = {"texts": 24, "pairs": 20}
"""Tokens of a text in each way of reading."""


@dataclass(frozen=True)
class Corpus:
    """Pictures of the sample corpus with captions, and a text tokenizer."""

    folder: Path
    tokenizer: str

    @property
    def images(self) -> str:
        return str(self.folder / "coco" / "train2014")

    @property
    def captions(self) -> str:
        return str(self.folder / "coco" / "annotations" / "captions_train2014.json")

    def run(self, name: str, moe: MoEConfig, **model: Any) -> Path:
        """The folder of a run with a random model; its tokenizer lies there."""
        sizes: dict[str, Any] = {
            **{"image_size": 32, "patch_size": 8},
            **{"text_length": MODEL_LENGTHS["texts"], "pair_text_length": MODEL_LENGTHS["pairs"]},
            "vocab_size": TextTokenizer(self.tokenizer).size,
            **model,
        }
        config = RunConfig(model=replace(MODEL, **sizes), moe=moe)
        folder = self.folder / name
        if not folder.exists():
            tensors = {
                # Routers with larger weights, so that gates differ and experts overflow.
                key: (8.0 if ".router." in key else 1.0) * value
                for key, value in random_tensors(config).items()
            }
            save(folder / "checkpoints", config, tensors)
            (folder / "text.model").write_bytes(Path(self.tokenizer).read_bytes())
        return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: str) -> Corpus:
    folder = tmp_path_factory.mktemp("routing")
    pictures, texts = pretraining_files(seed=3, num_images=13)
    for scene, file in pictures:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(encode_picture(scene, file.suffix))
    for file, text in texts.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)
    (folder / MARKER).write_text("{}")
    return Corpus(folder, tiny_tokenizer)


TWICE = MoEConfig(num_vision_experts=5, num_text_experts=3, layers=(1, 2), topk=2)


@dataclass(frozen=True)
class Explored:
    """What the command left."""

    folder: Path
    run: Path

    @property
    def summary(self) -> Any:
        return json.loads((self.folder / "routing.json").read_text())

    @property
    def items(self) -> list[Any]:
        return [json.loads(row) for row in (self.folder / "items.jsonl").read_text().splitlines()]

    def rows(self, number: int) -> list[dict[str, Any]]:
        """Tokens of one router, as plain numbers."""
        with np.load(self.folder / "trace.npz") as trace:
            own = np.flatnonzero(trace["router"] == number)
            names = ("item", "modality", "place", "expert", "gate", "kept")
            columns = [trace[name][own].tolist() for name in names]
        return [dict(zip(names, values)) for values in zip(*columns, strict=True)]


@pytest.fixture(scope="module")
def explored(corpus: Corpus) -> Explored:
    """Pairs, pictures alone and captions alone, through the real command line."""
    run_folder = corpus.run("twice", TWICE)
    words = ["--load", run_folder, "--images", corpus.images, "--captions", corpus.captions]
    words += ["--output", corpus.folder / "out", "--permutations", "5", "--batch-size", "5"]
    outcome = run("-m", "megatron_vlmoe", "routing", *words).succeeded()
    # 13 pictures, of which two are for validation and stand in another file.
    assert "11 found, 11 chosen, 0 not needed" in outcome.stdout
    return Explored(corpus.folder / "out", run_folder)


def recount_nmi(pairs: list[tuple[int, str]]) -> float:
    """From the definition, by dictionaries."""

    def h(counts: Counter[Any]) -> float:
        total = sum(counts.values())
        return -sum(n / total * math.log(n / total) for n in counts.values())

    both, rows, columns = (
        h(Counter(found)) for found in (pairs, [e for e, _ in pairs], [c for _, c in pairs])
    )
    return 2 * (rows + columns - both) / (rows + columns) if rows and columns else 0.0


def content(token: dict[str, Any], item: Any, target: str) -> str | None:
    """What a token is about, from the item's own line."""
    if token["place"] < 0:
        return None
    labels = item["patch_labels"] if token["modality"] else item["piece_labels"]
    if target in labels:
        return labels[target][token["place"]]
    if target == ("patch position" if token["modality"] else "word position"):
        return str(token["place"])
    return ("text", "image")[token["modality"]] if target == "modality" else None


@pytest.mark.process
def test_load_drops_and_specialisation_equal_a_recount_from_the_trace(explored: Explored) -> None:
    summary, items = explored.summary, explored.items
    met = [(r["input"], r["block"], r["pool"]) for r in summary["routers"]]
    # Block 3 is that of the VL-FFN, which has no experts here.
    assert sorted(met) == sorted(
        (read, block, pool)
        for read, pools in {
            "pairs": ("text", "vision"),
            "images": ("vision",),
            "texts": ("text",),
        }.items()
        for pool in pools
        for block in (1, 2)
    )
    lost = 0
    for number, router in enumerate(summary["routers"]):
        rows = explored.rows(number)
        chosen = Counter(expert for row in rows for expert in row["expert"])
        dropped = Counter(
            expert for row in rows for expert, kept in zip(row["expert"], row["kept"]) if not kept
        )
        numbers = range(router["experts"])
        assert router["load"] == [chosen[number] for number in numbers]
        assert router["dropped_load"] == [dropped[number] for number in numbers]
        assert router["tokens"] == len(rows) and router["assignments"] == 2 * len(rows)
        assert router["dropped"] == sum(dropped.values())
        assert router["kept"] + router["dropped"] == router["assignments"]
        assert router["dropped_share"] == pytest.approx(router["dropped"] / (2 * len(rows)))
        lost += router["dropped"]
        if router["pool"] == "vision":
            # Every picture has its patches and [I_CLS], once.
            assert Counter((row["item"], row["place"]) for row in rows) == Counter(
                (item, place) for item in range(11) for place in range(-1, GRID * GRID)
            )
        targets = {one["target"] for one in router["specialisation"]}
        wanted = {"color", "edge", "drawn color", "drawn shape", "patch position"}
        assert targets == (
            wanted if router["pool"] == "vision" else {"word class", "word", "word position"}
        )
        for one in router["specialisation"]:
            pairs = [
                (row["expert"][0], said)
                for row in rows
                if (said := content(row, items[row["item"]], one["target"])) is not None
            ]
            assert one["tokens"] == len(pairs)
            assert one["nmi"] == pytest.approx(recount_nmi(pairs), abs=1e-9)
            counted = router["classes"].get(one["target"])
            for expert, counts in enumerate(counted["counts"] if counted else ()):
                own = Counter(said for number, said in pairs if number == expert)
                assert dict(zip(counted["names"], counts)) == {n: own[n] for n in counted["names"]}
        together = Counter(frozenset(row["expert"]) for row in rows)
        for first in numbers:
            for second in numbers:
                expected = together[frozenset((first, second))] if first != second else 0
                assert router["chosen_together"][first][second] == expected
    assert lost > 100
    for one in summary["consecutive"]:
        places = [met.index((one["input"], block, one["pool"])) for block in one["blocks"]]
        sides = [
            {(r["item"], r["modality"], r["place"]): r["expert"][0] for r in explored.rows(place)}
            for place in places
        ]
        pairs = Counter((sides[0][key], sides[1][key]) for key in sides[0])
        found = {(a, b): n for a, row in enumerate(one["counts"]) for b, n in enumerate(row) if n}
        assert found == dict(pairs)
    assert len(summary["consecutive"]) == 4


def texts_of(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


@pytest.mark.process
def test_figures_show_what_the_trace_says(explored: Explored, corpus: Corpus) -> None:
    made = {path.name for path in explored.folder.glob("*.png")}
    kinds = ("patches", "overlay", "words")
    assert made == {f"{kind}_block_{block}.png" for kind in kinds for block in (1, 2)}
    model = routing.open_model(str(explored.run), capacity_factor=1.0)
    sources = find_sources(corpus.images, corpus.captions).sources
    items, _ = routing.read_items(sources, model, ImageRules())
    trace = routing.trace(model, items, ("pairs",), 5)
    summary, lines = routing.summarize(trace, items, model, 0, 0), explored.items
    for number, router in enumerate(summary["routers"]):
        rows, tokens = trace.rows(number), explored.rows(number)
        # Read again in this process, everything comes out as the command left it.
        assert rows["expert"].tolist() == [token["expert"] for token in tokens]
        assert rows["kept"].tolist() == [token["kept"] for token in tokens]
        chosen = Counter(expert for token in tokens for expert in token["expert"])
        lost = Counter(
            e for token in tokens for e, kept in zip(token["expert"], token["kept"]) if not kept
        )
        bars = [
            f"{chosen[e]}" + (f" ({lost[e]} dropped)" if lost[e] else "")
            for e in range(router["experts"])
        ]
        if router["pool"] == "vision":
            texts = texts_of(routing_figures.patch_figure(router, rows, items))
            overlay = texts_of(routing_figures.overlay_figure(router, rows, items))
            first = [t for t in tokens if t["item"] < routing_figures.PICTURES and t["place"] >= 0]
            shown = Counter(text for text in overlay if text.isdigit())
            assert shown == Counter(str(token["expert"][0]) for token in first)
            for item in range(routing_figures.PICTURES):
                crossed = sum(not t["kept"][0] for t in first if t["item"] == item)
                assert f"{crossed} of 16 dropped (crossed)" in overlay
        else:
            texts = texts_of(routing_figures.word_figure(router, rows, items))
            said = Counter(
                lines[t["item"]]["piece_labels"]["word"][t["place"]]
                for t in tokens
                if t["place"] >= 0 and t["expert"][0] == 0
            )
            word, times = max(
                ((word, n) for word, n in said.items() if word.isalnum()), key=lambda one: one[1]
            )
            assert any(f"{word} {times}" in text.split("   ") for text in texts)
        for bar in bars:
            assert bar in texts


CELLS = (
    "return [...document.querySelectorAll('#viewer rect')].map((one) => "
    "[+one.dataset.patch, +one.dataset.expert, +one.dataset.kept]).sort((a, b) => a[0] - b[0])"
)
"""The overlay of the page as [patch, expert, kept]."""


@pytest.fixture(scope="module")
def page(explored: Explored) -> Iterator[Page]:
    """A browser; with a reason the tests of the page are skipped."""
    if reason := missing_browser():
        pytest.skip(reason)
    with browser() as opened:
        yield opened


def wanted_cells(explored: Explored, router: int, item: int) -> list[list[int]]:
    """What the overlay should show, and the words."""
    return [
        [row["place"], row["expert"][0], int(row["kept"][0])]
        for row in explored.rows(router)
        if row["item"] == item and row["place"] >= 0
    ]


def numbers_of(summary: Any) -> dict[tuple[str, int, str], int]:
    return {(r["input"], r["block"], r["pool"]): n for n, r in enumerate(summary["routers"])}


@pytest.mark.process
def test_the_page_shows_what_the_trace_says(explored: Explored, page: Page) -> None:
    summary = explored.summary
    places = numbers_of(summary)
    page.open(explored.folder / "routing.html")
    assert page.run("return document.title") == f"Routing of {explored.run}"
    assert page.run(CELLS) == wanted_cells(explored, places["pairs", 1, "vision"], 0)
    # Another block, by a click on its label.
    page.click("#blocks label:nth-of-type(2)")
    number = places["pairs", 2, "vision"]
    assert page.run(CELLS) == wanted_cells(explored, number, 0)
    words = page.run(
        "return [...document.querySelectorAll('#caption [data-piece]')].map((one) => "
        "[+one.dataset.piece, +one.dataset.expert, +one.dataset.kept])"
    )
    assert words == wanted_cells(explored, places["pairs", 2, "text"], 0) and len(words) > 5
    # The next example, by a key.
    page.press("#viewer", ARROW_RIGHT)
    assert page.run(CELLS) == wanted_cells(explored, number, 1)
    for pool in ("vision", "text"):
        rows = explored.rows(places["pairs", 2, pool])
        load = Counter(expert for row in rows for expert in row["expert"])
        lost = Counter(e for row in rows for e, k in zip(row["expert"], row["kept"]) if not k)
        bars = page.run(
            "return [...document.querySelectorAll(`[data-pool=${arguments[0]}] .load`)].map((one) => "
            "[+one.dataset.load, +one.dataset.dropped])",
            pool,
        )
        assert bars == [[load[e], lost[e]] for e in range(5 if pool == "vision" else 3)]
        totals = page.run(
            "return document.querySelector(`[data-totals=${arguments[0]}]`).textContent", pool
        )
        said = f"{len(rows)} tokens, {2 * len(rows)} choices, {sum(lost.values())} dropped"
        assert totals.startswith(said)
    nmi = page.run(
        "return Object.fromEntries([...document.querySelectorAll('#special tr[data-target]')].map((one) => "
        "[one.dataset.target, one.querySelector('td.n').textContent]))"
    )
    for one in summary["routers"][number]["specialisation"]:
        assert nmi[one["target"]] == f"{one['nmi']:.3f}"
    drawn = page.run(
        "return [...document.querySelectorAll('#pass td')].map((one) => +one.dataset.count)"
    )
    counts = [
        n
        for one in summary["consecutive"]
        if one["input"] == "pairs"
        for n in sum(one["counts"], [])
    ]
    assert sorted(drawn) == sorted(counts)
    assert page.errors() == []


@pytest.mark.process
def test_the_page_shows_one_expert(explored: Explored, page: Page) -> None:
    summary = explored.summary
    places = numbers_of(summary)
    number = places["pairs", 2, "vision"]
    rows = [row for row in explored.rows(number) if row["place"] >= 0]
    expert = Counter(row["expert"][0] for row in rows).most_common(1)[0][0]
    pressed = "return document.querySelectorAll('.load[aria-pressed=true]').length"
    page.open(explored.folder / "routing.html", "input=pairs&block=2&item=1")
    page.click(f'[data-pool="vision"] [data-expert="{expert}"]')
    assert page.run(pressed) == 1
    framed = page.run(
        "return [...document.querySelectorAll('#viewer rect.own')].map((one) => +one.dataset.patch)"
    )
    own = [row["place"] for row in rows if row["item"] == 1 and expert in row["expert"]]
    assert sorted(framed) == own
    listed = page.run(
        "return [...document.querySelectorAll('#takes [data-item]')].map((one) => "
        "[+one.dataset.item, +one.dataset.patch])"
    )
    first = {(row["item"], row["place"]) for row in rows if row["expert"][0] == expert}
    assert len(listed) == min(len(first), 48) and set(map(tuple, listed)) <= first
    companions = page.run("return document.querySelector('[data-together]').textContent")
    most = max(summary["routers"][number]["chosen_together"][expert])
    assert companions.split(", ")[0].endswith(f"({most})")
    # A click on a patch opens its picture.
    page.click("#takes [data-item]:nth-of-type(2)")
    address = f"#input=pairs&block=2&item={listed[1][0]}&pool=vision&expert={expert}"
    assert page.run("return location.hash") == address
    # Captions alone have no picture; an address leads back to what was seen.
    page.click("#inputs label:nth-of-type(3)")
    assert page.run("return document.querySelector('#viewer').hidden") and page.run(CELLS) == []
    again = f"input=images&block=2&item=4&pool=vision&expert={expert}"
    page.open(explored.folder / "routing.html", again)
    assert page.run(CELLS) == wanted_cells(explored, places["images", 2, "vision"], 4)
    assert page.run(pressed) == 1
    page.click("#all")
    assert page.run(pressed) == 0
    assert page.errors() == []


def test_an_export_routes_as_its_checkpoint_and_as_the_model_says(corpus: Corpus) -> None:
    folder = corpus.run("twice", TWICE)
    exported = export_checkpoint(folder, corpus.folder / "exported", overwrite=True)
    sources = find_sources(corpus.images, corpus.captions).sources
    traces = []
    for place in (folder, exported):
        model = routing.open_model(str(place))
        # As the run evaluates.
        assert model.model.config.capacity_factor == 1.0
        items, _ = routing.read_items(sources, model, ImageRules())
        traces.append(routing.trace(model, items, routing.INPUTS, 11).arrays())
    for name, values in traces[0].items():
        assert np.array_equal(values, traces[1][name]), name
    # What the model itself gives out of its routers.
    with torch.no_grad():
        pixels = np.stack([item.pixels for item in items if item.pixels is not None])
        mean, std = (
            torch.tensor(v) for v in (model.config.data.pixel_mean, model.config.data.pixel_std)
        )
        batch = ((torch.tensor(pixels) / 255.0 - mean) / std).permute(0, 3, 1, 2)
        outputs = model.model(pixel_values=batch, output_router_logits=True)
    read, block = traces[0]["router_input"], traces[0]["router_block"]
    for number in np.flatnonzero(read == "images"):
        place = [1, 2].index(block[number])
        own = traces[0]["router"] == number
        logits = outputs.router_logits[place].numpy()
        best = np.argsort(-logits, axis=1, kind="stable")[:, :2]
        assert np.array_equal(traces[0]["expert"][own], best)
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        assert np.allclose(traces[0]["gate"][own], np.take_along_axis(shares, best, 1), atol=1e-5)
        assert (~traces[0]["kept"][own]).sum() == int(outputs.dropped_tokens[place]) > 0


def test_shared_and_pair_pools_read_both_modalities(corpus: Corpus) -> None:
    moe = MoEConfig(
        num_vision_experts=4, layers=(2, 3), shared_router=True, vl=True, num_vl_experts=2, topk=2
    )
    model = routing.open_model(str(corpus.run("shared", moe)), capacity_factor=0.0)
    sources = find_sources(corpus.images, corpus.captions).sources
    items, _ = routing.read_items(sources, model, ImageRules())
    trace = routing.trace(model, items, routing.inputs_of(items, model)[0], 4)
    found = {(r.input, r.block, r.pool): n for n, r in enumerate(trace.routers)}
    assert ("pairs", 3, "vl") in found and ("images", 3, "shared") in found
    rows = trace.rows(found["pairs", 3, "vl"])
    pieces = [min(len(item.ids), 18) for item in items]
    # [T_CLS], pieces and [T_SEP] of every caption, [I_CLS] and patches of every picture; no padding.
    assert (rows["modality"] == routing.TEXT).sum() == sum(pieces) + 2 * len(items)
    assert (rows["modality"] == routing.IMAGE).sum() == len(items) * (1 + GRID * GRID)
    assert rows["kept"].all()
    assert Counter(zip(rows["item"], rows["modality"], rows["place"])).most_common(1)[0][1] == 1
    summary = routing.summarize(trace, items, model, 3, 0)
    router = summary["routers"][found["pairs", 3, "vl"]]
    assert "modality" in {one["target"] for one in router["specialisation"]}
    kinds = set(routing_page.page_content(summary, trace, items)["routers"][0])
    assert {"images", "texts", "words"} <= kinds


def test_routed_padding_is_in_the_trace_and_is_about_nothing(corpus: Corpus) -> None:
    moe = replace(TWICE, route_padding=True, topk=1)
    model = routing.open_model(str(corpus.run("padding", moe)))
    sources = find_sources(None, write_lines(corpus)).sources
    items, _ = routing.read_items(sources, model, ImageRules())
    trace = routing.trace(model, items, ("texts",), 2)
    rows = trace.rows(0)
    longest = 2 + max(len(item.ids) for item in items)
    assert (rows["place"] == routing.PADDING).sum() == 2 * longest - 4 - sum(
        len(item.ids) for item in items
    )
    labels = routing.token_labels(rows, items)["word"]
    assert (labels.codes >= 0).sum() == sum(len(item.ids) for item in items)
    # Which of its tokens is which cannot be told in another block.
    (passed,) = routing.summarize(trace, items, model, 0, 0)["consecutive"]
    assert np.sum(passed["counts"]) == (rows["place"] != routing.PADDING).sum()


def write_lines(corpus: Corpus) -> str:
    path = corpus.folder / "lines.txt"
    path.write_text("a red circle\n\na small blue star left of the green square\n")
    return str(path)


def test_captions_come_in_many_layouts(corpus: Corpus, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("b.png", "a.png"):
        Image.new("RGB", (8, 8)).save(folder / name)

    def found(name: str, text: str, images: bool = True) -> list[tuple[str, str]]:
        (tmp_path / name).write_text(text)
        sources = find_sources(str(folder) if images else None, str(tmp_path / name)).sources
        assert all((source.picture is not None) == images for source in sources)
        return [(source.name, source.caption) for source in sources]

    pairs = [("a.png", "a star"), ("b.png", "two")]
    swapped = pairs[::-1]
    assert found("c.txt", "a star\ntwo\n") == pairs
    assert found("c.tsv", "b.png\ttwo\na.png\ta star\n") == swapped
    assert found("d.tsv", "image\tcaption\nb.png\ttwo\na.png\ta star\n") == swapped
    lines = '{"image": "b.png", "caption": "two"}\n{"image": "a.png", "captions": ["", "a star"]}\n'
    assert found("c.jsonl", lines) == swapped
    coco = {
        "images": [{"id": 1, "file_name": "b.png"}, {"id": 2, "file_name": "gone.png"}],
        "annotations": [{"image_id": 1, "caption": "two"}, {"image_id": 2, "caption": "lost"}],
    }
    assert found("c.json", json.dumps(coco)) == [("b.png", "two")]
    partly = find_sources(str(folder), str(tmp_path / "c.json"))
    assert "2 found, 1 chosen, 0 not needed, 1 left out (first: " in partly.line(1)
    assert found("c.txt", "a star\n\ntwo\nthree\n", images=False) == [
        ("line 1", "a star"),
        ("line 3", "two"),
        ("line 4", "three"),
    ]
    assert found("c.jsonl", '{"caption": "two"}\n', images=False) == [("line 1", "two")]
    with pytest.raises(DataError, match=r"c\.txt: 3 lines of plain text for 2 pictures"):
        found("c.txt", "a star\n\ntwo\nthree\n")
    with pytest.raises(DataError, match="give their folder with --images"):
        found("c.json", json.dumps(coco), images=False)
    with pytest.raises(DataError, match=r"none\.json: not found"):
        find_sources(str(folder), str(tmp_path / "none.json"))
    # What names pictures is no text to read alone.
    for name, text in (("n.txt", "b.png\ttwo\n"), ("r.token", "b.png#0\ttwo\nb.png#1\t2\n")):
        assert found(name, text) == [("b.png", "two")]
        with pytest.raises(DataError, match="give their folder with --images"):
            found(name, text, images=False)
    assert found("c.jsonl", '{"captions": ["", "two"]}\n', images=False) == [("line 1", "two")]
    # Nor are the lines of a table captions, be they as many as there are pictures.
    with pytest.raises(DataError, match=r"d\.csv: "):
        found("d.csv", "file,said\na.png,a star\n")
    (tmp_path / "bad.txt").write_bytes(b"a star\n\xff\n")
    partly = find_sources(str(folder), str(tmp_path / "bad.txt"))
    assert [(source.name, source.caption) for source in partly.sources] == [("a.png", "a star")]
    assert "2 found, 1 chosen, 0 not needed, 1 left out (first: " in partly.line(1)


def test_tars_and_folders_have_pictures_and_captions(tmp_path: Path) -> None:
    folder = tmp_path / "samples"
    (folder / "deep").mkdir(parents=True)
    for name in ("a", "deep/b"):
        Image.new("RGB", (8, 8)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a star {name}")
    with tarfile.open(tmp_path / "samples.tar", "w") as tar:
        tar.add(folder, ".")
    for captions in (folder, tmp_path / "samples.tar"):
        sources = find_sources(None, str(captions)).sources
        said = {source.name.removeprefix("./"): source.caption for source in sources}
        assert said == {"a.png": "a star a", "deep/b.png": "a star deep/b"}
        assert all(source.picture is not None and source.picture.read() for source in sources)
        with pytest.raises(DataError, match="has its pictures in it: leave out --images"):
            find_sources(str(folder), str(captions))
    # Pictures alone: the other files are told.
    alone = find_sources(str(folder), None)
    assert [source.name for source in alone.sources] == ["a.png", "deep/b.png"]
    assert alone.line(2) == "2 found, 2 chosen, 0 not needed; passed over: .txt 2"
    (folder / "empty").mkdir()
    (folder / "empty" / "notes.pdf").write_text("no picture")
    with pytest.raises(DataError, match=r"empty: nothing in it to read: .* passed over: \.pdf 1"):
        find_sources(str(folder / "empty"), None)
    (tmp_path / "plain.txt").write_text("a star\n")
    for images, captions in ((str(folder), None), (None, str(tmp_path / "plain.txt"))):
        with pytest.raises(DataError, match="--split test: nothing in .* names a split"):
            find_sources(images, captions, ("test",))


STRANGE = (
    ("$a$\\frac$.png", "L", "costs $5 & <script>alert('x')</script> \"_b\" ${1}"),
    (
        "caf\udce9 <b>.png",
        "CMYK",
        "\u0646\u062c\u0645\u0629 \u062d\u0645\u0631\u0627\u0621 \u661f\u5f62",
    ),
    ("long/wide.png", "RGBA", " ".join(["a small red circle"] * 30)),
    ("long/tall.gif", "P", "."),
)
"""Names, kinds and captions of pictures; a name that is no UTF-8 is as Python has it."""


@pytest.fixture(scope="module")
def strange(corpus: Corpus) -> tuple[Path, str]:
    """The folder of what the command makes of them, and what it prints."""
    folder = corpus.folder / "strange"
    (folder / "long").mkdir(parents=True)
    lines = []
    for number, (name, mode, caption) in enumerate(STRANGE):
        size = (90 - 20 * number, 30)
        pictures = [Image.new("RGB", size, (value, 90, 0)).convert(mode) for value in (9, 99)]
        more: dict[str, Any] = {"save_all": True, "append_images": pictures[1:]}
        kind = {"CMYK": "TIFF", "P": "GIF"}.get(mode, "PNG")
        pictures[0].save(folder / name, format=kind, **(more if mode == "P" else {}))
        lines.append(json.dumps({"image": name, "caption": caption}) + "\n")
    (folder / "captions.jsonl").write_text("".join(lines))
    words = ["--images", str(folder), "--captions", str(folder / "captions.jsonl")]
    words += ["--load", str(corpus.run("twice", TWICE)), "--output", str(folder / "out")]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        main([*words, "--permutations", "0"])
    return folder / "out", printed.getvalue()


def test_a_damaged_picture_is_left_out_with_its_caption(
    corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = corpus.folder / "partly-damaged"
    folder.mkdir()
    rows = []
    for number in range(3):
        Image.new("RGB", (40, 30), (60 * number, 90, 0)).save(folder / f"{number}.jpg")
        rows.append(
            json.dumps({"image": f"{number}.jpg", "caption": f"a red circle {number}"}) + "\n"
        )
    (folder / "1.jpg").write_bytes((folder / "1.jpg").read_bytes()[:-300])
    (folder / "captions.jsonl").write_text("".join(rows))
    words = ["--images", str(folder), "--captions", str(folder / "captions.jsonl")]
    words += ["--load", str(corpus.run("twice", TWICE)), "--output", str(folder / "out")]
    main([*words, "--permutations", "0"])
    printed = capsys.readouterr().out
    assert "3 found, 2 chosen, 0 not needed, 1 left out (first: " in printed.splitlines()[0]
    assert "1.jpg: corrupt image" in printed.splitlines()[1]
    lines = (folder / "out" / "items.jsonl").read_text().splitlines()
    items = [(row["name"], row["caption"]) for row in map(json.loads, lines)]
    assert items == [("0.jpg", "a red circle 0"), ("2.jpg", "a red circle 2")]


def test_strange_names_pictures_and_captions(strange: tuple[Path, str]) -> None:
    folder, printed = strange
    assert "4 found, 4 chosen, 0 not needed\n" in printed
    items = [json.loads(row) for row in (folder / "items.jsonl").read_text().splitlines()]
    assert [item["name"] for item in items] == [
        *("$a$\\frac$.png", "caf\\udce9 <b>.png", "long/wide.png", "long/tall.gif"),
    ]
    for name, length in MODEL_LENGTHS.items():
        cut = sum(len(item["pieces"]) > length - 2 for item in items)
        line = f"{name}: {cut} of 4 captions are cut after {length - 2} pieces, as in training\n"
        assert cut and line in printed
    for router in json.loads((folder / "routing.json").read_text())["routers"]:
        if router["pool"] == "text":
            # [T_CLS] and [T_SEP] besides what is read.
            most = MODEL_LENGTHS[router["input"]] - 2
            assert router["tokens"] == sum(2 + min(most, len(item["pieces"])) for item in items)
    source = (folder / "routing.html").read_text()
    assert source.count("<script") == 2 and "alert('x')" not in source
    (content,) = re.findall(r'<script type="application/json" id="content">(.*?)</script>', source)
    told = json.loads(content)["items"]
    assert [item["caption"] for item in told] == [caption for _, _, caption in STRANGE]
    assert len(list(folder.glob("*.png"))) == 6


@pytest.mark.process
def test_the_page_of_strange_captions(strange: tuple[Path, str], page: Page) -> None:
    folder, _ = strange
    page.open(folder / "routing.html", "input=pairs&block=2&item=2")
    assert (
        page.run("return document.querySelector('#which').textContent") == "3 of 4: long/wide.png"
    )
    counted = page.run("return document.querySelector('#counts').textContent")
    assert re.search(r" pieces of words, .* and \d+ more that are too many for the model", counted)
    # Addresses that nobody gets by clicking.
    for address in ("pool=vision&expert=-1", "pool=vision&expert=1.5", "pool=text&expert=9", "x=1"):
        page.open(folder / "routing.html", f"input=pairs&block=1&{address}")
        assert page.run("return document.querySelectorAll('#takes .every').length") == 2
    assert page.errors() == []


def test_a_router_that_gives_no_numbers_is_one_clear_line(corpus: Corpus) -> None:
    model = routing.open_model(str(corpus.run("twice", TWICE)))
    items, _ = routing.read_items(
        find_sources(None, write_lines(corpus)).sources, model, ImageRules()
    )
    with torch.no_grad():
        model.model.encoder.layer[1].layernorm_before.weight.fill_(math.nan)
    with pytest.raises(UserError, match="twice: the gates of block 2 .* has its training diverged"):
        routing.trace(model, items, ("texts",), 2)


CHOOSING = replace(TWICE, routing="expert_choice", topk=1)
VISION = MoEConfig(num_vision_experts=4, layers=(2,), modalities="vision")


@pytest.mark.parametrize(
    ("name", "moe", "model", "words", "message"),
    [
        ("dense", MoEConfig(), {}, "--images IMAGES", "a dense model: no block"),
        (
            "vision",
            VISION,
            {},
            "--captions LINES",
            "no router reads texts: the experts of .* vision",
        ),
        (
            "no-text",
            VISION,
            {"vocab_size": 0},
            "--captions LINES",
            "of images alone reads no captions",
        ),
        ("choosing", CHOOSING, {}, "--images IMAGES", "its experts choose tokens"),
        ("twice", TWICE, {}, "", "neither --images nor --captions is given"),
        ("twice", TWICE, {}, "--images nowhere", "nowhere: not found"),
        ("twice", TWICE, {}, "--images DAMAGED", "bad.jpg: corrupt image"),
        (
            "twice",
            TWICE,
            {},
            "--images IMAGES --text-tokenizer nowhere",
            "cannot read text tokenizer",
        ),
        ("twice", TWICE, {}, "--images IMAGES --num-items 0", "--num-items 0"),
        ("twice", TWICE, {}, "--images IMAGES --capacity-factor nan", "--capacity-factor nan"),
        ("gone", None, {}, "--images IMAGES", "no checkpoint there"),
    ],
)
def test_one_clear_line(name, moe, model, words, message, corpus: Corpus, tmp_path: Path) -> None:
    folder = corpus.run(name, moe, **model) if moe else tmp_path / "gone"
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "bad.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    places = {
        "IMAGES": corpus.images,
        "LINES": write_lines(corpus),
        "DAMAGED": str(tmp_path / "damaged"),
    }
    given = [places.get(word, word) for word in words.split()]
    with pytest.raises(UserError, match=message) as error:
        main(["--load", str(folder), *given, "--output", str(tmp_path / "out")])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_model_of_vision_experts_shows_pictures_with_their_captions(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--images", corpus.images, "--captions", corpus.captions, "--permutations", "0"]
    main(["--load", str(corpus.run("vision", VISION)), *words, "--output", str(tmp_path / "o")])
    summary = json.loads((tmp_path / "o" / "routing.json").read_text())
    met = {(r["input"], r["pool"]) for r in summary["routers"]}
    assert met == {("pairs", "vision"), ("images", "vision")}
    assert "no router reads texts" in capsys.readouterr().out
    assert not list((tmp_path / "o").glob("words*"))


def test_the_truth_of_the_sample_corpus_is_where_it_was_drawn(corpus: Corpus) -> None:
    files = sorted(Path(corpus.images).glob("*.jpg"))
    scenes = known_scenes(files[0].absolute())
    agreed = []
    for file in files:
        scene = scenes[file.absolute()]
        drawn, shown = np.asarray(render_picture(scene)).astype(int), np.asarray(shape_map(scene))
        ground = np.abs(drawn - BACKGROUND_VALUES[scene.background]).max(axis=2) < 4
        # All but the rims of shapes, which are mixed colours.
        assert (ground == (shown == 0)).mean() > 0.97
        colors, kinds = patch_truth(scene, 32, GRID)
        names = {(shape.color, shape.kind) for shape in scene.shapes}
        assert {pair for pair in zip(colors, kinds) if pair[1] != "background"} <= names
        square = Image.open(file).convert("RGB").resize((32, 32))
        seen = foreground(np.asarray(square).transpose(2, 0, 1), GRID)
        agreed += (seen == (np.array(kinds) != "background")).tolist()
    assert np.mean(agreed) > 0.93
    assert known_scenes(Path("/nowhere/a.jpg")) == {}


@pytest.mark.parametrize(("grid", "side", "detail"), [(14, 256, 256), (30, 480, 120)])
def test_a_page_of_100_pictures_stays_below_10_mb(
    tmp_path: Path, grid: int, side: int, detail: int
) -> None:
    """At the sizes of the paper's BASE with 32 experts in six blocks: of noise, which JPEG does not shrink, in
    pretraining, and of about what photographs have, in fine-tuning on VQA.
    """
    rng = np.random.default_rng(0)
    patches, blocks, k = grid**2, (2, 4, 6, 8, 10, 12), 2
    noise = [
        Image.fromarray(rng.integers(0, 255, (detail, detail, 3), dtype=np.uint8)).resize(
            (side, side)
        )
        for _ in range(8)
    ]
    labels = {"color": ["red"] * patches}
    items = [
        routing.Item(
            f"{n}.jpg", np.zeros((224, 224, 3), np.uint8), noise[n % 8], patch_labels=labels
        )
        for n in range(100)
    ]
    routers = tuple(
        routing.Router(read, block, "vision", 32)
        for read in ("pairs", "images")
        for block in blocks
    )
    tokens = 100 * (1 + patches)
    size = len(routers) * tokens
    columns = {
        "router": np.repeat(np.arange(len(routers), dtype=np.int16), tokens),
        "item": np.tile(np.repeat(np.arange(100, dtype=np.int32), 1 + patches), len(routers)),
        "modality": np.ones(size, dtype=np.int8),
        "place": np.tile(np.arange(-1, patches, dtype=np.int16), 100 * len(routers)),
        "expert": rng.integers(0, 32, (size, k)).astype(np.int16),
        "gate": rng.random((size, k)).astype(np.float32),
        "kept": rng.random((size, k)) < 0.9,
    }
    trace = routing.Trace(routers, columns)
    config = RunConfig(model=ModelConfig(), moe=MoEConfig(topk=k))
    holder: Any = type("Model", (), {"config": type("C", (), {"capacity_factor": 1.0})})
    summary = routing.summarize(trace, items, routing.Model("x", config, holder, None), 0, 0)
    page = routing_page.write_routing_page(summary, trace, items, tmp_path)
    assert page.stat().st_size < 10_000_000
    assert page.read_text().count("data:image/jpeg;base64,") == 100
    assert len(set(routing_figures.expert_colors(32))) == 32
