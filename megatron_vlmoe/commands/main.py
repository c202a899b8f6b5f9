"""The program: finds the command that its first word names."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from megatron_vlmoe import __version__
from megatron_vlmoe.commands.run_command import run_command
from megatron_vlmoe.commands.table import COMMANDS
from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.config.hints import did_you_mean


def main(arguments: Sequence[str] | None = None) -> int:
    """`vlmoe` with its words; returns the exit status."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    if words[0] == "--version":
        print(__version__)
        return 0
    return run_one_of(tuple(COMMANDS), words)


def run_one_of(names: Sequence[str], arguments: Sequence[str] | None = None) -> int:
    """Runs the command that the first word names, which is one of `names`; returns the exit status."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if not words or words[0] not in names:
        return run_command(lambda: _refuse(words[:1], names))
    return run(words[0], words[1:])


def run(name: str, arguments: Sequence[str] | None = None) -> int:
    """Runs a command by its name; returns the exit status.

    Args:
        name: a key of `COMMANDS`.
        arguments: the words after it; None takes those that this process was started with.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    command = COMMANDS[name]

    def action() -> object:
        module, _, function = command.main.partition(":")
        return getattr(importlib.import_module(f"{__package__}.{module}"), function)(words)

    return run_command(action, command.cleans_up)


def usage() -> str:
    """The list of commands."""
    width = max(map(len, COMMANDS))
    lines = ["usage: vlmoe COMMAND [OPTIONS]   (the same: python -m megatron_vlmoe COMMAND)"]
    group = ""
    for name, command in COMMANDS.items():
        if command.group != group:
            group = command.group
            lines += ["", f"{group}:"]
        lines.append(f"  {name:<{width}}  {command.summary}")
    return "\n".join(
        [
            *lines,
            "",
            "COMMAND --help explains its options; of training, --dry-run prints what would run.",
        ]
    )


def _refuse(words: Sequence[str], names: Sequence[str]) -> None:
    asked = f"unknown command {words[0]!r}" if words else "no command"
    hint = did_you_mean(words[0], names) if words else ""
    raise ConfigError(f"{asked}; one of {', '.join(names)}{hint}")
