"""Fine-tuning and evaluation from the command line: what a run leaves, and what it refuses."""

from __future__ import annotations

import html
import json
import math
import pickle
import re
import shutil
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Sequence

import pytest
from commands import Outcome, run, tool
from conftest import Run
from helpers import Workers, layout
from inference_runs import command_lines
from PIL import Image
from prepared_tasks import Prepared
from small_checkpoints import sum_again
from small_corpus import assert_same_metrics

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

# The text tokenizer of the prepared tasks has 200 tokens.
PRETRAINING = """
--preset tiny-8e --model.num_layers 4 --model.hidden_size 32 --model.num_attention_heads 4
--model.ffn_hidden_size 64 --model.num_vl_layers 1 --model.image_size 32 --model.patch_size 8
--model.text_length 24 --model.pair_text_length 24 --model.vocab_size 200 --model.visual_vocab_size 32
--model.init_std 0.3 --model.layer_scale_init 1
--moe.layers 2 3 --moe.num_vision_experts 4 --moe.num_text_experts 2
--data.micro_texts 2 --data.micro_images 2 --data.micro_pairs 2
--data.global_texts 4 --data.global_images 4 --data.global_pairs 4
--train.steps 2 --train.seed 5 --optim.lr_warmup_steps 1 --data.num_workers 0
""".split()
TUNING = """
--task.eval_epochs 0 --task.micro_batch_size 4 --task.global_batch_size 8 --task.eval_micro_batch_size 4
--task.report_examples 6 --model.text_length 24 --model.pair_text_length 24 --contrastive.matching_weight 1
--train.seed 3 --data.num_workers 0 --log.interval 1
""".split()
TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node".split()
TENSOR_PARALLEL = ["--parallel.tensor_model_parallel_size", "2"]
VQA_STEPS = 12
# Of scores between 0 and 1.
ROUNDING = 5e-6


@dataclass(frozen=True)
class Bench:
    """A pretraining checkpoint, prepared tasks, and processes to run command lines in.

    Args:
        folder: of all runs.
        prepared: the data.
        workers: forked processes, which start sooner than new ones.
    """

    folder: Path
    prepared: Prepared
    workers: Workers

    @property
    def pretrained(self) -> str:
        """Run folder of the pretraining."""
        return str(self.folder / "pretrained")

    def words(self, task: str, save: str, steps: int, *more: str) -> list[str]:
        """A fine-tuning from the pretraining checkpoint."""
        return [
            *("finetune", "--task", task, "--preset", f"sample-{task}", *TUNING),
            *("--load", self.pretrained, "--task.data", self.prepared.prefix(task)),
            *("--data.text_tokenizer", self.prepared.tokenizer),
            *("--save", str(self.folder / save), "--train.steps", str(steps), *more),
        ]

    def run(self, words: Sequence[str], processes: int = 1) -> Outcome:
        """Runs a command line on forked processes of its own; rank 0's status and output."""
        launched = processes > 1
        results = self.workers.run(layout(processes), command_lines, [list(words)], launched)
        return Outcome(tuple(words), *results[0][0])

    def finetune(self, task: str, save: str, steps: int, *more: str) -> Run:
        """Fine-tunes on one process."""
        outcome = self.run(self.words(task, save, steps, *more)).succeeded()
        return Run(self.folder / save, outcome)


@pytest.fixture(scope="module")
def bench(prepared: Prepared, workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    made = Bench(tmp_path_factory.mktemp("finetuning"), prepared, workers)
    program = ["-m", "megatron_vlmoe.train.random_pretrain"]
    run(*program, *PRETRAINING, "--save", made.pretrained).succeeded()
    return made


@pytest.fixture(scope="module")
def vqa(bench: Bench) -> Run:
    """Visual question answering, in a process as a user starts it."""
    words = bench.words("vqa", "vqa", VQA_STEPS, "--optim.lr", "0.003")
    return Run(bench.folder / "vqa", run("-m", "megatron_vlmoe", *words).succeeded())


@pytest.fixture(scope="module")
def resized(bench: Bench) -> Run:
    """Image classification at twice the pretraining's resolution."""
    more = "--model.image_size 64 --save-initial true --task.save_best false".split()
    return bench.finetune("imagenet", "imagenet", 1, *more)


@pytest.fixture(scope="module")
def seeds(bench: Bench) -> Run:
    """Two seeds with longer texts than the pretraining's."""
    more = "--seeds 1 2 --model.text_length 40 --save-initial true --task.save_best false"
    return bench.finetune("mnli", "seeds", 2, *more.split())


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def split_rows(prefix: str, task: str) -> list[Any]:
    """All samples of a prepared split."""
    from megatron_vlmoe.data.task_dataset import TaskDataset

    dataset = TaskDataset.open(prefix, task, None)
    return [dataset.row(number) for number in range(len(dataset))]


def tensors(run_folder: Path | str, step: int) -> dict[str, Any]:
    """Every tensor of a checkpoint, whole, by its name."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.FileSystemReader(str(Path(run_folder) / "checkpoints" / f"iter_{step:07d}"))
    known = reader.read_metadata().state_dict_metadata
    found = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in known.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(found, storage_reader=reader, no_dist=True)
    return found


def weights(run_folder: Path | str, step: int) -> dict[str, Any]:
    """The model's tensors, without those of the optimizer."""
    found = tensors(run_folder, step)
    return {key: value for key, value in found.items() if not key.startswith("optimizer.")}


def listed(outcome: Outcome, kind: str) -> set[str]:
    """Tensors that the log lists as resized, new or left."""
    return set(re.findall(rf" {kind}: (\S+)$", outcome.stdout, re.MULTILINE))


# What a run leaves


def test_the_log_accounts_for_every_tensor(bench: Bench, vqa: Run) -> None:
    before, after = weights(bench.pretrained, 2), weights(vqa.folder, VQA_STEPS)
    counts = re.search(
        r"(\d+) tensors taken, (\d+) resized, (\d+) new, (\d+) left", vqa.outcome.stdout
    )
    assert counts, vqa.outcome.text
    new, left = listed(vqa.outcome, "new"), listed(vqa.outcome, "left")
    assert new == after.keys() - before.keys() and all(key.startswith("heads.") for key in new)
    assert left == before.keys() - after.keys() and all(key.startswith("heads.") for key in left)
    assert new and left
    taken = len(before.keys() & after.keys())
    assert [int(count) for count in counts.groups()] == [taken, 0, len(new), len(left)]


def test_experts_and_routers_keep_their_bits(bench: Bench, vqa: Run) -> None:
    before, after = weights(bench.pretrained, 2), weights(vqa.folder, VQA_STEPS)
    same = {key for key in before.keys() & after.keys() if before[key].equal(after[key])}
    modules = {key for key in before if ".experts." in key or ".router." in key}
    assert len(modules) == 2 * (2 * 4 + 2) and modules <= same
    trained = [f"decoder.layers.{n}.self_attention.linear_qkv.weight" for n in range(4)]
    trained += ["embedding.image.position", "embedding.text.position", "embedding.text.word.weight"]
    trained += ["decoder.layers.0.mlp.vision_ffn.linear_fc1.weight", "decoder.final_layernorm.bias"]
    assert before.keys() >= set(trained) and not same & set(trained)
    kept = {key for key in tensors(vqa.folder, VQA_STEPS) if key.startswith("optimizer.")}
    assert any("linear_qkv" in key for key in kept)
    assert not any(".experts." in key or ".router." in key for key in kept)


def test_predictions_are_one_per_sample(bench: Bench, vqa: Run) -> None:
    samples = split_rows(f"{bench.prepared.prefix('vqa')}_val", "vqa")
    rows = read_rows(vqa.folder / "predictions.jsonl")
    assert [row["id"] for row in rows] == [sample.id for sample in samples]
    assert len({row["prediction"] for row in rows}) > 1, "the model says always the same"
    for row, sample in zip(rows, samples):
        assert row["texts"] == list(sample.raw) and row["answers"] == list(sample.answers)


NUMBERS = {"none": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"}


def test_metrics_follow_from_the_predictions(bench: Bench, vqa: Run) -> None:
    """The score of VQA v2: a mean over the ten annotators, each left out once, also per type of answer.

    Of the answers of the sample corpus the evaluator changes spelled numbers alone, where the ten differ.
    """
    samples = {x.id: x for x in split_rows(f"{bench.prepared.prefix('vqa')}_val", "vqa")}
    scores, by_type = [], defaultdict[str, list[float]](list)
    for row in read_rows(vqa.folder / "predictions.jsonl"):
        given = samples[row["id"]].answers
        if len(set(given)) > 1:
            given = tuple(NUMBERS.get(answer, answer) for answer in given)
        rests = [Counter(given[:i] + given[i + 1 :]) for i in range(len(given))]
        scores.append(sum(min(1.0, rest[row["prediction"]] / 3) for rest in rests) / len(rests))
        by_type[samples[row["id"]].answer_type].append(scores[-1])
    report = read_json(vqa.folder / "metrics.json")
    assert 0 < sum(scores) < len(scores)
    assert report["task"] == "vqa"
    assert report["metrics"]["val/vqa_official"] == pytest.approx(100 * sum(scores) / len(scores))
    assert set(by_type) == {"yes/no", "number", "other"}
    for name, own in by_type.items():
        key = f"val/vqa_official/{name.replace('/', '_')}"
        assert report["metrics"][key] == pytest.approx(100 * sum(own) / len(own))


def test_settings_say_how_it_was_evaluated(vqa: Run) -> None:
    settings = read_json(vqa.folder / "metrics.json")["settings"]
    expected = {
        **{"capacity": "dropless", "micro_batch_size": 4, "seed": 3, "precision": "fp32"},
        **{"world_size": 1, "data_parallel_size": 1, "tensor_model_parallel_size": 1},
        **{"pipeline_model_parallel_size": 1, "expert_model_parallel_size": 1},
    }
    assert {key: settings.get(key) for key in expected} == expected


def test_submission_file(vqa: Run) -> None:
    entries = read_json(vqa.folder / "vqa_submission.json")
    rows = read_rows(vqa.folder / "predictions.jsonl")
    assert entries == [{"question_id": int(row["id"]), "answer": row["prediction"]} for row in rows]


def test_a_submission_answers_questions_whose_picture_is_lost(bench: Bench, vqa: Run) -> None:
    """As the evaluation server demands: exactly the questions of the publishers' file."""
    raw, save = bench.folder / "lost_raw", bench.folder / "lost"
    shutil.copytree(bench.prepared.folder / "raw" / "tasks" / "vqa", raw)
    first, *others = sorted((raw / "test2015").iterdir())
    first.write_bytes(first.read_bytes()[:200])
    words = ["--task", "vqa", "--raw", str(raw), "--output-prefix", str(bench.folder / "lost_data")]
    words += ["--splits", "test", "--on-error", "skip"]
    tool("prepare_task", *words, "--tokenizer-model", bench.prepared.tokenizer).succeeded()
    options = ["--task.data", str(bench.folder / "lost_data"), "--task.eval_splits", "test"]
    words = ["evaluate", "--load", str(vqa.folder / "best"), "--save", str(save), *options]
    outcome = bench.run([*words, "--task.report_examples", "0"]).succeeded()
    asked = read_json(raw / "v2_OpenEnded_mscoco_test2015_questions.json")["questions"]
    lost = {q["question_id"] for q in asked if first.name.endswith(f"{q['image_id']:012d}.jpg")}
    answers = {e["question_id"]: e["answer"] for e in read_json(save / "vqa_submission.json")}
    assert lost and others and answers.keys() == {q["question_id"] for q in asked}
    notes = read_json(raw / "v2_mscoco_train2014_annotations.json")["annotations"]
    notes += read_json(raw / "v2_mscoco_val2014_annotations.json")["annotations"]
    counts = Counter(note["multiple_choice_answer"] for note in notes)
    (guess,) = {answers[number] for number in lost}
    assert counts[guess] == max(counts.values())
    assert read_json(save / "metrics.json")["left_out"] == {"test": len(lost)}
    assert (
        f"test: {len(lost)} samples were rejected when the split was prepared"
        in outcome.stdout + outcome.stderr
    )


def test_report_shows_examples(vqa: Run) -> None:
    page = (vqa.folder / "report.html").read_text()
    assert page.count("<img ") == 6 and page.count("data:image/") == 6
    assert not re.search(r"(src|href)=.?(https?:|//)", page), "the page needs other files"
    shown = [
        row
        for row in read_rows(vqa.folder / "predictions.jsonl")
        if all(
            html.escape(text) in page
            for text in (row["texts"][0], row["prediction"], *row["answers"][:1])
        )
    ]
    assert len(shown) >= 6
    score = read_json(vqa.folder / "metrics.json")["metrics"]["val/vqa_official"]
    assert f"{score:.2f}" in page


def test_the_answers_of_a_split_without_labels_are_named(bench: Bench, vqa: Run) -> None:
    save = bench.folder / "unlabelled"
    splits = ["--task.eval_splits", "val", "test-dev"]
    words = ["evaluate", "--load", str(vqa.folder / "best"), "--save", str(save), *splits]
    said = bench.run(words).succeeded().stdout
    rows = [row for row in read_rows(save / "predictions.jsonl") if row["split"] == "test-dev"]
    submission = save / "vqa_submission_test-dev.json"
    assert f"test-dev: no labels, {len(rows)} answers written to {submission}\n" in said
    assert "evaluation | \n" not in said and "micro-batch(es) per step" not in said
    assert len(read_json(submission)) == len(rows) > 0
    page = (save / "report.html").read_text()
    assert f"test-dev: no labels; its {len(rows)} answers are in {submission.name}." in page
    samples = int(read_json(save / "metrics.json")["metrics"]["val/samples"])
    assert f'val/samples</th><td class="number">{samples}</td>' in page
    assert page.count("<img ") == 6 and " of val</dd>" in page and "of test-dev</dd>" not in page
    log = (save / "log.txt").read_text()
    assert f"INFO test-dev: no labels, {len(rows)} answers" in log and "INFO torch " in log


def test_checkpoints(vqa: Run) -> None:
    for name in ("best", "checkpoints"):
        latest = (vqa.folder / name / "latest_checkpointed_iteration.txt").read_text().strip()
        assert latest == str(VQA_STEPS)
        assert (vqa.folder / name / f"iter_{VQA_STEPS:07d}" / "metadata.json").is_file()
    assert not list(vqa.folder.rglob("*.tmp"))


# Other resolutions and lengths


def test_image_positions_are_interpolated(bench: Bench, resized: Run) -> None:
    from torch.nn.functional import interpolate

    name = "embedding.image.position"
    assert listed(resized.outcome, "resized") == {name}
    before, after = weights(bench.pretrained, 2), weights(resized.folder, 0)
    patches = before[name][1:].T.reshape(1, 32, 4, 4)
    larger = interpolate(patches, size=(8, 8), mode="bicubic", align_corners=False)
    assert after[name].shape == (1 + 64, 32)
    assert after[name][0].equal(before[name][0]), "the class token has no place in the image"
    assert after[name][1:].allclose(larger.reshape(32, 64).T, atol=1e-6)
    for key in before.keys() & after.keys() - {name}:
        assert before[key].equal(after[key]), key
    settings = read_json(resized.folder / "metrics.json")["settings"]
    assert settings["image_size"] == 64


def test_longer_texts_keep_the_known_positions(bench: Bench, seeds: Run) -> None:
    name = "embedding.text.position"
    assert listed(seeds.outcome, "resized") == {name}
    before = weights(bench.pretrained, 2)
    after = weights(seeds.folder / "seed_1", 0)
    assert after[name].shape == (40, 32) and after[name][:24].equal(before[name])


# Several seeds, early stopping, interruption


def test_several_seeds(seeds: Run) -> None:
    found = [read_json(seeds.folder / f"seed_{n}" / "metrics.json")["metrics"] for n in (1, 2)]
    losses = [Run(seeds.folder / f"seed_{n}", seeds.outcome).steps for n in (1, 2)]
    assert losses[0][0]["loss/total"] != losses[1][0]["loss/total"]
    report = read_json(seeds.folder / "metrics.json")
    assert set(report["seeds"]) == {"1", "2"}
    spreads = []
    for name in ("dev_matched/accuracy", "dev_mismatched/accuracy"):
        one, two = (own[name] for own in found)
        assert [report["seeds"][seed][name] for seed in ("1", "2")] == [one, two]
        expected = {"mean": (one + two) / 2, "std": abs(one - two) / math.sqrt(2)}
        assert report["summary"][name] == pytest.approx(expected)
        spreads.append(expected["std"])
    assert max(spreads) > 0, "both seeds have the same results"


def test_early_stopping(bench: Bench) -> None:
    """Nothing changes at this rate: the second evaluation is no better than the first."""
    more = "--train.eval_interval 1 --task.early_stopping 1 --optim.lr 1e-12".split()
    first = bench.finetune("mnli", "early", 20, *more)
    assert [record["step"] for record in first.steps] == [1, 2]
    assert re.search(
        r"stopped after step 2: .*without a better dev_matched/accuracy", first.outcome.stdout
    )
    best = first.folder / "best" / "latest_checkpointed_iteration.txt"
    assert best.read_text().strip() == "1"
    # The same command again, as a scheduler gives it, does not train on.
    again = bench.finetune("mnli", "early", 20, *more)
    assert [record["step"] for record in again.steps] == [1, 2]


def test_an_interrupted_run_equals_an_unbroken_one(bench: Bench) -> None:
    more = "--train.eval_interval 1 --optim.lr 0.003".split()
    expected = bench.finetune("retrieval", "unbroken", 4, *more)
    assert "negatives from 4 pairs" in expected.outcome.stdout
    stopped = bench.finetune("retrieval", "stopped", 4, *more, "--exit-interval", "2")
    assert [record["step"] for record in stopped.steps] == [1, 2]
    assert not (stopped.folder / "metrics.json").exists(), "it is not done yet"
    actual = bench.finetune("retrieval", "stopped", 4, *more)
    assert [record["step"] for record in actual.steps] == [1, 2, 3, 4]
    assert_same_metrics(actual.metrics, expected.metrics)
    for name in ("predictions.jsonl", "best/latest_checkpointed_iteration.txt"):
        assert (actual.folder / name).read_text() == (expected.folder / name).read_text(), name
    left, right = (read_json(own.folder / "metrics.json") for own in (actual, expected))
    assert left["metrics"] == right["metrics"]


# Evaluation


def evaluation(bench: Bench, source: Run, save: str, batch: int, *more: str) -> list[str]:
    return [
        *("evaluate", "--load", str(source.folder / "best"), "--save", str(bench.folder / save)),
        *("--moe.eval_capacity_factor", "0", "--task.eval_micro_batch_size", str(batch), *more),
    ]


def assert_same_evaluation(actual: Path, expected: Path) -> None:
    left, right = (read_json(folder / "metrics.json") for folder in (actual, expected))
    assert left["metrics"] == right["metrics"] and left["settings"]["capacity"] == "dropless"
    rows, reference = (read_rows(folder / "predictions.jsonl") for folder in (actual, expected))
    assert [row["id"] for row in rows] == [row["id"] for row in reference]
    for row, other in zip(rows, reference):
        assert row.get("prediction") == other.get("prediction")
        assert row.get("images") == other.get("images")
        assert scores(row) == pytest.approx(scores(other), abs=ROUNDING)


def scores(row: dict[str, Any]) -> list[float]:
    if "most_likely" in row:
        return [item["score"] for item in row["most_likely"]]
    return [float(score) for score in row["scores"]]


def exported(bench: Bench, source: str, name: str) -> str:
    """A Hugging Face folder of a run, by the real command line."""
    folder = str(bench.folder / name)
    words = ["export", "--load", source, "--output", folder]
    tool("convert_checkpoint", *words, "--text-tokenizer", bench.prepared.tokenizer).succeeded()
    return folder


def test_a_hugging_face_folder_is_as_good_a_start_as_its_checkpoint(bench: Bench) -> None:
    folder = exported(bench, bench.pretrained, "hf")
    more = "--task.save_best false".split()
    expected = bench.finetune("vqa", "from_checkpoint", 1, *more)
    words = bench.words("vqa", "from_hf", 1, *more, "--load", folder)
    outcome = bench.run(words).succeeded()
    assert listed(outcome, "new") == listed(expected.outcome, "new")
    assert read_json(bench.folder / "from_hf" / "start.json")["checkpoint"] == folder
    actual = weights(bench.folder / "from_hf", 1)
    for key, value in weights(expected.folder, 1).items():
        assert (actual[key] == value).all(), key
    words = bench.words("vqa", "from_hf_tp2", 1, *more, "--load", folder, *TENSOR_PARALLEL)
    bench.run(words, processes=2).succeeded()


def test_an_exported_task_evaluates_as_the_run_does(bench: Bench, vqa: Run, alone: Path) -> None:
    folder = exported(bench, str(vqa.folder), "hf_vqa")
    more = ["--task.data", bench.prepared.prefix("vqa"), "--task.eval_splits", "val", "test-dev"]
    words = evaluation(bench, vqa, "evaluated_hf", 4, "--load", folder, *more)
    bench.run(words).succeeded()
    assert_same_evaluation(bench.folder / "evaluated_hf", alone)
    picture = str(bench.folder / "picture.png")
    Image.new("RGB", (40, 30), (200, 30, 30)).save(picture)
    # As a library would have saved it: the classes are in config.json alone.
    (Path(folder) / "labels.json").unlink()
    asked = ["--image", picture, "--question", "what color is it?"]
    here, there = (
        bench.run(["predict", "--task", "vqa", "--load", where, *asked]).succeeded().stdout
        for where in (str(vqa.folder), folder)
    )
    assert here == there and here.strip()


@pytest.fixture(scope="module")
def alone(bench: Bench, vqa: Run) -> Path:
    """The evaluation on one process; 50 and 25 questions fill no last batch of 7."""
    more = "--task.eval_splits val test-dev".split()
    bench.run(evaluation(bench, vqa, "alone", 7, *more)).succeeded()
    return bench.folder / "alone"


@pytest.mark.parametrize("name, batch, more", [("dp2", 4, []), ("tp2", 8, TENSOR_PARALLEL)])
def test_two_processes_evaluate_as_one(
    bench: Bench, vqa: Run, alone: Path, name: str, batch: int, more: list[str]
) -> None:
    """With batches of 4 the last of 25 questions leaves one rank with none."""
    splits = "--task.eval_splits val test-dev".split()
    words = evaluation(bench, vqa, name, batch, *splits, *more)
    if name == "dp2":
        run(*TORCHRUN, "2", "-m", "megatron_vlmoe", *words).succeeded()
    else:
        bench.run(words, 2).succeeded()
    assert_same_evaluation(bench.folder / name, alone)
    settings = read_json(bench.folder / name / "metrics.json")["settings"]
    assert (settings["world_size"], settings["micro_batch_size"]) == (2, batch)
    sizes = (settings["data_parallel_size"], settings["tensor_model_parallel_size"])
    assert sizes == ((2, 1) if name == "dp2" else (1, 2))


def test_retrieval_on_two_processes(bench: Bench) -> None:
    """10 images and 50 captions in batches of 3 and 4, the best 4 ranked anew; recalls follow from the predictions."""
    tuned = bench.finetune("retrieval", "retrieval", 2)
    more = "--task.eval_splits val --contrastive.rerank 4".split()
    bench.run(evaluation(bench, tuned, "retrieval-alone", 3, *more)).succeeded()
    bench.run(evaluation(bench, tuned, "retrieval-dp2", 4, *more), 2).succeeded()
    folder = bench.folder / "retrieval-dp2"
    assert_same_evaluation(folder, bench.folder / "retrieval-alone")
    rows = read_rows(folder / "predictions.jsonl")
    assert len(rows) == 50
    found = read_json(folder / "metrics.json")["metrics"]
    for k in (1, 5):
        hits = sum(row["truth"] in row["images"][:k] for row in rows)
        assert found[f"val/IR@{k}"] == pytest.approx(100 * hits / len(rows))
    # Ranking anew moves nothing into the best four.
    assert found["val/reranked/IR@10"] >= found["val/reranked/IR@1"]
    assert found["val/reranked/IR@1"] <= 100 * sum(r["truth"] in r["images"][:4] for r in rows) / 50


def test_submission_for_the_challenge(bench: Bench, alone: Path) -> None:
    """The annotations of this split are secret: answers to all its questions, and no score."""
    samples = split_rows(f"{bench.prepared.prefix('vqa')}_test-dev", "vqa")
    (path,) = alone.glob("vqa_submission*test-dev*.json")
    entries = read_json(path)
    assert [entry["question_id"] for entry in entries] == [int(sample.id) for sample in samples]
    labels = read_json(Path(f"{bench.prepared.prefix('vqa')}_labels.json"))["labels"]
    assert all(set(entry) == {"question_id", "answer"} for entry in entries)
    assert {entry["answer"] for entry in entries} <= set(labels)
    assert "test-dev/vqa_official" not in read_json(alone / "metrics.json")["metrics"]


def test_capacity_of_the_paper(bench: Bench, vqa: Run, alone: Path) -> None:
    """It is recorded, and drops tokens: the results are others."""
    words = evaluation(bench, vqa, "paper", 4, "--moe.eval_capacity_factor", "1")
    bench.run(words).succeeded()
    folder = bench.folder / "paper"
    assert "1.0" in read_json(folder / "metrics.json")["settings"]["capacity"]
    rows, reference = (read_rows(path / "predictions.jsonl") for path in (folder, alone))
    assert len(rows) == 50 and rows[-1]["id"] == reference[49]["id"]
    apart = [abs(scores(row)[0] - scores(other)[0]) for row, other in zip(rows, reference)]
    assert max(apart) > 20 * ROUNDING


# Errors


def lacking(bench: Bench) -> str:
    """The pretraining run without one of its tensors."""
    folder = bench.folder / "lacking"
    if not folder.exists():
        shutil.copytree(bench.pretrained, folder)
        path = folder / "checkpoints" / "iter_0000002" / ".metadata"
        content = pickle.loads(path.read_bytes())
        del content.state_dict_metadata["decoder.layers.1.input_layernorm.weight"]
        path.write_bytes(pickle.dumps(content))
        sum_again(path.parent)
    return str(folder)


def other_tokenizer(bench: Bench) -> str:
    """A tokenizer with as many tokens, trained on other texts."""
    from megatron_vlmoe.tokenizers.text import TextTokenizerTraining, train_text_tokenizer

    file = bench.prepared.folder / "raw" / "text" / "train.jsonl"
    texts = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    prefix = bench.folder / "other"
    train_text_tokenizer(TextTokenizerTraining(vocab_size=200, output_prefix=prefix), texts)
    return f"{prefix}.model"


def without(words: list[str], *options: str) -> list[str]:
    """A command line without some options and their values."""
    for option in options:
        place = words.index(option)
        words = words[:place] + words[place + 2 :]
    return words


def with_more(*more: str) -> Callable[[Bench], list[str]]:
    """A fine-tuning on vqa with options after the others."""
    return lambda bench: bench.words("vqa", "refused", 1, *more)


REFUSED: dict[str, tuple[Callable[[Bench], list[str]], list[str]]] = {
    "no task": (lambda b: without(with_more()(b), "--task", "--preset"), ["--task"]),
    "unknown task": (with_more("--task", "captions"), ["--task", "captions"]),
    "no checkpoint": (with_more("--load", "nowhere/run"), ["--load", "nowhere/run"]),
    "other task's data": (
        lambda b: with_more("--task.data", b.prepared.prefix("mnli"))(b),
        ["mnli_train.json", "vqa"],
    ),
    "no data": (with_more("--task.data", "nowhere/vqa"), ["nowhere/vqa"]),
    "no split": (with_more("--task.eval_splits", "nosplit"), ["vqa_nosplit"]),
    "other tokenizer": (
        lambda b: with_more("--data.text_tokenizer", other_tokenizer(b))(b),
        ["vqa_train", "tokenizer"],
    ),
    "global batch": (
        with_more("--task.micro_batch_size", "3"),
        ["task.global_batch_size=8", "task.micro_batch_size=3"],
    ),
    "other task's preset": (with_more("--preset", "sample-mnli"), ["--preset", "sample-mnli"]),
    "unknown preset": (with_more("--preset", "sample-captions"), ["--preset", "sample-captions"]),
    "contrastive cache": (with_more("--contrastive.cache", "true"), ["contrastive.cache", "vqa"]),
    "other architecture": (
        with_more("--model.hidden_size", "64"),
        ["pretrained", "model.hidden_size", "32", "64"],
    ),
    "no architecture": (
        lambda b: without(with_more()(b), "--load"),
        ["--load", "--task.architecture"],
    ),
    "negative patience": (with_more("--task.early_stopping", "-1"), ["task.early_stopping=-1"]),
    "a seed twice": (with_more("--seeds", "1", "1"), ["task.seeds"]),
    "a run of another task": (
        lambda b: with_more(
            "--preset", "sample-mnli", "--task", "mnli", "--save", str(b.folder / "vqa")
        )(b),
        ["--save", "vqa", "mnli"],
    ),
    "two architectures": (
        with_more("--task.architecture", "tiny-8e"),
        ["--task.architecture", "--load"],
    ),
    "a tensor is missing": (
        lambda b: with_more("--load", lacking(b))(b),
        ["lacking", "decoder.layers.1.input_layernorm.weight"],
    ),
    "evaluation of a pretraining": (
        lambda b: ["evaluate", *without(with_more()(b), "--preset", "--train.steps")[1:]],
        ["--load", "pretrained"],
    ),
    "evaluation of another task": (
        lambda b: ["evaluate", "--task", "mnli", "--load", str(b.folder / "vqa")],
        ["vqa", "mnli"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_one_line_names_it(bench: Bench, vqa: Run, name: str) -> None:
    words, names = REFUSED[name]
    bench.run(words(bench)).refused(*names)
    left = [path for path in (bench.folder / "refused").rglob("*") if path.is_file()]
    assert not left, "a refused run left files"
