"""The commands `pretrain` and `pretrain-random`, from a command line to a plan or to training, and `check-options`."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_vlmoe.config.command_line import parse_run, to_yaml
from megatron_vlmoe.config.errors import ConfigError, did_you_mean
from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.finetune.options import check_task_options
from megatron_vlmoe.planning.dry_run import dry_run_text
from megatron_vlmoe.planning.validate import validate
from megatron_vlmoe.runtime.lazy import load
from megatron_vlmoe.runtime.ranks import environment_rank, environment_world_size

CHECK_OPTIONS_USAGE = """usage: vlmoe check-options COMMAND [OPTIONS]

Checks the options of pretrain, pretrain-random, finetune or evaluate for the number of processes in WORLD_SIZE, prints
nothing and starts nothing; exit status 2 with one line if they are wrong. Architecture and classes of a fine-tuning run
come from its checkpoint and data, which are not read: what depends on them is found when the command starts."""


def main(words: Sequence[str]) -> None:
    """Trains on indexed datasets."""
    if config := _to_train(words):
        load("megatron_vlmoe.train.pretrain").pretrain(config)


def random_main(words: Sequence[str]) -> None:
    """Trains on random numbers: to compare layouts, and to try a cluster out before the data is there."""
    if config := _to_train(words):
        load("megatron_vlmoe.train.pretrain").pretrain_random(config)


def _to_train(words: Sequence[str]) -> RunConfig | None:
    """Parses and checks; prints the plan of a dry run, after which there is nothing to train."""
    command = parse_run("pretrain", words)
    world_size = command.dry_run_world_size or environment_world_size()
    validate(command.config, world_size)
    if not command.dry_run:
        return command.config
    if environment_rank() == 0:
        print(to_yaml(command.config))
        print(dry_run_text(command.config, world_size, command.dry_run_gpus_per_node))
    return None


def check_options(words: Sequence[str]) -> None:
    """Finds what the command that the first word names would refuse, without data, checkpoint or torch.

    Launchers call it before torchrun, which would start every worker to find the same error in each of them.
    """
    if {"-h", "--help"} & set(words):
        print(CHECK_OPTIONS_USAGE)
        return
    if not words:
        raise ConfigError("no command to check; see --help")
    command, options = words[0], words[1:]
    if command in ("pretrain", "pretrain-random"):
        parsed = parse_run("pretrain", options)
        validate(parsed.config, parsed.dry_run_world_size or environment_world_size())
    elif command in ("finetune", "evaluate"):
        check_task_options(command, options)
    else:
        hint = did_you_mean(command, ("pretrain", "pretrain-random", "finetune", "evaluate"))
        raise ConfigError(f"{command} is not a training command{hint}")
