"""The command `check`: what would end a run early, found before it is started."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from megatron_vlmoe.config.command_line import parse_run
from megatron_vlmoe.config.errors import ConfigError, did_you_mean
from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.finetune.options import parse_evaluate, parse_finetune
from megatron_vlmoe.planning.validate import validate
from megatron_vlmoe.runtime.lazy import load
from megatron_vlmoe.runtime.ranks import environment_world_size

USAGE = """usage: vlmoe check COMMAND [OPTIONS] [--quick]

Looks at what a run of pretrain, pretrain-random, finetune or evaluate with these options needs, and prints a line for
each: ok, warning or error. Exit status 1 if there is an error, 2 for wrong options. Nothing is trained or written.

It checks datasets and tokenizers (every file against the SHA-256 in its manifest), the checkpoint that would be loaded
(every file against SHA256SUMS), room at --save for checkpoints, GPUs, /dev/shm, names and interfaces of the network,
and, started by torchrun on all nodes, a collective. Processes per node: LOCAL_WORLD_SIZE, GPUS_PER_NODE, or 1.

  --quick   compares sizes of files and does not read them"""
COMMANDS_CHECKED = ("pretrain", "pretrain-random", "finetune", "evaluate")


def main(words: Sequence[str]) -> int:
    """`vlmoe check pretrain --config RUN/config.yaml`; returns the exit status."""
    if {"-h", "--help"} & set(words):
        print(USAGE)
        return 0
    if not words:
        raise ConfigError(f"no command to check: one of {', '.join(COMMANDS_CHECKED)}")
    command, quick = words[0], "--quick" in words
    options = [word for word in words[1:] if word != "--quick"]
    config: RunConfig
    if command in ("pretrain", "pretrain-random"):
        config = parse_run("pretrain", options).config
        # One process alone does not know on how many nodes the run is to be.
        if environment_world_size() > 1:
            validate(config, environment_world_size())
    elif command == "finetune":
        config = parse_finetune(options).config
    elif command == "evaluate":
        config = parse_evaluate(options).config
    else:
        hint = did_you_mean(command, COMMANDS_CHECKED)
        raise ConfigError(f"{command} is no command that can be checked{hint}")
    processes = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("GPUS_PER_NODE") or "1"
    if not re.fullmatch("0*[1-9][0-9]{0,8}", processes):
        raise ConfigError(f"GPUS_PER_NODE={processes}: expected a number of processes per node")
    findings = load("megatron_vlmoe.finetune.preflight").preflight(
        config, command, quick, int(processes)
    )
    for finding in findings:
        print(finding.line(), flush=True)
    return int(any(finding.level == "error" for finding in findings))
