"""Fine-tuned checkpoints in a script and behind `predict`, compared with what `evaluate` writes."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Workers, layout
from inference_runs import (
    FIELDS,
    SMALL,
    SPLITS,
    ask_all,
    command_lines,
    generators_and_groups,
    in_a_group,
    loading_errors,
    samples,
)
from PIL import Image
from prepared_tasks import Prepared

from megatron_vlmoe.tokenizers.text import TextTokenizer

# Written by two processes that share tensors and experts.
SPREAD = "nlvr2"
TOLERANCE = 5e-6


@dataclass(frozen=True)
class Tuned:
    """Fine-tuned runs of all tasks, and what `evaluate` predicts with each.

    Args:
        folder: run folders by task.
        prepared: the data.
        predictions: rows of predictions.jsonl by task.
        found: what `ask_all` found.
    """

    folder: Path
    prepared: Prepared
    predictions: dict[str, list[dict[str, Any]]]
    found: dict[str, Any]

    def run(self, task: str) -> str:
        return str(self.folder / task)


@pytest.fixture(scope="module")
def tuned(prepared: Prepared, workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    folder = tmp_path_factory.mktemp("tuned")
    words = {}
    for task, split in SPLITS.items():
        words[task] = ["finetune", "--task", task, "--preset", f"sample-{task}", *SMALL]
        words[task] += ["--task.data", prepared.prefix(task), "--task.eval_splits", split]
        words[task] += ["--data.text_tokenizer", prepared.tokenizer, "--save", f"{folder / task}"]
    where = layout(2, tp=2, ep=2)
    spread = workers.run(where, command_lines, [[*words.pop(SPREAD), *where.arguments]], True)
    evaluations = [
        [
            *("evaluate", "--load", f"{folder / task}/best", "--save", f"{folder}/{task}-again"),
            *("--moe.eval_capacity_factor", "0", "--parallel.tensor_model_parallel_size", "1"),
            *("--parallel.expert_model_parallel_size", "1"),
        ]
        for task in SPLITS
    ]
    (results,) = workers.run(1, command_lines, [*words.values(), *evaluations])
    for code, _, text in [*spread[0], *spread[1], *results]:
        assert code == 0, text
    predictions = {
        task: [json.loads(x) for x in Path(f"{folder}/{task}-again/predictions.jsonl").open()]
        for task in SPLITS
    }
    runs = {task: str(folder / task) for task in SPLITS}
    prefixes = {task: prepared.prefix(task) for task in SPLITS}
    (found,) = workers.run(1, ask_all, runs, prefixes)
    return Tuned(folder, prepared, predictions, found)


def most_likely(result: Any) -> list[tuple[str, float]]:
    """Labels and scores, best first, of what any classifying method returns."""
    if isinstance(result, list):
        return [(label, score) for label, _, score in result]
    if "scores" in result:
        return sorted(result["scores"].items(), key=lambda item: -item[1])
    return [(label, score) for label, _, score in result["most_likely"]]


@pytest.mark.parametrize(
    "asked", ["vqa.answer", "nlvr2.reason", "imagenet.classify", "mnli.entail"]
)
def test_predictions_are_those_of_evaluate(tuned: Tuned, asked: str) -> None:
    results, rows = tuned.found[asked]["together"], tuned.predictions[asked.split(".")[0]]
    assert len(results) == len(rows) > 7
    for result, row in zip(results, rows):
        best = most_likely(result)[:5]
        assert best[0][0] == row["prediction"]
        expected = [(item["label"], item["score"]) for item in row["most_likely"]]
        assert [label for label, _ in best] == [label for label, _ in expected]
        assert [s for _, s in best] == pytest.approx([s for _, s in expected], abs=TOLERANCE)
        if "prediction_name" in row:
            assert result[0][1] == row["prediction_name"]


def test_results_name_what_is_most_likely(tuned: Tuned) -> None:
    answer = tuned.found["vqa.answer"]["alone"][0]
    assert (answer["text"], answer["score"]) == (
        answer["most_likely"][0][0],
        answer["most_likely"][0][2],
    )
    decision = tuned.found["mnli.entail"]["alone"][0]
    assert list(decision["scores"]) == ["entailment", "neutral", "contradiction"]
    assert sum(decision["scores"].values()) == pytest.approx(1.0)
    assert (
        decision["score"]
        == decision["scores"][decision["label"]]
        == max(decision["scores"].values())
    )


def test_similarities_are_those_of_evaluate(tuned: Tuned) -> None:
    vectors, rows = tuned.found["retrieval.features"], tuned.predictions["retrieval"]
    assert np.linalg.norm(vectors["images"], axis=1) == pytest.approx(1.0)
    assert len(vectors["texts"]) == len(rows) > 7
    for text, row, score in zip(vectors["texts"], rows, tuned.found["retrieval.score"]["together"]):
        scores = vectors["images"][row["images"]] @ text
        assert scores == pytest.approx(row["scores"], abs=TOLERANCE)
        # The caption's own image, asked about as a pair.
        assert score == pytest.approx(float(vectors["images"][row["truth"]] @ text), abs=TOLERANCE)


@pytest.mark.parametrize(
    "asked",
    [
        *("vqa.answer", "nlvr2.reason", "imagenet.classify", "mnli.entail"),
        *("retrieval.score", "retrieval.match"),
    ],
)
def test_batched_equals_single(tuned: Tuned, asked: str) -> None:
    together, alone = (tuned.found[asked][name] for name in ("together", "alone"))
    for one, other in zip(together, alone):
        if isinstance(one, float):
            assert one == pytest.approx(other, abs=TOLERANCE)
            continue
        assert [label for label, _ in most_likely(one)] == [
            label for label, _ in most_likely(other)
        ]
        expected = [score for _, score in most_likely(other)]
        assert [score for _, score in most_likely(one)] == pytest.approx(expected, abs=TOLERANCE)


def test_with_capacity_the_batch_matters(tuned: Tuned) -> None:
    """What would be wrong with batches if tokens were dropped by default."""
    found = tuned.found["dropping"]
    differences = np.abs(np.subtract(found["together"], found["alone"]))
    assert differences.max() > 10 * TOLERANCE


def test_answers_differ(tuned: Tuned) -> None:
    """No comparison above is one of constants."""
    for asked in ("vqa.answer", "nlvr2.reason", "mnli.entail"):
        scores = [result["score"] for result in tuned.found[asked]["together"]]
        assert np.ptp(scores) > 10 * TOLERANCE, asked
    for asked in ("retrieval.score", "retrieval.match"):
        assert np.ptp(tuned.found[asked]["together"]) > 10 * TOLERANCE, asked


def test_run_folder_means_its_best_checkpoint(tuned: Tuned) -> None:
    for task, checkpoint in tuned.found["checkpoints"].items():
        assert checkpoint == f"{tuned.run(task)}/best/iter_0000002"


def test_wrong_requests(tuned: Tuned) -> None:
    errors = tuned.found["errors"]
    best = "best/iter_0000002"
    vqa, retrieval = (f"{tuned.run(task)}/{best}" for task in ("vqa", "retrieval"))
    assert errors == {
        "other task": f"ConfigError: classify needs a checkpoint of imagenet; {vqa} is of vqa",
        "no projections": f"ConfigError: encode_text needs a checkpoint of retrieval; {vqa} is of vqa",
        "no labels": f"ConfigError: answer needs a checkpoint of vqa; {retrieval} is of retrieval",
        "damaged": errors["damaged"],
        "no file": "DataError: no/such.jpg: not found",
        "empty": "DataError: text 1: empty text",
        "lengths": "DataError: lists of different lengths: image 2, text 3",
        "top_k": "ConfigError: top_k=0 must be at least 1",
    }
    assert errors["damaged"].startswith("DataError: image 0: ")


def test_loading_errors(tuned: Tuned, workers: Workers, tmp_path: Path) -> None:
    vqa = tuned.run("vqa")
    bare = tmp_path / "bare"
    shutil.copytree(f"{vqa}/best", bare / "best")
    other = tmp_path / "labels.json"
    shutil.copy(f"{tuned.run('nlvr2')}/labels.json", other)
    tokenizer = {"tokenizer": f"{vqa}/text.model"}
    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "nothing": (str(tmp_path / "none"), {}),
        "no tokenizer": (str(bare), {}),
        "no labels": (str(bare), tokenizer),
        "given": (str(bare), {**tokenizer, "labels": f"{vqa}/labels.json"}),
        "other labels": (vqa, {"labels": str(other)}),
        "precision": (vqa, {"precision": "fp8"}),
        "device": (vqa, {"device": "cuda"}),
        "batch": (vqa, {"batch_size": 0}),
    }
    (found,) = workers.run(1, loading_errors, cases)
    assert found.pop("given") == "no error"
    expected = {
        "nothing": "no checkpoint there",
        "no tokenizer": "no text.model beside it",
        "no labels": "no labels.json beside it",
        "other labels": "not those that",
        "precision": "precision=fp8: choose one of",
        "device": "device=cuda, but this process runs on cpu",
        "batch": "batch_size=0 must be at least 1",
    }
    for name, part in expected.items():
        assert found[name].startswith("ConfigError: ") and part in found[name], found[name]


def test_loading_leaves_the_script_as_it_was(tuned: Tuned, workers: Workers) -> None:
    (found,) = workers.run(1, generators_and_groups, tuned.run("nlvr2"))
    assert found["drawn"] == found["expected"]
    assert found["labels"] == ("False", "True")


def test_several_processes_are_refused(tuned: Tuned, workers: Workers) -> None:
    for message in workers.run(2, in_a_group, tuned.run("vqa")):
        assert message == "ConfigError: a model is loaded by one process alone, not by 2"


def test_predict(tuned: Tuned, workers: Workers, tmp_path: Path) -> None:
    """Files of records and single inputs give what the methods give; a bad record is named."""
    files = {task: records(tuned, task, tmp_path) for task in SPLITS}
    one = json.loads(files["imagenet"].read_text().splitlines()[0])["image"]
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(Path(one).read_bytes()[:300])
    turned = str(tmp_path / "turned.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(one).transpose(Image.Transpose.ROTATE_90).save(turned, exif=exif)
    mixed = tmp_path / "mixed.jsonl"
    lines = files["imagenet"].read_text().splitlines()[:2]
    mixed.write_text("\n".join([*lines, "", json.dumps({"image": str(broken)})]))
    many = [["predict", "--load", tuned.run(task), "--input", str(files[task])] for task in SPLITS]
    imagenet = ["predict", "--load", tuned.run("imagenet")]
    (results,) = workers.run(
        1,
        command_lines,
        [
            *many,
            [*imagenet, "--image", one, "--top-k", "2"],
            [
                *imagenet,
                "--task",
                "imagenet",
                "--image",
                one,
                "--json",
                "--output",
                f"{tmp_path}/o",
            ],
            [*imagenet, "--input", str(mixed), "--output", f"{tmp_path}/not"],
            [*imagenet, "--task", "vqa", "--image", one, "--question", "what?"],
            [*imagenet, "--image", one, "--text", "what"],
            [*imagenet, "--image", turned, "--top-k", "2"],
            [*imagenet, "--image", turned, "--top-k", "2", "--exif", "keep"],
        ],
    )
    patterns = {"mnli": unknown_line(tuned, files["mnli"])}
    for task, (code, out, err) in zip(SPLITS, results):
        assert code == 0 and re.fullmatch(patterns.get(task, ""), err), err
        rows = [json.loads(line) for line in out.splitlines()]
        assert [row["number"] for row in rows] == list(range(len(rows)))
        check_rows(tuned, task, rows)
    shown, written, bad_image, other_task, extra, upright, kept = results[len(SPLITS) :]
    first = tuned.found["imagenet.classify"]["together"][0]
    expected = [f"{score:.4f}  {label}  {name}" for label, name, score in first[:2]]
    assert shown[1].splitlines() == expected
    assert written[1:] == ("", f"1 prediction(s) written to {tmp_path}/o\n")
    check_rows(tuned, "imagenet", [json.loads((tmp_path / "o").read_text())])
    assert bad_image[0] == 1 and bad_image[2].startswith(f"error: {mixed}:4: {broken}: ")
    assert len(bad_image[2].splitlines()) == 1 and not (tmp_path / "not").exists()
    assert other_task[0] == 2 and "was fine-tuned on imagenet, not on vqa" in other_task[2]
    assert upright == shown and kept[0] == 0 and kept[1] != shown[1]
    assert extra[0] == 2 and "--text: no input of imagenet" in extra[2]


def unknown_line(tuned: Tuned, file: Path) -> str:
    """A pattern for what is said about texts with characters that the tokenizer was trained without."""
    tokenizer = TextTokenizer(tuned.prepared.tokenizer)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    texts = [[tokenizer.encode(row[name]) for name in FIELDS["mnli"]] for row in rows]
    poor = [any(ids.count(tokenizer.unk_id) > len(ids) / 100 for ids in both) for both in texts]
    where = rf"{re.escape(str(file))}:{poor.index(True) + 1}: (premise|hypothesis)"
    count = rf"\({sum(poor)} of {len(rows)} records\)"
    return rf"warning: {where}: \d+% of its tokens are unknown to the tokenizer {count}\n"


def records(tuned: Tuned, task: str, folder: Path) -> Path:
    """A file of records about a prepared split, with its images as files."""
    rows = []
    for number, sample in enumerate(samples(tuned.prepared.prefix(task), task)):
        row: dict[str, Any] = {"number": number}
        for name, value in sample.items():
            if isinstance(value, bytes):
                path = folder / f"{task}-{number}-{name}"
                path.write_bytes(value)
                value = str(path)
            row[name] = value
        rows.append(row)
    path = folder / f"{task}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def check_rows(tuned: Tuned, task: str, rows: list[dict[str, Any]]) -> None:
    """Compares what `predict` wrote with what the methods returned in another process."""
    if task == "retrieval":
        for name in ("score", "match"):
            expected = tuned.found[f"retrieval.{name}"]["together"]
            assert [row[name] for row in rows] == pytest.approx(expected, abs=TOLERANCE)
        return
    (asked,) = (name for name in tuned.found if name.startswith(f"{task}."))
    for row, result in zip(rows, tuned.found[asked]["together"]):
        assert set(FIELDS[task]) < set(row)
        best = most_likely(result)
        assert [item["label"] for item in row["most_likely"]] == [label for label, _ in best]
        assert row["prediction"] == best[0][0]
        assert row["score"] == pytest.approx(best[0][1], abs=TOLERANCE)
