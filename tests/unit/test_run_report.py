"""`vlmoe report`: its numbers are those of the files of runs, and what is missing or wrong is said."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pages import Page

from megatron_vlmoe.analysis.paper_tables import TABLE_1, TABLE_2
from megatron_vlmoe.commands.main import main
from megatron_vlmoe.config.command_line import to_yaml
from megatron_vlmoe.config.presets import apply_recipe, preset
from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.planning.estimate import flops_per_step, head_slots
from megatron_vlmoe.planning.parameters import parameter_counts
from megatron_vlmoe.stream.layout import StreamLayout
from megatron_vlmoe.stream.sizes import num_micro_batches

NASTY = "a <b> & |x| $y$ _z_"
SIZES = (("dev", 6982), ("test", 6967), ("val", 50_000))
Rows = Sequence[dict[str, Any]]


def config_of(name: str, **more: Any) -> RunConfig:
    config = preset(name)
    model = replace(config.model, vocab_size=300, visual_vocab_size=64)
    return replace(config, model=model, train=replace(config.train, steps=400, seed=1), **more)


def metrics(seed: int, pools: Sequence[str], steps: int = 40) -> list[dict[str, Any]]:
    """A run that logs every 10 steps and evaluates every 100; of a value that is not finite there is null."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for number in range(1, steps + 1):
        row = {"step": 10 * number}
        names = ["loss/mlm", "loss/mim", "grad_norm", "lr", "step_seconds", "tokens_per_second"]
        names += ["tflops_per_second_per_rank", "memory_gb", "data_wait_fraction"]
        for pool in pools:
            names += [f"loss/aux/{pool}", f"moe/{pool}/layer_2/load_max"]
            for name in ("load_max", "load_min", "dead_experts", "dropped_fraction"):
                names.append(f"moe/{pool}/{name}")
            names += [f"moe/{pool}/dropped_fraction/mim", f"moe/{pool}/router_entropy"]
        if number % 10 == 0:
            names += [f"{start}/mim" for start in ("eval/loss", "unigram", "acc")]
            names += ["acc/mim_foreground", "acc/mim_background", "eval/grounding/mim"]
        row |= {name: float(rng.uniform(0.1, 2.0)) for name in names}
        rows.append(row | {"tokens_per_second": float(rng.uniform(1e3, 9e3))})
    rows[7]["tokens_per_second"] = None
    return rows


def make_run(folder: Path, config: RunConfig | None, rows: Rows = (), results: Any = None) -> Path:
    folder.mkdir(parents=True)
    if config is not None:
        (folder / "config.yaml").write_text(to_yaml(config))
    if rows:
        lines = [json.dumps(row) for row in rows]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    if results is not None:
        (folder / "metrics.json").write_text(json.dumps(results))
    return folder


def tuned(load: str, task: str = "nlvr2", seed: int = 1, lr: float = 1e-3) -> RunConfig:
    config = apply_recipe(task, config_of("tiny-8e"))
    return replace(
        config,
        train=replace(config.train, seed=seed),
        optim=replace(config.optim, lr=lr),
        checkpoint=replace(config.checkpoint, load=load),
    )


def scores(task: str, checkpoint: Path | str = "", **values: float) -> dict[str, Any]:
    named = {name.replace("__", "/"): value for name, value in values.items()}
    return {
        "task": task,
        "metrics": named,
        "settings": {"checkpoint": str(checkpoint), "data": "d"},
    }


def official(task: str, checkpoint: Path | str = "", **values: float) -> dict[str, Any]:
    """Scores on as many samples as the official splits have."""
    splits = {name.partition("__")[0] for name in values}
    samples = {f"{split}__samples": float(count) for split, count in SIZES if split in splits}
    return scores(task, checkpoint, **values, **samples)


def report(output: Path, *runs: Path) -> tuple[Page, str, str]:
    """The page, its source and the Markdown of a report on runs."""
    assert main(["report", *map(str, runs), "--output", str(output)]) == 0
    source = (output / "report.html").read_text()
    return Page(source), source, (output / "report.md").read_text()


def table(page: Page, title: str, keys: int = 1) -> dict[tuple[str, ...], dict[str, str]]:
    """The table that has a column of this title: its rows by their first cells."""
    (rows,) = [rows for rows in page.tables if title in rows[0]]
    first, *others = rows
    return {tuple(row[:keys]): dict(zip(first, row)) for row in others}


def values(rows: Rows, key: str) -> np.ndarray:
    return np.array([row[key] for row in rows if row.get(key) is not None])


def test_numbers_are_those_of_the_files(tmp_path: Path) -> None:
    """Against a recount with numpy, from the lines that were written."""
    kept = {"sparse": metrics(1, ("text", "vision")), "dense": metrics(2, (), 30)}
    configs = {"sparse": config_of("tiny-8e"), "dense": config_of("tiny-dense")}
    # The run was resumed at step 200: what the first attempt logged after it is not the run's.
    abandoned = [row | {"memory_gb": 99.0, "loss/mim": 9.0} for row in kept["sparse"][20:33]]
    lines = {"sparse": [*kept["sparse"][:20], *abandoned, *kept["sparse"][20:]]}
    runs = [make_run(tmp_path / name, configs[name], lines.get(name, kept[name])) for name in kept]
    page, _, text = report(tmp_path / "out", *runs)
    cost = table(page, "peak memory, GB")
    evaluation = table(page, "loss, nats", 2)
    for name, rows in kept.items():
        own = cost[name,]
        counts = parameter_counts(configs[name])
        flops = flops_per_step(configs[name])
        assert own["parameters"] == f"{counts.total:,}"
        assert own["per token of a pair"] == f"{counts.per_token:,}"
        assert own["FLOPs per step"] == f"{flops:.4g}"
        assert own["FLOPs so far"] == f"{flops * rows[-1]['step']:.4g}"
        assert own["token slots/s"] == f"{np.median(values(rows, 'tokens_per_second')):,.0f}"
        assert own["seconds per step"] == f"{np.median(values(rows, 'step_seconds')):.3f}"
        assert own["peak memory, GB"] == f"{values(rows, 'memory_gb').max():.2f}"
        seconds = round(10 * values(rows, "step_seconds").sum())
        assert (
            own["training time"] == f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
        )
        own = evaluation["masked image (images)", name]
        assert own["step"] == f"{rows[-1]['step']}"
        assert own["loss, nats"] == f"{rows[-1]['eval/loss/mim']:.4f}"
        assert own["guessing by frequency"] == f"{rows[-1]['unigram/mim']:.4f}"
        assert own["right, %"] == f"{100 * rows[-1]['acc/mim']:.2f}"
        assert own["right in the foreground, %"] == f"{100 * rows[-1]['acc/mim_foreground']:.2f}"
        assert own["grounding, nats"] == f"{rows[-1]['eval/grounding/mim']:.4f}"
    less = kept["dense"][-1]["eval/loss/mim"] - kept["sparse"][-1]["eval/loss/mim"]
    assert own["against sparse"] == f"{less:+.4f}"
    balance = table(page, "pool", 2)
    assert sorted(balance) == [("sparse", "text"), ("sparse", "vision")]
    for (_, pool), own in balance.items():
        last = kept["sparse"][-4:]  # a tenth of 40
        for title, metric, scale, digits in (
            ("fullest expert", "load_max", 1, 3),
            ("emptiest expert", "load_min", 1, 3),
            ("dead experts", "dead_experts", 1, 2),
            ("dropped, %", "dropped_fraction", 100, 2),
            ("of images, %", "dropped_fraction/mim", 100, 2),
            ("router entropy, nats", "router_entropy", 1, 3),
        ):
            mean = scale * values(last, f"moe/{pool}/{metric}").mean()
            assert own[title] == f"{mean:.{digits}f}", (pool, title)
        assert own["auxiliary loss"] == f"{values(last, f'loss/aux/{pool}').mean():.4g}"
        assert own["experts per block"] == "8"
    options = table(page, "option")
    assert options["moe.num_text_experts",] == {
        **{"option": "moe.num_text_experts", "sparse": "8", "dense": "0"}
    }
    assert ("model.hidden_size",) not in options
    # The Markdown has the same cells.
    written = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line[:2] == "| "]
    plain = [[re.sub(r"\\(.)", r"\1", cell.strip()) for cell in row] for row in written]
    assert plain == [row for rows in page.tables for row in rows]
    pictures = re.findall(r"!\[.*\]\((.*)\)", text)
    assert pictures == ["figures/pretraining.svg", "figures/pretraining-experts-1.svg"]
    assert all((tmp_path / "out" / name).read_text().startswith("<?xml") for name in pictures)


def test_downstream_results_stand_beside_the_papers(tmp_path: Path) -> None:
    """A row is a pretrained model; seeds are averaged, other options have a row of their own."""
    moe = make_run(tmp_path / "moe", config_of("tiny-8e"), metrics(3, ("text",)))
    load = str(moe)
    rows = [{"step": 5, "loss/nlvr2": 0.5, "dev/accuracy": 60.0, "dev/samples": 8.0}]
    found = []
    for seed, score in ((1, 60.0), (2, 63.0), (3, 66.0)):
        folder = tmp_path / "nlvr2" / f"seed_{seed}"
        # The size of the official splits; of the first, 2 samples could not be read.
        own = {"dev__accuracy": score, "test__accuracy": score + 1, "dev__samples": 6980.0}
        own["test__samples"] = 6967.0
        result = scores("nlvr2", folder / "best/iter_0000005", **own) | {"left_out": {"dev": 2}}
        found.append(make_run(folder, tuned(load, seed=seed), rows, result))
    found.append(
        make_run(
            tmp_path / "higher", tuned(load, lr=1e-2), rows, official("nlvr2", dev__accuracy=50.0)
        )
    )
    # The same checkpoint, evaluated again in the same way, is no fourth seed.
    checkpoint = found[0] / "best/iter_0000005"
    checkpoint.mkdir(parents=True)
    again = official("nlvr2", checkpoint, dev__accuracy=60.0)
    found.append(make_run(tmp_path / "again", None, (), again))
    image_net = official("imagenet", val__top1=12.5, val__top5=40.0)
    found.append(make_run(tmp_path / "imagenet", tuned(load, "imagenet"), (), image_net))
    # An evaluation has no config.yaml; that of the run that it evaluates is found.
    evaluated = scores("imagenet", found[-1] / "best/iter_0000005", **{"test__top1": 10.0})
    (found[-1] / "best/iter_0000005").mkdir(parents=True)
    found.append(make_run(tmp_path / "evaluation", None, (), evaluated))
    page, _, text = report(tmp_path / "out", moe, found[3], tmp_path / "nlvr2", *found[4:])
    first, second = [rows for rows in page.tables if rows[0][0] == "model"]
    titles = first[0]
    column = {row[0]: dict(zip(titles, row)) for row in first[1:]}
    seeds = "nlvr2/seed_1, nlvr2/seed_2, nlvr2/seed_3, again"
    own = column[f"moe ({seeds})"]
    assert own["NLVR2 dev"] == "63.00 ± 3.00 (3)" and own["NLVR2 test-P"] == "64.00 ± 3.00 (3)"
    assert own["pretraining steps"] == "400"
    # Of pretraining: a task has a length of text of its own.
    tokens = parameter_counts(config_of("tiny-8e")).per_token
    assert tokens != parameter_counts(tuned(load)).per_token
    assert own["parameters per token"] == f"{tokens / 1e6:.3g}M"
    assert column["moe (higher)"]["NLVR2 dev"] == "50.00"
    assert column["paper: VL-MoE_BASE/32E"]["NLVR2 test-P"] == "86.77"
    assert column["paper: BEiT-3_BASE*"]["VQA test-dev"] == "76.21"
    assert column["paper: ViLT"]["VQA test-std"] == "–"
    assert column["paper: UNIMO_BASE"]["pretraining steps"] == "500K"
    assert [row[0] for row in second[1:]] == ["moe", *(f"paper: {r.model}" for r in TABLE_2.rows)]
    assert second[1][second[0].index("ImageNet")] == "12.50"
    for paper in (TABLE_1, TABLE_2):
        assert all(len(row.scores) == len(paper.columns) for row in paper.rows)
    # The heads of pretraining, 300 and 64 rows, are not those of the task.
    config = tuned(load)
    sections = {one.name: getattr(config, one.name) for one in fields(RunConfig)}
    pretraining = RunConfig(**sections)
    slots = head_slots(pretraining, StreamLayout.of(pretraining))
    heads = 2 * 3 * num_micro_batches(config, 1) * config.model.hidden_size
    heads *= slots[0] * 300 + slots[1] * 64
    flops = table(page, "FLOPs per step")["nlvr2/seed_1",]["FLOPs per step"]
    assert flops == f"{flops_per_step(pretraining) - heads:.4g}"
    assert "| evaluation | imagenet: evaluation |" in text
    (every,) = [rows for rows in page.tables if rows[0][:2] == ["score", "higher"]]
    assert ["dev/accuracy", "50.00", "60.00", "63.00", "66.00", "60.00"] in every


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    rows = [{"step": 5, "loss/mlm": 1.0, "tokens_per_second": 100.0}]
    unknown = make_run(tmp_path / "unknown", None, rows)
    begun = make_run(tmp_path / "begun", config_of("tiny-dense"))
    tuning = make_run(tmp_path / "tuning", tuned("gone"), [{"step": 5, "loss/nlvr2": 1.0}])
    newer = make_run(tmp_path / "newer", config_of("tiny-dense"), rows)
    (newer / "config.yaml").write_text("model: {number_of_heads: 3}\ntrain: {steps: many}\n")
    other = scores("nlvr2", train__accuracy=90.0)
    split = make_run(tmp_path / "split", tuned("gone"), [{"step": 5, "loss/nlvr2": 1.0}], other)
    page, source, _ = report(tmp_path / "out", unknown, begun, tuning, newer, split)
    for sentence in (
        "unknown: no config.yaml: options, parameters and FLOPs are not known.",
        "unknown: no evaluation logged.",
        "begun: nothing logged yet: no curves, speed or memory.",
        "tuning: no metrics.json: the run has not ended, and is in no table of results.",
        "split: the downstream tables have no column for its scores; chapter Task nlvr2 has them.",
    ):
        assert sentence in page.texts
    assert re.search(
        r"newer: config.yaml: unknown option model.number_of_heads.* not known\.", source
    )
    assert table(page, "token slots/s")["unknown",]["token slots/s"] == "100"
    assert not [rows for rows in page.tables if rows[0][0] == "model"]


def test_losses_are_compared_with_those_of_the_first_run_alone(tmp_path: Path) -> None:
    """The first run has no such loss: there is nothing that the others could be compared with."""
    losses = (("texts", "mlm", 3.0), ("b", "mim", 2.0), ("c", "mim", 1.5))
    runs = [
        make_run(
            tmp_path / name,
            config_of("tiny-dense"),
            [{"step": 5, f"loss/{loss}": 9.0, f"eval/loss/{loss}": value}],
        )
        for name, loss, value in losses
    ]
    page, _, _ = report(tmp_path / "out", *runs)
    (rows,) = [rows for rows in page.tables if "loss, nats" in rows[0]]
    # A column without a number is left out.
    assert not [title for title in rows[0] if title.startswith("against")]
    page, _, _ = report(tmp_path / "other", *runs[1:])
    assert table(page, "loss, nats", 2)["masked image (images)", "c"]["against b"] == "-0.5000"


def test_a_run_without_config_does_not_take_that_of_the_folder_one_is_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = make_run(tmp_path / "here", tuned("gone"), (), scores("nlvr2", dev__accuracy=50.0))
    logged = make_run(tmp_path / "logged", None, [{"step": 5, "loss/mlm": 1.0}])
    unsaved = make_run(tmp_path / "unsaved", None, (), scores("nlvr2", "", dev__accuracy=60.0))
    monkeypatch.chdir(here)
    page, _, _ = report(tmp_path / "out", here, logged, unsaved)
    for name in ("logged", "unsaved"):
        assert f"{name}: no config.yaml: options, parameters and FLOPs are not known." in page.texts


def test_numbers_of_others_that_no_run_has_are_left_out(tmp_path: Path) -> None:
    results = scores("nlvr2", dev__accuracy=50.0, dev__samples=math.nan, dev__loss=math.inf)
    config = tuned("gone")
    run = make_run(tmp_path / "run", config, (), results)
    text = to_yaml(replace(config, model=replace(config.model, hidden_size=2**63)))
    (run / "config.yaml").write_text(text)
    page, _, _ = report(tmp_path / "out", run)
    told = "model.hidden_size=9223372036854775808 must be below 2**31"
    assert any(f"{told}: parameters and FLOPs are not known" in text for text in page.texts)


def test_a_checkpoint_that_is_named_in_two_ways_is_one_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", tuned("gone"))
    (run / "best/iter_0000005").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    found = [
        make_run(tmp_path / name, None, (), official("nlvr2", place, dev__accuracy=60.0))
        for name, place in (("a", "run/best/iter_0000005"), ("b", run / "best/iter_0000005"))
    ]
    page, _, _ = report(tmp_path / "out", *found)
    (rows,) = [rows for rows in page.tables if rows[0][0] == "model"]
    assert rows[1][rows[0].index("NLVR2 dev")] == "60.00"


def test_results_on_other_data_stand_in_a_row_of_their_own(tmp_path: Path) -> None:
    """Both are of one model and one task, and in the same column."""
    runs = []
    for name, score in (("a", 60.0), ("b", 70.0)):
        config = tuned("gone")
        config = replace(config, task=replace(config.task, data=f"{tmp_path}/{name}/nlvr2"))  # type: ignore[attr-defined]
        results = official("nlvr2", dev__accuracy=score)
        results["settings"]["data"] = f"{tmp_path}/{name}/nlvr2"
        runs.append(make_run(tmp_path / name, config, (), results))
    page, _, _ = report(tmp_path / "out", *runs)
    (rows,) = [rows for rows in page.tables if rows[0][0] == "model"]
    place = rows[0].index("NLVR2 dev")
    assert [row[place] for row in rows[1:3]] == ["60.00", "70.00"]


def test_a_page_is_safe_and_needs_nothing_else(tmp_path: Path) -> None:
    run = make_run(tmp_path / NASTY, config_of("tiny-8e"), metrics(4, ("text",)))
    other = make_run(tmp_path / "_b", config_of("tiny-8e"), metrics(5, ("text",), 10))
    page, source, text = report(tmp_path / "out", run, other)
    assert not {"script", "link", "iframe", "img", "b", "object"} & set(page.tags)
    assert not re.search(r"https?:(?!//www\.w3\.org/)|@import|url\((?!#)", source)
    assert NASTY in page.texts and "Experts of _b, block by block" in page.texts
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    named = set(re.findall(r'(?:href="|url\()#([\w-]+)', source))
    assert named <= set(ids)
    assert r"a \<b\> \& \|x\| \$y\$ \_z\_" in text


def test_what_is_no_run_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = make_run(tmp_path / "runs/a", config_of("tiny-dense"), [{"step": 1, "loss/mlm": 1.0}])
    (tmp_path / "empty").mkdir()
    damaged = {
        "results": make_run(tmp_path / "results", None, (), ["no"]),
        "yaml": make_run(tmp_path / "yaml", None),
        "list": make_run(tmp_path / "list", None),
    }
    (damaged["yaml"] / "config.yaml").write_text("a: [")
    (damaged["list"] / "config.yaml").write_text("- a")
    files = "none of metrics.jsonl, metrics.json, config.yaml"
    for folder, status, line in (
        ("nowhere", 1, f"{tmp_path}/nowhere: no such folder"),
        ("empty", 1, f"{tmp_path}/empty: not a run folder: has {files}"),
        (
            "runs",
            1,
            f"{tmp_path}/runs: not a run folder: has {files}; it holds runs, such as {good}",
        ),
        ("results", 1, f"{tmp_path}/results/metrics.json: not the results of a downstream task"),
        ("yaml", 1, f"{tmp_path}/yaml/config.yaml: not valid YAML"),
        ("list", 1, f"{tmp_path}/list/config.yaml: not a run's configuration"),
    ):
        words = ["report", str(good), str(tmp_path / folder), "--output", str(tmp_path / "out")]
        assert main(words) == status
        assert capsys.readouterr() == ("", f"error: {line}\n")
    assert main(["report", str(good), "--output", str(good)]) == 2
    assert "is the folder of a run" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def model_rows(page: Page, table: int = 0) -> dict[str, dict[str, str]]:
    """Rows of a downstream table by their model, without the paper's."""
    found = [rows for rows in page.tables if rows[0][0] == "model"][table]
    return {
        row[0]: dict(zip(found[0], row)) for row in found[1:] if not row[0].startswith("paper: ")
    }


def test_a_diverged_run_is_shown_as_one(tmp_path: Path) -> None:
    """What an earlier evaluation had is not mixed into the last one, nor the end of a run with its beginning."""
    known = {"eval/loss/mim": 2.0, "unigram/mim": 1.0, "acc/mim": 0.25, "eval/grounding/mim": 0.5}
    first = {"step": 0, **known}
    logged = [{"step": n, "loss/mim": 1.0, "moe/text/load_max": 1.0} for n in range(1, 10)]
    nan = {"loss/mim": None, "moe/text/load_max": 7.0, "moe/text/router_entropy": None}
    last = known | {"eval/loss/mim": None, "acc/mim": 0.5, "eval/grounding/mim": None}
    diverged = [first, *logged, {"step": 10, **nan}, {"step": 11, **nan, **last}]
    runs = [
        make_run(tmp_path / "diverged", config_of("tiny-8e"), diverged),
        make_run(tmp_path / "fine", config_of("tiny-8e"), [first, *logged]),
    ]
    page, _, _ = report(tmp_path / "out", *runs)
    assert "diverged: losses are not finite from step 10 on." in page.texts
    rows = table(page, "loss, nats", 2)
    own, other = (rows["masked image (images)", name] for name in ("diverged", "fine"))
    assert (own["step"], own["loss, nats"], own["right, %"]) == ("11", "not finite", "50.00")
    assert own["grounding, nats"] == "not finite" and other["loss, nats"] == "2.0000"
    assert other["against diverged"] == "not finite"
    balance = table(page, "pool")["diverged",]
    assert balance["router entropy, nats"] == "not finite"
    assert balance["fullest expert"] == "7.000"
    page, _, _ = report(tmp_path / "other", *reversed(runs))
    own = table(page, "loss, nats", 2)["masked image (images)", "diverged"]
    assert own["against fine"] == "not finite"


def trained(folder: Path, config: RunConfig, score: float, **more: Any) -> Path:
    """A fine-tuning run that was saved as `runs/NAME`, under that name in its results too."""
    name = f"runs/{folder.name}"
    config = replace(config, checkpoint=replace(config.checkpoint, save=name))
    results = official("nlvr2", f"{name}/best/iter_0000005", dev__accuracy=score)
    results["settings"]["data"] = "corpora/nlvr2"
    rows = [{"step": 5, "loss/nlvr2": 0.5}]
    return make_run(folder, config, rows, {**results, **more})


def test_runs_of_one_relative_name_are_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seeds that were trained elsewhere under the same name count each; a copy of one counts no second time."""
    runs = [
        trained(tmp_path / f"p{seed}/runs/a", tuned("runs/base", seed=seed), score)
        for seed, score in ((1, 40.0), (2, 50.0))
    ]
    copy = tmp_path / "moved"
    copy.mkdir()
    for file in runs[0].iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    monkeypatch.chdir(tmp_path / "p1")
    page, _, _ = report(tmp_path / "out", *runs, copy)
    assert model_rows(page)["runs/base"]["NLVR2 dev"] == "45.00 ± 7.07 (2)"
    assert "moved: a copy of p1/runs/a, which counts once." in page.texts
    # An evaluation of the second run, which lies beside it, is of that one, wherever the reader is.
    again = official("nlvr2", "runs/a/best/iter_0000005", dev__accuracy=50.0)
    again["settings"]["data"] = "corpora/nlvr2"
    evaluation = make_run(tmp_path / "p2/runs/again", None, (), again)
    page, _, _ = report(tmp_path / "out", *runs, evaluation)
    assert model_rows(page)["runs/base"]["NLVR2 dev"] == "45.00 ± 7.07 (2)"


def test_pretrained_models_of_one_relative_name_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is looked for where its run was trained, and not where the reader is."""
    bases = {}
    for number, steps in ((1, 400), (2, 800)):
        config = config_of("tiny-8e")
        config = replace(config, train=replace(config.train, steps=steps))
        config = replace(config, checkpoint=replace(config.checkpoint, save="runs/base"))
        bases[number] = make_run(tmp_path / f"p{number}/runs/base", config, metrics(number, ()))
    runs = [
        trained(tmp_path / f"p{number}/runs/a{number}", tuned("runs/base"), 10.0 * number)
        for number in bases
    ]
    monkeypatch.chdir(tmp_path / "p1")
    page, _, _ = report(tmp_path / "out", *runs)
    found = {(row["pretraining steps"], row["NLVR2 dev"]) for row in model_rows(page).values()}
    assert found == {("400", "10.00"), ("800", "20.00")}
    # A folder of this name that another run has taken since is not the one that it started from.
    other = config_of("tiny-8e")
    (bases[2] / "config.yaml").write_text(
        to_yaml(replace(other, model=replace(other.model, num_layers=6)))
    )
    # Neither is the reader's: this run was saved elsewhere.
    away = trained(tmp_path / "away/a3", tuned("runs/base"), 30.0)
    page, _, _ = report(tmp_path / "out", *runs, away)
    rows = model_rows(page)
    (lost,) = [row for row in rows.values() if row["NLVR2 dev"].startswith("25.00")]
    assert (lost["pretraining steps"], lost["parameters per token"]) == ("–", "–")
    sentence = "p2/runs/a2, away/a3: the run runs/base that training started from was not found"
    assert any(text.startswith(sentence) for text in page.texts)


def test_the_papers_columns_are_for_data_of_the_official_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the data are called, and wherever the reader is."""
    named = {"flickr30k": 500.0, "retrieval": 5000.0, "other": 25_010.0, "none": None}
    runs = []
    for name, samples in named.items():
        results = scores("retrieval", **{"test__TR@1": 10.0, "test__IR@1": 20.0})
        results["settings"]["data"] = f"tasks/{name}"
        if samples is not None:
            results["metrics"]["test/samples"] = samples
        runs.append(make_run(tmp_path / name, tuned(name, "flickr30k"), (), results))
    monkeypatch.chdir(tmp_path)
    page, _, _ = report(tmp_path / "out", *runs)
    rows = model_rows(page)
    shown = {
        name: [title for title, cell in row.items() if cell in ("10.00", "20.00")]
        for name, row in rows.items()
    }
    own = ["retrieval {} test/IR@1", "retrieval {} test/TR@1"]
    assert shown == {
        "retrieval": ["Flickr30K TR", "Flickr30K IR"],
        "other": ["COCO TR", "COCO IR"],
        **{name: [title.format(name) for title in own] for name in ("flickr30k", "none")},
    }
    for task, metric, column in (
        *(("nlvr2", "dev/accuracy", "NLVR2 dev"), ("imagenet", "val/top1", "ImageNet")),
        ("mnli", "dev_matched/accuracy", "MNLI-m"),
    ):
        results = scores(task) | {"metrics": {metric: 50.0, f"{metric.split('/')[0]}/samples": 9.0}}
        run = make_run(tmp_path / task, tuned("gone", task), (), results)
        page, _, _ = report(tmp_path / "out", run)
        own_row = model_rows(page)["gone"]
        assert own_row[f"{task} d {metric}"] == "50.00" and own_row.get(column, "–") == "–"
        assert f"{task}: the data d were not found, or are not those of the run: " in str(
            page.texts
        )


def test_parameters_per_token_are_of_the_architecture_in_any_order(tmp_path: Path) -> None:
    """Tasks have lengths of text of their own, and ImageNet has no vocabulary."""
    runs = []
    for task, vocabulary in (("imagenet", 0), ("nlvr2", 300)):
        config = tuned("", task)
        model = replace(config.model, vocab_size=vocabulary, text_length=16, pair_text_length=16)
        config = replace(config, model=model, task=replace(config.task, architecture="tiny-8e"))  # type: ignore[attr-defined]
        values = {"val__top1": 5.0} if task == "imagenet" else {"dev__accuracy": 50.0}
        runs.append(make_run(tmp_path / task, config, (), scores(task, **values)))
    expected = f"{parameter_counts(config_of('tiny-8e')).per_token / 1e6:.3g}M"
    for order in (runs, runs[::-1]):
        page, _, _ = report(tmp_path / "out", *order)
        for number in (0, 1):
            row = model_rows(page, number)["tiny-8e, from scratch"]
            assert row["parameters per token"] == expected


def test_a_run_that_was_only_evaluated_has_a_chapter(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", config_of("tiny-dense"), [{"step": 0, "eval/loss/mim": 3.0}])
    page, _, _ = report(tmp_path / "out", run)
    assert table(page, "loss, nats")["masked image (images)",]["loss, nats"] == "3.0000"
    run = make_run(tmp_path / "b", config_of("tiny-dense"))
    page, _, _ = report(tmp_path / "out", run)
    assert "Nothing was logged that could be shown here." in page.texts
