"""The command `check-options`: finds what a training command would refuse, without data, checkpoint or torch.

Launchers call it before torchrun, which would start every worker to find the same error in each of them.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_vlmoe.config.command_line import parse_run
from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.finetune.options import check_task_options
from megatron_vlmoe.planning.validate import validate
from megatron_vlmoe.runtime.ranks import environment_world_size

USAGE = """usage: vlmoe check-options COMMAND [OPTIONS]

Checks the options of pretrain, pretrain-random, finetune or evaluate for the number of processes in WORLD_SIZE, prints
nothing and starts nothing; exit status 2 with one line if they are wrong. Architecture and classes of a fine-tuning run
come from its checkpoint and data, which are not read: what depends on them is found when the command starts."""


def main(words: Sequence[str]) -> None:
    """Checks the options of the command that the first word names."""
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return
    command, options = words[0], words[1:]
    if command in ("pretrain", "pretrain-random"):
        parsed = parse_run("pretrain", options)
        validate(parsed.config, parsed.dry_run_world_size or environment_world_size())
    elif command in ("finetune", "evaluate"):
        check_task_options(command, options)
    else:
        raise ConfigError(f"{command} is not a training command")
