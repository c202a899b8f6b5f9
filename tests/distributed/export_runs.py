"""What the processes of a layout do for exports: write a checkpoint of known weights, and compute its outputs."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers import Layout, small_config

SAMPLES, CLASSES = 4, 5


def config_of(task: str, where: Layout, arguments: tuple[str, ...]) -> Any:
    """The small model, of pretraining or with the head of a task."""
    from megatron_vlmoe.config.schema import RunConfig
    from megatron_vlmoe.config.task_schema import FinetuneConfig, TaskConfig

    config = small_config(*arguments, where=where)
    if not task:
        return config
    sections = {field.name: getattr(config, field.name) for field in fields(RunConfig)}
    classes = 0 if task == "retrieval" else 2 if task == "nlvr2" else CLASSES
    return FinetuneConfig(**sections, task=TaskConfig(name=task, num_classes=classes))  # type: ignore[arg-type]


def write(where: Layout, task: str, arguments: tuple[str, ...], folder: str) -> None:
    """Writes a checkpoint whose weights do not depend on the layout, and none of which is left at 0 or 1."""
    _build(where, task, arguments, folder)


def compute(
    task: str, arguments: tuple[str, ...], folder: str, factors: tuple[float, ...]
) -> list[dict[str, Any]]:
    """Writes the checkpoint on one process and computes outputs by name, with each of these expert capacities."""
    results = []
    for factor in factors:
        words = (*arguments, "--moe.eval_capacity_factor", str(factor))
        results.append(_outputs(task, *_build(Layout(1), task, words, folder)))
    return results


def _outputs(task: str, config: Any, model: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with torch.no_grad():
        for layout, stream, batch in _batches(task, config):
            if not task:
                hidden = model.decoder(model.embedding(batch, stream), stream)
                found |= _pretraining(model, hidden.squeeze(1), layout)
            else:
                found |= model(batch, stream)
    return {name: value.float().numpy() for name, value in found.items()}


def load_imported(where: Layout, folder: str) -> None:
    """Loads a checkpoint strictly, as a run that starts from it does."""
    from megatron_vlmoe.runtime.distributed import initialize
    from megatron_vlmoe.train.checkpoint import load_checkpoint
    from megatron_vlmoe.train.checkpoint_files import find_checkpoint
    from megatron_vlmoe.train.setup import build_training

    config = config_of("", where, ())
    initialize(config.parallel, config.train.seed)
    parts = build_training(config, "fp32")
    path = find_checkpoint(folder)
    assert path is not None
    load_checkpoint(path, config, parts)


def inputs(config: Any) -> dict[str, Any]:
    """What the models of both sides read: ids, lengths, raw pixels, hidden patches; two images for every text."""
    model = config.model
    draw = np.random.default_rng(7)
    count = 2 * SAMPLES
    shape = (count, 3, model.image_size, model.image_size)
    return {
        "text_ids": draw.integers(5, model.vocab_size, (count, model.text_length)),
        "pair_ids": draw.integers(5, model.vocab_size, (count, model.pair_text_length)),
        "text_lengths": draw.integers(3, model.text_length + 1, count),
        "pair_lengths": draw.integers(3, model.pair_text_length + 1, count),
        "pixels": draw.integers(0, 256, shape).astype(np.uint8),
        "mask": draw.random((count, model.num_patches)) < 0.4,
    }


def _build(where: Layout, task: str, arguments: tuple[str, ...], folder: str) -> tuple[Any, Any]:
    from megatron_vlmoe.model.heads import MaskedHeads
    from megatron_vlmoe.model.task_heads import build_task_heads
    from megatron_vlmoe.runtime.distributed import initialize
    from megatron_vlmoe.train.checkpoint import CheckpointWriter
    from megatron_vlmoe.train.checkpoint_files import TrainState
    from megatron_vlmoe.train.setup import build_forward_only, checkpoint_metadata

    config = config_of(task, where, arguments)
    if not torch.distributed.is_initialized():
        initialize(config.parallel, config.train.seed)
    parts = build_forward_only(config, "fp32", build_task_heads if task else MaskedHeads)
    for chunk in parts.chunks:
        for entry in chunk.sharded_state_dict(metadata=checkpoint_metadata()).values():
            if hasattr(entry, "global_shape"):
                _disturb(entry, config)
    writer = CheckpointWriter(Path(folder) / "checkpoints", 0, False)
    writer.save(TrainState(step=3), config, parts, with_optimizer=False)
    return config, parts.chunks[0]


@torch.no_grad()
def _disturb(entry: Any, config: Any) -> None:
    """Adds noise that depends on the key alone, except where training never moves a value from zero."""
    from megatron_vlmoe.model.initial_values import VOCABULARIES
    from megatron_vlmoe.stream.draws import keyed_generator

    if not hasattr(entry, "data") or not torch.is_tensor(entry.data):
        return
    generator = keyed_generator(torch.device("cpu"), 11, entry.key)
    noise = 0.05 * torch.randn(tuple(entry.global_shape), generator=generator)
    vocabulary = VOCABULARIES.get(entry.key.replace(".bias", ".weight"))
    if vocabulary:
        noise[getattr(config.model, vocabulary) :] = 0.0
    if entry.key.endswith("linear_qkv.bias"):
        noise.view(config.model.num_attention_heads, 3, -1)[:, 1] = 0.0
    part = tuple(slice(o, o + n) for o, n in zip(entry.global_offset, entry.local_shape))
    entry.data.add_(noise[part].view_as(entry.data))


def _batches(task: str, config: Any) -> list[tuple[Any, Any, dict[str, Any]]]:
    """Layout, stream and batch of every forward pass."""
    from megatron_vlmoe.stream.batch import StreamBatch
    from megatron_vlmoe.stream.layout import StreamLayout

    given = {name: torch.as_tensor(value) for name, value in inputs(config).items()}
    model = config.model

    def one(texts: int = 0, pairs: int = 0, images: int = 0, packed: bool = False) -> Any:
        lengths = (model.text_length, model.pair_text_length, model.image_length)
        layout = StreamLayout(texts, pairs, images, *lengths)
        stream = StreamBatch(
            layout,
            pair_lengths=given["pair_lengths"][:pairs] if pairs else None,
            text_lengths=given["text_lengths"][:texts] if texts and not packed else None,
        )
        batch = {
            "texts": {"ids": given["text_ids"][:texts]},
            "pair_texts": {"ids": given["pair_ids"][:pairs]},
            "pair_images": {"pixels": given["pixels"][:pairs]},
            "images": {"pixels": given["pixels"][:images]},
        }
        if not task:
            batch["pair_images"]["mask"] = given["mask"][:pairs]
            batch["images"]["mask"] = given["mask"][:images]
        if task == "nlvr2":
            # The sentence stands before either image.
            batch["pair_texts"]["ids"] = given["pair_ids"][: pairs // 2].repeat_interleave(2, 0)
            half = given["pair_lengths"][: pairs // 2].repeat_interleave(2, 0)
            stream = StreamBatch(layout, pair_lengths=half)
        return layout, stream, batch

    if not task:
        return [one(texts=SAMPLES, packed=True), one(pairs=SAMPLES), one(images=SAMPLES)]
    return {
        "vqa": [one(pairs=SAMPLES)],
        "nlvr2": [one(pairs=2 * SAMPLES)],
        "imagenet": [one(images=SAMPLES)],
        "mnli": [one(texts=SAMPLES)],
        "retrieval": [one(texts=SAMPLES, images=SAMPLES), one(pairs=SAMPLES)],
    }[task]


def _pretraining(model: Any, hidden: torch.Tensor, layout: Any) -> dict[str, Any]:
    """Hidden states and logits of all positions of one segment, or of the two of pairs."""
    found = {}
    for segment in ("texts", "pair_texts", "pair_images", "images"):
        if not layout.count(segment):
            continue
        states = layout.take(hidden, segment)
        head = model.heads.text if "text" in segment else model.heads.image
        rows = states if "text" in segment else states[:, 1:]
        logits = head(rows.reshape(-1, 1, rows.shape[2])).view(*rows.shape[:2], -1)
        found[f"{segment}/hidden"] = states
        found[f"{segment}/logits"] = logits[..., : head.valid_rows]
    return found
