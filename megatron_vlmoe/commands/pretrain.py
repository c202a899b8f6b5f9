"""The commands `pretrain` and `pretrain-random`: from a command line to a plan, or to training."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_vlmoe.config.command_line import ParsedCommand, parse_run, to_yaml
from megatron_vlmoe.planning.dry_run import dry_run_text
from megatron_vlmoe.planning.validate import validate
from megatron_vlmoe.runtime.lazy import load
from megatron_vlmoe.runtime.ranks import environment_rank, environment_world_size


def main(words: Sequence[str]) -> None:
    """Trains on indexed datasets."""
    command = _parse(words)
    if not command.dry_run:
        load("megatron_vlmoe.train.pretrain").pretrain(command.config)


def random_main(words: Sequence[str]) -> None:
    """Trains on random numbers: to compare layouts, and to try a cluster out before the data is there."""
    command = _parse(words)
    if not command.dry_run:
        load("megatron_vlmoe.train.pretrain").pretrain_random(command.config)


def _parse(words: Sequence[str]) -> ParsedCommand:
    """Parses and checks; prints the plan of a dry run."""
    command = parse_run("pretrain", words)
    world_size = command.dry_run_world_size or environment_world_size()
    validate(command.config, world_size)
    if command.dry_run and environment_rank() == 0:
        print(to_yaml(command.config))
        print(dry_run_text(command.config, world_size, command.dry_run_gpus_per_node))
    return command
