"""The program: finds the command that its first word names, and runs it as every command and tool runs.

That is: log lines, signals, and what becomes of errors.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, TextIO, cast

from megatron_vlmoe import __version__
from megatron_vlmoe.commands.table import COMMANDS
from megatron_vlmoe.config.errors import ConfigError, UserError, did_you_mean
from megatron_vlmoe.runtime.files import delete_unpublished
from megatron_vlmoe.runtime.helper_processes import take_signals
from megatron_vlmoe.runtime.ranks import (
    adopt_launcher,
    environment_rank,
    environment_world_size,
)
from megatron_vlmoe.runtime.watchdog import has_other_ranks, linger, tell_other_ranks, unwatch
from megatron_vlmoe.train.run_log import begin_run_logs, write_to_run_log

INTERRUPTED, TERMINATED = 130, 143
"""Exit statuses after Ctrl-C and SIGTERM, as shells have them."""
RANK_0_FAILS_WITHIN = 5.0
"""Seconds in which rank 0 has found an error that every rank finds, and torchrun has ended the others."""
SPIN_COUNT = "1000"
"""How often torch's idle threads on a CPU look for work before they sleep, 300 times less than by themselves: for some
milliseconds they take the cores that threads of the experts need (`runtime/host_threads.py`)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """`vlmoe` with its words; returns the exit status."""
    words = _words(arguments)
    if words[:1] == ["--version"]:
        return run_command(lambda: print(__version__))
    return run_one_of(tuple(COMMANDS), words) if words else run_command(lambda: _help(COMMANDS, 2))


def _words(arguments: Sequence[str] | None) -> list[str]:
    """These words or the command line's, without the rank that DeepSpeed's launcher puts first and in LOCAL_RANK."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    return words[1:] if words and re.fullmatch(r"--local[-_]rank=\d+", words[0]) else words


def _help(names: Collection[str], status: int) -> int:
    """Prints the commands of these names with what each does; returns the exit status."""
    width = max(map(len, names))
    print("usage: vlmoe COMMAND [OPTIONS]   (the same: python -m megatron_vlmoe COMMAND)")
    group = ""
    for name in names:
        command = COMMANDS[name]
        if command.group != group:
            group = command.group
            print(f"\n{group}:")
        print(f"  {name:<{width}}  {command.summary}")
    print("\nCOMMAND --help explains its options; of training, --dry-run prints what would run.")
    return status


def run_one_of(names: Sequence[str], arguments: Sequence[str] | None = None) -> int:
    """Runs the command that the first word names, which is one of `names`; returns the exit status."""
    words = _words(arguments)
    if words and words[0] in names:
        return run(words[0], words[1:])
    if words and words[0] in ("-h", "--help"):
        return run_command(lambda: _help(names, 0))

    def refuse() -> None:
        asked = f"unknown command {words[0]!r}" if words else "no command"
        hint = did_you_mean(words[0], names) if words else ""
        # Former names had another verb: prepare-task is index-task.
        ends = [name for name in names if words and name.split("-")[-1] == words[0].split("-")[-1]]
        if ends and not hint:
            hint = f"; did you mean {' or '.join(ends)}?"
        raise ConfigError(f"{asked}; one of {', '.join(names)}{hint}")

    return run_command(refuse)


def run(name: str, arguments: Sequence[str] | None = None) -> int:
    """Runs a command by its name with the words after it, or those of this process; returns the exit status."""
    words = _words(arguments)
    command = COMMANDS[name]

    def action() -> object:
        if command.on_ranks:
            adopt_launcher(os.environ)
            configure_logging()  # again: the rank may not have been known
        module, _, function = command.main.partition(":")
        return getattr(importlib.import_module(f"{__package__}.{module}"), function)(words)

    # One of several ranks may be waiting for others, which only the system's own handler ends.
    waits = command.on_ranks and environment_world_size() > 1
    return run_command(action, command.cleans_up and not waits)


def run_command(action: Callable[[], object], cleans_up: bool = False) -> int:
    """Runs the work of a command and returns its exit status.

    An error that the user can mend becomes one line on stderr. Every other exception is a mistake in this program and
    keeps its traceback. Output that cannot be written is such an error, but log lines may be lost: a run goes on
    without its console. Where the reader of the output went away (`... | head`), nothing is left to say.

    Args:
        action: the work; a number that it returns is the exit status.
        cleans_up: whether SIGTERM is to unwind the work, so that it deletes its temporary files. Not for training,
            which has its own handlers, and which must end at once while it waits for other ranks.
    """
    take_signals()
    _open_closed_streams()
    configure_logging()
    if "OMP_WAIT_POLICY" not in os.environ:
        # Read when torch is loaded, which commands do later.
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    output = sys.stdout
    told = _Output(output)
    sys.stdout = cast(TextIO, told)
    try:
        with _unwinding_on_sigterm() if cleans_up else contextlib.nullcontext():
            status = action()
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        status = INTERRUPTED
    except SystemExit as leaving:  # after --help or SIGTERM
        if isinstance(leaving.code, str):
            raise
        status = leaving.code
    except Exception as error:
        status = 1
        if told.lost is not None and told.lost in (error, error.__cause__):
            pass  # told below
        elif not isinstance(error, UserError):
            begin_run_logs()
            write_to_run_log(traceback.format_exc().rstrip())
            if not has_other_ranks():
                raise
            # At once: when the others end, their launcher may end this one too.
            tell_other_ranks(f"{type(error).__name__}: {error}")
            traceback.print_exc()
            linger()
        else:
            status = error.exit_status
            _tell(error)
    finally:
        sys.stdout = output
        # However this rank has ended: its neighbour is not to take it for one that was killed.
        unwatch()
    status = status if isinstance(status, int) else 0
    with contextlib.suppress(OSError):
        told.flush()
    if told.lost is None or isinstance(told.lost, BrokenPipeError):
        return status
    print(f"error: stdout: {told.lost.strerror}", file=sys.stderr)
    return status or 1


def _tell(error: UserError) -> None:
    """Prints and logs an error as one line; one that every rank finds is printed by rank 0 alone."""
    line = " ".join(str(error).split())
    rank = environment_rank()
    if rank and error.exit_status == 2:  # every rank has the same options
        return
    # What ends here may be a collective that another rank has left.
    cause = tell_other_ranks(line)
    line = line if error.exit_status == 2 else cause or line
    write_to_run_log(line)
    if rank and "TORCHELASTIC_RUN_ID" in os.environ:
        # If rank 0 fails too, torchrun ends this process meanwhile.
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(RANK_0_FAILS_WITHIN)
    print(f"error: {line}", file=sys.stderr, flush=True)
    if error.exit_status != 2:
        linger()


def _open_closed_streams() -> None:
    """Puts /dev/null where a standard stream was closed (`>&-`), whose number the next file would get otherwise."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            mode = "w" if number else "r"
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))


class _Output:
    """Standard output that remembers the first error in writing it, which others may catch, as argparse does."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._try(self._stream.write, text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, action: Callable[..., Any], *arguments: str) -> Any:
        try:
            return action(*arguments)
        except OSError as error:
            self.lost = error
            _drop(self._stream)
            raise


def _drop(stream: TextIO) -> None:
    """From here on what is written to a stream goes nowhere, also what it has not got rid of so far."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


class _Console(logging.StreamHandler[TextIO]):
    """Log lines on stdout as long as they can be written there."""

    def handleError(self, record: logging.LogRecord) -> None:
        if isinstance(sys.exc_info()[1], OSError):
            _drop(self.stream)
        else:
            super().handleError(record)


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
        handler = _Console(sys.stdout)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
