"""From command line and YAML to a resolved RunConfig.

One grammar for every command: ``--preset NAME``, ``--config FILE.yaml``, ``--section.option VALUE`` and the
short aliases below. Later sources win: preset, file, command line.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any, Mapping, Sequence

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.config.presets import preset, preset_names
from megatron_vlmoe.config.schema import RunConfig

ALIASES = {
    "--save": "--checkpoint.save",
    "--load": "--checkpoint.load",
    "--save-interval": "--checkpoint.save_interval",
    "--save-initial": "--checkpoint.save_initial",
    "--exit-interval": "--train.exit_interval",
    "--keep-last": "--checkpoint.keep_last",
    "--task": "--task.name",
    "--seeds": "--task.seeds",
}
DEFAULT_PRESET = "base-32e"


@dataclasses.dataclass(frozen=True)
class ParsedCommand:
    """A resolved command line.

    Args:
        config: the run.
        dry_run: whether only to print what would run.
        dry_run_world_size: ranks to plan for; 0 takes those of this launch.
        dry_run_gpus_per_node: ranks of a machine in that plan.
    """

    config: RunConfig
    dry_run: bool = False
    dry_run_world_size: int = 0
    dry_run_gpus_per_node: int = 8


def _option_types(root: type[RunConfig]) -> dict[str, Any]:
    """Every `--section.option` of a run with its type."""
    sections = typing.get_type_hints(root)
    return {
        f"--{section.name}.{name}": kind
        for section in dataclasses.fields(root)
        for name, kind in typing.get_type_hints(sections[section.name]).items()
    }


def sequence_options(root: type[RunConfig] = RunConfig) -> dict[str, str]:
    """Options that take several values, with the name of their element type."""
    return {
        name: typing.get_args(kind)[0].__name__
        for name, kind in _option_types(root).items()
        if typing.get_origin(kind) is tuple
    }


def normalize_arguments(arguments: Sequence[str], root: type[RunConfig] = RunConfig) -> list[str]:
    """Spells aliases out, gathers several values into one and lets a bare boolean mean true."""
    sequences = sequence_options(root)
    booleans = {name for name, kind in _option_types(root).items() if kind is bool}
    result: list[str] = []
    index = 0
    while index < len(arguments):
        name, equals, inline = arguments[index].partition("=")
        name = ALIASES.get(name, name)
        index += 1
        if not name.startswith("--"):
            raise ConfigError(f"{arguments[index - 1]!r} is not an option; see --help")
        values = [inline] if equals else []
        while not equals and index < len(arguments) and not arguments[index].startswith("--"):
            values.append(arguments[index])
            index += 1
        if name in sequences:
            result += [name, _as_list(values, sequences[name])]
        elif not values:
            result += [name, "true"] if name in booleans else [name]
        elif len(values) > 1:
            raise ConfigError(f"{name} takes one value, got {' '.join(values)}")
        else:
            result += [name, values[0]]
    return result


def _as_list(values: list[str], element: str) -> str:
    if len(values) == 1 and values[0].startswith("["):
        return values[0]
    if element == "str":
        return json.dumps(values)
    return "[" + ", ".join(values) + "]"


def build_parser(
    command: str, start: RunConfig, presets: Sequence[str] = preset_names()
) -> ArgumentParser:
    """The parser of a command whose defaults are a preset's; the options are those of the class of `start`."""
    parser = ArgumentParser(
        prog=f"python -m megatron_vlmoe {command}",
        exit_on_error=False,
        allow_abbrev=False,
        description="Options are --section.option VALUE; later sources win: preset, --config, options. "
        "Short forms: "
        + ", ".join(
            f"{short} = {full}"
            for short, full in ALIASES.items()
            if full in _option_types(type(start))
        ),
    )
    parser.add_argument("--preset", default="", help=", ".join(presets))
    parser.add_argument("--config", default="", help="YAML file with sections")
    parser.add_argument("--dry-run", dest="dry_run", action="store_true", help="print, do not run")
    parser.add_argument(
        "--dry-run-world-size",
        dest="dry_run_world_size",
        type=int,
        default=0,
        help="number of ranks that --dry-run plans for; 0 takes those of this launch",
    )
    parser.add_argument(
        "--dry-run-gpus-per-node",
        dest="dry_run_gpus_per_node",
        type=int,
        default=8,
        help="ranks of a machine in that plan",
    )
    parser.add_class_arguments(type(start), None, as_group=False)
    parser.set_defaults(_flatten(dataclasses.asdict(start)))
    return parser


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
) -> ParsedCommand:
    """Puts `--config` and the options of a command line on top of a configuration.

    Args:
        command: name of the command.
        normalized: the options, as `normalize_arguments` leaves them.
        start: what they are put on; its class decides which options there are.
        presets: names for --help.

    Raises:
        ConfigError: on unknown options or files, or values of the wrong type.
        SystemExit: after --help.
    """
    file = option_value(normalized, "--config")
    if file:
        start = merge_file(start, Path(file))
    parser = build_parser(command, start, presets)
    try:
        parsed = parser.parse_args(list(normalized))
    except (ArgumentError, TypeError, ValueError) as error:
        raise ConfigError(_one_line(str(error))) from None
    return ParsedCommand(
        _to_config(parsed, type(start)),
        bool(parsed.dry_run),
        parsed.dry_run_world_size,
        parsed.dry_run_gpus_per_node,
    )


def merge_file(start: RunConfig, path: Path) -> RunConfig:
    """A configuration with the sections of a YAML file on top.

    Raises:
        ConfigError: if the file cannot be read or has an unknown section or option.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path}: {_one_line(str(error))}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path}: expected sections such as `model:`")
    return from_dict(content, start, where=f"--config {path}")


def from_dict(content: dict[str, Any], start: RunConfig, where: str) -> RunConfig:
    """A configuration with a nested dictionary on top, checked against the schema.

    Raises:
        ConfigError: naming `where` and the section or option that is unknown or of the wrong type.
    """
    known = _flatten(dataclasses.asdict(start))
    flat = _flatten(content)
    for name in flat:
        if name not in known:
            raise ConfigError(f"{where}: unknown option {name}")
    parser = build_parser("config", start)
    try:
        return _to_config(parser.parse_object(_nest(flat)), type(start))
    except (ArgumentError, TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {_one_line(str(error))}") from None


def to_yaml(config: RunConfig) -> str:
    """The configuration as YAML that `--config` reads back."""
    return yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(config))), sort_keys=False)


def option_value(arguments: Sequence[str], name: str) -> str:
    """The last value of an option in a normalized command line; empty if it is not there."""
    value = ""
    for index, argument in enumerate(arguments[:-1]):
        if argument == name:
            value = arguments[index + 1]
    return value


def _to_config(parsed: Namespace, root: type[RunConfig]) -> RunConfig:
    def build(kind: Any, values: Any) -> Any:
        if not dataclasses.is_dataclass(kind):
            return tuple(values) if isinstance(values, list) else values
        if dataclasses.is_dataclass(values):
            return values
        hints = typing.get_type_hints(kind)
        source = vars(values) if isinstance(values, Namespace) else values
        fields = {f.name: build(hints[f.name], source[f.name]) for f in dataclasses.fields(kind)}
        return kind(**fields)  # type: ignore[operator]

    return build(root, parsed)


def flat_options(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Every option of a configuration as nested dictionaries: `section.option` to its value, sequences as lists."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in _flatten(sections).items()
    }


def _flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _nest(flat: dict[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        node = nested
        *path, last = name.split(".")
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return nested


def _one_line(message: str) -> str:
    return " ".join(message.split())
