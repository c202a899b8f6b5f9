"""The queue through which megatron-core's checkpoint writers report to their rank."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import pickle
import signal
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.managers import SyncManager
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_vlmoe.runtime.helper_processes import FOR_THE_RANK, become_helper


@dataclass(frozen=True)
class _PickledQueue:
    """A manager's queue that holds bytes: for results as they are the manager would import torch (250 MB, seconds)."""

    queue: Any

    def put(self, item: object) -> None:
        # Who asks for it finds out that the manager is gone.
        with contextlib.suppress(OSError, EOFError):
            self.queue.put(pickle.dumps(item))

    def get_nowait(self) -> Any:
        """What was put; an exception, as of a writer that failed, where the manager is gone. Raises queue.Empty."""
        try:
            return pickle.loads(self.queue.get_nowait())
        except (OSError, EOFError):
            return ChildProcessError("the process that keeps what writers report was killed")


def install_results_queue(start_method: str = "spawn") -> None:
    """Gives megatron-core's checkpoint writers a queue whose manager is a helper process.

    The manager starts with the first save. A queue that was installed before stays.

    Args:
        start_method: how it is started (`multiprocessing.get_context`).

    Raises:
        RuntimeError: if this megatron-core makes its queue elsewhere.
    """

    @functools.cache
    def results_queue() -> Any:
        manager = SyncManager(ctx=multiprocessing.get_context(start_method))
        before = signal.pthread_sigmask(signal.SIG_BLOCK, FOR_THE_RANK)
        try:
            # What is blocked stays so in a program that is started; but starting the tracker unblocks SIGTERM.
            resource_tracker.ensure_running()
            signal.pthread_sigmask(signal.SIG_BLOCK, FOR_THE_RANK)
            manager.start(become_helper)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return _PickledQueue(manager.Queue())

    # Before 0.19 its name began with an underscore.
    names = ("get_write_results_queue", "_get_write_results_queue")
    name = next((name for name in names if hasattr(filesystem_async, name)), "")
    if not name:
        raise RuntimeError(f"megatron-core's {filesystem_async.__name__} has no {names[0]}")
    if getattr(filesystem_async, name).__module__ != __name__:
        setattr(filesystem_async, name, results_queue)
