"""From a Hugging Face folder to a checkpoint that training goes on from, or straight into a run, at any layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import torch

from megatron_vlmoe.config.errors import CheckpointError, ConvertError
from megatron_vlmoe.convert.checkpoints import check_output, write_checkpoint
from megatron_vlmoe.convert.hf_config import CONFIG_FILE, open_export
from megatron_vlmoe.convert.name_table import name_table
from megatron_vlmoe.convert.tensors import (
    SafetensorsFolder,
    check_tensors,
    counted,
)
from megatron_vlmoe.runtime.files import write_text_atomic
from megatron_vlmoe.train.run_files import LABELS_FILE, TOKENIZER_FILE, keep_file


class HuggingFaceModel:
    """A folder that an export or `save_pretrained` wrote, as the checkpoint that it stands for.

    It is a `WeightSource` of train/resume.py. Every name and shape is checked at once.

    Args:
        location: the folder.
        verify: compares the files with the export's checksums, if any.

    Attributes:
        config: of the run that an import makes.
        tensors: by checkpoint key, read lazily.
        tokenizer: its text tokenizer's file; None for a model without text.
        labels: the classes of a task.

    Raises:
        ConvertError: another architecture, a damaged or tampered file, or a tensor that is missing, unknown or of
            another shape (a missing expert, for one).
    """

    def __init__(self, location: str | Path, verify: bool = True) -> None:
        self.path = Path(location)
        self.config, self.tokenizer, self.labels = open_export(self.path)
        files = SafetensorsFolder(self.path)
        table, model = name_table(self.config), self.config.model
        shapes = {name: shape for e in table for name, shape in e.their_shapes(model).items()}
        check_tensors(self.path, files.tensors, shapes, CONFIG_FILE, "a checkpoint")
        if verify:
            files.verify_checksums()
        self.tensors = {entry.ours: entry.joined(files.tensors, model) for entry in table}

    @property
    def sections(self) -> Mapping[str, Any]:
        """The configuration that the weights belong to."""
        return dataclasses.asdict(self.config)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Key of our checkpoints and whole shape of every tensor."""
        return {key: tensor.shape for key, tensor in self.tensors.items()}

    @torch.no_grad()
    def load(self, wanted: Mapping[str, Any]) -> None:
        """Fills shards (megatron-core's ShardedTensor) in place; one whole tensor is in memory at a time.

        Raises:
            CheckpointError: a file cannot be read.
        """
        for shard in wanted.values():
            try:
                whole = self.tensors[shard.key].read()
            except ConvertError as error:
                raise CheckpointError(str(error)) from None
            skip = shard.prepend_axis_num
            part = tuple(
                slice(start, start + size)
                for start, size in zip(shard.global_offset[skip:], shard.local_shape)
            )
            shard.data.copy_(whole[part].view_as(shard.data))


def import_checkpoint(
    location: str | Path,
    output: Path,
    parallel: Optional[Mapping[str, Any]] = None,
    overwrite: bool = False,
) -> Path:
    """Writes a checkpoint with the weights of a Hugging Face folder, tokenizer and class names beside it.

    Options of `parallel` are only noted in it: a checkpoint loads at any layout, and they say what a run that takes its
    configuration from it starts with. Returns the iteration folder.

    Raises:
        ConvertError: see `HuggingFaceModel` and `check_output`; nothing is left behind.
    """
    check_output(output, overwrite)
    model = HuggingFaceModel(location)
    config = replace(model.config, parallel=replace(model.config.parallel, **(parallel or {})))
    if model.tokenizer is not None:
        # Found beside the checkpoint, wherever it is moved.
        config = replace(config, data=replace(config.data, text_tokenizer=""))
    with counted(model.tensors, "import") as tensors:
        path = write_checkpoint(output, tensors, config, overwrite=overwrite)
    if model.tokenizer is not None:
        keep_file(model.tokenizer, output, TOKENIZER_FILE)
    if model.labels is not None:
        write_text_atomic(output / LABELS_FILE, model.labels.to_json())
    return path
