"""The program: finds the command that its first word names, and runs it as every command and tool runs.

That is: log lines, signals, and what becomes of errors.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence

from megatron_vlmoe import __version__
from megatron_vlmoe.commands.table import COMMANDS
from megatron_vlmoe.config.errors import ConfigError, UserError, did_you_mean
from megatron_vlmoe.runtime.files import delete_unpublished
from megatron_vlmoe.runtime.helper_processes import take_signals
from megatron_vlmoe.runtime.ranks import environment_rank
from megatron_vlmoe.train.run_log import begin_run_logs, write_to_run_log

INTERRUPTED, TERMINATED = 130, 143
"""Exit statuses after Ctrl-C and SIGTERM, as shells have them."""


def main(arguments: Sequence[str] | None = None) -> int:
    """`vlmoe` with its words; returns the exit status."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words[:1] == ["--version"]:
        print(__version__)
        return 0
    if words and words[0] not in ("-h", "--help"):
        return run_one_of(tuple(COMMANDS), words)
    width = max(map(len, COMMANDS))
    print("usage: vlmoe COMMAND [OPTIONS]   (the same: python -m megatron_vlmoe COMMAND)")
    group = ""
    for name, command in COMMANDS.items():
        if command.group != group:
            group = command.group
            print(f"\n{group}:")
        print(f"  {name:<{width}}  {command.summary}")
    print("\nCOMMAND --help explains its options; of training, --dry-run prints what would run.")
    return 0 if words else 2


def run_one_of(names: Sequence[str], arguments: Sequence[str] | None = None) -> int:
    """Runs the command that the first word names, which is one of `names`; returns the exit status."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words and words[0] in names:
        return run(words[0], words[1:])

    def refuse() -> None:
        asked = f"unknown command {words[0]!r}" if words else "no command"
        hint = did_you_mean(words[0], names) if words else ""
        raise ConfigError(f"{asked}; one of {', '.join(names)}{hint}")

    return run_command(refuse)


def run(name: str, arguments: Sequence[str] | None = None) -> int:
    """Runs a command by its name with the words after it, or those of this process; returns the exit status."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    command = COMMANDS[name]

    def action() -> object:
        module, _, function = command.main.partition(":")
        return getattr(importlib.import_module(f"{__package__}.{module}"), function)(words)

    return run_command(action, command.cleans_up)


def run_command(action: Callable[[], object], cleans_up: bool = False) -> int:
    """Runs the work of a command and returns its exit status.

    An error that the user can mend becomes one line on stderr. Every other exception is a mistake in this program and
    keeps its traceback.

    Args:
        action: the work; a number that it returns is the exit status.
        cleans_up: whether SIGTERM is to unwind the work, so that it deletes its temporary files. Not for training,
            which has its own handlers, and which must end at once while it waits for other ranks.
    """
    take_signals()
    configure_logging()
    try:
        with _unwinding_on_sigterm() if cleans_up else contextlib.nullcontext():
            status = action()
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output went away (`... | head`); nothing is left to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except UserError as error:
        # Every rank finds the same error in the options; one line is enough.
        if error.exit_status != 2 or environment_rank() == 0:
            line = " ".join(str(error).split())
            print(f"error: {line}", file=sys.stderr, flush=True)
            write_to_run_log(line)
        return error.exit_status
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception:
        begin_run_logs()
        write_to_run_log(traceback.format_exc().rstrip())
        raise
    return status if isinstance(status, int) else 0


@contextlib.contextmanager
def _unwinding_on_sigterm() -> Iterator[None]:
    previous = None
    with contextlib.suppress(ValueError):  # not the main thread
        previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        yield
    finally:
        delete_unpublished()
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


def configure_logging() -> None:
    """Our lines on rank 0's stdout; warnings of everything else on stderr."""
    rank = environment_rank()
    logger = logging.getLogger("megatron_vlmoe")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    # It warns about our feed-forward spec, which is not one of its own classes, once per block.
    logging.getLogger("megatron.core.transformer.transformer_layer").setLevel(logging.ERROR)
