"""From command line and YAML to a resolved RunConfig.

One grammar for every command: ``--preset NAME``, ``--config FILE.yaml``, ``--section.option VALUE`` and the
short aliases below. Later sources win: preset, file, command line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import shutil
import typing
from argparse import SUPPRESS, Action
from pathlib import Path
from typing import Any, Iterable, Literal, Mapping, Sequence

import yaml
from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter

from megatron_vlmoe.config.errors import ConfigError, did_you_mean, did_you_mean_option
from megatron_vlmoe.config.presets import preset, preset_names
from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.config.yaml_files import parse_yaml

ALIASES = {
    "--save": "--checkpoint.save",
    "--load": "--checkpoint.load",
    "--save-interval": "--checkpoint.save_interval",
    "--save-initial": "--checkpoint.save_initial",
    "--exit-interval": "--train.exit_interval",
    "--keep-last": "--checkpoint.keep_last",
    "--task": "--task.name",
    "--seeds": "--task.seeds",
    "-h": "--help",
}
PROGRAM_OPTIONS = {
    "--preset": str,
    "--config": str,
    "--dry-run": None,
    "--dry-run-world-size": int,
    "--dry-run-gpus-per-node": int,
    "--help": None,
}
"""What is not an option of the configuration, with its type; None is a flag."""
DEFAULT_PRESET = "base-32e"
_MISFIT = (ArgumentError, TypeError, ValueError, OverflowError, AttributeError, LookupError)
"""What the parser raises for a value that does not fit its option, or is not what its YAML tag says."""


@dataclasses.dataclass(frozen=True)
class ParsedCommand:
    """A resolved command line: a run, or its plan for so many ranks (0: those of this launch) on such machines."""

    config: RunConfig
    dry_run: bool = False
    dry_run_world_size: int = 0
    dry_run_gpus_per_node: int = 8


# They are looked up in the text of annotations, which takes 10 ms for a whole configuration.
_type_hints = functools.cache(typing.get_type_hints)


def option_types(root: type) -> dict[str, Any]:
    """Every option of a configuration, as `section.option` without hyphens, with its type."""
    types: dict[str, Any] = {}
    for name, kind in _type_hints(root).items():
        if dataclasses.is_dataclass(kind):
            nested = option_types(typing.cast(type, kind))
            types.update({f"{name}.{option}": value for option, value in nested.items()})
        else:
            types[name] = kind
    return types


def normalize_arguments(
    arguments: Sequence[str], root: type[RunConfig] = RunConfig, own: Iterable[str] = ()
) -> list[str]:
    """Spells aliases out, gathers several values into one and lets a bare boolean mean true.

    A command that has options of its `own`, already taken out, names them here, for it may be one that is misspelt.

    Returns:
        Option names, which are those of the class `root`, and values in turn; a flag has no value.

    Raises:
        ConfigError: on unknown options, and on options with too many or too few values.
    """
    types = {**PROGRAM_OPTIONS, **{f"--{name}": kind for name, kind in option_types(root).items()}}
    result: list[str] = []
    index = 0
    while index < len(arguments):
        word = arguments[index]
        given, equals, inline = word.partition("=")
        name = ALIASES.get(given, given)
        index += 1
        if not name.startswith("--"):
            hint = _with_hyphens(word, types) or "; see --help"
            raise ConfigError(f"{word!r} is not an option{hint}")
        # A whole section, `--model FILE`, is read by the parser.
        if name not in types and not any(option.startswith(f"{name}.") for option in types):
            if name.startswith(("--task.", "--contrastive.")) and "--task.name" not in types:
                raise ConfigError(f"unknown option {given}, which finetune and evaluate have")
            shorts = [short for short, full in ALIASES.items() if full in types]
            hint = did_you_mean_option(name, [*own, *types, *shorts]) or "; see --help"
            raise ConfigError(f"unknown option {given}{hint}")
        kind = types.get(name, str)
        values = [inline] if equals else []
        while not equals and index < len(arguments) and not arguments[index].startswith("--"):
            hint = _with_hyphens(arguments[index], types)
            if hint or kind is None:
                hint = hint or ", but takes no value"
                raise ConfigError(f"{given} is followed by {arguments[index]!r}{hint}")
            values.append(arguments[index])
            index += 1
        if kind is None:
            if values:
                raise ConfigError(f"{given} takes no value, got {values[0]}")
            result += [name]
        elif typing.get_origin(kind) is tuple:
            if len(values) != 1 or not values[0].startswith("["):
                words = json.dumps(values) if typing.get_args(kind)[0] is str else ""
                values = [words or f"[{', '.join(values)}]"]
            result += [name, values[0]]
        elif not values and kind is bool:
            result += [name, "true"]
        else:
            result += [name, _only_value(given, name, kind, values)]
    return result


def _only_value(given: str, name: str, kind: Any, values: Sequence[str]) -> str:
    """The value of an option that has one. Raises ConfigError if there is none, or several."""
    if not values:
        what = "a value" if kind is str else _expected(kind)
        raise ConfigError(f"{given} needs {what} after it")
    if len(values) > 1:
        raise ConfigError(f"{given} takes one value, got {' '.join(values)}")
    if not values[0] and name in (*PROGRAM_OPTIONS, "--task.name"):
        # As of a shell variable that is not set: the run would silently be another one.
        raise ConfigError(f"{given} is empty")
    return values[0]


def _with_hyphens(word: str, known: Mapping[str, Any]) -> str:
    """A hint if a word is an option that lacks its hyphens, as `train.steps=5` or `-train.steps`."""
    option = f"--{word.lstrip('-')}"
    name = option.partition("=")[0]
    return f"; did you mean {option}?" if name in known or name in ALIASES else ""


class _HelpFormatter(DefaultHelpFormatter):
    """Options as they are typed, with their short form; a description and the default in a line below."""

    def __init__(self, prog: str) -> None:
        width = min(100, shutil.get_terminal_size().columns - 2)
        super().__init__(prog, max_help_position=8, width=width)

    def _format_action_invocation(self, action: Action) -> str:
        shorts = [short for short, full in ALIASES.items() if full in action.option_strings]
        names = ", ".join(dict.fromkeys([*shorts, *action.option_strings]))
        return f"{names} {self._format_args(action, '')}" if action.metavar else names

    def _get_help_string(self, action: Action) -> str:
        text = (action.help or "").strip().removesuffix(".")
        default = action.default
        if default in (None, SUPPRESS, "", (), []) or action.nargs == 0:
            return text
        if isinstance(default, (tuple, list)):
            shown = " ".join(map(str, default))
        else:
            shown = str(default).lower() if isinstance(default, bool) else str(default)
        return f"{text} (default: {shown})"


class _HelpWithoutDefaults(_HelpFormatter):
    """For commands whose defaults are known only when they start."""

    def _get_help_string(self, action: Action) -> str:
        return (action.help or "").strip().removesuffix(".")


def build_parser(
    command: str, start: RunConfig, presets: Sequence[str] = preset_names(), base: str = ""
) -> ArgumentParser:
    """The parser of a command whose defaults are those of `start`; the options are those of its class.

    Descriptions and headings come from the docstrings of the configuration's classes. Where `start` is no preset,
    `base` says what takes its place, and --help lists no defaults, of which it knows none.
    """
    program = f"vlmoe {command}"
    parser = ArgumentParser(
        prog=program,
        usage=f"{program} [--preset NAME] [--config FILE] [--section.option VALUE ...]",
        formatter_class=_HelpWithoutDefaults if base else _HelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
        description=f"Later sources of an option win: first {base or 'the preset'}, then the file of --config, then "
        "the command line. An option with several values takes them one after another, as in `--moe.layers 2 4 6`. "
        "The same names stand in YAML files, as in `moe: {layers: [2, 4, 6]}`.",
    )
    starts_from = f"what the other options start from: {', '.join(presets)}"
    if not presets:
        starts_from = "not for this command, which starts from the options of the checkpoint"
    add = parser.add_argument
    add("--preset", default="", metavar="NAME", help=starts_from)
    add("--config", default="", metavar="FILE", help="YAML file with sections of options")
    add(
        "--dry-run",
        action="store_true",
        help="print the resolved options and what they need, then stop",
    )
    for name, default, about in (
        ("world-size", 0, "number of ranks that --dry-run plans for; 0 takes those of this launch"),
        ("gpus-per-node", 8, "ranks on a machine in that plan"),
    ):
        add(f"--dry-run-{name}", type=int, default=default, metavar="N", help=about)
    parser.add_class_arguments(type(start), None, as_group=False)
    parser.set_defaults(flat_options(dataclasses.asdict(start)))
    types = option_types(type(start))
    for action in parser._actions:
        if action.dest in types:
            action.metavar = _metavar(types[action.dest])
        elif any(name.startswith(f"{action.dest}.") for name in types):
            action.help = SUPPRESS  # `--model FILE`: a section of --config in a file of its own
    return parser


def _metavar(kind: Any) -> str:
    """What stands for a value in --help: `N`, `X`, `TEXT` or the choices; `N ...` for several."""
    if typing.get_origin(kind) is tuple:
        elements = typing.get_args(kind)
        name = _metavar(elements[0])
        return f"{name} ..." if elements[-1] is Ellipsis else " ".join([name] * len(elements))
    if typing.get_origin(kind) is Literal:
        return "{" + ",".join(typing.get_args(kind)) + "}"
    return {int: "N", float: "X", bool: "{true,false}"}.get(kind, "TEXT")


def parse_run(command: str, arguments: Sequence[str]) -> ParsedCommand:
    """Resolves a command line.

    Raises:
        ConfigError: on unknown options, presets, files or values of the wrong type.
        SystemExit: after --help.
    """
    normalized = normalize_arguments(arguments)
    start = preset(option_value(normalized, "--preset") or DEFAULT_PRESET)
    return parse_options(command, normalized, start)


def parse_options(
    command: str,
    normalized: Sequence[str],
    start: RunConfig,
    presets: Sequence[str] = preset_names(),
    base: str = "",
) -> ParsedCommand:
    """Puts `--config` and options, as `normalize_arguments` leaves them, on top of `start`, whose class they fit.

    Raises:
        ConfigError: on unknown options or files, or values of the wrong type.
        SystemExit: after --help.
    """
    file = option_value(normalized, "--config")
    if file:
        start = merge_file(start, Path(file))
    if "--help" in normalized:
        build_parser(command, start, presets, base).parse_args(["--help"])
    types = option_types(type(start))
    program: dict[str, Any] = {}
    words = iter(normalized)
    for name in words:
        option = name.removeprefix("--")
        kind = types.get(option, PROGRAM_OPTIONS.get(name, str))
        value = "" if kind is None else next(words)
        if name in PROGRAM_OPTIONS:
            program[name] = kind is None or _from_word(kind, name, value)
        elif option in types:
            start = _with_values(start, {option: _from_word(kind, name, value)})
        else:
            # A section of --config in a file of its own.
            section: Any = read_yaml(Path(value), f"{name} {value}")
            for part in reversed(option.split(".")):
                section = {part: section}
            start = from_dict(section, start, f"{name} {value}")
    size = program.get("--dry-run-world-size", 0)
    machine = program.get("--dry-run-gpus-per-node", 8)
    for name, number, least in (("world-size", size, 0), ("gpus-per-node", machine, 1)):
        if number < least:
            raise ConfigError(f"--dry-run-{name} {number}: must be at least {least}")
    return ParsedCommand(start, "--dry-run" in program, size, machine)


def _from_word(kind: Any, name: str, value: str) -> Any:
    """The value of an option on the command line, in its type. Raises ConfigError if it does not fit."""
    try:
        found = _value_parser(kind).parse_args([f"--value={value}"]).value
    except _MISFIT:
        several = typing.get_origin(kind) is tuple
        shown = value.strip("[]").replace(",", "") if several else value
        raise ConfigError(f"{name} {shown}: {_wrong(kind, value)}") from None
    return tuple(found) if isinstance(found, list) else found


def merge_file(start: RunConfig, path: Path) -> RunConfig:
    """A configuration with the sections of a YAML file on top.

    Raises:
        ConfigError: if the file cannot be read or has an unknown section or option.
    """
    content = read_yaml(path, f"--config {path}")
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path}: expected sections such as `model:`")
    return from_dict(content, start, where=f"--config {path}")


def read_yaml(path: Path, where: str) -> Any:
    """What a YAML file holds. Raises ConfigError, naming `where`; also for a name that stands twice in a section."""
    try:
        return parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{where}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{where}: not a text file in UTF-8") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(f"{where}: not valid YAML: {place}{error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def from_dict(content: dict[str, Any], start: RunConfig, where: str) -> RunConfig:
    """A configuration with a nested dictionary on top, checked against the schema.

    Raises:
        ConfigError: naming `where` and the section or option that is unknown or of the wrong type.
    """
    types = option_types(type(start))
    sections = {name.rpartition(".")[0] for name in types}
    flat = {}
    for name, value in flat_options(content).items():
        if name in types:
            if value is None:
                raise ConfigError(f"{where}: {name} is empty: {_wrong(types[name], value)}")
            flat[name] = value
        elif name in sections:
            # A section whose every line is commented out is None.
            if value is not None:
                raise ConfigError(f"{where}: {name} is a section of options, got {value}")
        else:
            # The option, a section above it, or a value where none belongs.
            parents = [name[:end] for end, letter in enumerate(name) if letter == "."]
            if above := [parent for parent in parents if parent in types]:
                wrong = f"{above[0]}: {_expected(types[above[0]])} is expected there, not a section"
            elif f"--{name}" in PROGRAM_OPTIONS:
                wrong = f"{name} is not for files; give --{name} on the command line"
            elif name.startswith(("task.", "contrastive.")) and "task" not in sections:
                wrong = f"unknown section {parents[0]}, which finetune and evaluate have"
            elif parents and parents[0] not in sections:
                tops = [section for section in sections if "." not in section]
                wrong = f"unknown section {parents[0]} ({name}){did_you_mean(parents[0], tops)}"
            else:
                wrong = f"unknown option {name}{did_you_mean_option(name, [*types, *sections])}"
            raise ConfigError(f"{where}: {wrong}")
    values = {}
    for name, value in flat.items():
        try:
            values[name] = _converted(types[name], value)
        except _MISFIT:
            message = f"{where}: {name}={value}: {_wrong(types[name], value)}"
            raise ConfigError(message) from None
    try:
        return _with_values(start, values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _converted(kind: Any, value: Any) -> Any:
    """A value of YAML or JSON in the type of an option.

    Raises:
        One of `_MISFIT`: it does not fit.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    # The parser takes 0.2 ms for a value, and a whole configuration has two hundred that are of their type already.
    if type(value) is kind or (origin is Literal and isinstance(value, str) and value in inner):
        return value
    if origin is tuple and isinstance(value, (list, tuple)):
        kinds = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        if [type(item) for item in value] == [*kinds]:
            return tuple(value)
    return _value_parser(kind).parse_object({"value": value}).value


def _value_parser(kind: Any) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=kind)
    return parser


def _with_values(config: Any, values: Mapping[str, Any], prefix: str = "") -> Any:
    """A configuration with other values of some options, by `section.option`."""
    changes = {}
    for field in dataclasses.fields(config):
        name, current = f"{prefix}{field.name}", getattr(config, field.name)
        if dataclasses.is_dataclass(current):
            changes[field.name] = _with_values(current, values, f"{name}.")
        elif name in values:
            changes[field.name] = values[name]
    return dataclasses.replace(config, **changes)


def _fits(kind: Any, value: Any) -> bool:
    """Whether the parser takes a value, as a word or from YAML, for an option of a type."""
    try:
        if isinstance(value, str):
            _value_parser(kind).parse_args([f"--value={value}"])
        _converted(kind, value)
    except _MISFIT:
        return False
    return True


def _wrong(kind: Any, value: Any) -> str:
    """What is expected instead of a value that does not fit, and what was probably meant."""
    message = f"expected {_expected(kind)}"
    if typing.get_origin(kind) is Literal:
        return message + did_you_mean(str(value), typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        items = value
        if isinstance(value, str) and value[:1] == "[":
            with contextlib.suppress(yaml.YAMLError):
                items = parse_yaml(value)
        if not isinstance(items, list):
            return f"{message} as a list" + (f", as in [{items}]" if items is not None else "")
        element = typing.get_args(kind)[0]
        bad = [item for item in items if not _fits(element, item)]
        if bad and element is str:
            return f"{message}, got {bad[0]}, which needs quotes: '{bad[0]}'"
        return f"{message}, got {bad[0]}" if bad else f"{message}, got {len(items)}"
    if kind is int:
        try:
            number = float(value)
        except _MISFIT:
            return message
        return f"{message}, such as {round(number)}" if abs(number) < 1e15 else message
    if kind is str and not isinstance(value, str):
        return f"{message}, as in {str(value)!r}"
    return message


def _expected(kind: Any) -> str:
    """The values of a type, in words."""
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(typing.get_args(kind))}"
    if typing.get_origin(kind) is tuple:
        elements = typing.get_args(kind)
        number = "" if elements[-1] is Ellipsis else f"{len(elements)} "
        return number + {int: "whole numbers", float: "numbers"}.get(elements[0], "texts")
    return {int: "a whole number", float: "a number", bool: "true or false"}.get(kind, "a text")


def to_yaml(config: RunConfig) -> str:
    """The configuration as YAML that `--config` reads back."""
    return yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(config))), sort_keys=False)


def option_value(arguments: Sequence[str], name: str) -> str:
    """The last value of an option in a normalized command line; empty if it is not there."""
    return dict(zip(arguments, arguments[1:])).get(name, "")


def flat_options(sections: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every option of a configuration as nested dictionaries: `section.option` to its value, sequences as lists."""
    flat: dict[str, Any] = {}
    for name, value in sections.items():
        if isinstance(value, dict):
            flat.update(flat_options(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = list(value) if isinstance(value, tuple) else value
    return flat
