"""From the command line of `finetune` and `evaluate` to a run: architecture from a checkpoint, recipe, options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional, Sequence

import yaml

from megatron_vlmoe.config.command_line import (
    ParsedCommand,
    from_dict,
    normalize_arguments,
    option_value,
    parse_options,
)
from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.config.presets import preset
from megatron_vlmoe.config.recipes import apply_recipe, default_recipe, recipe_names
from megatron_vlmoe.config.schema import CheckpointConfig, RunConfig
from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.config.tasks import task_names
from megatron_vlmoe.train.run_files import TOKENIZER_FILE, is_hugging_face, run_file


def parse_finetune(arguments: Sequence[str]) -> ParsedCommand:
    """Resolves the command line of `finetune`.

    The architecture is that of the checkpoint of `--load`, or without one the preset `task.architecture`; the recipe
    of `--preset`, or else of the task, is put on it, then `--config`, then the options.

    Raises:
        ConfigError: on unknown options, recipes, presets, files or values.
        SystemExit: after --help.
    """
    words = normalize_arguments(arguments, FinetuneConfig)
    file = _file_values(option_value(words, "--config"))
    task = option_value(words, "--task.name") or file.get("task.name", "")
    recipe = option_value(words, "--preset")
    asks = bool({"--help", "-h"} & set(words))
    if not recipe and not task and not asks:
        raise ConfigError(f"--task is missing: one of {', '.join(task_names())}")
    if task and task not in task_names():
        raise ConfigError(f"--task {task}: unknown; choose one of {', '.join(task_names())}")
    if asks:
        return parse_options(
            "finetune", words, apply_recipe(recipe or "vqa", RunConfig()), recipe_names()
        )
    base = _architecture(
        option_value(words, "--checkpoint.load") or file.get("checkpoint.load", ""),
        option_value(words, "--task.architecture") or file.get("task.architecture", ""),
        _step_of_load(words, file),
    )
    start = apply_recipe(recipe or default_recipe(task), base)
    if task and start.task.name != task:
        raise ConfigError(f"--preset {recipe} is a recipe of {start.task.name}, not of {task}")
    return parse_options("finetune", words, start, recipe_names())


def parse_evaluate(arguments: Sequence[str]) -> ParsedCommand:
    """Resolves the command line of `evaluate`: the checkpoint's own run with options on top.

    Raises:
        ConfigError: on unknown options or values, without `--load`, or if the checkpoint is not of a task.
        SystemExit: after --help.
    """
    words = normalize_arguments(arguments, FinetuneConfig)
    start: RunConfig = FinetuneConfig()
    if not {"--help", "-h"} & set(words):
        load = option_value(words, "--checkpoint.load")
        if not load:
            raise ConfigError(
                "--load is missing: the run or checkpoint folder of a fine-tuned model"
            )
        start = saved_run(load, option_value(words, "--checkpoint.step"))
        if not isinstance(start, FinetuneConfig):
            raise ConfigError(f"--load {load}: is a pretraining checkpoint, not one of a task")
        task = option_value(words, "--task.name")
        if task and task != start.task.name:
            raise ConfigError(f"--load {load}: was fine-tuned on {start.task.name}, not on {task}")
        start = replace(
            start, checkpoint=CheckpointConfig(load=load), task=replace(start.task, seeds=())
        )
        if option_value(words, "--preset"):
            raise ConfigError("--preset: evaluate takes its options from the checkpoint")
    return parse_options("evaluate", words, start, ())


def _file_values(path: str) -> dict[str, str]:
    """What a `--config` file says of the task and of where the architecture comes from; errors are found later."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8")) if path else {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    found = {}
    names = ("task.name", "task.architecture", "checkpoint.load", "checkpoint.save")
    for name in (*names, "checkpoint.step"):
        section, _, option = name.partition(".")
        values = content.get(section) if isinstance(content, dict) else None
        if isinstance(values, dict) and isinstance(values.get(option), str):
            found[name] = values[option]
    return found


def _step_of_load(words: Sequence[str], file: Mapping[str, str]) -> str:
    """Which checkpoint of `--load` is meant: `checkpoint.step` is of `--save` where that has begun."""
    from megatron_vlmoe.train.checkpoint_files import checkpoint_root, has_checkpoints

    save = option_value(words, "--checkpoint.save") or file.get("checkpoint.save", "")
    if save and has_checkpoints(checkpoint_root(save)):
        return ""
    return option_value(words, "--checkpoint.step") or file.get("checkpoint.step", "")


def _architecture(load: str, name: str, step: str) -> RunConfig:
    """The run whose architecture is fine-tuned."""
    if load and name:
        raise ConfigError(
            f"--task.architecture {name}: the architecture comes from --load {load}; give one of the two"
        )
    if load:
        return saved_run(load, step)
    if not name:
        raise ConfigError(
            "--load is missing: the checkpoint to start from (or --task.architecture PRESET for initial weights)"
        )
    return preset(name)


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
        return _hugging_face_run(path)
    content = _saved_content(path)
    root: RunConfig = FinetuneConfig() if "task" in content else RunConfig()
    config = from_dict(content, root, f"--load {path}")
    beside = run_file(path, TOKENIZER_FILE)
    if beside is not None and not Path(config.data.text_tokenizer).is_file():
        config = replace(config, data=replace(config.data, text_tokenizer=str(beside)))
    return config


def prepare_megatron() -> None:
    """Makes megatron-core importable, without a GPU too; what imports it may only be imported afterwards."""
    from megatron_vlmoe.runtime.cpu import install_cpu_runtime
    from megatron_vlmoe.train.startup import quiet_imports

    quiet_imports()
    install_cpu_runtime()


def checkpoint_of(location: str, step: Optional[str] = None) -> Path:
    """The checkpoint that `--load` names: of a run folder that of a step, else the best, else the last.

    A Hugging Face folder is its own checkpoint.

    Raises:
        ConfigError: if there is none.
    """
    prepare_megatron()
    from megatron_vlmoe.train.checkpoint_files import find_best_or_last

    if is_hugging_face(location):
        return Path(location)
    path = find_best_or_last(location, step)
    if path is None:
        raise ConfigError(f"--load {location}: no checkpoint there")
    return path


def _hugging_face_run(folder: Path) -> RunConfig:
    # Needs torch, which --help must not wait for.
    from megatron_vlmoe.config.errors import ConvertError
    from megatron_vlmoe.convert.importing import open_hugging_face

    try:
        return open_hugging_face(folder, verify=False).config
    except ConvertError as error:
        raise ConfigError(f"--load {error}") from None


def _saved_content(path: Path) -> dict[str, Any]:
    from megatron_vlmoe.config.errors import CheckpointError
    from megatron_vlmoe.train.checkpoint import load_common

    try:
        content = load_common(path).get("config")
    except CheckpointError as error:
        raise ConfigError(f"--load {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"--load {path}: holds no configuration of this project")
    return content
