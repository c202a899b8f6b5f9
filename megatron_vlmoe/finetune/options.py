"""From the command line of `finetune` and `evaluate` to a run: architecture from a checkpoint, recipe, options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Optional, Sequence

import yaml

from megatron_vlmoe.config.command_line import (
    ParsedCommand,
    from_dict,
    normalize_arguments,
    option_value,
    parse_options,
)
from megatron_vlmoe.config.errors import CheckpointError, ConfigError, ConvertError, unknown_name
from megatron_vlmoe.config.presets import apply_recipe, default_recipe, preset, recipe_names
from megatron_vlmoe.config.schema import CheckpointConfig, RunConfig
from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.config.tasks import task_names
from megatron_vlmoe.config.yaml_files import parse_yaml
from megatron_vlmoe.convert.hf_config import open_export
from megatron_vlmoe.train.checkpoint_files import (
    COMMON_FILE,
    checkpoint_root,
    find_best_or_last,
    has_checkpoints,
    saved_config,
)
from megatron_vlmoe.train.checkpoint_sums import check_one_file
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
    asks = "--help" in words
    if not recipe and not task and not asks:
        raise ConfigError(f"--task is missing: one of {', '.join(task_names())}")
    if task and task not in task_names():
        raise ConfigError(f"--task {task}: {unknown_name(task, task_names())}")
    if asks:
        base = "the architecture of --load and the recipe of the task, which --dry-run shows"
        start = apply_recipe(recipe or "vqa", RunConfig())
        return parse_options("finetune", words, start, recipe_names(), base)
    start = apply_recipe(recipe or default_recipe(task), _architecture(words, file))
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
    if "--help" not in words:
        location = option_value(words, "--checkpoint.load")
        if not location:
            raise ConfigError(
                "--load is missing: the run or checkpoint folder of a fine-tuned model"
            )
        step = option_value(words, "--checkpoint.step")
        start = saved_run(location, step)
        if not isinstance(start, FinetuneConfig):
            raise ConfigError(f"--load {location}: is a pretraining checkpoint, not one of a task")
        task = option_value(words, "--task.name")
        if task and task != start.task.name:
            raise ConfigError(
                f"--load {location}: was fine-tuned on {start.task.name}, not on {task}"
            )
        start = replace(
            start, checkpoint=CheckpointConfig(load=location), task=replace(start.task, seeds=())
        )
        if option_value(words, "--preset"):
            raise ConfigError("--preset: evaluate takes its options from the checkpoint")
    return parse_options("evaluate", words, start, (), "the options in the checkpoint of --load")


def check_task_options(command: str, arguments: Sequence[str]) -> None:
    """Checks names and types of the options of `finetune` or `evaluate`, without the checkpoint of `--load`.

    Raises:
        ConfigError: on unknown options, recipes, files or values.
    """
    words = normalize_arguments(arguments, FinetuneConfig)
    recipe = option_value(words, "--preset") if command == "finetune" else ""
    start = apply_recipe(recipe or "vqa", RunConfig())
    parse_options(command, words, start, recipe_names())


def _file_values(path: str) -> dict[str, str]:
    """What a `--config` file says of the task and of where the architecture comes from; errors are found later."""
    try:
        content = parse_yaml(Path(path).read_text(encoding="utf-8")) if path else {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    found: dict[str, str] = {}
    for section, options in (
        ("task", ("name", "architecture")),
        ("checkpoint", ("load", "save", "step")),
    ):
        values = content.get(section) if isinstance(content, dict) else None
        if isinstance(values, dict):
            own = {option: values.get(option) for option in options}
            found |= {f"{section}.{k}": v for k, v in own.items() if isinstance(v, str)}
    return found


def _architecture(words: Sequence[str], file: Mapping[str, str]) -> RunConfig:
    """The run whose architecture is fine-tuned."""

    def value(name: str) -> str:
        return option_value(words, f"--{name}") or file.get(name, "")

    location, name = value("checkpoint.load"), value("task.architecture")
    if location and name:
        raise ConfigError(
            f"--task.architecture {name}: the architecture comes from --load {location}; give one of the two"
        )
    if location:
        save = value("checkpoint.save")
        # `checkpoint.step` is of `--save` where that has begun.
        begun = save and has_checkpoints(checkpoint_root(save))
        return saved_run(location, "" if begun else value("checkpoint.step"))
    if not name:
        raise ConfigError(
            "--load is missing: the checkpoint to start from (or --task.architecture PRESET for initial weights)"
        )
    return preset(name, "--task.architecture")


def saved_run(location: str, step: Optional[str] = None) -> RunConfig:
    """The configuration in a checkpoint, with the tokenizer that lies beside it where its own path is gone.

    Args:
        location: run folder, checkpoint folder, iteration folder, or Hugging Face folder.
        step: see `find_checkpoint`.

    Raises:
        ConfigError: if there is no checkpoint, its configuration is damaged, or it holds none of this project.
    """
    path = checkpoint_of(location, step)
    if is_hugging_face(path):
        try:
            return open_export(path)[0]
        except ConvertError as error:
            raise ConfigError(f"--load {error}") from None
    try:
        check_one_file(path, COMMON_FILE)
        content = saved_config(path)
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
