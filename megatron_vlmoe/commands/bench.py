"""The command `bench`: what the parts of this project cost, beside what a user could take instead."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import tempfile
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import docstring_parser

from megatron_vlmoe.benchmarks.options import (
    CheckpointOptions,
    DataOptions,
    ExportOptions,
    PreprocessOptions,
    ScalingOptions,
)
from megatron_vlmoe.commands.options import CommandParser, output_file
from megatron_vlmoe.config.command_line import did_you_mean
from megatron_vlmoe.config.errors import ConfigError, TrainingError
from megatron_vlmoe.prepare.tool import count, positive_int
from megatron_vlmoe.runtime.lazy import load
from megatron_vlmoe.runtime.ranks import environment_rank

SUMMARIES = {
    "moe_layer": "one feed-forward layer of experts beside a dense one and other implementations",
    "step": "training steps of presets against each other, plain PyTorch and transformers, and where time goes",
    "scaling": "how a step or a layer grows with experts, tokens, length and ranks, beside its dense model",
    "data": "the loader beside a bare loop, and the memory of its workers by the size of the dataset",
    "preprocess": "indexing texts, images and pairs beside bare loops",
    "checkpoint": "how long a save stalls training and a load takes, beside torch.save and torch.load",
    "export": "inference of the Hugging Face model with experts beside the dense one and transformers' experts",
}
"""Every benchmark, and what it measures."""

_OF_CLASS: dict[str, tuple[type[Any], str]] = {
    "scaling": (ScalingOptions, "How time grows"),
    "data": (DataOptions, "Loading images"),
    "preprocess": (PreprocessOptions, "Indexing"),
    "checkpoint": (CheckpointOptions, "Checkpoints"),
    "export": (ExportOptions, "Inference of the Hugging Face model"),
}


_PASSES_ON = "Other options (`--section.option VALUE`) go to every preset."


def main(words: Sequence[str]) -> None:
    """`vlmoe bench moe_layer --tokens 8192 --experts 8 32`."""
    if words and not words[0].startswith("-"):
        name, rest = words[0], list(words[1:])
        if name not in SUMMARIES:
            hint = did_you_mean(name, SUMMARIES)
            raise ConfigError(f"bench {name}: expected one of {', '.join(SUMMARIES)}{hint}")
    elif list(words) in (["-h"], ["--help"]):
        return _parser_of_names().print_help()
    else:
        # As the command was before it had names.
        name, rest = "step", list(words)
    if name in _OF_CLASS:
        _of_class(name, rest)
    else:
        {"moe_layer": _moe_layer, "step": _step}[name](rest)


def _parser_of_names() -> CommandParser:
    parser = CommandParser(
        "bench",
        "Measures parts of this project in turn with what could take their place, in one run. "
        "`vlmoe bench NAME --help` lists the options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"  {name:<12}{text}" for name, text in SUMMARIES.items()),
    )
    parser.add_argument("name", metavar="NAME", choices=list(SUMMARIES), help="what to measure")
    return parser


def _parser(name: str, more: str = "") -> CommandParser:
    """With the options that all benchmarks have."""
    parser = CommandParser(
        f"bench {name}", f"Measures {SUMMARIES[name]}. {more}".strip(), {"--presets": "--preset"}
    )
    add = parser.add_argument
    add("--threads", type=count, default=0, help="CPU threads; 0 leaves torch's (%(default)s)")
    add(
        "--output",
        type=output_file,
        metavar="FILE",
        help="JSON list of rows, rewritten as they come, with a table beside it (default: "
        "benchmarks/results/NAME-DEVICE.json)",
    )
    return parser


def _report(
    name: str,
    title: str,
    output: Path | None,
    threads: int,
    rows: Iterator[list[Any]],
    draw: Callable[[list[Any], Path], None] | None = None,
) -> None:
    """Measures, which the iterator does as it is read, and writes rows as they come, at the end a picture of them."""
    compare = load("megatron_vlmoe.benchmarks.compare")
    compare.use_threads(threads)
    path = output or compare.results_path(name)
    _check_output(path)
    done: list[Any] = []
    try:
        for some in rows:
            done += some
            compare.write_rows(path, title, done)
            print("\n".join(compare.table(some)), flush=True)
    except Exception as error:
        if place := load("megatron_vlmoe.train.failures").out_of_memory(error):
            raise TrainingError(
                f"out of memory on the {place}: measure less at once, or smaller sizes"
            ) from error
        raise
    # Of a run on several ranks, the first has the rows.
    if done:
        print(f"rows: {path}, table: {path.with_suffix('.md')}")
        if draw:
            draw(done, path.with_suffix(".png"))
    elif environment_rank() == 0:
        raise ConfigError(f"bench {name}: nothing to measure: an option names no case")


def _check_output(path: Path) -> None:
    """Now, and not when there is something to write: whether it can be, and would replace nothing but earlier results.

    Raises:
        ConfigError: the name is that of a table or picture, a file of it is of something else, or none can be written.
    """
    table, picture = path.with_suffix(".md"), path.with_suffix(".png")
    if path in (table, picture):
        raise ConfigError(
            f"--output {path}: the rows are JSON: give it a name that ends with .json"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.exists() and not _are_rows(path.read_bytes()):
            raise ConfigError(f"--output {path}: is not of a benchmark, and would be replaced")
        for file in (table, picture):
            if file.is_dir():
                raise ConfigError(f"--output {path}: {file} is a folder")
            if file.exists() and not path.exists():
                raise ConfigError(
                    f"--output {path}: {file}, which is there without it, would be replaced"
                )
    except OSError as error:
        raise ConfigError(f"--output {path}: {error.strerror}") from None


def _are_rows(content: bytes) -> bool:
    """Whether the content of a file is empty, or rows of a benchmark."""
    if not content.strip():
        return True
    try:
        rows = json.loads(content)
    except (ValueError, RecursionError):
        return False
    return isinstance(rows, list) and all(
        isinstance(row, dict) and "contender" in row for row in rows
    )


def _of_class(name: str, words: Sequence[str]) -> None:
    """A benchmark whose options are the fields of a class, which its docstring explains."""
    kind, title = _OF_CLASS[name]
    fields = dataclasses.fields(kind)
    passes_on = any(field.name == "words" for field in fields)
    parser = _parser(name, _PASSES_ON if passes_on else "")
    told = docstring_parser.parse(kind.__doc__ or "").params
    about = {own.arg_name: own.description or "" for own in told}
    types = typing.get_type_hints(kind)
    for field in fields:
        if field.name == "words":
            continue
        own = types[field.name]
        several = typing.get_origin(own) is tuple
        element = typing.get_args(own)[0] if several else own
        more: dict[str, Any] = {"type": element}
        if typing.get_origin(element) is Literal:
            more = {"choices": typing.get_args(element)}
        if several:
            more["nargs"] = "*"
        default = field.default
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            default=default,
            help=f"{' '.join(about[field.name].split()).removesuffix('.')} ({shown})",
            **more,
        )
    options, others = (
        parser.parse_passing_on(words) if passes_on else (parser.parse_args(words), [])
    )
    values = _each_once(options)
    if others:
        values["words"] = tuple(others)
    threads, output = values.pop("threads"), values.pop("output")
    if name == "export":
        if not importlib.util.find_spec("transformers"):
            raise ConfigError('bench export needs transformers: pip install "megatron-vlmoe[hf]"')
        # As in a program of transformers, where nobody has told torch's idle threads to sleep soon.
        os.environ.pop("GOMP_SPINCOUNT", None)
    module = load(f"megatron_vlmoe.benchmarks.{name}")
    draw = getattr(module, "draw", None)
    _report(name, title, output, threads, module.run(kind(**values)), draw)


def _each_once(options: argparse.Namespace) -> dict[str, Any]:
    """The options by name, several values as a tuple: what is named twice is measured once."""
    return {
        key: tuple(dict.fromkeys(value)) if isinstance(value, list) else value
        for key, value in vars(options).items()
    }


def _moe_layer(words: Sequence[str]) -> None:
    parser = _parser(
        "moe_layer",
        "All contenders have the same weights and carry out the same assignments, which is checked before they are "
        "timed. Ratios are to the dense layer.",
    )
    add = parser.add_argument

    def numbers(option: str, default: list[int], what: str, **more: Any) -> None:
        add(
            option,
            type=positive_int,
            nargs="+",
            default=default,
            help=f"{what}(%(default)s)",
            **more,
        )

    numbers("--tokens", [1024, 8192, 32768], "multiples of 128 ")
    numbers("--experts", [8, 32], "")
    numbers("--topk", [1, 2], "experts per token ", choices=[1, 2])
    numbers("--width", [384, 768], "multiples of 64 ")
    add(
        "--load",
        nargs="+",
        default=["balanced"],
        choices=["balanced", "skewed"],
        help="(%(default)s)",
    )
    add(
        "--gradients",
        nargs="+",
        default=["new"],
        choices=["new", "main_grad"],
        help="made anew in every pass, or added to buffers as in training with megatron-core (%(default)s)",
    )
    add("--contenders", nargs="+", metavar="NAME", help="some of them; dense is always there")
    add("--rounds", type=positive_int, default=5, help="turns of every contender (%(default)s)")
    add("--precision", default="fp32", choices=["fp32", "bf16"], help="(%(default)s)")
    options = argparse.Namespace(**_each_once(parser.parse_args(words)))
    if max(options.topk) > min(options.experts):
        parser.error(f"--topk {max(options.topk)} is more than --experts {min(options.experts)}")
    for width in options.width:
        if width % 64:
            parser.error(f"--width {width} is not a multiple of 64")
        if max(options.experts) > width:
            parser.error(f"--experts {max(options.experts)} needs a --width of at least as much")
    for tokens in options.tokens:
        if tokens % 128:
            parser.error(f"--tokens {tokens} is not a multiple of 128")
    module = load("megatron_vlmoe.benchmarks.moe_layer")
    known = list(module.builders())
    # A CPU's table need not name them in every case.
    absent = () if module.torch.cuda.is_available() else module.GPU_LAYERS
    for name in options.contenders or ():
        if name not in known:
            hint = did_you_mean(name, known)
            parser.error(f"--contenders {name}: expected some of {', '.join(known)}{hint}")
    wanted = options.contenders or [name for name in known if name not in absent]
    names = [name for name in known if name in ("dense", *wanted)]
    cases = [
        module.Case(tokens, width, experts, topk, spread, gradients)
        for tokens in options.tokens
        for width in options.width
        for experts in options.experts
        for topk in options.topk
        for spread in options.load
        for gradients in options.gradients
    ]
    rows = module.run(cases, names, options.rounds, options.precision)
    title = "One feed-forward layer, forward and backward"
    _report("moe_layer", title, options.output, options.threads, rows)


def _step(words: Sequence[str]) -> None:
    parser = _parser(
        "step",
        f"{_PASSES_ON} Under torchrun, ranks step together.",
    )
    add = parser.add_argument
    add(
        "--preset",
        dest="presets",
        nargs="+",
        required=True,
        metavar="NAME",
        help="presets to measure; the first is the reference",
    )
    add(
        "--texts",
        type=count,
        default=64,
        help="texts of a step, of every data-parallel rank (%(default)s)",
    )
    add("--images", type=count, default=64, help="likewise images (%(default)s)")
    add("--pairs", type=count, default=64, help="likewise pairs (%(default)s)")
    add("--rounds", type=positive_int, default=3, help="turns of every preset (%(default)s)")
    add("--steps", type=positive_int, default=2, help="measured steps of a turn (%(default)s)")
    add("--warmup", type=count, default=1, help="steps of a turn before them (%(default)s)")
    add(
        "--precision",
        default="auto",
        choices=["auto", "fp32", "bf16", "fp16"],
        help="of the model's arithmetic (%(default)s)",
    )
    add(
        "--vocab-size",
        type=positive_int,
        default=64_000,
        help="rows of the text head (%(default)s)",
    )
    add(
        "--visual-vocab-size",
        type=positive_int,
        default=8_192,
        help="rows of the image head (%(default)s)",
    )
    add(
        "--caption-mask-slots",
        type=int,
        default=16,
        help="predicted tokens of a caption (%(default)s)",
    )
    add(
        "--dispatcher",
        choices=["fixed_capacity", "alltoall", "dropless"],
        help="short for --moe.dispatcher",
    )
    add(
        "--experts",
        type=count,
        default=0,
        help="of each modality in sparse presets; 0 leaves those of the preset (%(default)s)",
    )
    add(
        "--plain",
        action="store_true",
        help="also a dense model in plain PyTorch, of the first preset's size",
    )
    add(
        "--transformers",
        action="store_true",
        help="also that model with attention and FFN of transformers",
    )
    add(
        "--profile",
        action="store_true",
        help="also a picture of where the time of each preset goes, beside the JSON",
    )
    options, others = parser.parse_passing_on(words)
    if not options.texts + options.images + options.pairs:
        parser.error("nothing to measure: --texts, --images and --pairs are all 0")
    if len(set(options.presets)) != len(options.presets):
        parser.error("--preset names a preset twice")
    if options.dispatcher:
        if any(word.partition("=")[0] == "--moe.dispatcher" for word in others):
            parser.error("--dispatcher and --moe.dispatcher are the same option: give one of them")
        others += ["--moe.dispatcher", options.dispatcher]
    values = vars(options)
    threads, output, profile, _ = (
        values.pop(name) for name in ("threads", "output", "profile", "dispatcher")
    )
    module = load("megatron_vlmoe.benchmarks.step")
    step_options = module.StepOptions(**values)
    _report("step", "Training steps", output, threads, module.run(step_options, others))
    if profile:
        path = output or load("megatron_vlmoe.benchmarks.compare").results_path("step")
        module.draw_parts(step_options, others, path.with_suffix(".png"))
