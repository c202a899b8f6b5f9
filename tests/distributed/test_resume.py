"""A resumed run is the unbroken one, its options are those of the command, and nothing of a run folder is lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import Layout, Workers, assemble, assert_close, assert_identical, layout
from prepared_tasks import Prepared
from resume_runs import (
    SMALL,
    adam_step_by_hand,
    command,
    loss_scale_after_loading,
    stopped_and_resumed,
)
from small_checkpoints import edited_common
from training_runs import trainer_run

from megatron_vlmoe.config.presets import recipe_names
from megatron_vlmoe.train.checkpoint_files import common_content

ONE = Layout(1)
# Recipe to its task: one of each task, and those that differ from it in numbers.
MAIN = {
    "pretrain": "",
    **{"vqa": "vqa", "nlvr2": "nlvr2", "coco": "retrieval", "imagenet": "imagenet", "mnli": "mnli"},
}
TASKS = {"flickr30k": "retrieval", "imagenet22k": "imagenet"}
RECIPES = MAIN | {
    name: TASKS.get(name, name.removesuffix("-ablation").removeprefix("sample-"))
    for name in recipe_names()
    if name not in MAIN
}
RECIPES["flickr30k-ablation"] = "retrieval"
# The last LayerNorm and the heads, two blocks, and the embeddings.
FACTORS = {
    "vqa": {1.0, 20.0},
    "imagenet": {0.85**n for n in range(4)},
    "imagenet-ablation": {0.85**n for n in range(4)},
    "imagenet22k": {0.65**n for n in range(4)},
}
WITHOUT = ("--parallel.use_distributed_optimizer", "false")
OPTIMIZERS = {
    "distributed": (),
    "not-distributed": WITHOUT,
    "sgd": (*WITHOUT, *"--optim.optimizer sgd --optim.sgd_momentum 0.9".split()),
}


@pytest.fixture(scope="module")
def resumed(workers: Workers, prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Reports of every rank by optimizer, recipe and layout; the checkpoint is that of one process."""
    folder = tmp_path_factory.mktemp("resumed")
    prefixes = {task: prepared.prefix(task) for task in RECIPES.values() if task}
    kept: dict[Any, Any] = {}

    def run(name: str, recipe: str, where: Layout = ONE) -> list[dict[str, Any]]:
        if (name, recipe, where) not in kept:
            path, named = str(folder / name / recipe), (recipe, RECIPES[recipe])
            arguments = (where, named, prefixes, prepared.tokenizer, OPTIMIZERS[name], path)
            kept[name, recipe, where] = workers.run(
                where, stopped_and_resumed, *arguments, where != ONE
            )
        return list(kept[name, recipe, where])

    return run


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        *(("distributed", recipe) for recipe in RECIPES),
        *(("not-distributed", recipe) for recipe in (*MAIN, "imagenet22k")),
        ("sgd", "pretrain"),
    ],
)
def test_a_recipe_resumes_as_if_unbroken(name: str, recipe: str, resumed: Any) -> None:
    (report,) = resumed(name, recipe)
    assert report["loaded"]["groups"] == report["stopped"]["groups"]
    factors = {group["lr_mult"] for group in report["loaded"]["groups"]}
    assert sorted(factors) == pytest.approx(sorted(FACTORS.get(recipe, {1.0})))
    for group in report["loaded"]["groups"]:
        assert group["max_lr"] == report["lr"] * group["lr_mult"]
    mine, theirs = report["resumed"], report["unbroken"]
    assert_identical(mine["optimizer"], theirs["optimizer"], "optimizer")
    stopped, whole = (assemble([report[what]["weights"]]) for what in ("stopped", "unbroken"))
    assert_identical(assemble([mine["weights"]]), whole, "weights")
    assert any((stopped[key] != whole[key]).any() for key in whole)


@pytest.mark.parametrize(
    ("name", "where", "recipe"),
    [
        ("distributed", layout(2, tp=2), "vqa"),
        ("distributed", layout(2, pp=2), "imagenet"),
        ("not-distributed", layout(2, tp=2), "imagenet"),
        ("not-distributed", layout(2, pp=2), "vqa"),
    ],
    ids=["vqa-tp2", "imagenet-pp2", "imagenet-tp2-not-distributed", "vqa-pp2-not-distributed"],
)
def test_a_recipe_resumes_at_another_layout(
    name: str, where: Layout, recipe: str, resumed: Any
) -> None:
    (expected,) = resumed(name, recipe)
    results = resumed(name, recipe, where)
    rates = {g["lr_mult"]: g["lr"] for own in results for g in own["loaded"]["groups"]}
    assert rates == {g["lr_mult"]: g["lr"] for g in expected["loaded"]["groups"]}
    mine = assemble([result["resumed"]["weights"] for result in results])
    # Adam's division magnifies rounding where a gradient is nearly zero.
    assert_close(mine, assemble([expected["unbroken"]["weights"]]), recipe, 1e-3)


CHANGED = """
--optim.lr 5e-4 --optim.min_lr 5e-5 --optim.lr_decay_style linear --train.steps 6 --optim.weight_decay 0.3
--optim.adam_beta1 0.8 --optim.adam_beta2 0.9 --optim.adam_eps 1e-5 --optim.layer_decay 0.5
--optim.head_lr_multiplier 3 --optim.clip_grad 0.05
""".split()


def test_a_step_after_resuming_is_of_the_options_of_the_command(
    workers: Workers, tmp_path: Path
) -> None:
    before = (*WITHOUT, "--optim.layer_decay", "0.9")
    after = (*WITHOUT, *CHANGED)
    (found,) = workers.run(1, adam_step_by_hand, ONE, before, after, str(tmp_path))
    assert found["parameters"] > 50 and found["worst"] < 1e-3
    assert found["norm"] > 0.05, "the new bound clips"
    # Two of six steps of a linear decay from 5e-4 to 5e-5.
    rate = 3.5e-4
    expected = {(rate * f, d) for f in (1.0, 3.0, 0.5, 0.25, 0.125) for d in (0.0, 0.3)}
    pairs = {(group["lr"], group["weight_decay"]) for group in found["groups"]}
    # Only the last LayerNorm has the full rate, and it does not decay.
    assert len(pairs) == 9
    for pair in pairs:
        assert any(pair == pytest.approx(other) for other in expected), pair
    for group in found["groups"]:
        assert tuple(group["betas"]) == (0.8, 0.9) and group["eps"] == 1e-5


FEW = ("--data.global_texts", "4", "--data.global_images", "4", "--data.global_pairs", "4")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def saved(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three steps with checkpoints of all."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    options = (
        *FEW,
        "--train.steps",
        "3",
        "--save-interval",
        "1",
        "--optim.lr_decay_style",
        "linear",
    )
    workers.run(ONE, trainer_run, ONE, options, str(folder))
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """The run of `saved`, to be changed."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def check_rates(result: dict[str, Any]) -> None:
    """After four of the six steps of `CHANGED`: a third of the way from 5e-5 to 5e-4, times every factor."""
    factors = (1.0, 3.0, *(0.5**n for n in range(1, 6)))
    for name, value in (("lr", 2e-4), ("max_lr", 5e-4), ("min_lr", 5e-5)):
        found = sorted({group[name] for group in result["groups"]})
        assert found == pytest.approx(sorted(value * factor for factor in factors)), name
    for group in result["groups"]:
        assert group["lr"] == pytest.approx(2e-4 * group["lr_mult"])


@pytest.mark.parametrize("how", ["--save", "--load"])
def test_changed_rates_train_and_are_logged(
    how: str, workers: Workers, copy: Path, tmp_path: Path
) -> None:
    target = copy if how == "--save" else tmp_path / "other"
    options = (*FEW, *CHANGED, "--exit-interval", "4")
    if how == "--load":
        options = (*options, "--load", str(copy))
    (result,) = workers.run(ONE, trainer_run, ONE, options, str(target))
    assert result["step"] == 4
    # After four of six steps of a linear decay from 5e-4 to 5e-5.
    assert read_metrics(target)[-1]["lr"] == pytest.approx(2e-4)
    check_rates(result)
    if how == "--save":
        (warning,) = result["warnings"]
        assert "optim.lr: 0.003 -> 0.0005" in warning and "optim.adam_beta1: 0.9 -> 0.8" in warning


def test_rates_of_a_checkpoint_of_an_earlier_version(workers: Workers, copy: Path) -> None:
    """Its groups have no factors, and a wrong resume had mixed their rates up; of sums between lines it has none."""
    with edited_common(copy / "checkpoints/iter_0000003") as common:
        del common["train_state"]["interval"]
        for part in common["optimizer"].values():
            for group in part["optimizer"]["param_groups"]:
                group.update(lr_mult=1.0, lr=7.0, max_lr=7.0, min_lr=7.0, weight_decay=7.0)
    options = (*FEW, *CHANGED, "--exit-interval", "4")
    (result,) = workers.run(ONE, trainer_run, ONE, options, str(copy))
    check_rates(result)
    assert {group["weight_decay"] for group in result["groups"]} == {0.0, 0.3}
    assert {group["step"] for group in result["groups"]} == {4}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--moe.train_experts", "false"), "moe.train_experts: True -> False"),
        (("--data.micro_texts", "0"), "data.micro_texts: 2 -> 0"),
        (WITHOUT, "parallel.use_distributed_optimizer: True -> False"),
        ((*WITHOUT, "--optim.optimizer", "sgd"), "optim.optimizer: adam -> sgd"),
        (("--train.steps", "2"), "train.steps=2: "),
        (
            (*WITHOUT, "--train.precision", "bf16"),
            "parallel.use_distributed_optimizer=false cannot",
        ),
    ],
    ids=["frozen", "unreached", "format", "optimizer", "shorter", "not-savable"],
)
def test_options_that_the_saved_state_does_not_allow_are_named(
    options: tuple[str, ...], named: str, workers: Workers, saved: Path
) -> None:
    (result,) = workers.run(
        ONE, trainer_run, ONE, (*FEW, "--train.steps", "4", *options), str(saved)
    )
    assert result.get("error") in ("CheckpointError", "ConfigError"), result
    assert named in result["message"] and "\n" not in result["message"]


@pytest.mark.parametrize(
    ("options", "anew", "expected", "after"),
    [
        # Nothing has changed: the state is kept.
        ((), False, (512.0, 600, 1), 512.0),
        (("min_loss_scale", "1024"), False, (1024.0, 600, 1), 1024.0),
        # 600 good steps are enough already: the next one doubles it.
        (("loss_scale_window", "500"), False, (512.0, 499, 1), 1024.0),
        (("initial_loss_scale", "4096", "hysteresis", "3"), True, (4096.0, 0, 3), 4096.0),
    ],
)
def test_loaded_loss_scale_keeps_to_the_options(
    options: tuple[str, ...], anew: bool, expected: Any, after: float, workers: Workers
) -> None:
    saved = {"scale": 512.0, "growth_tracker": 600, "hysteresis_tracker": 1}
    (found,) = workers.run(1, loss_scale_after_loading, saved, options, anew)
    assert found == (expected, after)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def test_a_run_without_tracker_is_refused_and_goes_on_by_choice(
    workers: Workers, copy: Path
) -> None:
    root = copy / "checkpoints"
    tracker = root / "latest_checkpointed_iteration.txt"
    tracker.unlink()
    before = (copy / "metrics.jsonl").read_bytes()
    options = (*FEW, "--train.steps", "3", "--optim.lr_decay_style", "linear")
    (result,) = workers.run(ONE, trainer_run, ONE, options, str(copy))
    assert result["error"] == "CheckpointError" and "--checkpoint.step newest" in result["message"]
    assert "iter_0000001, iter_0000002, iter_0000003" in result["message"]
    assert (copy / "metrics.jsonl").read_bytes() == before and not tracker.exists()
    marks = {step: common_content(root / f"iter_000000{step}") for step in (1, 2, 3)}

    chosen = ("--checkpoint.step", "1", "--save-interval", "1", "--exit-interval", "2")
    (result,) = workers.run(ONE, trainer_run, ONE, (*options, *chosen), str(copy))
    assert result["step"] == 2 and tracker.read_text() == "2\n"
    assert names(root) == ["iter_0000001", "iter_0000002", "set_aside"]
    for step in (2, 3):
        aside = root / f"set_aside/iter_000000{step}"
        assert common_content(aside) == marks[step]
        assert any(str(aside) in line for line in result["warnings"])
    assert [line["step"] for line in read_metrics(copy)] == [0, 1, 2]
    later = (copy / "metrics.set_aside.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in later] == [2, 3]
    # The choice was made once: it is no option of the run.
    assert "step: ''" in (copy / "config.yaml").read_text()
    (result,) = workers.run(ONE, trainer_run, ONE, options, str(copy))
    assert result["step"] == 3 and names(root)[:3] == [f"iter_000000{n}" for n in (1, 2, 3)]
    assert [line["step"] for line in read_metrics(copy)] == [0, 1, 2, 3]


def test_a_damaged_tracker_is_mended_by_choice(workers: Workers, copy: Path) -> None:
    tracker = copy / "checkpoints/latest_checkpointed_iteration.txt"
    tracker.unlink()
    tracker.mkdir()
    options = (*FEW, "--train.steps", "4")
    (result,) = workers.run(ONE, trainer_run, ONE, options, str(copy))
    assert f"{tracker}: is no regular file" in result["message"]
    (result,) = workers.run(
        ONE, trainer_run, ONE, (*options, "--checkpoint.step", "newest"), str(copy)
    )
    assert result["step"] == 4 and tracker.read_text() == "4\n"


def test_a_step_that_is_not_there(workers: Workers, copy: Path, tmp_path: Path) -> None:
    for folder, step, expected in (
        (copy, "7", "no checkpoint of step 7, but iter_0000001, iter_0000002, iter_0000003"),
        (tmp_path / "new", "7", "checkpoint.step=7: no checkpoint there"),
    ):
        options = (*FEW, "--checkpoint.step", step)
        (result,) = workers.run(ONE, trainer_run, ONE, options, str(folder))
        assert expected in result.get("message", ""), result


def test_fine_tuning_goes_on_by_choice_and_with_the_options_of_the_command(
    workers: Workers, prepared: Prepared, tmp_path: Path
) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    data = ("--task.data", prepared.prefix("nlvr2"), "--data.text_tokenizer", prepared.tokenizer)
    start = ("--task", "nlvr2", *SMALL, *data, "--train.steps", "2", "--keep-last", "0")
    start = (*start, "--save-interval", "1", "--task.eval_epochs", "0")

    def call(name: str, *words: str) -> str:
        return str(workers.run(1, command, name, words)[0])

    # A request to leave that comes with the last step leaves the evaluation to the next start.
    leave = ("--train.exit_duration_minutes", "1e-9")
    assert "saved" in call("finetune", *start, "--save", str(run), *leave)
    made = call("finetune", *start, "--save", str(run), *leave)
    assert "stopped after step 2: train.exit_duration_minutes" in made
    assert not (run / "metrics.json").exists()
    assert "finished 2 steps" in call("finetune", *start, "--save", str(run))
    assert (run / "metrics.json").exists()
    root = run / "checkpoints"
    tracker = root / "latest_checkpointed_iteration.txt"
    tracker.unlink()
    options = (
        "--optim.lr 3e-4 --optim.layer_decay 0.5 --train.steps 3 --optim.lr_warmup_steps 0".split()
    )
    options += ["--optim.lr_decay_style", "linear", "--save", str(run)]
    refusal = call("finetune", *start, *options)
    assert refusal.startswith(f"error: {root}: has iter_0000001, iter_0000002, but no")
    # Of another run in --load, the step is that run's: its weights, from step 0.
    words = [*SMALL[2:], "--task", "nlvr2", *data, "--load", str(run), "--checkpoint.step", "1"]
    made = call("finetune", *words, "--train.steps", "1", "--save", str(other))
    assert f"starting from {root}/iter_0000001" in made
    went_on = call("finetune", *start, *options, "--checkpoint.step", "1")
    assert f"going on in {root}/iter_0000001 with other options" in went_on
    assert "optim.lr: 0.001 -> 0.0003" in went_on
    # After two of three steps of a linear decay to 0.
    records = {line["step"]: line for line in read_metrics(run) if "lr" in line}
    assert records[2]["lr"] == pytest.approx(1e-4) and records[3]["lr"] == 0.0
    assert names(root) == ["iter_0000001", "iter_0000002", "iter_0000003", "set_aside"]
    evaluated = call("evaluate", "--load", str(run), "--checkpoint.step", "1")
    assert f"loaded {root}/iter_0000001" in evaluated
    # Labels in another order would be learned on top of what the head knows.
    with edited_common(root / "iter_0000003") as common:
        common["config"]["task"]["labels_sha256"] = "0" * 64
    assert "its labels are not those" in call("finetune", *start, *options)
