"""A Hugging Face folder of a tiny random model, as an export would be, without any checkpoint."""

from __future__ import annotations

import io
import json
import random
import shutil
from pathlib import Path
from typing import Any

import sentencepiece

from megatron_vlmoe.config.schema import DataConfig, ModelConfig, RunConfig
from megatron_vlmoe.convert.hf_config import (
    CUSTOM_PIPELINES,
    architecture,
    auto_map,
    hf_source_files,
    processor_files,
)

VOCAB = 80
TINY: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "num_vl_layers": 1,
    "image_size": 32,
    "patch_size": 8,
    "text_length": 12,
    "pair_text_length": 16,
    "vocab_size": VOCAB,
    "visual_vocab_size": 20,
    "initializer_range": 0.3,
    "moe_layers": [2],
    "num_vision_experts": 4,
    "num_text_experts": 3,
}


def sentencepiece_model(path: Path, **options: Any) -> Path:
    """Trains a small model with the five special pieces, in an order of its own."""
    generator = random.Random(0)
    words = ["red", "blue", "circle", "square", "left", "of", "a", "the", "two", "is", "there"]
    words += ["".join(generator.choices("abcdefghij", k=4)) for _ in range(60)]
    lines = [" ".join(generator.choices(words, k=8)) for _ in range(400)]
    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=writer,
        vocab_size=VOCAB,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        control_symbols=["[MASK]"],
        num_threads=1,
        minloglevel=2,
        **options,
    )
    path.write_bytes(writer.getvalue())
    return path


SPECIAL_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, "mask_token_id": 4}


def write_processors(folder: Path, with_text: bool = True) -> None:
    """The files of tokenizer and processors."""
    folder.mkdir(parents=True, exist_ok=True)
    model = ModelConfig(
        image_size=TINY["image_size"],
        text_length=TINY["text_length"],
        pair_text_length=TINY["pair_text_length"],
        vocab_size=TINY["vocab_size"] if with_text else 0,
    )
    data = DataConfig(pixel_mean=(0.5, 0.4, 0.3), pixel_std=(0.5, 0.6, 0.7))
    files = processor_files(RunConfig(model=model, data=data))
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    if with_text:
        sentencepiece_model(folder / "sentencepiece.model")


def write_folder(folder: Path, task: str = "", **options: Any) -> Path:
    """A whole folder with a random model of a task."""
    import torch

    from megatron_vlmoe.convert.hf import modeling_vlmoe
    from megatron_vlmoe.convert.hf.configuration_vlmoe import VLMoEConfig

    torch.manual_seed(0)
    config = VLMoEConfig(**{**TINY, **SPECIAL_IDS, "task": task, "num_labels": 3, **options})
    getattr(modeling_vlmoe, architecture(task))(config).save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text())
    content["auto_map"] = auto_map(task)
    content["custom_pipelines"] = CUSTOM_PIPELINES
    (folder / "config.json").write_text(json.dumps(content))
    write_processors(folder, with_text=config.vocab_size > 0)
    for source in hf_source_files():
        shutil.copyfile(source, folder / source.name)
    return folder
