"""Fine-tuning an export with the Hugging Face Trainer: examples/hf_finetune/train.py."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from commands import environment, tool
from data_files import ROOT, encoded, picture
from hf_folder import write_folder
from raw_tasks import put
from safetensors.torch import load_file

from megatron_vlmoe.convert.checkpoints import CheckpointReader
from megatron_vlmoe.data.task_labels import read_labels

pytest.importorskip("transformers")
pytest.importorskip("accelerate")


FOLDER = ROOT / "examples" / "hf_finetune"
SCRIPT = FOLDER / "train.py"
ALLOWED = {"torch", "transformers", "accelerate", "PIL", "sentencepiece", "deepspeed"}
QUICK = """
--max-steps 3 --per-device-train-batch-size 2 --per-device-eval-batch-size 4 --logging-steps 1 --learning-rate 1e-2
--warmup-fraction 0 --save-strategy no --use-cpu --disable-tqdm true
""".split()
# With the least count 2 the classes are red, 2, yes; "blue" is said once.
MAIN_ANSWERS = {"train2014": ["red", "2", "red", "yes", "blue"], "val2014": ["yes", "2"]}
LABELS = ["red", "2", "yes"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("hf_finetune_train", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their annotations up there.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def write_vqa(raw: Path) -> Path:
    """Raw VQAv2: question i of a part is about image i; one annotator of four says "2" instead."""
    for part, answers in MAIN_ANSWERS.items():
        questions, annotations = [], []
        for number, answer in enumerate(answers):
            key = 10 * len(part) + number
            questions.append({"image_id": number, "question": "a red star", "question_id": key})
            said = [{"answer": text} for text in (answer, answer, answer, "2")]
            annotations.append(
                {"question_id": key, "multiple_choice_answer": answer, "answers": said}
            )
            image = encoded(picture(number))
            put(raw / part / f"COCO_{part}_{number:012d}.jpg", image)
        put(raw / f"v2_OpenEnded_mscoco_{part}_questions.json", {"questions": questions})
        name = f"v2_mscoco_{part}_annotations.json"
        put(raw / "annotations" / name, {"annotations": annotations})
    return raw


def doubled(path: Path) -> None:
    """Puts the first record of a file in again, behind itself."""
    ((key, records),) = json.loads(path.read_text()).items()
    put(path, {key: [records[0], *records]})


def write_classes(raw: Path) -> Path:
    """Two classes."""
    for split, count in (("train", 4), ("val", 2)):
        for label in ("cat", "dog"):
            for number in range(count):
                put(raw / split / label / f"{number}.png", encoded(picture(number), "PNG"))
    return raw


def finetune(launcher: list[str], *words: str | Path, cache: Path) -> None:
    """Runs the script; in the end no process of it is left, however it ended."""
    environ = {
        "HF_MODULES_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
        "DS_ACCELERATOR": "cpu",
    }
    command = [sys.executable, *launcher, str(SCRIPT), *map(str, words), *QUICK]
    process = subprocess.Popen(
        command,
        env=environment(**environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        # DeepSpeed may have to compile its extension first.
        output, _ = process.communicate(timeout=500)
    finally:
        # The launcher's workers too, which would outlive it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output[-4000:]


def changed(before: Path, after: Path) -> dict[str, bool]:
    """Whether the values of a parameter changed, by name, for those in both."""
    old, new = (load_file(path / "model.safetensors") for path in (before, after))
    assert all(value.isfinite().all() for value in new.values())
    return {name: not torch.equal(old[name], new[name]) for name in old.keys() & new.keys()}


def results(folder: Path) -> dict[str, float]:
    return json.loads((folder / "all_results.json").read_text())  # type: ignore[no-any-return]


def imported(folder: Path, output: Path) -> CheckpointReader:
    """The checkpoint that an import of the folder makes."""
    tool("convert_checkpoint", "import", "--load", folder, "--output", output).succeeded()
    return CheckpointReader(output)


def assert_fine_tuned(base: Path, output: Path) -> None:
    """Attention changed, but experts and routers did not, and the loss is a number."""
    found = changed(base, output)
    experts = {name for name in found if ".experts." in name or ".router." in name}
    assert len(experts) == 10  # router and four tensors of two pools
    assert not any(found[name] for name in experts)
    assert all(found[name] for name in found if ".attention." in name and "weight" in name)
    assert math.isfinite(results(output)["train_loss"])
    assert math.isfinite(results(output)["eval_loss"])


def test_vqa_there_and_back(tmp_path: Path) -> None:
    base, raw, output = write_folder(tmp_path / "hf", "vqa"), tmp_path / "raw", tmp_path / "out"
    put(tmp_path / "labels.json", {"task": "vqa", "labels": LABELS})
    words = ["--model", base, "--data", write_vqa(raw), "--output-dir", output]
    words += ["--labels", tmp_path / "labels.json"]
    finetune([], *words, cache=tmp_path / "cache")
    assert_fine_tuned(base, output)
    assert changed(base, output)["classifier.output.weight"]
    reader = imported(output, tmp_path / "back")
    assert reader.config.task.name == "vqa" and not reader.config.moe.train_experts
    assert read_labels(tmp_path / "back" / "labels.json").labels == tuple(LABELS)
    # A model of the task keeps its head and classes: the same score again, without training.
    again = ["--model", output, "--data", raw, "--output-dir", tmp_path / "again", "--do-train=no"]
    finetune([], *again, cache=tmp_path / "cache")
    for name in ("eval_loss", "eval_vqa_soft_score"):
        assert results(tmp_path / "again")[name] == pytest.approx(results(output)[name], rel=1e-5)


def test_image_classes_and_trained_experts(tmp_path: Path) -> None:
    base, output = write_folder(tmp_path / "hf"), tmp_path / "out"
    words = ["--task", "imagenet", "--model", base, "--data", write_classes(tmp_path / "raw")]
    words += ["--output-dir", output, "--train-experts", "--layer-decay", "0.9"]
    finetune([], *words, cache=tmp_path / "cache")
    found = changed(base, output)
    assert found["vlmoe.encoder.layer.1.feed_forward.vision.router.weight"]
    assert found["vlmoe.encoder.layer.1.feed_forward.vision.experts.fc1_weight"]
    assert not found["vlmoe.encoder.layer.1.feed_forward.text.experts.fc1_weight"]
    assert results(output)["eval_top1"] in (0.0, 25.0, 50.0, 75.0, 100.0)
    assert imported(output, tmp_path / "back").config.moe.train_experts
    assert read_labels(tmp_path / "back" / "labels.json").labels == ("cat", "dog")


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_deepspeed(stage: str, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    base, output = write_folder(tmp_path / "hf"), tmp_path / "out"
    launcher = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    words = ["--model", base, "--data", write_vqa(tmp_path / "raw"), "--output-dir", output]
    words += ["--min-answer-count", "2", "--deepspeed", FOLDER / f"{stage}.json"]
    finetune(launcher, *words, cache=tmp_path / "cache")
    assert_fine_tuned(base, output)
    assert imported(output, tmp_path / "back").config.task.num_classes == len(LABELS)
    assert read_labels(tmp_path / "back" / "labels.json").labels == tuple(LABELS)


def test_script_needs_no_other_packages() -> None:
    tree = ast.parse(SCRIPT.read_text())
    found = {
        (alias.name if isinstance(node, ast.Import) else node.module or "").split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    assert found <= ALLOWED | set(sys.stdlib_module_names)


def test_targets_are_soft_scores(script: ModuleType, tmp_path: Path) -> None:
    raw = write_vqa(tmp_path)
    assert script.answer_vocabulary(raw, 2) == LABELS
    train = script.vqa_samples(raw, "train2014", LABELS, drop_unanswerable=True)
    assert [row["target"] for row in train] == [
        {0: 0.9, 1: 0.3},
        {1: 1.0},
        {0: 0.9, 1: 0.3},
        {2: 0.9, 1: 0.3},
        {1: 0.3},
    ]
    assert len(script.vqa_samples(raw, "train2014", ["red"], drop_unanswerable=True)) == 2
    assert len(script.vqa_samples(raw, "train2014", ["red"], drop_unanswerable=False)) == 5


def test_metric_is_the_mean_over_batches(script: ModuleType) -> None:
    score = script.MeanScore("m")
    first = (torch.tensor([0, 1]), torch.tensor([[0.9, 0.0], [0.0, 0.3]]))
    assert score(first) == {}
    last = (torch.tensor([1]), torch.tensor([[1.0, 0.0]]))
    assert score(last, compute_result=True)["m"] == pytest.approx(40.0)  # (0.9 + 0.3 + 0) / 3
    classes = (torch.tensor([1, 2]), torch.tensor([1, 1]))
    assert score(classes, compute_result=True)["m"] == pytest.approx(50.0)


@pytest.mark.parametrize("task", ["vqa", "imagenet"])
@pytest.mark.parametrize("shared", [False, True])
def test_what_is_frozen_is_what_gets_no_gradient(
    script: ModuleType, tmp_path: Path, task: str, shared: bool
) -> None:
    from megatron_vlmoe.convert.hf import modeling_vlmoe
    from megatron_vlmoe.convert.hf_config import architecture

    folder = write_folder(tmp_path / "hf", task, shared_router=shared)
    model = getattr(modeling_vlmoe, architecture(task)).from_pretrained(folder)
    inputs: dict[str, Any] = {"pixel_values": torch.randn(2, 3, 32, 32)}
    if task == "vqa":
        inputs["input_ids"] = torch.tensor([[1, 7, 9, 2]] * 2)
    model(**inputs).logits.square().sum().backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    script.freeze(model, SimpleNamespace(task=task, train_experts=True))
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert trained == reached


def test_rates_follow_depth(script: ModuleType) -> None:
    options = SimpleNamespace(head_lr_multiplier=20.0, layer_decay=0.5)
    config = SimpleNamespace(num_hidden_layers=3)
    scales = {
        "classifier.output.weight": 20.0,
        "pooler.dense.weight": 1.0,
        "vlmoe.layernorm.weight": 1.0,
        "vlmoe.encoder.layer.2.lambda_1": 0.5,
        "vlmoe.encoder.layer.0.lambda_1": 0.125,
        "vlmoe.text_embeddings.word_embeddings.weight": 0.0625,
    }
    assert {name: script.rate_scale(name, options, config) for name in scales} == scales


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: (raw / "val2014" / f"COCO_val2014_{1:012d}.jpg").unlink(), "no image"),
        (
            lambda raw: put(raw / "v2_OpenEnded_mscoco_val2014_questions.json", "{"),
            "val2014_questions.json: not readable",
        ),
        (
            lambda raw: put(
                raw / "annotations" / "v2_mscoco_train2014_annotations.json",
                {"annotations": [{"question_id": 1}]},
            ),
            "annotation entry 0 is incomplete",
        ),
        (
            lambda raw: doubled(raw / "annotations" / "v2_mscoco_train2014_annotations.json"),
            "annotation entry 1: question 90 has one already",
        ),
        (
            lambda raw: doubled(raw / "v2_OpenEnded_mscoco_val2014_questions.json"),
            "question entry 1 is incomplete, came before or has no annotation",
        ),
    ],
)
def test_bad_data_is_named(script: ModuleType, tmp_path: Path, damage: Any, message: str) -> None:
    damage(write_vqa(tmp_path))
    with pytest.raises(script.InputError, match=message):
        script.load_datasets(script.Options(model="", data=str(tmp_path)), LABELS)


def test_errors_are_one_line(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--model", str(tmp_path), "--data", "raw", "--output-dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["train.py", *words, "--use-cpu"])
    assert script.main() == 2
    line = f"error: --model {tmp_path}: no exported model (config.json) there\n"
    assert capsys.readouterr().err == line


def test_bf16_is_left_to_the_deepspeed_file(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(script.InputError, match="torch_autocast"):
        script.Arguments(output_dir=str(tmp_path), deepspeed=str(FOLDER / "zero2.json"), bf16=True)
