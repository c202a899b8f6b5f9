"""Options that several of the tools that make datasets have."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from typing import Any

from megatron_vlmoe.data.image_files import ALPHA, DEFAULT_RULES, EXIF
from megatron_vlmoe.prepare.tool import Run, positive_int


def add_options(
    parser: argparse.ArgumentParser,
    *names: str,
    rejects: str,
    prefix: str = "P",
    tokenizer: str | None = None,
) -> None:
    """Adds the named ones of the shared options, in their order.

    Args:
        parser: of the tool.
        names: such as ``--workers``.
        rejects: what ``--on-error skip`` leaves out.
        prefix: what the files with the rejects begin with.
        tokenizer: when ``--tokenizer-model`` is needed; None: always.
    """
    known: dict[str, dict[str, Any]] = {
        "--output-prefix": {"required": True, "metavar": "P"},
        "--tokenizer-model": {"required": tokenizer is None, "metavar": "M", "help": tokenizer},
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


def run_of(
    options: argparse.Namespace, tool: str, arguments: Sequence[str], inputs: Sequence[str]
) -> Run:
    """The shared options as the work of a tool takes them.

    Args:
        options: with ``output_prefix``, ``workers`` and ``on_error``.
        tool: name of its file.
        arguments: its command line.
        inputs: files and folders that it reads.
    """
    command = shlex.join([f"tools/{tool}", *arguments])
    source = {"command": command, "inputs": list(inputs)}
    return Run(options.output_prefix, options.workers, options.on_error, source)
