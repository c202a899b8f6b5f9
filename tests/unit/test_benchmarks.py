"""Benchmarks at tiny sizes: their contenders agree, and they make rows."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import SMALL

from megatron_vlmoe.benchmarks import (
    checkpoint,
    data,
    export,
    moe_layer,
    preprocess,
    scaling,
    step,
)
from megatron_vlmoe.benchmarks.compare import Row, table
from megatron_vlmoe.benchmarks.options import (
    CheckpointOptions,
    DataOptions,
    ExportOptions,
    PreprocessOptions,
    ScalingOptions,
)
from megatron_vlmoe.commands import bench
from megatron_vlmoe.config.errors import ConfigError, TrainingError
from megatron_vlmoe.convert.hf.moe_vlmoe import VLMoEExperts
from megatron_vlmoe.data.order import MAX_TABLE


def measured(rows: list[Row]) -> dict[str, Row]:
    """Rows by contender; all can be written."""
    json.dumps([row.record() for row in rows])
    assert len(list(table(rows))) == len(rows) + 2
    assert all(bool(row.rounds_ms) != row.note.startswith("not run") for row in rows)
    return {row.contender: row for row in rows}


LOADER = DataOptions(
    images=6, width=100, height=75, size=32, batch=4, documents=(), rounds=1, turn_seconds=0.0
)


def test_the_loader_makes_the_pixels_of_the_bare_loop() -> None:
    options = dataclasses.replace(LOADER, clock="cpu")
    for jitter, rows in zip(options.color_jitter, data.run(options), strict=True):
        found = measured(rows)
        assert list(found) == ["pillow", "ours", "pillow_worker", "ours_worker"]
        assert rows[0].case["color_jitter"] == jitter
        assert found["pillow"].ratio_to_dense == 1 and found["ours"].ratio_to_dense is not None
        assert found["ours"].per_second() == pytest.approx(4e3 / found["ours"].rounds_ms[0], 0.01)
        assert "needs the wall clock" in found["ours_worker"].note


@pytest.mark.process
def test_loaders_with_workers_are_measured() -> None:
    (rows,) = data.run(dataclasses.replace(LOADER, color_jitter=(0.4,)))
    assert measured(rows)["ours_worker"].rounds_ms


def test_other_pixels_end_the_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data.write_images(tmp_path / "images", LOADER)
    bare = data.bare_pixels
    monkeypatch.setattr(data, "bare_pixels", lambda drawn, size: bare(drawn, size) ^ 1)
    with pytest.raises(RuntimeError, match="pixels of micro-batch 0 differ"):
        data.compare_speed(tmp_path / "images", 0.4, LOADER)


@pytest.mark.process
def test_memory_of_workers_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    options = DataOptions(
        color_jitter=(), documents=(2000, 10**9), workers=1, texts=2, micro_batches=1
    )
    # As on a machine where a billion documents do not fit.
    monkeypatch.setattr(data, "memory_needed", refuse_large)
    small, large = data.run(options)
    assert list(measured(small)) == ["tables_per_worker", "ours", "ours_again"]
    found = measured(large)
    assert found["tables_per_worker"].note.startswith("not run") and 10**9 > MAX_TABLE
    for name in ("ours", "ours_again"):
        assert found[name].peak_mb is not None and found[name].peak_mb < 50


def refuse_large(gigabytes: float) -> None:
    if gigabytes > 1:
        raise data.NotRun("too large")


def test_generated_texts_are_what_an_index_would_say() -> None:
    texts = data.GeneratedTexts(3000)
    lengths = texts.sequence_lengths[np.arange(3000)]
    assert lengths.min() >= 16 and lengths.max() <= 600
    ends = np.cumsum(lengths)
    assert [texts.items_before(i) for i in (0, 1, 1024, 2999, 3000)] == [
        0,
        *(int(ends[i - 1]) for i in (1, 1024, 2999, 3000)),
    ]
    assert len(texts.sequence_slice(2999, 3, 5)) == 5
    with pytest.raises(IndexError):
        texts.sequence_slice(0, 0, 601)


INDEXING = PreprocessOptions(
    texts=40,
    words=8,
    vocab_size=150,
    images=5,
    width=60,
    height=50,
    captions=2,
    resize_short=(0, 32),
    rounds=1,
    turn_seconds=0.0,
    clock="cpu",
)


def test_indexing_writes_the_files_of_the_bare_loop() -> None:
    cases = [measured(rows) for rows in preprocess.run(INDEXING)]
    assert [list(found) for found in cases] == [
        ["bare", "ours", "megatron"],
        ["bare", "ours"],
        ["bare", "ours"],
        ["bare", "ours"],
    ]
    assert [found["ours"].items for found in cases] == [40, 5, 5, 5]


def test_another_file_ends_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocess, "preprocess_text", lambda *_: None)
    monkeypatch.setattr(preprocess.filecmp, "cmp", lambda *_, shallow: False)
    with pytest.raises(RuntimeError, match="writes another text_document.bin"):
        list(preprocess.run(dataclasses.replace(INDEXING, images=0)))


@pytest.mark.process
def test_saving_and_loading_are_measured(tmp_path: Path) -> None:
    options = CheckpointOptions(
        preset=("tiny-8e",),
        words=tuple(SMALL),
        vocab_size=300,
        visual_vocab_size=200,
        folder=str(tmp_path),
        step_seconds=0.01,
        rounds=1,
        turn_seconds=0.0,
    )
    saving, loading = checkpoint.run(options)
    found = measured(saving)
    background = ["ours_async", "ours_async_updated_at_once"]
    assert list(found) == ["torch_save", "torch_save_synced", "ours", *background]
    for name in background:
        assert list(found[name].phases_ms) == ["stall", "page_copies"]
        assert re.match(r"\d+\.\d{3} of ours", found[name].note)
    assert "complete after" in found["ours_async_updated_at_once"].note
    assert list(measured(loading)) == ["torch_load", "ours"]
    assert not list(tmp_path.iterdir())


# Vocabularies that need no padding, and stochastic depth, which the check leaves out.
STEPS = step.StepOptions(
    presets=("tiny-dense",),
    plain=True,
    transformers=True,
    texts=1,
    images=1,
    pairs=1,
    rounds=1,
    steps=1,
    warmup=0,
    precision="fp32",
    vocab_size=128,
    visual_vocab_size=128,
    caption_mask_slots=4,
)
DROP_PATH = ("--model.drop_path", "0.5")


def test_layers_of_transformers_make_the_same_model() -> None:
    (rows,) = step.run(STEPS, DROP_PATH)
    assert list(measured(rows)) == ["tiny-dense", "plain_pytorch", "transformers_layers"]
    assert len({row.parameters for row in rows}) == 1
    for row in rows:
        # Parameters, gradients and two moments, in fp32.
        assert row.state_mb == pytest.approx(16e-6 * (row.parameters or 0), rel=0.01)
        assert f"{row.parameters:,}" in "".join(table(rows))


def test_another_loss_ends_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    modeling = pytest.importorskip("transformers.models.siglip.modeling_siglip")
    made = modeling.SiglipMLP.forward
    monkeypatch.setattr(modeling.SiglipMLP, "forward", lambda self, hidden: 2 * made(self, hidden))
    with pytest.raises(RuntimeError, match="the loss of transformers' layers is off"):
        list(step.run(STEPS, DROP_PATH))


TINY = ScalingOptions(
    axis=("experts", "sequence"),
    size="tiny",
    experts=(2,),
    lengths=(16, 32),
    base_samples=1,
    vocab_size=128,
    visual_vocab_size=128,
    rounds=1,
)


def test_steps_are_measured_by_experts_and_length(tmp_path: Path) -> None:
    cases = list(scaling.run(TINY))
    found = [measured(rows)["moe"] for rows in cases]
    assert [row.case["experts"] for row in found] == [2, 8, 8]
    assert [row.case.get("length") for row in found] == [None, 16, 32]
    # Twice as many texts of half the length.
    assert found[1].case["tokens"] == found[2].case["tokens"] == 32
    assert all(row.ratio_to_dense is not None for row in found)
    assert (found[0].parameters or 0) < (found[1].parameters or 0)
    scaling.draw([row for rows in cases for row in rows], tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 1000


def test_layers_are_measured_by_tokens() -> None:
    options = dataclasses.replace(TINY, axis=("tokens",), work="layer", samples=(1, 2))
    cases = [measured(rows) for rows in scaling.run(options)]
    assert [list(found) for found in cases] == [["dense", "moe"]] * 2
    assert [found["moe"].case["tokens"] for found in cases] == [128, 256]


def test_a_row_is_read_as_it_was_written() -> None:
    row = Row({"tokens": 8}, "moe", [2.0, 4.0], {"forward": [2.0, 4.0]}, 1.5, 3.0, "", 8, 1.0, 10)
    assert Row.read(json.loads(json.dumps(row.record())), 8).record() == row.record()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts": (4, 0)}, "--experts 0: must be at least 1"),
        ({"work": "layer", "axis": ("sequence",)}, "--axis sequence needs --work step"),
        (
            {"work": "layer", "axis": ("tokens",), "base_experts": 129},
            "--experts 129: a layer of tiny has at most 128",
        ),
        ({"lengths": (48, 64)}, "--lengths 48 does not divide the longest"),
    ],
)
def test_options_that_do_not_go_together(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        next(scaling.run(dataclasses.replace(TINY, **change)))


def test_torchrun_measures_ranks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="--axis must be ranks alone"):
        next(scaling.run(TINY))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("data --batch 0", "--batch 0: must be at least 1"),
        ("data --documents 10 -5", "--documents -5: must be at least 1"),
        ("data --workers 0", "--workers 0: must be at least 1"),
        ("data --color-jitter nan", "--color-jitter nan: must be at least 0"),
        ("data --color-jitter --documents", "nothing to measure"),
        ("preprocess --texts -1", "--texts -1: must be at least 0"),
        ("preprocess --texts 0 --images 0", "nothing to measure"),
        ("checkpoint --preset tiny-8e --rounds 0", "--rounds 0: must be at least 1"),
        ("checkpoint --presets tiny-8e --turn-seconds -1", "--turn-seconds -1.0: must be at"),
        ("data --output /dev/null/x.json", "--output /dev/null/x.json: /dev/null is a file"),
        ("data --output /dev/full", "--output /dev/full: is no regular file"),
        (f"data --output {'x' * 300}.json", "File name too long"),
        ("data --color-jitter inf", "--color-jitter inf: must be at most"),
        ("data --documents 99999999999999", "--documents 99999999999999: must be at most"),
        ("preprocess --width 99999", "--width 99999: must be at most 65500"),
        ("preprocess --vocab-size 5", "--vocab-size 5: must be at least 6"),
        ("data --threads 99999999999", "--threads 99999999999: must be at most 4096"),
        ("checkpoint --folder /none", "--folder /none: no such folder"),
        ("checkpoint --preset tiny-8e nosuch", "nosuch"),
        ("checkpoint --model.nosuch 4", "model.nosuch"),
        ("scaling --axis", "bench scaling: nothing to measure"),
        ("scaling --axis tokens --layout expert", "--layout expert needs --axis ranks"),
        (
            "scaling --layout expert --base-experts 3",
            "--layout expert: --base-experts 3 is no multiple of --ranks 2",
        ),
        ("export --size tiny --inputs --short-text 0", "bench export: nothing to measure"),
        ("export --experts", "bench export: nothing to measure"),
        ("moe_layer --topk 3", "--topk 3: expected one of 1, 2"),
        ("moe_layer --experts 1", "--topk 2 is more than --experts 1"),
        ("step --preset tiny-8e --vocab-size 0", "--vocab-size 0: expected a whole number of at"),
        (
            "step --preset tiny-8e --dispatcher alltoall --moe.dispatcher dropless",
            "--dispatcher and --moe.dispatcher are the same option",
        ),
        (
            "step --preset tiny-dense small-dense --texts 1 --images 0 --pairs 0",
            "--preset small-dense: reads batches of other shapes than tiny-dense",
        ),
    ],
)
def test_numbers_that_are_no_work_are_named(
    words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        bench.main(words.split())
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


LAYER = "moe_layer --tokens 128 --width 64 --experts 2 --topk 1 --rounds 1 --contenders dense"


@pytest.mark.parametrize(
    ("output", "present", "message"),
    [
        ("a.md", (), "the rows are JSON: give it a name that ends with .json"),
        ("a.png", (), "the rows are JSON"),
        ("prog.py", ("prog.py",), "prog.py: is not of a benchmark, and would be replaced"),
        ("notes.json", ("notes.md",), "notes.md, which is there without it, would be replaced"),
        ("notes.json", ("notes.png",), "notes.png, which is there without it"),
    ],
)
def test_what_is_not_of_a_benchmark_is_not_replaced(
    output: str, present: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    for name in present:
        (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match=message):
        bench.main([*LAYER.split(), "--output", str(tmp_path / output)])
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        name: "mine" for name in present
    }


def test_earlier_rows_are_replaced_and_what_is_named_twice_is_measured_once(tmp_path: Path) -> None:
    words = [*LAYER.split(), "--output", str(tmp_path / "rows.json")]
    bench.main(words)
    first = json.loads((tmp_path / "rows.json").read_text())
    bench.main([*words, "--load", "balanced", "balanced", "--gradients", "new", "new"])
    second = json.loads((tmp_path / "rows.json").read_text())
    assert len(first) == len(second) == 1
    assert first[0]["case"] == second[0]["case"] and first[0]["contender"] == "dense"


def test_a_benchmark_without_memory_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(moe_layer, "make_problem", without)
    with pytest.raises(TrainingError, match="out of memory on the host: measure less"):
        bench.main([*LAYER.split(), "--output", str(tmp_path / "rows.json")])


def test_missing_transformers_is_a_note_or_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec

    def absent(name: str, *more: Any) -> Any:
        if name == "transformers":
            return None
        if name.startswith("transformers."):
            raise ModuleNotFoundError("No module named 'transformers'")
        return found(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", absent)
    words = LAYER.replace("--contenders dense", "--contenders transformers_eager").split()
    bench.main([*words, "--output", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["note"] for row in rows] == ["", "not run: needs transformers 5"]
    with pytest.raises(ConfigError, match="bench export needs transformers: pip install"):
        bench.main(["export"])


EXPORT = ExportOptions(
    size="tiny",
    experts=(4,),
    inputs=("pairs",),
    batch=(1,),
    short_text=5,
    rounds=1,
    turn_seconds=0.0,
    clock="cpu",
)


def test_inference_of_an_export_is_measured() -> None:
    found = [measured(rows) for rows in export.run(EXPORT)]
    for number, rows in enumerate(found):
        assert list(rows) == ["dense", *EXPORT.contenders]
        assert rows["dense"].ratio_to_dense == 1 and rows["ours"].ratio_to_dense is not None
        # A pair of 40 tokens and 37 of its image; then a text.
        kind, tokens = (("pairs", 77), ("texts", 5))[number % 2]
        assert {row.items for row in rows.values()} == {tokens}
        assert rows["ours"].case["inputs"] == kind
        assert rows["ours"].case["topk"] == 1 + number // 2
    assert len(found) == 4


def test_bf16_is_measured() -> None:
    options = dataclasses.replace(EXPORT, precision="bf16", topk=(2,), batch=())
    (rows,) = export.run(options)
    assert all(row.rounds_ms for row in rows)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("in_place", "equal experts, texts: off by"),
        ("batched", r"ours_batched_mm, encoder\.layer\.1\.feed_forward\.text: off by"),
    ],
)
def test_other_outputs_end_the_benchmark(
    monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.setattr(VLMoEExperts, name, lambda self, rows, *_: torch.zeros_like(rows))
    with pytest.raises(RuntimeError, match=message):
        list(export.run(dataclasses.replace(EXPORT, batch=())))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"topk": (5,)}, "--topk 5 is more than --experts 4"),
        ({"batch": (1, 0)}, "--batch 0"),
        ({"rounds": 0}, "--rounds 0"),
        ({"short_text": -1}, "--short-text -1"),
        ({"short_text": 65}, "--short-text 65: texts of tiny have up to 64 tokens"),
    ],
)
def test_numbers_that_fit_no_export_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        list(export.run(dataclasses.replace(EXPORT, **given)))
