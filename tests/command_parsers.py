"""The parsers of the commands, as they are when a command starts."""

from __future__ import annotations

import importlib
from unittest import mock

from megatron_vlmoe.commands.options import CommandParser
from megatron_vlmoe.commands.table import COMMANDS


class _Built(Exception):
    """Carries the parser out of a command that is about to parse."""


def parser_of(name: str, *words: str) -> CommandParser:
    """The parser of a command; not for those of training, whose options are the configuration's.

    `words` are what it needs to choose one, such as the name of a benchmark.
    """

    def parse(self: CommandParser, *_: object) -> None:
        raise _Built(self)

    module, _, function = COMMANDS[name].main.partition(":")
    main = getattr(importlib.import_module(f"megatron_vlmoe.commands.{module}"), function)
    with mock.patch.object(CommandParser, "parse_known_args", parse):
        try:
            main(list(words))
        except _Built as built:
            return built.args[0]
    raise AssertionError(f"{name} does not parse with CommandParser")
