"""An export computes what the trainer computes, and is the same from every layout; an import gives the weights back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from export_runs import SAMPLES, compute, config_of, inputs, load_imported, write
from helpers import Layout, Workers, layout

from megatron_vlmoe.convert.checkpoints import CheckpointReader
from megatron_vlmoe.convert.exporting import export_checkpoint
from megatron_vlmoe.convert.hf_config import architecture
from megatron_vlmoe.convert.importing import import_checkpoint
from megatron_vlmoe.data.task_labels import Labels
from megatron_vlmoe.tokenizers.text import TextTokenizerTraining, train_text_tokenizer
from megatron_vlmoe.train.run_files import LABELS_FILE, TOKENIZER_FILE

pytest.importorskip("transformers")

TOLERANCE = 1e-5
VARIANTS = {
    "dense": "--moe.num_vision_experts 0 --moe.num_text_experts 0 --moe.layers []",
    "8e": "",
    "t-only": "--moe.modalities text",
    "v-only": "--moe.modalities vision",
    "shared": "--moe.shared_router true",
    "vl": "--moe.vl true --moe.num_vl_experts 4 --moe.layers 2 4 --moe.topk 2 --moe.normalize_gate true",
    "balance-bias": "--moe.balance_bias_rate 0.001 --moe.topk 2",
    "expert-choice": "--moe.routing expert_choice --moe.topk 2",
    "types": "--model.token_type_embeddings true --model.layer_scale_init 0",
}
CLASSES = {"vqa": 5, "nlvr2": 2, "retrieval": 1, "imagenet": 5, "mnli": 5}
TASKS = ("vqa", "nlvr2", "retrieval", "imagenet", "mnli")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of as many pieces as the small model has."""
    folder = tmp_path_factory.mktemp("pieces")
    letters = "abcdefghijklmnop"
    draw = np.random.default_rng(0)
    words = ["".join(draw.choice(list(letters), 4)) for _ in range(600)]
    lines = (" ".join(draw.choice(words, 12)) for _ in range(800))
    prefix = folder / "text"
    training = TextTokenizerTraining(output_prefix=prefix, vocab_size=300)
    size = train_text_tokenizer(training, lines)
    assert size == 300
    return prefix.with_suffix(".model")


def exported(folder: Path, task: str, tokenizer: Path, **options: Any) -> Path:
    """The export of the checkpoint in a run folder."""
    (folder / TOKENIZER_FILE).write_bytes(tokenizer.read_bytes())
    if task:
        labels = Labels(task, tuple(f"class {number}" for number in range(CLASSES[task])))
        (folder / LABELS_FILE).write_text(labels.to_json())
    return export_checkpoint(folder, folder / "hf", **options)


def loaded(folder: Path, task: str, factor: float) -> Any:
    from megatron_vlmoe.convert.hf import modeling_vlmoe

    kind = getattr(modeling_vlmoe, architecture(task))
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    model.config.capacity_factor = factor
    return model.eval()


@torch.no_grad()
def outputs(model: Any, task: str, given: dict[str, Any]) -> dict[str, Any]:
    """What the trainer's side computes in `export_runs.compute`, by the same names."""
    tensors = {name: torch.as_tensor(value) for name, value in given.items()}
    pixels = tensors["pixels"].float() / 255.0 * 2.0 - 1.0

    def texts(kind: str, count: int = SAMPLES) -> dict[str, Any]:
        ids = tensors[f"{kind}_ids"][:count]
        mask = torch.arange(ids.shape[1]) < tensors[f"{kind}_lengths"][:count, None]
        return {"input_ids": ids, "attention_mask": mask.long()}

    images = {"pixel_values": pixels[:SAMPLES]}
    if task == "":
        masked = images | {"bool_masked_pos": tensors["mask"][:SAMPLES]}
        found = {}
        for names, batch in (
            (("texts", None), {"input_ids": tensors["text_ids"][:SAMPLES]}),
            (("pair_texts", "pair_images"), {**texts("pair"), **masked}),
            ((None, "images"), masked),
        ):
            hidden, heads = model.vlmoe(**batch), model(**batch)
            if names[0]:
                found[f"{names[0]}/hidden"] = hidden.text_hidden_state
                found[f"{names[0]}/logits"] = heads.mlm_logits
            if names[1]:
                found[f"{names[1]}/hidden"] = hidden.image_hidden_state
                found[f"{names[1]}/logits"] = heads.mim_logits
        return found
    if task == "nlvr2":
        two = pixels.view(SAMPLES, 2, *pixels.shape[1:])
        return {"logits": model(**texts("pair"), pixel_values=two).logits}
    if task == "retrieval":
        return {
            "text_features": model.get_text_features(**texts("text")).pooler_output,
            "image_features": model.get_image_features(**images).pooler_output,
            "match_logits": model.match_logits(**texts("pair"), **images),
            "logit_scale": model.logit_scale,
        }
    batch = {"vqa": texts("pair") | images, "imagenet": images, "mnli": texts("text")}[task]
    return {"logits": model(**batch).logits}


CASES = [("", name) for name in VARIANTS] + [(task, "8e") for task in TASKS]


@pytest.mark.parametrize(("task", "variant"), CASES)
def test_export_computes_what_the_trainer_computes(
    task: str, variant: str, workers: Workers, tokenizer: Path, tmp_path: Path
) -> None:
    words = tuple(VARIANTS[variant].split())
    config = config_of(task, Layout(1), words)
    # Experts that choose tokens have no result without a capacity.
    factors = {"dense": (0.0,), "expert-choice": (0.4, 1.0)}.get(variant, (0.0, 1.0))
    (computed,) = workers.run(1, compute, task, words, str(tmp_path), factors)
    folder = exported(tmp_path, task, tokenizer)
    for factor, expected in zip(factors, computed):
        actual = outputs(loaded(folder, task, factor), task, inputs(config))
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            mine = actual[name].detach().numpy()
            valid = _valid(name, mine, config) if value.ndim == 3 else np.ones_like(mine, bool)
            error = np.abs(mine - value)[valid].max()
            assert error < TOLERANCE, f"{name} with capacity factor {factor}: off by {error:.2g}"


def _valid(name: str, value: Any, config: Any) -> Any:
    """Padding of captions has no defined value."""
    mask = np.ones(value.shape, bool)
    if name.startswith("pair_texts"):
        lengths = inputs(config)["pair_lengths"][: len(value)]
        mask &= (np.arange(value.shape[1]) < lengths[:, None])[:, :, None]
    return mask


def test_export_and_import_from_any_layout(
    workers: Workers, tokenizer: Path, tmp_path: Path
) -> None:
    where = layout(4, tp=2, pp=2, ep=2)
    folders = {}
    for name, place in (("one", Layout(1)), ("many", where)):
        workers.run(place, write, place, "", (), str(tmp_path / name))
        folders[name] = exported(tmp_path / name, "", tokenizer, max_shard_bytes=100_000)
    one, many = (sorted(f.glob("*.safetensors")) for f in folders.values())
    assert [path.name for path in one] == [path.name for path in many] and len(one) > 3
    for left, right in zip(one, many):
        assert left.read_bytes() == right.read_bytes(), left.name
    # The import of the export is the checkpoint again, bit for bit.
    import_checkpoint(folders["many"], tmp_path / "back", {"tensor_model_parallel_size": 2})
    before, after = CheckpointReader(tmp_path / "many"), CheckpointReader(tmp_path / "back")
    assert before.tensors.keys() == after.tensors.keys()
    for key, tensor in before.tensors.items():
        assert torch.equal(tensor.read(), after.tensors[key].read()), key
    assert (after.config.model, after.config.moe) == (before.config.model, before.config.moe)
    assert after.config.parallel.tensor_model_parallel_size == 2
    # And training takes it, at another layout than it was ever written at.
    place = layout(2, ep=2)
    workers.run(place, load_imported, place, str(tmp_path / "back"))


def test_export_of_a_task_gives_head_and_labels_back(
    workers: Workers, tokenizer: Path, tmp_path: Path
) -> None:
    workers.run(1, write, Layout(1), "vqa", (), str(tmp_path))
    folder = exported(tmp_path, "vqa", tokenizer)
    config = json.loads((folder / "config.json").read_text())
    assert config["id2label"]["4"] == "class 4" and config["task"] == "vqa"
    import_checkpoint(folder, tmp_path / "back")
    before, after = CheckpointReader(tmp_path), CheckpointReader(tmp_path / "back")
    for key, tensor in before.tensors.items():
        assert torch.equal(tensor.read(), after.tensors[key].read()), key
    assert after.config.task.num_classes == CLASSES["vqa"]  # type: ignore[attr-defined]
    assert (tmp_path / "back" / LABELS_FILE).read_text() == (tmp_path / LABELS_FILE).read_text()
