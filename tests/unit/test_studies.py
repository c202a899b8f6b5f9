"""Studies: the rule for claims, which runs are the same, what a summary holds, and the built-in studies."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from torch.distributed.checkpoint.metadata import Metadata

from megatron_vlmoe.analysis.studies.claims import Interval, decide, t_quantile
from megatron_vlmoe.analysis.studies.metrics import LAST, SCORES
from megatron_vlmoe.analysis.studies.plan import Planner, Request
from megatron_vlmoe.analysis.studies.results import (
    measured_of,
    task_scores,
    write_summary,
)
from megatron_vlmoe.analysis.studies.runner import Runner, locked
from megatron_vlmoe.analysis.studies.scales import SCALES
from megatron_vlmoe.analysis.studies.study import (
    Claim,
    Part,
    Run,
    Study,
    above,
    below,
    metrics_of,
    read_study,
)
from megatron_vlmoe.analysis.studies.table import STUDIES
from megatron_vlmoe.commands.main import main, run
from megatron_vlmoe.config.command_line import parse_run, to_yaml
from megatron_vlmoe.config.errors import ConfigError, DataError
from megatron_vlmoe.planning.estimate import flops_per_step

TINY = SCALES["tiny"]
DOCS = Path(__file__).parents[2] / "docs"
PUBLISHED = sorted((DOCS / "studies").glob("*/summary.json"))


def row(label: str, seed: int, **values: float) -> dict[str, Any]:
    return {"label": label, "seed": seed, "values": values, "curve": {}, "states": {}}


def test_quantiles_of_students_t():
    """Printed tables of the 97.5 % point."""
    printed = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 10: 2.228, 30: 2.042, 120: 1.980}
    for degrees, value in printed.items():
        assert t_quantile(0.975, degrees) == pytest.approx(value, abs=5e-4)
    assert t_quantile(0.75, 1) == pytest.approx(1.0)
    with pytest.raises(ValueError):
        t_quantile(0.4, 3)


@pytest.mark.parametrize(
    ("numbers", "low", "high", "verdict"),
    [
        # Standard deviation 0.1, and 4.302653 * 0.1 / sqrt(3) = 0.248414.
        ((0.1, 0.2, 0.3), -0.048414, 0.448414, "undecided"),
        # A tenth of it.
        ((0.19, 0.2, 0.21), 0.175159, 0.224841, "reproduced"),
        ((-0.19, -0.2, -0.21), -0.224841, -0.175159, "not reproduced"),
        # 12.706205 * 0.00707107 / sqrt(2); two seeds decide nothing, however close they are.
        ((0.2, 0.21), 0.141469, 0.268531, "undecided"),
        ((0.2,), -math.inf, math.inf, "undecided"),
        ((0.2, 0.2, 0.2), 0.2, 0.2, "reproduced"),
        ((0.0, 0.0, 0.0), 0.0, 0.0, "undecided"),
    ],
)
def test_the_interval_decides(numbers, low, high, verdict):
    interval = Interval.of(numbers)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=2e-6)
    assert interval.verdict == verdict


def test_a_claim_needs_all_of_its_parts():
    """Seeds are paired, a seed without one of the runs is left out, and one part that fails is enough."""
    rows = [
        *(row("a", seed, mlm=1.0 + seed, mim=2.0) for seed in (1, 2, 3, 4)),
        # As far above "a" as the seeds are apart, so that unpaired means would decide nothing.
        *(row("b", seed, mlm=1.5 + seed + 0.01 * seed, mim=1.0) for seed in (1, 2, 3)),
    ]
    claim = Claim("", "", (below("mlm", "a", "b"),))
    decision = decide(claim, rows)
    ((part, interval),) = decision.parts
    assert decision.verdict == "reproduced" and part.text == "mlm: a below b"
    assert (interval.count, interval.mean) == (3, pytest.approx(0.52))
    both = Claim("", "", (below("mlm", "a", "b"), above("mim", "a", "b")))
    assert decide(both, rows).verdict == "reproduced"
    assert decide(Claim("", "", (*both.parts, above("mim", "b", "a"))), rows).verdict == (
        "not reproduced"
    )
    missing = decide(Claim("", "", (*both.parts, below("mlm", "a", "c"))), rows)
    assert missing.verdict == "undecided" and missing.parts[-1][1] is None


def test_claims_at_equal_flops_read_the_curves_where_the_shorter_one_ends():
    """The longer run has lost 0.5 at 15 FLOPs, between 10 and 20, and would win at its own end."""
    rows = []
    for seed in (1, 2, 3):
        rows += [
            {**row("short", seed), "curve": {"flops": [0, 15], "mlm": [3.0, 2.25]}},
            {**row("long", seed), "curve": {"flops": [0, 10, 20], "mlm": [3.0, 3.0, 2.0]}},
        ]
    ((_, interval),) = decide(
        Claim("", "", (below("mlm", "long", "short", equal_flops=True),)), rows
    ).parts
    assert interval.mean == pytest.approx(2.25 - 2.5)


def test_every_study_at_every_scale_is_one_that_runs():
    """Options fit each other and the processes; claims, panels and columns are about what is there."""
    for scale in SCALES.values():
        planner = Planner(scale, Request(Path("nowhere"), (1,), scale.processes))
        names = [task.name for task in scale.tasks]
        shared: dict[str, set[str]] = {}
        for name, make in STUDIES.items():
            study = make(scale)
            assert study.name == name
            rows = planner.plan(study)
            labels = [run.label for run in study.runs]
            assert len(set(labels)) == len(labels) == len(rows)
            for planned in rows:
                assert set(planned.tasks) <= set(names)
                config = planned.pretraining.config
                after_warmup = config.train.steps - config.optim.lr_warmup_steps
                assert after_warmup >= 100 * config.log.interval, "too few to see spikes"
                shared.setdefault(planned.pretraining.digest, set()).add(name)
            terms = [term for claim in study.claims for part in claim.parts for term in part.terms]
            assert study.claims and {label for _, _, label in terms} <= set(labels)
            assert {label for panel in study.panels for label in panel.labels} <= set(labels)
            scored = [name for name in metrics_of(study) if name.partition("/")[0] in names]
            assert {name.split("/")[2] for name in scored} <= set(SCORES)
            assert set(metrics_of(study)) - set(scored) <= {*LAST, "average"}
        # The paper's sparse model of this size, trained once for all of them.
        assert max(map(len, shared.values())) >= 6


@pytest.fixture
def study() -> Study:
    """Two runs that differ in what is fine-tuned from them."""
    runs = (Run("frozen", "8e"), Run("trained", "8e", finetune=("--moe.train_experts", "true")))
    return Study("mine", "", runs, (), ())


def digests(study: Study, folder: Path, *options: str, seeds: tuple[int, ...] = (1,)) -> list[str]:
    request = Request(folder, seeds, 1, options)
    return [planned.pretraining.digest for planned in Planner(TINY, request).plan(study)]


def test_runs_are_the_same_if_options_seed_and_data_are(study, tmp_path):
    for name in ("text.json", "other.json", "moved.json"):
        files = {"text_document.bin": {"size": 1, "sha256": "ab" if name != "other.json" else "cd"}}
        (tmp_path / name).write_text(json.dumps({"files": files, "source": name}))
    first, trained = digests(study, tmp_path)
    assert first == trained
    same = digests(study, tmp_path, "--checkpoint.keep_last", "3", "--data.num_workers", "0")
    assert same == [first, first]
    text = ("--data.text", str(tmp_path / "text"))
    found = [
        first,
        *digests(study, tmp_path, seeds=(2,))[:1],
        *digests(study, tmp_path, "--optim.lr", "1e-3")[:1],
        *digests(study, tmp_path, *text)[:1],
        *digests(study, tmp_path, "--data.text", str(tmp_path / "other"))[:1],
    ]
    assert len(set(found)) == len(found)
    moved = digests(study, tmp_path, "--data.text", str(tmp_path / "moved"))
    assert moved[0] == found[3], "what counts is the content of the data"


def test_what_a_run_starts_from_and_files_of_options_are_no_secret(study, tmp_path):
    """Two runs that start from different weights would be taken for one; options of a file are as if typed."""
    mine = tmp_path / "mine.yaml"
    for options in (
        "checkpoint.load: x",
        "checkpoint.step: 3",
        "preset: small-8e",
        "train.seed: 3",
    ):
        mine.write_text(f"runs: [{{label: a, experts: 8e, options: {{{options}}}}}]")
        wrong = read_study(mine, list(TINY.sizes), [])
        name = options.partition(":")[0]
        with pytest.raises(
            ConfigError, match=f"a: --.*{name.rpartition('.')[2]} is not for studies"
        ):
            digests(wrong, tmp_path)
    file = tmp_path / "options.yaml"
    file.write_text("train: {steps: 30}\nmoe:\n  layers: [2]\nlog:\n")
    mine.write_text(
        f"runs:\n  - {{label: a, experts: 8e, options: --config '{file}'}}\n"
        "  - {label: b, experts: 8e, options: {train: {steps: 30}, moe.layers: [2]}}"
    )
    first, second = digests(read_study(mine, list(TINY.sizes), []), tmp_path)
    assert first == second
    rows = Planner(TINY, Request(tmp_path, (1,), 1, ("--config", str(file)))).plan(study)
    assert rows[0].pretraining.config.train.steps == 30
    file.write_text("checkpoint: {load: elsewhere}")
    with pytest.raises(ConfigError, match="checkpoint.load is not for studies"):
        digests(study, tmp_path, "--config", str(file))
    file.write_text("moe: {top: 3}")
    with pytest.raises(ConfigError, match="options.yaml: unknown option moe.top"):
        digests(study, tmp_path, "--config", str(file))


def test_an_image_tokenizer_is_its_model_and_not_the_record_of_its_training(study, tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    found = []
    for name, text in (
        ("config.json", "{}"),
        ("metrics.jsonl", "images_per_second"),
        ("model.safetensors", "x"),
    ):
        (folder / name).write_text(text)
        found += digests(study, tmp_path, "--data.image_tokenizer", str(folder))[:1]
    assert found[0] == found[1] != found[2]


def test_an_objective_that_is_left_out_has_no_micro_batch(study, tmp_path):
    rows = Planner(TINY, Request(tmp_path, (1,), 1, ("--data.global_texts", "0"))).plan(study)
    assert rows[0].pretraining.config.data.micro_texts == 0


def test_a_seed_that_no_generator_takes(study, tmp_path):
    with pytest.raises(ConfigError, match="frozen: train.seed=9223372036854775808 is not"):
        digests(study, tmp_path, seeds=(2**63,))


def test_runs_on_one_task_know_their_own_splits(tmp_path):
    """A run is the same planned alone and after one that evaluates other splits of the task."""
    for split in ("train", "one", "two"):
        (tmp_path / f"mnli_{split}.json").write_text(
            json.dumps({"files": {"x": {"sha256": split}}})
        )
    runs = [Run(name, "8e", (), ("mnli",), ("--task.eval_splits", name)) for name in ("one", "two")]

    def digest(*chosen: Run) -> str:
        request = Request(tmp_path, (1,), 1, tasks=str(tmp_path))
        rows = Planner(TINY, request).plan(Study("mine", "", chosen, (), ()))
        return rows[-1].tasks["mnli"].digest

    assert digest(*runs) == digest(runs[1])


def test_tasks_of_the_sample_corpus_do_not_go_with_data_of_ones_own(tmp_path):
    mine = Study("mine", "", (Run("a", "8e", tasks=("vqa",)),), (), ())
    for options, folder in (((), TINY.folder), (("--data.text", "t"), "data")):
        (planned,) = Planner(TINY, Request(tmp_path, (1,), 1, options)).plan(mine)
        assert planned.tasks["vqa"].config.task.data == f"{folder}/vqa"  # type: ignore[attr-defined]


def test_a_run_is_found_under_the_name_that_another_study_gave_it(study, tmp_path):
    (digest, _) = digests(study, tmp_path)
    folder = tmp_path / "runs" / f"as-it-was-called-{digest}"
    folder.mkdir(parents=True)
    rows = Planner(TINY, Request(tmp_path, (1,), 1)).plan(study)
    assert rows[0].pretraining.folder == folder


def claim(part: str) -> str:
    """A study whose only claim has this part, or none."""
    return f"runs: [{{label: a, experts: 8e}}]\nclaims: [{{text: x, source: me, parts: [{part}]}}]"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("runs: []", "has no runs"),
        ("[1]", "expected `runs:`"),
        ("runs: [{label: a}]", "experts is missing"),
        ("runs: [{label: a, experts: 9e}]", "experts 9e: unknown; choose one of dense"),
        ("runs: [{label: a, experts: 8e, size: huge}]", "size huge: unknown"),
        ("runs: [{label: a, experts: 8e, tasks: [vqas]}]", "did you mean vqa?"),
        ("runs: [{label: a, experts: 8e, option: {}}]", "unknown field option; did you mean"),
        ("runs: [{label: a, experts: 8e}, {label: a, experts: 8e}]", "two runs have this label"),
        ("runs: [{label: a, experts: 8e}]\npanels: [{kind: pie, metrics: [mlm]}]", "kind pie"),
        (
            "runs: [{label: a, experts: 8e}]\n"
            "claims: [{text: x, source: me, parts: [{below: [mlm, a, b]}]}]",
            "run b: unknown; choose one of a",
        ),
        (
            "runs: [{label: a, experts: 8e}]\n"
            "claims: [{text: x, source: me, parts: [{below: [mlm, a]}]}]",
            "expected below: [METRIC, LABEL, LABEL]",
        ),
        ("runs: [", "not valid YAML"),
        ("runs: []\nruns: [{label: a, experts: 8e}]", "runs is there twice"),
        ("runs: [{label: no, experts: 8e}]", "label: YAML reads yes, no, on and off"),
        ("runs: [{label: a, experts: 8e, options: --moe.topk '2}]", "No closing quotation"),
        ("name: ../x\nruns: [{label: a, experts: 8e}]", "expected the name of a folder"),
        ("panels: []\nruns: [{label: a, experts: 8e}]", "panels: expected at least one"),
        (
            "panels: [{kind: curve, metrics: [mim, mlm]}]\nruns: [{label: a, experts: 8e}]",
            "panels[1]: metrics: curve takes one",
        ),
        (
            "panels: [{kind: values, metrics: []}]\nruns: [{label: a, experts: 8e}]",
            "panels[1]: metrics: values takes at least one",
        ),
        (
            "panels: [{kind: curve, metrics: [mim], labels: [b]}]\nruns: [{label: a, experts: 8e}]",
            "panel mim: run b: unknown; choose one of a",
        ),
        ("columns: [{mim: 1}]\nruns: [{label: a, experts: 8e}]", "columns: expected a text"),
        ("scores: 3\nruns: [{label: a, experts: 8e}]", "scores: expected a list"),
        ("scores: [vqa/val/x]\nruns: [{label: a, experts: 8e}]", "task vqa: no run has `tasks:`"),
        (
            "paper: [{label: a, values: {mim: low}}]\nruns: [{label: a, experts: 8e}]",
            "mim: expected a number",
        ),
        (claim("{text: y, terms: [[1, mim, a]], equal_flops: maybe}"), "expected true or false"),
        (claim("{text: y, terms: [[.nan, mim, a]]}"), "term [nan, 'mim', 'a']: expected [FACTOR,"),
        (claim("{text: y, terms: [[1e400, mim, a]]}"), "expected [FACTOR, METRIC, LABEL]"),
        (claim("{text: y, terms: []}"), "terms: expected at least one"),
        (claim(""), "claims[1]: parts: expected at least one"),
        (claim("{above: [mimm, a, a]}"), "claim 'x': metric mimm: unknown; did you mean mim?"),
        (
            claim("{text: y, terms: [[1, dropped, a]], equal_flops: true}"),
            "metric dropped: unknown; choose one of mlm, mim",
        ),
        ('name: "a\\0b"\nruns: [{label: a, experts: 8e}]', "has the character '\\x00'"),
        ('runs: [{label: "\\ud800", experts: 8e}]', "runs[1]: label: has the character"),
        (f"name: {'n' * 300}\nruns: [{{label: a, experts: 8e}}]", "expected the name of a folder"),
        ("runs: [{label: '', experts: 8e}]", "runs[1]: label: is empty"),
        (
            "runs: [{label: a, experts: 8e, finetune: {train.stepz: 3}}]",
            "run a: finetune: the run has no `tasks:`",
        ),
        ("columns: [mim, spike]\nruns: [{label: a, experts: 8e}]", "did you mean spikes?"),
        ("columns: [average]\nruns: [{label: a, experts: 8e}]", "columns: metric average: unknown"),
        (
            "panels: [{kind: blocks, metrics: [dropped/mmlm]}]\nruns: [{label: a, experts: 8e}]",
            "panels[1]: metric dropped/mmlm: unknown; choose one of dropped/mlm",
        ),
        (
            "scores: [vqa/val/vqa]\nruns: [{label: a, experts: 8e, tasks: [vqa]}]",
            "score vqa/val/vqa: vqa: unknown; choose one of accuracy",
        ),
        (
            "columns: [mim]\npaper: [{label: p, values: {mimm: 3}}]\n"
            "runs: [{label: a, experts: 8e}]",
            "paper p: mimm is not in `columns:`; did you mean mim?",
        ),
        (
            "columns: [mim]\npaper: [{label: p, values: {mim: .nan}}]\n"
            "runs: [{label: a, experts: 8e}]",
            "mim: expected a number",
        ),
    ],
)
def test_what_is_wrong_with_a_study_of_ones_own(text, message, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_study(path, list(TINY.sizes), ["vqa"])
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_a_study_of_ones_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "title: My router\n"
        "runs:\n"
        "  - {label: paper, experts: 8e}\n"
        "  - label: mine\n"
        "    experts: 8e\n"
        "    options: {moe.batch_priority: false, moe.layers: [2, 4], optim.lr: 1e-3}\n"
        "  - {label: typed, experts: 8e, options: --moe.topk 2}\n"
        "claims:\n"
        "  - {text: mine is better, source: me, parts: [{below: [mim, mine, paper]}]}\n"
    )
    study = read_study(path, list(TINY.sizes), [])
    assert (study.name, study.title) == ("mine", "My router")
    mine = "--moe.batch_priority false --moe.layers 2 4 --optim.lr 1e-3".split()
    assert study.runs[1].options == tuple(mine) and study.runs[2].options == ("--moe.topk", "2")
    assert study.claims[0].parts == (below("mim", "mine", "paper"),)
    assert [panel.metrics for panel in study.panels] == [("mlm",), ("mim",), ("vlm",)]
    rows = Planner(TINY, Request(tmp_path, (1,), 1)).plan(study)
    assert not rows[1].pretraining.config.moe.batch_priority


def write_run(folder: Path, *options: str) -> None:
    """Eight logged steps of two seconds each, every second step's, and three evaluations."""
    words = "--preset tiny-8e --train.steps 16 --optim.lr_warmup_steps 0".split()
    config = parse_run("pretrain", [*words, *options]).config
    model = dataclasses.replace(config.model, vocab_size=200, visual_vocab_size=64)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(dataclasses.replace(config, model=model)))
    losses = [9.0, 8.0, 7.0, 6.0, 5.0, 40.0, 3.0, 2.0]
    rows: list[dict[str, float | None]] = [{"step": 0, "eval/loss/mlm": 5.0, "eval/loss/mim": 4.0}]
    for place, loss in enumerate(losses, 1):
        rows.append(
            {
                **{"step": 2 * place, "loss/total": loss + 0.5, "loss/aux/text": 0.2},
                **{"loss/aux/vision": 0.3, "step_seconds": 2.0, "grad_norm": 1.0},
                **{"memory_gb": 1.0, "moe/text/load_max": 1.0 + place, "moe/text/dead_experts": 1},
                # 500 and 1500 assignments: two blocks of 8 experts with 80 and 98 slots each.
                **{"moe/text/effective_capacity_factor": 1280 / 500},
                **{"moe/vision/effective_capacity_factor": 1568 / 1500},
                **{"moe/vision/load_max": 3.0, "moe/vision/dead_experts": 2.0},
                "moe/text/dropped_fraction": 0.1 * place,
                "moe/vision/dropped_fraction": 0.3,
                "moe/vision/dropped_fraction/mim": 0.01 * place,
                "moe/vision/layer_4/dropped_fraction/mim": 0.02 * place,
                "moe/vl/dropped_fraction/vlm_image": 0.9,
            }
        )
    rows[4] |= {"eval/loss/mlm": 4.0, "eval/loss/mim": None}
    rows[8] |= {
        **{"eval/loss/mlm": 3.0, "eval/loss/vlm_text": 2.0, "eval/loss/vlm_image": 1.0},
        **{"eval/loss/vlm_image_foreground": 7.0, "acc/mlm": 0.25},
        "eval/moe/vision/dropped_fraction/mim": 0.125,
    }
    text = "".join(json.dumps(line) + "\n" for line in rows)
    (folder / "metrics.jsonl").write_text(text)


def test_a_row_of_a_summary_is_what_the_run_logged(tmp_path):
    write_run(tmp_path / "run")
    measured = measured_of(tmp_path / "run")
    values, curve = measured["values"], measured["curve"]
    words = "--preset tiny-8e --model.vocab_size 200 --model.visual_vocab_size 64".split()
    flops = flops_per_step(parse_run("pretrain", words).config)
    assert curve["step"] == [0, 8, 16] and curve["seconds"] == [0.0, 16.0, 32.0]
    assert curve["flops"] == pytest.approx([0.0, 8 * flops, 16 * flops])
    assert curve["mlm"] == [5.0, 4.0, 3.0] and curve["mim"] == [4.0, None, None]
    # Not the sum of what is finite, which would look like a better model.
    assert curve["total"] == [9.0, None, 6.0] and curve["vlm"] == [None, None, 3.0]
    assert measured["training"]["train"] == [9.0, 8.0, 7.0, 6.0, 5.0, 40.0, 3.0, 2.0]
    # The last quarter are steps 14 and 16.
    expected = {
        **{"train": 2.5, "overfit": 3.5, "seconds": 32.0, "seconds_per_step": 2.0, "mlm": 3.0},
        **{"acc/mlm": 0.25, "eval_dropped/mim": 0.125, "dropped_text": 0.75, "dropped": 0.4125},
        **{"dropped/mim": 0.075, "dropped/mim/block_4": 0.15, "load_max": 8.5, "dead_experts": 3.0},
        # 40 is 33.5 above the running median; 1.5 is the median of all distances from it.
        **{"spikes": 1.0, "gradient_peak": 1.0},
    }
    assert {name: values[name] for name in expected} == pytest.approx(expected)
    assert "dropped/vlm_image" not in values and "vlm_image_foreground" not in values
    # Running medians over all that is within five steps.
    medians = [7.5, 7.0, 6.5, 6.5, 6.5, 6.5, 6.0, 5.5]
    deviations = [a - b for a, b in zip(measured["training"]["train"], medians)]
    mean = sum(deviations) / 8
    assert values["roughness"] == pytest.approx(
        math.sqrt(sum((value - mean) ** 2 for value in deviations) / 8)
    )


def change(folder: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    """Changes the rows of metrics.jsonl."""
    file = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    change(rows)
    file.write_text("".join(json.dumps(line) + "\n" for line in rows))


def test_held_out_and_training_losses_have_the_same_weights(tmp_path):
    write_run(tmp_path / "run", "--objectives.mlm_weight", "2")
    values = measured_of(tmp_path / "run")["values"]
    assert (values["total"], values["overfit"]) == (9.0, 6.5)


def test_steps_without_a_finite_number_and_between_logged_ones(tmp_path):
    """An fp16 run has no gradient norm where a step overflows, and evaluation may come between two logged steps."""
    write_run(tmp_path / "run", "--train.stop_on_nan", "false")
    change(tmp_path / "run", lambda rows: rows[3].update(grad_norm=None))
    change(tmp_path / "run", lambda rows: rows.insert(2, {"step": 3, "eval/loss/mlm": 4.5}))
    measured = measured_of(tmp_path / "run")
    assert measured["curve"]["step"] == [0, 3, 8, 16]
    assert measured["curve"]["seconds"] == [0.0, 6.0, 16.0, 32.0]
    assert "gradient_peak" not in measured["values"], "seven norms are too few"

    def spoil(rows):
        for line in rows:
            line |= {key: None for key in line if "loss" in key or key == "grad_norm"}

    change(tmp_path / "run", spoil)
    values = measured_of(tmp_path / "run")["values"]
    assert values["steps"] == 16 and not {"mlm", "total", "train", "roughness"} & set(values)


@pytest.mark.parametrize("key", ["loss/total", "loss/aux/text"])
def test_a_loss_that_is_not_finite_leaves_out_what_it_would_enter(key, tmp_path):
    write_run(tmp_path / "run", "--train.stop_on_nan", "false")
    change(tmp_path / "run", lambda rows: rows[7].update({key: None, "moe/text/load_max": None}))
    measured = measured_of(tmp_path / "run")
    values = measured["values"]
    assert measured["diverged_at"] == 14
    assert measured["training"] == {
        **{"step": [2, 4, 6, 8, 10, 12, 16], "train": [9.0, 8.0, 7.0, 6.0, 5.0, 40.0, 2.0]}
    }
    assert not {"train", "overfit", "roughness", "spikes", "load_max_text"} & set(values)
    assert values["mlm"] == 3.0 and values["load_max_vision"] == 3.0


def test_scores_of_one_seed_and_means_of_several(tmp_path):
    for text in ("[]", "{}", '{"metrics": {"dev/accuracy": "high"}}', '{"metrics": {"a/b": NaN}}'):
        (tmp_path / "metrics.json").write_text(text)
        with pytest.raises(DataError, match="metrics.json: damaged"):
            task_scores("nlvr2", tmp_path)
    path = tmp_path / "metrics.json"
    path.write_text('{"metrics": {"dev/accuracy": 60.0, "dev/samples": 9}}')
    assert task_scores("nlvr2", tmp_path) == {"nlvr2/dev/accuracy": 60.0}
    path.write_text('{"seeds": {}, "summary": {"dev/accuracy": {"mean": 61.0, "std": 1.0}}}')
    assert task_scores("nlvr2", tmp_path) == {"nlvr2/dev/accuracy": 61.0}


def drop(key: str) -> Callable[[Path], object]:
    """Takes a key out of every line of metrics.jsonl."""
    return lambda folder: change(folder, lambda rows: [row.pop(key, None) for row in rows])


def noted(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "study.json").write_text(text)


def cut(folder: Path) -> None:
    change(folder, lambda rows: rows.__delitem__(slice(5, None)))


# What is done to a finished run of 16,000,016 steps, and its state then.
SPOILED: list[tuple[Callable[[Path], object], str]] = [
    (noted("{}"), "finished"),
    (noted('{"environment": "x"}'), "finished"),
    (noted('{"environ'), "finished"),
    (drop("memory_gb"), "metrics.jsonl: step 2000002 has no memory_gb"),
    (lambda folder: (folder / "config.yaml").unlink(), "config.yaml: No such file"),
    (
        lambda folder: change(folder, lambda rows: rows[7].update({"loss/total": None})),
        "diverged: a loss is not finite at step 14000014",
    ),
    (lambda folder: (cut(folder), noted('{"failed": "no memory"}')(folder)), "failed: no memory"),
    (cut, "unfinished: after step 8000008"),
]


def test_one_run_that_cannot_be_read_keeps_no_other_from_the_table(tmp_path, capsys, monkeypatch):
    steps = ["--train.steps", "16000016"]
    seeds = [str(seed) for seed in range(1, len(SPOILED) + 1)]
    words = [*steps, "--seeds", *seeds]
    script = printed_script(
        tmp_path, monkeypatch, capsys, *words, text="runs: [{label: a, experts: 8e}]"
    )
    folders = [Path(shlex.split(line)[-1]) for line in script[2:]]
    for folder, (spoil, _) in zip(folders, SPOILED):
        write_run(folder, *steps)
        change(folder, lambda rows: [row.update(step=1_000_001 * row["step"]) for row in rows])
        root = folder / "checkpoints"
        (root / "iter_16000016").mkdir(parents=True)
        (root / "latest_checkpointed_iteration.txt").write_text("16000016")
        (root / "iter_16000016/metadata.json").write_text('{"sharded_backend": ""}')
        with (root / "iter_16000016/.metadata").open("wb") as file:
            pickle.dump(Metadata(state_dict_metadata={}, storage_data={}), file)
        spoil(folder)
    assert main(["study", "mine.yaml", *DATA, "--data.text", "my text", *words, "--collect"]) == 0
    out, err = capsys.readouterr()
    assert "3 of 8 runs are finished, 3 failed, 1 diverged, 1 unfinished" in out
    rows = json.loads(Path("runs/studies/mine/summary.json").read_text())["rows"]
    for line, (_, state) in zip(rows, SPOILED):
        assert state in line["states"][folders[rows.index(line)].name]
    assert rows[0]["curve"]["step"] == [0, 8000008, 16000016] and rows[0]["values"]["mlm"] == 3.0
    # One line each for the two that cannot be read, the one that diverged and the one that failed before.
    assert [line.startswith("warning: tiny-8e-seed") for line in err.splitlines()] == [True] * 4


def summary(folder: Path, name: str, runs: int | None = None) -> Path:
    """The summary of a study whose first runs have all the values that its table and figure show, from hand."""
    study = STUDIES[name](TINY)
    study = dataclasses.replace(study, runs=study.runs[:runs])
    curve = {"step": [0, 5], "flops": [0, 50], "seconds": [0, 2], "mlm": [5.0, 4.0], "vlm": [9, 8]}
    rows = [
        {
            **row(run.label, seed, **{name: 0.5 + seed for name in study.columns}),
            "curve": {**curve, "mim": [3.0, None], "total": [9.0, 8.0]},
            "training": {"step": [5, 10], "train": [4.0, 3.0]},
            "environment": 0,
            "states": {"x": "finished", "y": "failed: no memory"},
        }
        for seed in (1, 2)
        for run in study.runs
    ]
    definition = dataclasses.asdict(dataclasses.replace(study, runs=()))
    about = {"format_version": 1, "scale": "tiny", "command": "vlmoe study", "study": definition}
    labels = [run.label for run in study.runs]
    path = folder / f"{name}.json"
    write_summary({**about, "labels": labels, "environments": [{}], "rows": rows}, path)
    return path


@pytest.mark.parametrize("name", STUDIES)
def test_table_and_figure_are_drawn_from_a_summary_alone(name, tmp_path, capsys):
    path = summary(tmp_path, name)
    assert run("study", ["--redraw", str(path), "--output", str(tmp_path / "out")]) == 0
    table = (tmp_path / "out" / name / "table.md").read_text()
    assert table.strip() in capsys.readouterr().out
    study = STUDIES[name](TINY)
    assert all(f"| {planned.label} | 2 |" in table for planned in study.runs)
    assert all(claim.text in table for claim in study.claims)
    assert "| 1 of 2 failed |" in table
    if study.paper:
        paper = study.paper[-1]
        assert f"| *{paper.label}* |  | " in table and "numbers that the paper prints" in table
    assert (tmp_path / "out" / name / "figure.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", [path.parent.name for path in PUBLISHED])
def test_published_results_are_what_their_summary_says(name, tmp_path):
    """The table is drawn from the summary beside it, docs/studies.md has its claims, and no run is missing."""
    folder = DOCS / "studies" / name
    summary = json.loads((folder / "summary.json").read_text())
    study = STUDIES[name](SCALES[summary["scale"]])
    assert [run.label for run in study.runs] == summary["labels"]
    assert all(state == "finished" for line in summary["rows"] for state in line["states"].values())
    assert len({line["seed"] for line in summary["rows"]}) >= 3
    assert run("study", ["--redraw", str(folder / "summary.json"), "--output", str(tmp_path)]) == 0
    table = (tmp_path / name / "table.md").read_text()
    assert table == (folder / "table.md").read_text()
    page = (DOCS / "studies.md").read_text()
    decided = [line for line in table.splitlines() if line.startswith("- **")]
    assert len(decided) == len(study.claims)
    assert [line for line in decided if line not in page] == []
    assert f"studies/{name}/figure.png" in page and (folder / "figure.png").is_file()


def test_a_number_of_fewer_seeds_says_so(tmp_path):
    """A fine-tuning failed in one of three seeds; two rows of one pretraining took its time once; a misspelt metric."""
    path = summary(tmp_path, "frozen", runs=2)
    content = json.loads(path.read_text())
    content["study"]["columns"].append("mimm")
    content["study"]["title"] = "$x_$"
    for place, line in enumerate(content["rows"]):
        line["values"]["seconds"] = 120.0
        line["states"] = {f"pretraining-{line['seed']}": "finished", f"task-{place}": "finished"}
    del content["rows"][0]["values"]["mnli/dev_matched/accuracy"]
    write_summary(content, path)
    assert run("study", ["--redraw", str(path)]) == 0
    table = (tmp_path / "table.md").read_text()
    first = next(line for line in table.splitlines() if line.startswith("| frozen | 2 |"))
    assert first.split(" | ")[2:8] == ["2.0 ± 0.7"] * 5 + ["2.5 (1)"]
    assert "Not measured: mimm." in table and "took 4 minutes" in table


@pytest.mark.parametrize("name", ["scaling", "losses"])
def test_lines_of_means_show_the_spread_over_seeds(name, tmp_path, monkeypatch):
    """Seeds end at 5 and 6: 5.5 with a standard deviation of the root of a half."""
    drawn: list[Any] = []
    bars, band = Axes.errorbar, Axes.fill_between
    monkeypatch.setattr(
        Axes,
        "errorbar",
        lambda self, x, y, e, **k: (drawn.append((y, e)), bars(self, x, y, e, **k)),
    )
    monkeypatch.setattr(
        Axes,
        "fill_between",
        lambda self, x, a, b, **k: (drawn.append((a, b)), band(self, x, a, b, **k)),
    )
    path = summary(tmp_path, name, runs=1)
    content = json.loads(path.read_text())
    for line in content["rows"]:
        line["curve"]["mlm"] = [9.0, 4.0 + line["seed"]]
        line["training"]["train"] = [4.0, 4.0 + line["seed"]]
    write_summary(content, path)
    assert run("study", ["--redraw", str(path)]) == 0
    spread = math.sqrt(0.5)
    expected = ([4.0, 5.5 - spread], [4.0, 5.5 + spread]) if name == "losses" else ([5.5], [spread])
    assert any(
        [*a, *b] == pytest.approx([*expected[0], *expected[1]])
        for a, b in drawn
        if isinstance(a, list) and len(a) == len(expected[0])
    )


def edited(key: str, value: Any) -> Callable[[dict[str, Any]], object]:
    """Sets something in the first row of a summary."""
    section, _, name = key.partition(".")
    return lambda content: (content["rows"][0][section] if name else content["rows"][0]).update(
        {name or section: value}
    )


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda content: content.update(labels=[["a"], "b"]), "labels: expected different texts"),
        (lambda content: content.update(labels=["frozen"] * 2), "labels: expected different texts"),
        (lambda content: content.update(environments=["x"]), "environments: expected objects"),
        (lambda content: content.update(format_version="2"), "format_version is '2', not a number"),
        (lambda content: content.pop("format_version"), "format_version is missing"),
        (lambda content: content["rows"].append(content["rows"][0]), "seed 1 is there twice"),
        (lambda content: content["rows"].append(3), "rows[5]: expected an object"),
        (edited("label", "other"), "label other is not among the labels"),
        (edited("seed", True), "seed: wrong type"),
        (edited("values.mim", math.nan), "rows[1]: values: mim: expected a number"),
        (edited("values.mim", 10**400), "rows[1]: values: mim: expected a number"),
        (edited("states", {"x": 1}), "states: x: expected a text"),
        (edited("curve.flops", [None, 1]), "curve: flops: expected numbers"),
        (edited("curve.mlm", ["a", "b"]), "curve: mlm: expected numbers"),
        (edited("curve.mlm", [5.0]), "curve: mlm: as many as steps are expected"),
        (edited("training.train", [None, 3.0]), "training: train: expected numbers"),
        (edited("training.train", [3.0]), "training: train: as many as steps are expected"),
    ],
)
def test_a_summary_that_was_changed_by_hand_is_one_line(edit, message, tmp_path, capsys):
    path = summary(tmp_path, "frozen")
    content = json.loads(path.read_text())
    edit(content)
    write_summary(content, path)
    assert main(["study", "--redraw", str(path)]) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert f"{path}: damaged: " in error and message in error


def test_panels_of_runs_that_were_left_out_stay_empty(tmp_path):
    path = summary(tmp_path, "contrastive", runs=1)
    assert run("study", ["--redraw", str(path), "--output", str(tmp_path / "out")]) == 0
    table = (tmp_path / "out" / "contrastive" / "table.md").read_text()
    assert "LIMoE-masked |" not in table and "no seed has all of these numbers" in table


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "NAME is missing"),
        ("lossess", "did you mean losses?"),
        ("frozen --only frozn", "did you mean frozen?"),
        ("frozen --seeds 1 1", "--seeds names a seed twice"),
        ("frozen --train.seed 3", "use --seeds"),
        ("frozen --save x", "--checkpoint.save is not for studies"),
        ("frozen --finetune.train.stepz 3", "--finetune: unknown option --train.stepz"),
        ("frozen --slurm", "--slurm goes with --print-commands"),
        ("frozen --moe.topk 99", "frozen: moe.topk=99"),
        ("frozen --scale base", "--data.text is missing"),
        ("frozen --data.text nowhere", "is missing"),
        ("--redraw {here}/no.json", "no.json: not found"),
        ("--redraw {here}/broken.json", "damaged"),
        ("--redraw {here}/newer.json", "newer"),
        ("--redraw {here}/foreign.json", "damaged: not the summary of a study"),
        ("losses --redraw {here}/newer.json", "losses: --redraw runs nothing"),
        ("losses.yaml", "losses.yaml: the name losses is that of a built-in study"),
        ("scaling --scale base --print-commands", "--processes 32: more than the 8 of a machine"),
        ("frozen --processes 12 --print-commands --slurm", "no multiple of them"),
        ("frozen --print-commands --slurm", "examples/slurm_pretrain.sh is not here"),
        ("frozen --checkpoint.step 3", "--checkpoint.step is not for studies"),
        ("frozen --finetune.task vqa", "--task.name is not for studies"),
        ("--scale tiny --train.steps 5 frozen --only frozn", "did you mean frozen?"),
        ("--finetune.train.steps 5 frozen --only frozn", "did you mean frozen?"),
        ("frozen --train.steps 5 6", "'6' is not an option"),
        ("scaling --finetune.train.steps 3", "--finetune.train.steps: nothing is fine-tuned in"),
        ("frozen --seeds 9223372036854775808", "--seeds 9223372036854775808: not a whole number"),
        ("frozen --collect --dry-run", "not allowed with"),
        ("frozen --checkpoint {here}/load.yaml", "--checkpoint.load is not for studies"),
        ("help.yaml", "help: --help is not for studies"),
        ("split.yaml", "metric mnli/dev/accuracy: split dev: unknown; choose one of dev_matched"),
        ("--redraw {here}/frozen.json --train.steps 3", "--train.steps: --redraw runs nothing"),
        ("--redraw {here}/frozen.json --scale tiny", "--scale: --redraw runs nothing"),
        ("--redraw {here}/frozen.json --output=", "--output is empty"),
    ],
)
def test_a_users_error_is_one_line(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.json").write_text('{"format_version": 1, "rows": []}')
    (tmp_path / "newer.json").write_text('{"format_version": 2}')
    content = json.loads(summary(tmp_path, "frozen").read_text())
    content["rows"][0]["values"] = []
    (tmp_path / "foreign.json").write_text(json.dumps(content))
    (tmp_path / "losses.yaml").write_text("runs: [{label: a, experts: 8e}]")
    (tmp_path / "help.yaml").write_text("runs: [{label: help, experts: 8e, options: '--help'}]")
    (tmp_path / "load.yaml").write_text("load: elsewhere")
    (tmp_path / "split.yaml").write_text(f"scores: [mnli/dev/accuracy]\n{TUNED}")
    line = words.format(here=tmp_path).split()
    assert main(["study", *line]) in (1, 2)
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "runs").exists()


DATA = "--data.images images --data.pairs pairs --data.text_tokenizer text.model".split()
TUNED = "runs: [{label: a, experts: 32e, tasks: [mnli]}]"


def printed_script(folder: Path, monkeypatch, capsys, *more: str, text: str = TUNED) -> list[str]:
    """The lines that `--print-commands` prints of a run and its fine-tuning, with data in a folder with a space."""
    monkeypatch.chdir(folder)
    for name in ("my text", "images", "pairs", "t/mnli_train", "t/mnli_dev_matched"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.json").write_text("{}")
    (folder / "t/mnli_dev_mismatched.json").write_text("{}")
    (folder / "text.model").write_text("")
    (folder / "mine.yaml").write_text(text)
    words = ["mine.yaml", "--tasks", "t", "--print-commands", *DATA, "--data.text", "my text"]
    assert main(["study", *words, *more]) == 0
    return capsys.readouterr().out.splitlines()


def calls_of(lines: list[str], folder: Path, program: str, says: str) -> list[list[str]]:
    """Runs a script elsewhere, with another program of this name; the words that it was called with."""
    stand_in = folder / "bin" / program
    stand_in.parent.mkdir()
    stand_in.write_text(
        f'#!/bin/bash\n{{ pwd; printf "%s\\n" "$@"; echo; }} >> {folder}/calls\n{says}\n'
    )
    stand_in.chmod(0o755)
    environment = {**os.environ, "PATH": f"{stand_in.parent}:{os.environ['PATH']}"}
    subprocess.run(
        ["bash"], input="\n".join(lines), text=True, check=True, cwd="/", env=environment
    )
    return [call.split("\n") for call in (folder / "calls").read_text().strip().split("\n\n")]


@pytest.mark.process
def test_commands_for_slurm_wait_for_what_they_start_from(tmp_path, capsys, monkeypatch):
    here = tmp_path / "with a space"
    (here / "examples").mkdir(parents=True)
    (here / "examples/slurm_pretrain.sh").write_text("")
    lines = printed_script(here, monkeypatch, capsys, "--scale", "base", "--slurm")
    assert lines[0] == "set -e" and len(lines) == 4
    # The number of a job is how many there are.
    says = f"grep -c slurm_pretrain.sh$ {tmp_path}/calls"
    pretrain, finetune = calls_of(lines, tmp_path, "sbatch", says)
    assert pretrain[0] == finetune[0] == str(here)
    assert pretrain[2].startswith("--job-name=base-32e-seed1-")
    nodes = ["--nodes=4", "--gpus-per-node=8", "--export=ALL,GPUS_PER_NODE=8"]
    own = ["examples/slurm_pretrain.sh", "examples/launch.sh"]
    assert pretrain[3:10] == [*nodes, *own, "pretrain", "--preset"]
    assert pretrain[pretrain.index("--data.text") + 1] == '["my text"]'
    assert pretrain[pretrain.index("--parallel.expert_model_parallel_size") + 1] == "32"
    assert finetune[6:10] == ["--dependency=afterok:1", "--kill-on-invalid-dep=yes", *own]
    assert finetune[finetune.index("--load") + 1] == pretrain[-1]
    assert finetune[finetune.index("--task.micro_batch_size") + 1] == "1"


def test_a_job_starts_as_many_processes_as_its_run_has(tmp_path, capsys, monkeypatch):
    """Also where Slurm gives it whole nodes, of which the launcher would use all GPUs."""
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples/slurm_pretrain.sh").write_text("")
    words = ("--scale", "base", "--processes", "4", "--slurm")
    lines = printed_script(tmp_path, monkeypatch, capsys, *words)
    for job in lines[2:]:
        assert "--nodes=1 --gpus-per-node=4 --export=ALL,GPUS_PER_NODE=4 " in job


@pytest.mark.process
def test_commands_without_slurm_run_as_they_are_printed(tmp_path, capsys, monkeypatch):
    here = tmp_path / "with a space"
    here.mkdir()
    lines = printed_script(here, monkeypatch, capsys, "--seeds", "1", "--processes", "2")
    pretrain, finetune = calls_of(lines, tmp_path, "torchrun", "")
    start = ["--standalone", "--nproc-per-node", "2", "-m", "megatron_vlmoe"]
    assert pretrain[:7] == [str(here), *start, "pretrain"] and finetune[6] == "finetune"
    assert pretrain[pretrain.index("--data.text") + 1] == '["my text"]'
    assert finetune[finetune.index("--load") + 1] == pretrain[pretrain.index("--save") + 1]


@pytest.mark.process
def test_a_run_that_a_killed_study_left_behind_is_named(tmp_path):
    """It holds the lock as the study gave it, and nobody can wait for, or end, what he does not know."""
    with locked(tmp_path) as lock:
        code = "import sys; sys.stdin.read()"
        words = [sys.executable, "-c", code, "--save", str(tmp_path / "runs/tiny-8e-seed1-0")]
        left = subprocess.Popen(words, stdin=subprocess.PIPE, pass_fds=(lock.fileno(),))
    try:
        with (
            pytest.raises(ConfigError, match=rf"\(tiny-8e-seed1-0, process {left.pid}\); wait"),
            locked(tmp_path),
        ):
            pass
    finally:
        left.communicate()
    with locked(tmp_path):
        pass


def test_data_that_change_while_a_study_runs_are_not_taken_for_the_former(study, tmp_path, capsys):
    manifest = tmp_path / "text.json"
    manifest.write_text(json.dumps({"files": {"text_document.bin": {"size": 1, "sha256": "ab"}}}))
    request = Request(tmp_path, (1,), 1, ("--data.text", str(tmp_path / "text")))
    planner = Planner(TINY, request)
    runs = [row.pretraining for row in planner.plan(study)][:1]
    assert not planner.has_changed(runs[0])
    manifest.write_text(manifest.read_text().replace("ab", "cd"))
    with locked(tmp_path) as lock:
        runner = Runner(runs, 1, lock, planner.has_changed)
        runner.run()
    assert not runs[0].folder.exists()
    assert "its data have changed since this command began" in runner.failures[runs[0].folder]
    assert capsys.readouterr().err.startswith(f"failed: {runs[0].folder.name}: its data have")


def test_parts_may_have_terms_of_several_metrics():
    """A gain on one loss minus that on another: 0.3 - 0.1."""
    terms = ((1.0, "mlm", "d"), (-1.0, "mlm", "e"), (-1.0, "vlm", "d"), (1.0, "vlm", "e"))
    rows = [row("d", 1, mlm=1.3, vlm=2.1), row("e", 1, mlm=1.0, vlm=2.0)]
    ((_, interval),) = decide(Claim("", "", (Part("", terms),)), rows).parts
    assert interval.mean == pytest.approx(0.2)
