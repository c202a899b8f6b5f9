"""The parser of the commands, and options that several of them have."""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron_vlmoe.config.command_line import ALIASES, normalize_arguments, option_types
from megatron_vlmoe.config.errors import ConfigError, did_you_mean
from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.data.image_files import ALPHA, DEFAULT_RULES, EXIF
from megatron_vlmoe.planning.validate import prefix_of_file
from megatron_vlmoe.prepare.shards import shard_argument
from megatron_vlmoe.prepare.tool import Execution, Run, positive_int


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are one line, as those of every other command.

    `renamed` are former spellings of options and those that took their place.
    """

    def __init__(
        self, name: str, description: str, renamed: Mapping[str, str] | None = None, **more: Any
    ) -> None:
        super().__init__(prog=f"vlmoe {name}", description=description, allow_abbrev=False, **more)
        self._renamed = dict(renamed or {})

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError."""
        raise ConfigError(message)

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Parses; a misspelt option is named before what is missing, with the one that was probably meant."""
        words = sys.argv[1:] if args is None else list(args)
        known = {*self._option_string_actions, *self._renamed}
        names = [word.partition("=")[0] for word in words if word.startswith("--") and word != "--"]
        unknown = [name for name in names if name not in known]
        if unknown and not self._subparsers:
            self.error(f"unknown option {unknown[0]}{did_you_mean(unknown[0], known)}")
        return super().parse_args(words, namespace)

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        named = (
            action.choices is not None or action.type is output_file or _name(action) == "--preset"
        )
        if not arg_string and (action.required or named):
            # As of a shell variable that is not set: as a path it would be the folder that one is in.
            raise ConfigError(f"{_name(action)} is empty")
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError as error:
            expected = _EXPECTED.get(action.type, error.message)
            raise ConfigError(f"{_name(action)} {arg_string}: {expected}") from None

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            hint, listed = did_you_mean(str(value), choices), ", ".join(choices)
            raise ConfigError(f"{_name(action)} {value}: expected one of {listed}{hint}")

    def parse_passing_on(self, words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """Parses the options of this command; gives the others, which must be options of `pretrain`, as they are."""
        known = {*self._option_string_actions, *self._renamed}
        # Where the command takes words without an option, one after a complete option is such a word.
        takes_words = any(not action.option_strings for action in self._actions)
        types = option_types(RunConfig) if takes_words else {}
        own, others = pick_options(words, lambda name: name not in known, types)
        options, left = self.parse_known_args(own)
        if left:
            raise ConfigError(f"{left[0]!r} is not an option; see --help")
        normalize_arguments(others, own=self._option_string_actions)
        return options, others

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parses, with a warning for each former spelling."""
        words = sys.argv[1:] if args is None else list(args)
        for place, word in enumerate(words):
            option, equals, value = word.partition("=")
            if current := self._renamed.get(option):
                words[place] = f"{current}{equals}{value}"
                print(
                    f"warning: {option} is now {current}; the former spelling goes with the next release",
                    file=sys.stderr,
                )
        return super().parse_known_args(words, namespace)


def pick_options(
    words: Sequence[str], is_picked: Callable[[str], bool], types: Mapping[str, Any]
) -> tuple[list[str], list[str]]:
    """The words without the options that are picked by their names, and these with their values.

    Args:
        types: of the options, as `option_types` gives them, which says how many values an option has; one that is not
            among them has all words up to the next option.
    """
    own: list[str] = []
    picked: list[str] = []
    target, room = own, 0.0
    for word in words:
        if word.startswith("--"):
            name, equals, _ = word.partition("=")
            target = picked if is_picked(name) else own
            kind = types.get(ALIASES.get(name, name)[2:], tuple)
            several = kind is tuple or typing.get_origin(kind) is tuple
            room = 0.0 if equals else math.inf if several else 1.0
            target.append(word)
        elif target is picked and room > 0 and (kind is not bool or word.lower() in _TRUTH):
            target.append(word)
            room -= 1
        else:
            target = own
            own.append(word)
    return own, picked


# What may stand after an option that is true or false.
_TRUTH = ("true", "false", "yes", "no", "on", "off", "0", "1")
_EXPECTED: Mapping[Any, str] = {int: "expected a whole number", float: "expected a number"}


def _name(action: argparse.Action) -> str:
    return action.option_strings[-1] if action.option_strings else str(action.metavar)


def output_file(text: str) -> Path:
    """Argument type: a file to write at the end of the work, which must not fail then. Nothing is made yet."""
    path = Path(text)
    try:
        if path.is_dir() or text.endswith(os.sep):
            raise argparse.ArgumentTypeError("is a folder")
        if path.exists() and not path.is_file():
            raise argparse.ArgumentTypeError("is no regular file")
        above = next(folder for folder in path.absolute().parents if folder.exists())
    except OSError as error:
        raise argparse.ArgumentTypeError(error.strerror) from None
    if not above.is_dir():
        raise argparse.ArgumentTypeError(f"{above} is a file, not a folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError("not writable")
    return path


def output_folder(text: str) -> Path:
    """Argument type: a folder for several files that are written at the end of the work, made if it is not there."""
    return output_file(os.path.join(text, "file")).parent


def output_prefix(text: str) -> str:
    """Argument type: the path that the names of several new files begin with."""
    if text.endswith(os.sep):
        raise argparse.ArgumentTypeError(
            f"an output prefix needs a name after its folder, such as {text}NAME"
        )
    return text


def dataset_prefix(text: str) -> str:
    """Argument type: the path that the names of a dataset's files begin with, and not one of the files."""
    if prefix := prefix_of_file(text):
        raise argparse.ArgumentTypeError(
            f"is one file of a dataset; give the prefix of all its files: {prefix}"
        )
    return text


OUTPUT_PREFIX = {"--output-prefix": "--output"}
TEXT_TOKENIZER = {"--tokenizer-model": "--text-tokenizer"}


def add_options(
    parser: argparse.ArgumentParser,
    *names: str,
    rejects: str,
    prefix: str = "P",
    tokenizer: str | None = None,
) -> None:
    """Adds the named ones of the shared options, in their order.

    Args:
        parser: of the command.
        names: such as ``--workers``.
        rejects: what ``--on-error skip`` leaves out.
        prefix: what the files with the rejects begin with.
        tokenizer: when ``--text-tokenizer`` is needed; None: always.
    """
    known: dict[str, dict[str, Any]] = {
        "--output": {
            "type": output_prefix,
            "required": True,
            "metavar": "P",
            "help": "path that the names of the dataset's files begin with",
        },
        "--text-tokenizer": {
            "required": tokenizer is None,
            "metavar": "FILE",
            "help": "SentencePiece model of train-text-tokenizer"
            + (f"; {tokenizer}" if tokenizer else ""),
        },
        "--workers": {"type": positive_int, "default": 1, "help": "processes (%(default)s)"},
        "--resize-short": {
            "type": positive_int,
            "metavar": "N",
            "help": "shrink images whose shorter side is over N pixels to it (JPEG quality 95)",
        },
        "--on-error": {
            "choices": ["stop", "skip"],
            "default": "stop",
            "help": f"skip: leave bad {rejects} out and list them in {prefix}.rejects.jsonl",
        },
    }
    for name in names:
        parser.add_argument(name, **known[name])


def add_image_rules(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Adds the options that make `ImageRules`, for image files that are read."""
    parser.add_argument(
        "--exif",
        choices=EXIF,
        default=DEFAULT_RULES.exif,
        help="turn images upright by the orientation in their EXIF, or keep them (%(default)s)",
    )
    parser.add_argument(
        "--alpha",
        choices=ALPHA,
        default=DEFAULT_RULES.alpha,
        help="ground of transparent pixels; drop: the colours under them (%(default)s)",
    )


SHARDING = ("--shard", "--num-shards", "--executor", "--ray-address")


def add_sharding(parser: argparse.ArgumentParser) -> None:
    """Adds the options that divide the work of a command."""
    group = parser.add_argument_group("work in shards")
    group.add_argument(
        "--shard",
        type=shard_argument,
        metavar="I/N",
        help="do shard I (0 to N-1) of N alone, for arrays of jobs; vlmoe merge-data --shards P joins them",
    )
    group.add_argument(
        "--executor",
        choices=["local", "ray"],
        default="local",
        help="where shards are worked on: here, or as Ray tasks (%(default)s)",
    )
    group.add_argument(
        "--num-shards",
        type=positive_int,
        metavar="N",
        help="do all of N shards, then merge them; a restart goes on with those that are not there (with Ray 4 per "
        "worker)",
    )
    group.add_argument(
        "--ray-address",
        metavar="A",
        help="address of a Ray cluster, or auto ($RAY_ADDRESS, else --workers processes on this machine)",
    )


def execution_of(options: argparse.Namespace, on_gpus: bool = False) -> Execution:
    """The options of `add_sharding` as `execute` takes them."""
    return Execution(options.executor, options.num_shards, options.ray_address, on_gpus)


def _without(words: Sequence[str], names: Sequence[str]) -> list[str]:
    """Words without some options that have one value each."""
    kept: list[str] = []
    skip = False
    for word in words:
        name, equals, _ = word.partition("=")
        if skip:
            skip = False
        elif name in names:
            skip = not equals
        else:
            kept.append(word)
    return kept


def run_of(
    options: argparse.Namespace, command: str, arguments: Sequence[str], inputs: Sequence[str]
) -> Run:
    """The shared options as the work of a command takes them, with its command line and what it reads."""
    # Merged shards are the same dataset as that of one run, to the byte.
    line = shlex.join(["vlmoe", command, *_without(arguments, SHARDING)])
    source = {"command": line, "inputs": list(inputs)}
    return Run(options.output, options.workers, options.on_error, source, options.shard)
