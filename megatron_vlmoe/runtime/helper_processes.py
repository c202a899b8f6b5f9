"""The processes that help a rank: loader workers, checkpoint writers and the manager of their results.

torchrun, schedulers and shells signal whole process groups. A helper that dies of a signal that asks its rank to save
takes the save with it, and one that outlives its rank holds memory for nobody. So helpers never see such signals, and
the kernel ends them with their rank.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from typing import Any

_PR_SET_PDEATHSIG = 1

FOR_THE_RANK = {
    *(signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
}
"""Signals that helpers leave to their rank."""


def take_signals() -> None:
    """Gives SIGTERM and SIGUSR1 their usual effect again where the launcher ignores them.

    A process inherits what its parent ignores, and would miss them until it has a handler of its own.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def lead_helpers(exit_signals: Iterable[str] = ()) -> None:
    """From here on processes that this one forks leave signals to it, and end with it.

    If torchrun dies without ending its ranks, as it does of SIGUSR1, this rank gets SIGTERM.

    Args:
        exit_signals: names of signals that ask this process to leave, besides the usual ones.
    """
    FOR_THE_RANK.update(signal.Signals[name] for name in exit_signals)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _set_parent_death_signal(signal.SIGTERM)
    _register_hooks()


@functools.cache
def _register_hooks() -> None:
    _libc()  # a library must not be loaded in a forked child, whose locks may be held by nobody
    os.register_at_fork(after_in_child=become_helper)
    # multiprocessing's own hook, which runs after this one, asks workers to end by a signal that they do not see.
    atexit.register(_end_workers)


@functools.cache
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def _set_parent_death_signal(number: signal.Signals) -> None:
    if sys.platform == "linux":
        _libc().prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)


def become_helper() -> None:
    """In a helper: blocks the rank's signals, whatever handlers a library sets later, and ends with its parent."""
    signal.pthread_sigmask(signal.SIG_BLOCK, FOR_THE_RANK)
    _set_parent_death_signal(signal.SIGKILL)


def end_with_parent(parent: int) -> None:
    """In a worker that was started anew: the kernel ends it with its parent, or it ends now if that is gone already.

    A pool's workers wait for work together, and none of them would notice.

    Args:
        parent: its process number.
    """
    _set_parent_death_signal(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


@contextlib.contextmanager
def without_interrupts() -> Iterator[None]:
    """Around the start of workers that Ctrl-C, which reaches the whole process group, is not to interrupt.

    What is blocked is inherited, so that they never see it, even while they start. This process sees it afterwards.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_workers() -> None:
    # torch's handler would raise for each of them, after the error line that the process ends with.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
