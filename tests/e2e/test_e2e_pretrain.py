"""One process from raw files to a checkpoint: what a run leaves, resume, stop, stored codes."""

from __future__ import annotations

import gzip
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from commands import environment, run, run_many, tool
from conftest import Run
from small_corpus import ROOMY, Corpus, assert_same_metrics, metrics

STEP_KEYS = """
step loss/total loss/mlm loss/mim loss/vlm loss/vlm_text loss/vlm_image loss/aux/text loss/aux/vision
moe/text/dropped_fraction moe/vision/dropped_fraction moe/text/effective_capacity_factor tokens_per_second
""".split()


def test_metrics_have_the_keys_of_the_contract(unbroken: Run) -> None:
    assert [record["step"] for record in unbroken.steps] == [1, 2, 3, 4, 5, 6]
    for record in unbroken.steps:
        assert set(STEP_KEYS) <= record.keys(), set(STEP_KEYS) - record.keys()
        assert all(isinstance(value, (int, float)) for value in record.values())
        assert all(math.isfinite(value) for value in record.values())


def test_the_total_is_the_sum_of_the_losses(unbroken: Run) -> None:
    for record in unbroken.steps:
        vlm = record["loss/vlm_text"] + record["loss/vlm_image"]
        assert record["loss/vlm"] == pytest.approx(vlm, rel=1e-6)
        parts = ["loss/mlm", "loss/mim", "loss/vlm", "loss/aux/text", "loss/aux/vision"]
        assert record["loss/total"] == pytest.approx(sum(record[p] for p in parts), rel=1e-5)


def test_untrained_losses_are_near_the_uniform_entropy(unbroken: Run) -> None:
    first = unbroken.metrics[0]
    assert first["step"] == 0
    for name, size in (("mlm", 200), ("vlm_text", 200), ("mim", 64), ("vlm_image", 64)):
        assert first[f"eval/loss/{name}"] == pytest.approx(math.log(size), rel=0.15)


def test_evaluations_at_step_0_and_every_third(unbroken: Run) -> None:
    records = [record for record in unbroken.metrics if any(k.startswith("acc/") for k in record)]
    assert [record["step"] for record in records] == [0, 3, 6]
    for record in records:
        for name in ("mlm", "mim", "vlm_text", "vlm_image"):
            assert 0.0 <= record[f"acc/{name}"] <= 1.0
            assert 0.0 < record[f"unigram/{name}"] < math.log(200)
        for name in ("mim", "vlm_image"):
            parts = [record[f"eval/loss/{name}_{part}"] for part in ("foreground", "background")]
            assert min(parts) < record[f"eval/loss/{name}"] < max(parts)
        # Before the first step it makes nearly no difference what stands beside what.
        grounding = [record[f"eval/grounding/{name}"] for name in ("vlm_text", "vlm_image")]
        assert all(value != 0.0 for value in grounding)
        assert all(abs(value) < 0.1 for value in grounding)


def test_it_learns(unbroken: Run) -> None:
    losses = [record["loss/total"] for record in unbroken.steps]
    assert losses[-1] < losses[0] - 0.2


def test_checkpoints_tracker_and_configuration(unbroken: Run) -> None:
    folder = unbroken.folder / "checkpoints"
    assert (folder / "latest_checkpointed_iteration.txt").read_text().strip() == "6"
    kept = sorted(path.name for path in folder.iterdir() if path.is_dir())
    assert kept == ["iter_0000004", "iter_0000006"]
    assert not list(folder.rglob("*.tmp"))
    config = yaml.safe_load((unbroken.folder / "config.yaml").read_text())
    assert config["train"]["seed"] == 5 and config["model"]["hidden_size"] == 32


def test_saved_configuration_runs_again(unbroken: Run, corpus: Corpus) -> None:
    words = ["pretrain", "--config", str(unbroken.folder / "config.yaml"), "--dry-run"]
    run_many([words], cwd=corpus.folder)[0].succeeded()


def test_profile_and_tensorboard_leave_files(unbroken: Run) -> None:
    (trace,) = (unbroken.folder / "profile").glob("*.json.gz")
    with gzip.open(trace, "rt") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"aten::addmm", "_OneByOneBackward"} <= names and len(names) > 20
    assert list(unbroken.folder.rglob("events.out.tfevents.*"))


def test_progress_lines(unbroken: Run) -> None:
    text = unbroken.outcome.stdout
    for step in range(1, 7):
        assert f"{step}/6" in text
    assert "unigram" in text


def test_plot(unbroken: Run, corpus: Corpus) -> None:
    from PIL import Image

    outcome = tool(
        *("plot_losses", "--run", unbroken.folder, "--output", "losses.png"),
        *("--experts", "experts.png"),
        cwd=corpus.folder,
    )
    outcome.succeeded()
    for name in ("losses.png", "experts.png"):
        with Image.open(corpus.folder / name) as picture:
            assert picture.format == "PNG" and min(picture.size) > 200
    for column in ("task", "held-out loss", "guessing by frequency", "accuracy"):
        assert column in outcome.stdout
    # The last losses of both patch objectives and both token objectives.
    last = unbroken.steps[-1]
    for name in ("mlm", "mim", "vlm_text", "vlm_image"):
        assert f"{last[f'eval/loss/{name}']:.3f}" in outcome.stdout


def test_report(unbroken: Run, corpus: Corpus) -> None:
    """Of a real run nothing is missing, and the page has what the run itself printed."""
    tool("report", unbroken.folder, "--output", "report", cwd=corpus.folder).succeeded()
    text = (corpus.folder / "report" / "report.md").read_text(encoding="utf-8")
    last = unbroken.steps[-1]
    assert "6 of 6" in text and " no " not in text.partition("## Cost")[0]
    for name in ("mlm", "mim", "vlm_text", "vlm_image"):
        assert f"{last[f'eval/loss/{name}']:.4f}" in text
    assert (corpus.folder / "report" / "report.html").read_text().count("<svg role") > 10


def test_a_stopped_and_resumed_run_equals_an_unbroken_one(unbroken: Run, corpus: Corpus) -> None:
    folder = corpus.folder / "runs" / "resumed"
    words = [*ROOMY, "--train.eval_interval", "3"]
    first, second, third = run_many(
        [
            corpus.words(folder, 6, *words, "--exit-interval", "2"),
            corpus.words(folder, 6, *words),
            corpus.words(folder, 6, *words),
        ],
        cwd=corpus.folder,
    )
    first.succeeded()
    assert "2/6" in first.stdout and "3/6" not in first.stdout
    second.succeeded()
    assert "1/6" not in second.stdout and "3/6" in second.stdout and "6/6" in second.stdout
    assert "train.exit_interval: 2 -> 0" in second.stdout and "other options" not in first.stdout
    assert_same_metrics(metrics(folder), unbroken.metrics)
    # The third has nothing left to do, and says so by ending well.
    third.succeeded()
    assert "6/6" not in third.stdout
    assert_same_metrics(metrics(folder), unbroken.metrics)


def test_sigterm_saves_and_ends_well(corpus: Corpus) -> None:
    folder = corpus.folder / "runs" / "stopped"
    words = corpus.words(folder, 100000, "--save-interval", "0")
    command = [sys.executable, "-m", "megatron_vlmoe", *words]
    process = subprocess.Popen(
        command,
        cwd=corpus.folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + 300
        path = folder / "metrics.jsonl"
        while not (path.exists() and len(path.read_text().splitlines()) > 4):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "no step in 300 s"
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        text = process.communicate(timeout=300)[0]
    finally:
        process.kill()
    assert process.returncode == 0, text
    assert "Traceback" not in text
    latest = int((folder / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
    records = metrics(folder)
    assert latest == records[-1]["step"]
    assert (folder / "checkpoints" / f"iter_{latest:07d}").is_dir()
    # With the paper's capacity something is dropped now and then.
    shares = [record["moe/vision/dropped_fraction"] for record in records if record["step"] > 0]
    assert all(0.0 <= share < 1.0 for share in shares) and max(shares) > 0.0


def copy_dataset(corpus: Corpus, name: str, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for path in corpus.folder.glob(f"{name}[._]*"):
        if path.is_file():
            (target / path.name).write_bytes(path.read_bytes())


def test_stored_codes(unbroken: Run, corpus: Corpus) -> None:
    coded = corpus.folder / "coded"
    for name in ("images_train", "pairs_train"):
        copy_dataset(corpus, name, coded)
        line = f"--images coded/{name} --tokenizer image_tokenizer --views 2 --workers 0 --seed 7"
        # Captions say left and right: the preset does not mirror pairs.
        line += " --flip-probability 0" if name == "pairs_train" else ""
        tool("encode_images", *line.split(), cwd=corpus.folder).succeeded()
        for suffix in ("bin", "idx", "json"):
            assert (coded / f"{name}_codes.{suffix}").stat().st_size > 0
    data = "--data.images coded/images_train --data.pairs coded/pairs_train".split()
    settings = [*ROOMY, "--train.eval_interval", "3"]
    names = ("stored", "auto", "compute")
    runs = {name: corpus.folder / "runs" / f"codes-{name}" for name in names}
    outcomes = run_many(
        [
            corpus.words(
                runs[name], 3, *settings, *data, "--data.codes", name, "--save-interval", "0"
            )
            for name in names
        ]
        + [corpus.words(corpus.folder / "runs" / "no-codes", 3, "--data.codes", "stored")],
        cwd=corpus.folder,
    )
    for outcome in outcomes[:3]:
        outcome.succeeded()
    assert_same_metrics(metrics(runs["auto"]), metrics(runs["stored"]))
    # Computed on the fly, whatever lies beside the images; the schedule of the learning rate is that of 3 steps.
    assert metrics(runs["compute"])[0] == unbroken.metrics[0]
    first = metrics(runs["compute"])[1], metrics(runs["stored"])[1], unbroken.steps[0]
    assert first[0]["loss/total"] == first[2]["loss/total"]
    assert first[0]["loss/mim"] != first[1]["loss/mim"], "stored views are other crops"
    assert first[0]["loss/mlm"] == first[1]["loss/mlm"], "texts have nothing to do with it"
    outcomes[3].refused("codes")


COUNT_READINGS = """
import sys
from megatron_vlmoe.commands.main import main
from megatron_vlmoe.tokenizers import image

read = image.load_vqkd
image.load_vqkd = lambda folder: print("reads", folder) or read(folder)
sys.exit(main(sys.argv[1:]))
"""


def test_the_image_tokenizer_is_read_once(corpus: Corpus) -> None:
    words = corpus.words(corpus.folder / "runs" / "one-reading", 1, *ROOMY)
    outcome = run("-c", COUNT_READINGS, *words, cwd=corpus.folder, timeout=150).succeeded()
    assert outcome.stdout.count("reads image_tokenizer") == 1


def test_seed_checkpoint(unbroken: Run, corpus: Corpus) -> None:
    """--checkpoint.save_initial: the untrained weights, from which another run starts at step 0."""
    seed, folder = corpus.folder / "runs" / "seed", corpus.folder / "runs" / "from-seed"
    settings = [*ROOMY, "--train.eval_interval", "3", "--checkpoint.keep_last", "1"]
    outcomes = run_many(
        [
            corpus.words(
                seed, 2, *settings, "--checkpoint.save_initial", "true", "--exit-interval", "1"
            ),
            corpus.words(
                folder, 6, *settings, "--load", str(seed / "checkpoints" / "iter_0000000")
            ),
        ],
        cwd=corpus.folder,
    )
    outcomes[0].succeeded()
    assert (seed / "checkpoints" / "iter_0000000").is_dir(), "keep_last spares the seed checkpoint"
    outcomes[1].succeeded()
    assert_same_metrics(metrics(folder), unbroken.metrics)


@pytest.mark.parametrize("kind, name", [("texts", "mlm"), ("images", "mim")])
def test_one_objective_alone_trains_saves_and_resumes(corpus: Corpus, kind: str, name: str) -> None:
    off = [other for other in ("texts", "images", "pairs") if other != kind]
    words = [f"--data.{size}_{other}=0" for size in ("micro", "global") for other in off]
    folder = corpus.folder / "runs" / f"only-{kind}"
    outcomes = run_many(
        [
            corpus.words(folder, 3, *words, "--exit-interval", "2"),
            corpus.words(folder, 3, *words),
        ],
        cwd=corpus.folder,
    )
    for outcome in outcomes:
        outcome.succeeded()
    records = [record for record in metrics(folder) if "loss/total" in record]
    assert [record["step"] for record in records] == [1, 2, 3]
    for record in records:
        losses = {key for key in record if key.startswith("loss/") and "aux" not in key}
        assert losses == {"loss/total", f"loss/{name}"}


def test_the_folder_of_a_run_can_be_moved_and_resumed(unbroken: Run, corpus: Corpus) -> None:
    """Another folder starts from weights that --load names, and leaves that folder alone."""
    before = sorted(os.listdir(unbroken.folder / "checkpoints"))
    folder = corpus.folder / "runs" / "loaded"
    words = corpus.words(folder, 8, *ROOMY, "--load", str(unbroken.folder))
    outcome = run_many([words], cwd=corpus.folder)[0].succeeded()
    assert "7/8" in outcome.stdout and "6/8" not in outcome.stdout
    assert sorted(os.listdir(unbroken.folder / "checkpoints")) == before
