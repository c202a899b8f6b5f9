"""From a checkpoint to a Hugging Face folder, tensor by tensor, whole or not at all."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import torch
from torch import Tensor

from megatron_vlmoe.config.errors import ConfigError, ConvertError
from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.convert.checkpoints import CheckpointReader
from megatron_vlmoe.convert.hf_config import (
    CONFIG_FILE,
    SPM_FILE,
    export_config,
    hf_source_files,
    processor_files,
)
from megatron_vlmoe.convert.model_card import CardOptions, model_card
from megatron_vlmoe.convert.name_table import FP32_KEYS, Entry, name_table
from megatron_vlmoe.convert.safetensors_files import Group, write_folder
from megatron_vlmoe.convert.tensors import check_tensors, with_progress
from megatron_vlmoe.data.task_labels import Labels
from megatron_vlmoe.runtime.files import folder_atomic
from megatron_vlmoe.tokenizers.text import TextTokenizer
from megatron_vlmoe.train.run_files import (
    LABELS_FILE,
    TOKENIZER_FILE,
    open_labels,
    open_text_tokenizer,
    run_file,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ExportOptions:
    """What an export looks like.

    Args:
        dtype: of the weights; None keeps that of the checkpoint. Routers are fp32 always.
        max_shard_bytes: size of a safetensors file, unless a single tensor is larger.
        text_tokenizer: SentencePiece model; empty takes that of the run.
        overwrite: replaces a folder that is there.
        card: what only the author knows for the model card.
    """

    dtype: Optional[torch.dtype] = None
    max_shard_bytes: int = 5_000_000_000
    text_tokenizer: str = ""
    overwrite: bool = False
    card: CardOptions = CardOptions()


def export_checkpoint(location: str | Path, output: Path, options: ExportOptions) -> Path:
    """Writes a folder that transformers loads with ``trust_remote_code=True`` and that imports back.

    Args:
        location: run, checkpoint or iteration folder; of pretraining or of a task, of any layout.
        output: the folder to make.
        options: see there.

    Returns:
        The folder.

    Raises:
        ConvertError: a tensor is missing, unknown or of another shape, the tokenizer or the labels do not go with the
            checkpoint, or the folder exists; nothing is left behind.
    """
    if output.exists() and not options.overwrite:
        raise ConvertError(f"{output}: exists (--overwrite replaces it)")
    reader = CheckpointReader(location)
    table = name_table(reader.config)
    shapes = {entry.ours: entry.shape for entry in table}
    check_tensors(reader.path, reader.tensors, shapes, "its configuration", "an export")
    tokenizer = _tokenizer(reader, options.text_tokenizer)
    labels = _labels(reader)
    groups = [_group(entry, reader, options.dtype) for entry in table]
    try:
        with folder_atomic(output) as temporary:
            written = write_folder(temporary, groups, options.max_shard_bytes)
            for _ in with_progress(written, len(groups), "export"):
                pass
            _write_texts(temporary, reader, tokenizer, labels, options)
    except OSError as error:
        raise ConvertError(f"{output}: {error.strerror or error}") from None
    return output


def _group(entry: Entry, reader: CheckpointReader, dtype: Optional[torch.dtype]) -> Group:
    tensor = reader.tensors[entry.ours]
    wanted = torch.float32 if FP32_KEYS.search(entry.ours) else dtype or tensor.dtype
    shapes = entry.their_shapes(reader.config.model)

    def read() -> tuple[Tensor, ...]:
        return entry.transform.split(tensor.read(), reader.config.model)

    return Group(tuple(shapes), tuple(shapes.values()), wanted, read)


def _tokenizer(reader: CheckpointReader, given: str) -> Optional[TextTokenizer]:
    config = reader.config
    if not config.model.vocab_size:
        return None
    path = given or run_file(reader.path, TOKENIZER_FILE) or config.data.text_tokenizer
    if not path or not Path(path).is_file():
        raise ConvertError(
            f"{reader.path}: no {TOKENIZER_FILE} beside it and no {path or 'text tokenizer'}; "
            "name it with --text-tokenizer"
        )
    try:
        return open_text_tokenizer(path, config, reader.path)
    except ConfigError as error:
        raise ConvertError(str(error)) from None


def _labels(reader: CheckpointReader) -> Optional[Labels]:
    config = reader.config
    if not isinstance(config, FinetuneConfig) or not config.task.num_classes:
        return None
    path = run_file(reader.path, LABELS_FILE)
    if path is None:
        raise ConvertError(f"{reader.path}: no {LABELS_FILE} beside it")
    try:
        return open_labels(path, config, reader.path)
    except ConfigError as error:
        raise ConvertError(str(error)) from None


def _write_texts(
    folder: Path,
    reader: CheckpointReader,
    tokenizer: Optional[TextTokenizer],
    labels: Optional[Labels],
    options: ExportOptions,
) -> None:
    """Everything but the weights."""
    config = reader.config
    content = export_config(config, tokenizer, labels)
    processing = processor_files(
        image_size=config.model.image_size,
        image_mean=config.data.pixel_mean,
        image_std=config.data.pixel_std,
        text_length=config.model.text_length,
        pair_text_length=config.model.pair_text_length,
        with_text=tokenizer is not None,
    )
    for name, values in {CONFIG_FILE: content, **processing}.items():
        text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
    if tokenizer is not None:
        shutil.copyfile(tokenizer.model_path, folder / SPM_FILE)
    if labels is not None:
        source = run_file(reader.path, LABELS_FILE)
        assert source is not None
        shutil.copyfile(source, folder / LABELS_FILE)
    for source in hf_source_files():
        shutil.copyfile(source, folder / source.name)
    (folder / "README.md").write_text(model_card(reader, content, options.card), encoding="utf-8")
