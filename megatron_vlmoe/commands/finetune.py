"""The commands `finetune` and `evaluate`."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.finetune.options import parse_evaluate, parse_finetune
from megatron_vlmoe.runtime.lazy import load
from megatron_vlmoe.runtime.ranks import environment_world_size


def main(words: Sequence[str]) -> None:
    """Fine-tunes on a task, or prints the plan of it."""
    command = parse_finetune(words)
    run = load("megatron_vlmoe.finetune.run")
    if command.dry_run:
        world_size = command.dry_run_world_size or environment_world_size()
        run.dry_run(command.config, world_size, command.dry_run_gpus_per_node)
    else:
        run.run_finetune(command.config)


def evaluate_main(words: Sequence[str]) -> None:
    """Scores a fine-tuned checkpoint."""
    command = parse_evaluate(words)
    if command.dry_run:
        raise ConfigError("--dry-run is for training; evaluate has nothing to plan")
    load("megatron_vlmoe.finetune.run").run_evaluate(command.config)
