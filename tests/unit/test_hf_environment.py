"""Exports in an interpreter without megatron-core and this package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_folder import TINY, VOCAB, write_folder
from PIL import Image

from megatron_vlmoe.convert.exporting import usage
from megatron_vlmoe.convert.hf_config import (
    CUSTOM_PIPELINES,
    architecture,
    auto_map,
    hf_source_files,
)

pytest.importorskip("transformers")

from megatron_vlmoe.convert.hf import modeling_vlmoe

SCRIPT = Path(__file__).resolve().parents[1] / "hf_clean_environment.py"
TASKS = ("vqa", "nlvr2", "retrieval", "imagenet", "mnli")


def write_pictures(folder: Path) -> None:
    """Files that transformers' own pipelines and the processor read in different ways, of the model's image size."""
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise[..., :3]).save(folder / "turned.jpg", exif=exif)
    Image.fromarray(noise[..., 0].astype(np.uint16) * 20).save(folder / "deep.png")
    Image.fromarray(noise).save(folder / "logo.png")
    Image.fromarray(noise[..., :2].copy(), "LA").save(folder / "grey.png")
    palette = Image.fromarray(noise[..., :3]).quantize(16)
    palette.save(folder / "palette.png", transparency=3)
    Image.fromarray(noise, "CMYK").save(folder / "print.jpg")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exports")
    write_folder(path / "pretraining")
    for task in TASKS:
        write_folder(path / task, task)
    write_folder(path / "images", "imagenet", vocab_size=0, num_text_experts=0)
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "input_ids": torch.randint(5, VOCAB, (2, 6), generator=generator),
        "attention_mask": torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]]),
        "pixel_values": torch.randn(2, 3, 32, 32, generator=generator),
    }
    torch.save(inputs, path / "inputs.pt")
    write_pictures(path / "pictures")
    kinds = {"": "pretraining", "images": "images", **{task: task for task in TASKS}}
    code = {folder: usage(kind, str(path / folder)) for kind, folder in kinds.items()}
    (path / "uses.json").write_text(json.dumps(code))
    return path


@pytest.fixture(scope="module")
def results(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the script found."""
    folder = tmp_path_factory.mktemp("clean")
    environment = {
        **os.environ,
        "HF_MODULES_CACHE": str(folder / "modules"),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    done = subprocess.run(
        [sys.executable, "-I", str(SCRIPT), str(root), str(folder / "results.pt")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / "results.pt")


@pytest.mark.process
def test_every_class_gives_what_it_gives_here(root, results):
    inputs = torch.load(root / "inputs.pt")
    names = [name for name in modeling_vlmoe.__all__ if name.startswith(("VLMoEModel", "VLMoEFor"))]
    assert sorted(results["heads"]) == sorted(names)
    folders = {architecture(task): task for task in TASKS}
    for name in names:
        values = dict(inputs)
        if name == architecture("nlvr2"):
            values["pixel_values"] = torch.stack([inputs["pixel_values"]] * 2, dim=1)
        elif name == architecture("imagenet"):
            values = {"pixel_values": inputs["pixel_values"]}
        elif name == architecture("mnli"):
            del values["pixel_values"]
        folder = root / folders.get(name, "pretraining")
        model = getattr(modeling_vlmoe, name).from_pretrained(folder)
        with torch.no_grad():
            assert torch.equal(model(**values)[0], results["heads"][name]), name


@pytest.mark.process
def test_pipelines_answer(results):
    answers = results["pipelines"]
    one, several = answers["fill-mask"]
    assert len(one) == 2 and one[0]["score"] >= one[1]["score"]
    assert one[0]["sequence"].startswith("a red ")
    assert [len(found) for found in several] == [5, 5]
    for name, labels in (
        ("text-classification", {f"LABEL_{n}" for n in range(3)}),
        ("zero-shot-image-classification", {"red", "blue", "square"}),
        ("images-alone", {f"LABEL_{n}" for n in range(3)}),
    ):
        assert {found["label"] for found in answers[name]} == labels
        assert sum(found["score"] for found in answers[name]) == pytest.approx(1.0, abs=1e-4)
    assert len(answers["image-classification"]) == 2
    one, several = answers["visual-question-answering"]
    assert len(one) == 2 and one[0]["score"] >= one[1]["score"]
    assert [len(found) for found in several] == [3] * 4
    features = torch.tensor(answers["feature-extraction"])
    assert features.shape[0] == 1 and features.shape[2] == TINY["hidden_size"]


@pytest.mark.process
def test_pipelines_read_files_as_the_processor_does(results):
    assert len(results["pictures"]) == 6
    for name, pixels in results["pictures"].items():
        for way, found in pixels.items():
            assert torch.equal(found, pixels["path"]), (name, way)


@pytest.mark.process
def test_the_code_of_the_model_cards_runs(results):
    assert results["uses"] == {
        "pretraining": "outputs",
        "images": "hidden",
        "vqa": "answer",
        "nlvr2": "logits",
        "retrieval": "similarity",
        "imagenet": "logits",
        "mnli": "logits",
    }


@pytest.mark.process
def test_saving_again_takes_all_files_along(results):
    assert results["files"] == [path.name for path in hf_source_files()]


@pytest.mark.process
def test_neither_torchvision_nor_megatron_was_needed(results):
    assert not {"torchvision", "megatron", "megatron_vlmoe"} & set(results["modules"])
    assert results["images_alone"] == "VLMoEImageProcessor"


def test_the_map_names_classes_that_exist():
    for task in ("", *TASKS):
        assert hasattr(modeling_vlmoe, architecture(task))
        for reference in auto_map(task).values():
            module, name = reference.split(".")
            assert module in {path.stem for path in hf_source_files()}
            assert f"class {name}(" in "".join(path.read_text() for path in hf_source_files())
    for pipeline in CUSTOM_PIPELINES.values():
        module, name = pipeline["impl"].split(".")
        (path,) = (path for path in hf_source_files() if path.stem == module)
        assert f"class {name}(" in path.read_text()
        assert set(pipeline["pt"]) <= set(auto_map())
    with pytest.raises(ValueError, match="poetry"):
        architecture("poetry")


def test_the_files_name_each_other_directly():
    # Transformers 4 copies only what the module of a class names itself.
    for name in (
        "modeling_vlmoe",
        "processing_vlmoe",
        "tokenization_vlmoe",
        "image_processing_vlmoe",
    ):
        needed, direct = {name}, set()
        while needed - direct:
            for module in needed - direct:
                direct.add(module)
                needed |= relative_imports(module)
        assert direct - {name} == relative_imports(name)


def relative_imports(module: str) -> set[str]:
    (path,) = (path for path in hf_source_files() if path.stem == module)
    lines = [line.strip() for line in path.read_text().splitlines()]
    return {line.split()[1][1:] for line in lines if line.startswith("from .")}
