"""The commands `finetune` and `evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from megatron_vlmoe.config.command_line import to_yaml
from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.finetune.options import parse_evaluate, parse_finetune
from megatron_vlmoe.finetune.prepared import PreparedTask
from megatron_vlmoe.planning.dry_run import dry_run_text
from megatron_vlmoe.planning.validate import validate_task
from megatron_vlmoe.runtime.lazy import load
from megatron_vlmoe.runtime.ranks import environment_rank, environment_world_size
from megatron_vlmoe.stream.sizes import data_parallel_size


def main(words: Sequence[str]) -> None:
    """Fine-tunes on a task, or prints the plan of it."""
    command = parse_finetune(words)
    if not command.dry_run:
        load("megatron_vlmoe.finetune.run").run_finetune(command.config)
        return
    world_size = command.dry_run_world_size or environment_world_size()
    config = cast(FinetuneConfig, command.config)
    validate_task(config, world_size)
    prepared = PreparedTask.open(config)
    plan = dry_run_text(prepared.config, world_size, command.dry_run_gpus_per_node)
    if environment_rank() == 0:
        print(to_yaml(prepared.config))
        print("\n".join(prepared.summary(data_parallel_size(config.parallel, world_size))))
        print(plan)


def evaluate_main(words: Sequence[str]) -> None:
    """Scores a fine-tuned checkpoint."""
    command = parse_evaluate(words)
    if command.dry_run:
        raise ConfigError("--dry-run is for training; evaluate has nothing to plan")
    load("megatron_vlmoe.finetune.run").run_evaluate(command.config)
