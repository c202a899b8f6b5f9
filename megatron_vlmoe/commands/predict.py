"""The command `predict`: asks a fine-tuned checkpoint about one input, or about every line of a file."""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from megatron_vlmoe.commands.options import CommandParser, add_image_rules, output_file
from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.config.schema import Precision
from megatron_vlmoe.config.tasks import task_names, working_tasks
from megatron_vlmoe.finetune.predictions import json_line
from megatron_vlmoe.inference.inputs import UnknownTextWarning
from megatron_vlmoe.inference.records import (
    Record,
    predict,
    read_records,
    text_lines,
    unknown_texts,
)
from megatron_vlmoe.runtime.files import write_text_atomic
from megatron_vlmoe.runtime.lazy import load


def main(words: Sequence[str]) -> None:
    """`predict`: prints what the model says, or writes it to a file."""
    options = parse_arguments(words)
    # Programs read the answers on stdout, where other commands log.
    for handler in logging.getLogger("megatron_vlmoe").handlers:
        # A stream may be none of the system's, or closed.
        with contextlib.suppress(OSError, ValueError):
            if isinstance(handler, logging.StreamHandler) and handler.stream.fileno() == 1:
                handler.stream = sys.stderr
    records = _records(options)
    for record in records if options.task else ():
        record.check(options.task)
    checkpoint, config = load("megatron_vlmoe.inference.model").read_run(options.load)
    task = config.task.name
    if options.task not in (None, task):
        raise ConfigError(f"--load {options.load}: was fine-tuned on {task}, not on {options.task}")
    for record in records:
        record.check(task)
    model = load("megatron_vlmoe.inference.model").VLMoE.from_checkpoint(
        checkpoint,
        precision=options.precision,
        tokenizer=options.text_tokenizer,
        labels=options.labels,
        batch_size=options.batch_size,
        capacity_factor=options.capacity_factor,
        exif=options.exif,
        alpha=options.alpha,
    )
    with warnings.catch_warnings():
        # Said once, by record.
        warnings.simplefilter("ignore", UnknownTextWarning)
        rows = (
            row
            for first in range(0, len(records), model.batch_size)
            for row in predict(model, records[first : first + model.batch_size], options.top_k)
        )
        _report(options, records, rows)
    if line := unknown_texts(model, records):
        print(f"warning: {line}", file=sys.stderr)
    load("megatron_vlmoe.runtime.distributed").destroy()


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    """Reads the command line.

    Raises:
        ConfigError: unknown options or wrong values.
        SystemExit: after --help.
    """
    specs = working_tasks()
    inputs = "; ".join(
        f"{spec.name}: {' '.join(f'--{name}' for name in (*spec.images, *spec.texts))}"
        for spec in specs
    )
    parser = CommandParser(
        "predict",
        f"Asks a fine-tuned checkpoint. Inputs by task: {inputs}.",
        {"--tokenizer": "--text-tokenizer"},
    )
    parser.add_argument(
        "--load", required=True, metavar="DIR", help="run, checkpoint or Hugging Face folder"
    )
    parser.add_argument(
        "--task", choices=task_names(), help="checks that the checkpoint is of this task"
    )
    group = parser.add_argument_group("inputs")
    images = {name for spec in specs for name in spec.images}
    for name in _input_names():
        tasks = ", ".join(spec.name for spec in specs if name in (*spec.images, *spec.texts))
        kind = "FILE" if name in images else "TEXT"
        group.add_argument(f"--{name}", metavar=kind, help=f"of {tasks}")
    group.add_argument(
        "--input",
        metavar="FILE",
        help="many: a JSON object per line, with keys named as these options; other keys are handed on",
    )
    add_image_rules(group)
    group = parser.add_argument_group("results")
    group.add_argument("--json", action="store_true", help="one input: print a JSON object")
    group.add_argument(
        "--output", type=output_file, metavar="FILE", help="write JSON lines here instead of stdout"
    )
    group.add_argument(
        "--top-k", type=int, default=5, metavar="K", help="answers or classes to name (%(default)s)"
    )
    group = parser.add_argument_group("model")
    group.add_argument(
        "--precision",
        choices=("auto", *get_args(Precision)),
        default="auto",
        help="of the model's arithmetic; auto: bf16, on older GPUs fp16, on CPU fp32 (%(default)s)",
    )
    group.add_argument(
        "--batch-size", type=int, default=32, metavar="N", help="inputs at a time (%(default)s)"
    )
    group.add_argument(
        "--capacity-factor",
        type=float,
        default=0.0,
        metavar="X",
        help="capacity of experts; 0 drops no token (%(default)s), the paper has 1.0",
    )
    group.add_argument(
        "--text-tokenizer", metavar="FILE", help="text.model, if not in the run folder"
    )
    group.add_argument("--labels", metavar="FILE", help="labels.json, if not in the run folder")
    options = parser.parse_args(words)
    for name in ("top_k", "batch_size"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least 1")
    return options


def _input_names() -> tuple[str, ...]:
    """The inputs of all tasks, each once."""
    found = (name for spec in working_tasks() for name in (*spec.images, *spec.texts))
    return tuple(dict.fromkeys(found))


def _records(options: argparse.Namespace) -> list[Record]:
    """What is asked."""
    given = {
        name: value for name in _input_names() if (value := getattr(options, name)) is not None
    }
    if not options.input:
        if not given:
            raise ConfigError("no input: give --input FILE or the inputs of a task; see --help")
        return [Record("", given)]
    if given:
        raise ConfigError(f"--{next(iter(given))} does not go with --input")
    return read_records(Path(options.input))


def _report(
    options: argparse.Namespace, records: Sequence[Record], rows: Iterator[dict[str, Any]]
) -> None:
    """Prints rows as they come, or writes the file once all are there."""
    if not (options.input or options.json or options.output):
        for row in rows:
            print("\n".join(text_lines(row)))
        return
    lines = (
        json_line({**record.content, **row}) for record, row in zip(records, rows, strict=True)
    )
    if not options.output:
        for line in lines:
            print(line, flush=True)
        return
    try:
        write_text_atomic(options.output, "".join(f"{line}\n" for line in lines))
    except OSError as error:
        raise ConfigError(f"--output {options.output}: {error.strerror}") from None
    print(f"{len(records)} prediction(s) written to {options.output}", file=sys.stderr)
