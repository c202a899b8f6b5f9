"""The command line: parse, call, and turn every expected failure into one line."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import traceback
from typing import Callable, Optional, Sequence

from megatron_vlmoe.runtime.helper_processes import take_signals
from megatron_vlmoe.train.run_log import write_to_run_log

COMMANDS = {
    "pretrain": ("megatron_vlmoe.train.pretrain:main", "train a VL-MoE from indexed datasets"),
    "finetune": ("megatron_vlmoe.finetune.run:main", "train a checkpoint on a downstream task"),
    "evaluate": ("megatron_vlmoe.finetune.run:evaluate_main", "score a fine-tuned checkpoint"),
    "predict": ("megatron_vlmoe.inference.command:main", "ask a fine-tuned checkpoint"),
}


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Runs a command; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    if words[0] == "--version":
        from megatron_vlmoe import __version__

        print(__version__)
        return 0
    if words[0] not in COMMANDS:
        print(f"error: unknown command {words[0]!r}; one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    take_signals()
    configure_logging()
    return run_guarded(lambda: _run(words[0], words[1:]))


def usage() -> str:
    """The list of commands."""
    lines = [f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: python -m megatron_vlmoe COMMAND [--preset NAME] [--config FILE] [--section.option VALUE]"
        ]
        + lines
        + ["COMMAND --help lists every option; COMMAND --dry-run prints what would run."]
    )


def run_guarded(action: Callable[[], int]) -> int:
    """Runs an action; expected errors become one line on stderr and status 2 (options) or 1 (the rest)."""
    from megatron_vlmoe.config.errors import ConfigError

    try:
        return action()
    except BrokenPipeError:
        # The reader of our output went away (`... | head`); nothing is left to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ConfigError as error:
        return _fail(error, 2)
    except Exception as error:
        if type(error).__module__.startswith("megatron_vlmoe."):
            return _fail(error, 1)
        write_to_run_log(traceback.format_exc().rstrip())
        raise


def _fail(error: Exception, status: int) -> int:
    rank = int(os.environ.get("RANK", 0))
    # Every rank finds the same error in the configuration; one line is enough.
    if rank == 0 or status != 2:
        print(f"error: {error}", file=sys.stderr, flush=True)
        write_to_run_log(str(error))
    return status


def _run(command: str, words: Sequence[str]) -> int:
    module, _, function = COMMANDS[command][0].partition(":")
    return int(getattr(importlib.import_module(module), function)(words))


def configure_logging() -> None:
    """Our lines on rank 0's stdout; warnings of everything else on stderr."""
    rank = int(os.environ.get("RANK", 0))
    logger = logging.getLogger("megatron_vlmoe")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    # It warns about our feed-forward spec, which is not one of its own classes, once per block.
    logging.getLogger("megatron.core.transformer.transformer_layer").setLevel(logging.ERROR)
