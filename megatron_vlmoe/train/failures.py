"""What ends a run that is no mistake in it, in one line that says what to do: memory, loader workers, collectives."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Optional

import torch
import torch.distributed as dist

from megatron_vlmoe.config.errors import TrainingError, UserError
from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.runtime.watchdog import watchdog

_SHARED_MEMORY = Path("/dev/shm")
# torch's words: "DataLoader worker (pid 7) is killed by signal: Killed.", "... (pid(s) 7, 8) exited unexpectedly".
_WORKER = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? ([0-9, ]+)\)(?: is killed by signal: ([^.]+))?"
)
_HOST_MEMORY = re.compile(r"DefaultCPUAllocator|[Cc]annot allocate memory|std::bad_alloc")
# Of gloo, whose errors are RuntimeErrors.
_PEER = re.compile(
    r"Connection closed by peer|Connection reset by peer|Timed out waiting|Read timeout|Application timeout|"
    r"Broken pipe|Socket closed"
)
# Where in its own sources gloo has noticed it.
_SOURCE_LINE = re.compile(r"^\[[^\]]*\] ")


@contextlib.contextmanager
def training_failures(
    config: RunConfig, check_files: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Around a run: what a user can do something about becomes a `TrainingError`.

    Args:
        config: names the options that help, with their values.
        check_files: raises DataError where a file of the data is not as it was; none are open yet without it.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if line := explain(error, config, check_files):
            raise TrainingError(line) from error
        raise


def explain(error: BaseException, config: RunConfig, check_files: Callable[[], None]) -> str:
    """The line of an error that is no mistake in the program; empty for any other.

    Raises:
        DataError: a loader worker has died of a file that was changed.
    """
    text = " ".join(str(error).split())
    without_memory = out_of_memory(error)
    if without_memory == "GPU":
        return f"out of memory on the GPU: {text[:200]} Take {memory_options(config)}"
    workers = [found for link in _chain(error) if (found := _WORKER.search(str(link)))]
    if workers:
        # That it was killed is the cause of that it is gone.
        worker = next((found for found in workers if found[2]), workers[0])
        return _dead_worker(worker[1], worker[2] or "", config, check_files)
    if without_memory:
        data = config.data
        return (
            f"out of memory on the host: {text[:200] or 'no more to be had'}; take {memory_options(config)}, and on "
            f"the host fewer loader workers (data.num_workers={data.num_workers}, data.prefetch={data.prefetch})"
        )
    if isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and _PEER.search(text)
    ):
        missing = watchdog().missing()
        return (
            f"{_collective(error.__traceback__)}: {_SOURCE_LINE.sub('', text)[:120]}; "
            f"{missing or 'another rank has left or is late'} "
            f"(parallel.distributed_timeout_minutes={config.parallel.distributed_timeout_minutes})"
        )
    return ""


def out_of_memory(error: BaseException) -> str:
    """Whose memory was not enough, `GPU` or `host`; empty for an error of another kind."""
    if isinstance(error, torch.OutOfMemoryError):
        return "GPU"
    is_host = isinstance(error, RuntimeError) and _HOST_MEMORY.search(str(error))
    is_fork = isinstance(error, OSError) and error.errno == errno.ENOMEM
    return "host" if isinstance(error, MemoryError) or is_host or is_fork else ""


def _chain(error: Optional[BaseException]) -> Iterator[BaseException]:
    """An error and what it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def memory_options(config: RunConfig) -> str:
    """What takes less memory, with the values that it has now."""
    data, train, parallel = config.data, config.train, config.parallel
    if isinstance(config, FinetuneConfig):
        sizes = [f"task.micro_batch_size={config.task.micro_batch_size}"]
    else:
        names = ("micro_texts", "micro_images", "micro_pairs")
        sizes = [f"data.{name}={getattr(data, name)}" for name in names if getattr(data, name)]
    parts = [f"smaller micro-batches ({', '.join(sizes)}; the global batch may stay)"]
    if train.recompute == "none":
        parts.append("train.recompute=full")
    if not train.head_chunk_rows:
        parts.append("train.head_chunk_rows=1024")
    parts.append(
        f"more ranks to a model (expert_model_parallel_size={parallel.expert_model_parallel_size}, "
        f"tensor_model_parallel_size={parallel.tensor_model_parallel_size}, "
        f"pipeline_model_parallel_size={parallel.pipeline_model_parallel_size} of parallel)"
    )
    return ", ".join(parts[:-1]) + " or " + parts[-1]


def _dead_worker(pids: str, killer: str, config: RunConfig, check_files: Callable[[], None]) -> str:
    bus_error = killer == signal.strsignal(signal.SIGBUS) or "Bus error" in killer
    if bus_error:
        check_files()
    how = f"was killed by a signal ({killer})" if killer else "has ended unexpectedly"
    hint = (
        f"fewer workers or less ahead (data.num_workers={config.data.num_workers}, "
        f"data.prefetch={config.data.prefetch}) take less memory"
    )
    if bus_error and _SHARED_MEMORY.exists():
        usage = shutil.disk_usage(_SHARED_MEMORY)
        hint = (
            f"{_SHARED_MEMORY} has {usage.free / 1e6:.0f} of {usage.total / 1e6:.0f} MB free, and batches pass through "
            f"it: give a container more of it (docker run --shm-size), or take {hint.replace(' take less memory', '')}"
        )
    return f"loader worker {pids.strip()} of rank {os.environ.get('RANK', '0')} {how}: {hint}"


def _collective(trace: Optional[TracebackType]) -> str:
    """What a collective was called from: `all_reduce in finish_grad_sync`."""
    names, called = [], ""
    while trace is not None:
        code = trace.tb_frame.f_code
        if code.co_filename.endswith("distributed_c10d.py"):
            called = called or code.co_name
        elif not called and code.co_name not in ("wrapper", "_call_impl", "_wrapped_call_impl"):
            names.append(code.co_name)
        trace = trace.tb_next
    where = names[-1] if names else "the program"
    called = "a collective" if called in ("", "wrapper") else called
    return f"{called} in {where}"
