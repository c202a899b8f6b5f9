"""Files that an earlier version wrote: today's commands read them, and find in them what that version found.

tests/fixtures/README.md says which version, what is in the archive, and how it was made.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Outcome, run, run_many, tool
from small_corpus import assert_same_metrics, metrics

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
# Where they were recorded all values are equal digit for digit; another processor adds up in another order. Relative,
# of what training writes, and absolute, of scores between -1 and 1.
TOLERANCE, ROUNDING = 1e-4, 5e-6
# The tiny preset had these values; others are in small.yaml.
FORMER_TINY = (
    "--model.drop_path 0.1 --data.pair_unit caption --data.crop_scale_min 0.5 --data.flip_probability 0.5"
    " --data.pixel_std 0.5 0.5 0.5 --optim.adam_beta2 0.999 --checkpoint.save_interval 200"
)
COMMANDS = {
    "resume": "pretrain --config pretrain/config.yaml --save resumed",
    "dry run": f"pretrain --preset tiny-8e {FORMER_TINY} --config small.yaml --save new --dry-run",
    "dry run of a task": "finetune --config vqa/config.yaml --save new --dry-run",
    "vqa": "evaluate --load vqa --save evaluated/vqa",
    "retrieval": "evaluate --load retrieval --save evaluated/retrieval",
    "predict": "predict --task vqa --load vqa --image picture.jpg --question",
}
QUESTION = "what color is the circle?"
DATASETS = ["text", "images", "pairs", "vqa_train", "retrieval_val"]


@dataclass(frozen=True)
class Old:
    """The unpacked archive and what today's commands said about it.

    Args:
        folder: where they ran.
        outcomes: by the names of COMMANDS.
    """

    folder: Path
    outcomes: dict[str, Outcome]

    def recorded(self, name: str) -> str:
        """What the old code left."""
        return (self.folder / "recorded" / name).read_text()


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Old:
    where = tmp_path_factory.mktemp("old")
    with tarfile.open(FIXTURES / "old_files.tar.xz") as archive:
        archive.extractall(where, filter="data")
    folder = where / "old_files"
    shutil.copytree(folder / "pretrain", folder / "resumed")
    lines = [line.split() for line in COMMANDS.values()]
    lines[-1].append(QUESTION)
    return Old(folder, dict(zip(COMMANDS, run_many(lines, cwd=folder), strict=True)))


def rows(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def assert_close(actual: Any, expected: Any) -> None:
    """Numbers within the tolerance, all else equal; what is new beside the keys of a recorded object may be there."""
    if isinstance(expected, dict):
        for key, value in expected.items():
            assert_close(actual[key], value)
    elif isinstance(expected, list):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected):
            assert_close(one, other)
    elif isinstance(expected, float):
        assert actual == pytest.approx(expected, abs=ROUNDING)
    else:
        assert actual == expected


# Runs


def test_an_old_run_goes_on_as_it_would_have(old: Old) -> None:
    """By its own config.yaml, with its optimizer state: losses, statistics of experts, gradients and evaluation."""
    old.outcomes["resume"].succeeded()
    expected = rows(old.recorded("pretrain.jsonl"))
    assert [row["step"] for row in expected] == [0, 1, 2, 3, 4, 5, 6]
    found = metrics(old.folder / "resumed")
    actual = [{k: v for k, v in row.items() if k in own} for row, own in zip(found, expected)]
    assert len(found) == len(expected)
    assert_same_metrics(actual, expected, TOLERANCE)


def test_old_yaml_files_are_understood(old: Old) -> None:
    """That of a user, which gives the same options and as many parameters, and the resolved one of a fine-tuning."""
    found = old.outcomes["dry run"].succeeded().stdout.splitlines()
    expected, _, _ = old.recorded("dry_run.txt").partition("\nFLOPs per step")
    assert "vocab_size: 0" in expected and "\nParameters per rank" in expected
    # Another default by now, which chooses the same.
    changed = [line for line in expected.splitlines() if line not in found]
    assert changed == ["  attention_backend: sdpa"] and "  attention_backend: auto" in found
    assert "  num_classes: 16" in old.outcomes["dry run of a task"].succeeded().stdout.splitlines()


def test_an_old_model_of_questions_predicts_the_same(old: Old) -> None:
    """But for `gained` and the metric: it was the soft score of the labels, and is the official accuracy now."""
    old.outcomes["vqa"].succeeded()
    folder = old.folder / "evaluated" / "vqa"
    expected = rows(old.recorded("vqa.jsonl"))
    assert len(expected) == 50 and len({row["prediction"] for row in expected}) > 1
    for row in expected:
        del row["gained"]
    assert_close(rows((folder / "predictions.jsonl").read_text()), expected)
    assert json.loads((folder / "metrics.json").read_text())["metrics"]["val/samples"] == 50


def test_old_retrieval_finds_the_same(old: Old) -> None:
    old.outcomes["retrieval"].succeeded()
    folder = old.folder / "evaluated" / "retrieval"
    expected = json.loads(old.recorded("retrieval.json"))
    assert_close(json.loads((folder / "metrics.json").read_text())["metrics"], expected["metrics"])
    assert_close(
        rows((folder / "predictions.jsonl").read_text()), rows(old.recorded("retrieval.jsonl"))
    )


def test_predict_prints_the_same(old: Old) -> None:
    assert old.outcomes["predict"].succeeded().stdout == old.recorded("predict.txt")


def test_scripts_get_the_same_answers(old: Old, tmp_path: Path) -> None:
    """`VLMoE`, imported alone by a fresh interpreter, on runs and an export; and the export in transformers."""
    modules = {"HF_MODULES_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    outcome = run(FIXTURES / "ask.py", old.folder, environ=modules).succeeded()
    found, expected = json.loads(outcome.stdout), json.loads(old.recorded("answers.json"))
    assert found.keys() == expected.keys()
    assert_close(found, expected)


# Conversion


def test_an_old_checkpoint_and_its_old_export_hold_the_same(old: Old) -> None:
    """Today's export of the one has the same weights bit by bit, and the import of the other the same tensors."""
    words = ["export", "--load", "vqa", "--output", "exported"]
    tool("convert_checkpoint", *words, cwd=old.folder).succeeded()
    now, before = (old.folder / x / "model.safetensors" for x in ("exported", "vqa_export"))
    assert now.read_bytes() == before.read_bytes()
    words = ["import", "--load", "vqa_export", "--output", "imported"]
    tool("convert_checkpoint", *words, cwd=old.folder).succeeded()
    tool("inspect_checkpoint", "diff", "imported", "vqa", cwd=old.folder).succeeded()


# Datasets and tokenizers


@pytest.mark.parametrize("prefix", DATASETS)
def test_old_datasets_are_read(old: Old, prefix: str) -> None:
    manifest = json.loads((old.folder / f"{prefix}.json").read_text())
    words = [prefix, "--tokenizer-model", "text.model", "--checksums"]
    outcome = tool("inspect_dataset", *words, cwd=old.folder).succeeded()
    for name in ("documents", "sequences"):
        assert f"{manifest[name]:,}" in outcome.stdout


def test_the_old_text_tokenizer_gives_the_same_tokens(old: Old) -> None:
    words = "--input text.jsonl --output-prefix again --tokenizer-model text.model".split()
    tool("preprocess_text", *words, cwd=old.folder).succeeded()
    for suffix in ("bin", "idx"):
        name = f"_text_document.{suffix}"
        again, before = ((old.folder / f"{x}{name}").read_bytes() for x in ("again", "text"))
        assert again == before


def test_the_old_image_tokenizer_gives_the_same_codes(old: Old) -> None:
    words = "--images pairs --tokenizer image_tokenizer --views 2 --output again".split()
    tool("encode_images", *words, cwd=old.folder).succeeded()
    again, before = (
        np.fromfile(old.folder / name, np.int32)
        for name in ("again_codes.bin", "recorded/pairs_codes.bin")
    )
    assert again.size == before.size
    # A patch that lies between two codes may go to either on another processor.
    assert (again == before).mean() > 0.98


NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "explore.ipynb"
# The notebook names the runs of the quick starts; here it looks at those of the archive, without Jupyter.
HERE = {
    "from IPython.display import Image, display": "Image, display = lambda filename: filename.stat(), print",
    'Path("runs/quickstart")': 'Path("pretrain")',
    'Path("runs/downstream/vqa/moe")': 'Path("vqa")',
    'sorted(Path("corpora/sample-2000/coco/val2014").glob("*.jpg"))[0]': 'Path("picture.jpg")',
}


def test_the_notebook_runs(old: Old) -> None:
    """Its cells one after another."""
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert all(cell["cell_type"] in ("code", "markdown") for cell in cells)
    program = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    for there, here in HERE.items():
        assert program.count(there) == 1
        program = program.replace(there, here)
    (old.folder / "explore.py").write_text(program)
    outcome = run("explore.py", cwd=old.folder).succeeded()
    assert "pretrain, last evaluation" in outcome.stdout
    assert "How many squares are there? [(" in outcome.stdout
