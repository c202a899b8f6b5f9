"""What is in a checkpoint of any layout, or in a Hugging Face folder: the run that saved it, and its weights."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

from megatron_vlmoe.config.command_line import from_dict
from megatron_vlmoe.config.errors import CheckpointError, ConfigError, ConvertError
from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.convert.importing import HuggingFaceModel
from megatron_vlmoe.train.checkpoint import load_checkpoint, load_common
from megatron_vlmoe.train.checkpoint_files import (
    checkpoint_root,
    find_best_or_last,
    has_checkpoints,
)
from megatron_vlmoe.train.run_files import TOKENIZER_FILE, is_hugging_face, run_file
from megatron_vlmoe.train.warm_start import CheckpointWeights, WeightSource, warm_start


def has_begun(save: str) -> bool:
    """Whether the run in a folder has written a checkpoint."""
    return bool(save) and has_checkpoints(checkpoint_root(save))


def saved_run(location: str, step: Optional[str] = None) -> RunConfig:
    """The configuration in a checkpoint, with the tokenizer that lies beside it where its own path is gone.

    Args:
        location: run folder, checkpoint folder, iteration folder, or Hugging Face folder.
        step: see `find_checkpoint`.

    Raises:
        ConfigError: if there is no checkpoint, or it holds no configuration of this project.
    """
    path = checkpoint_of(location, step)
    if is_hugging_face(path):
        try:
            return HuggingFaceModel(path, verify=False).config
        except ConvertError as error:
            raise ConfigError(f"--load {error}") from None
    try:
        content = load_common(path).get("config")
    except CheckpointError as error:
        raise ConfigError(f"--load {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"--load {path}: holds no configuration of this project")
    root: RunConfig = FinetuneConfig() if "task" in content else RunConfig()
    config = from_dict(content, root, f"--load {path}")
    beside = run_file(path, TOKENIZER_FILE)
    if beside is not None and not Path(config.data.text_tokenizer).is_file():
        config = replace(config, data=replace(config.data, text_tokenizer=str(beside)))
    return config


def checkpoint_of(location: str, step: Optional[str] = None) -> Path:
    """The checkpoint that `--load` names: of a run folder that of a step, else the best, else the last.

    A Hugging Face folder is its own checkpoint.

    Raises:
        ConfigError: if there is none.
    """
    if is_hugging_face(location):
        return Path(location)
    path = find_best_or_last(location, step)
    if path is None:
        raise ConfigError(f"--load {location}: no checkpoint there")
    return path


def weight_source(path: Path) -> WeightSource:
    """The weights of an iteration folder or of a Hugging Face folder.

    Raises:
        CheckpointError: a Hugging Face folder that is damaged, tampered with, or of another architecture.
    """
    if not is_hugging_face(path):
        return CheckpointWeights(path)
    try:
        # Checksums cost a whole reading: once per node.
        return HuggingFaceModel(path, verify=int(os.environ.get("LOCAL_RANK", 0)) == 0)
    except ConvertError as error:
        raise CheckpointError(str(error)) from None


def load_weights(path: Path, config: RunConfig, parts: Any) -> None:
    """Loads the whole model of a run, heads included.

    Raises:
        CheckpointError: it is of another model, incomplete or damaged.
    """
    if not is_hugging_face(path):
        load_checkpoint(path, config, parts, with_optimizer=False)
        return
    report = warm_start(weight_source(path), config, parts, with_heads=True)
    if missing := (*report.new, *report.resized):
        raise CheckpointError(f"{path}: {missing[0]} does not fit the model of this run")
