"""Runs in shards: one after the other on this machine, or side by side as Ray tasks, and then their merge.

A shard leaves its files beside the output, complete or not at all, and a shard that is there is not done again. So a
run that was ended goes on where it was, and a worker that dies costs no more than its shard.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from megatron_vlmoe.config.errors import DataError, UserError
from megatron_vlmoe.prepare.merge import delete_shards, merge_shards
from megatron_vlmoe.prepare.shards import Shard
from megatron_vlmoe.prepare.tool import Execution, Run
from megatron_vlmoe.runtime.progress import Progress

Job = Callable[[Run], object]
"""Does one run, or the shard of it that `Run.shard` says: picklable, and the same on every machine."""

_SHARDS_PER_WORKER = 4
_RETRIES = 3


def execute(job: Job, run: Run, execution: Execution, name: str | None = None) -> None:
    """Does a run, or one shard of it, or all shards and their merge.

    Args:
        job: the work.
        run: the whole, or the shard that the user asked for.
        execution: where.
        name: prefix of the shards; None: that of the output.

    Raises:
        ConfigError: options contradict each other.
        DataError: as the job does; Ray is missing, or a shard's workers died again and again.
    """
    execution.check(run)
    if execution.executor == "local" and execution.num_shards is None:
        job(run)
        return
    count = execution.num_shards or _SHARDS_PER_WORKER * max(run.workers, 1)
    shards = [replace(run, shard=Shard(index, count)) for index in range(count)]
    if execution.executor == "local":
        for shard in shards:
            job(shard)
    else:
        _run_on_ray(job, shards, max(run.workers, 1), execution)
    prefix = name or run.output_prefix
    merge_shards(prefix)
    delete_shards(prefix)


def _run_on_ray(job: Job, shards: Sequence[Run], workers: int, execution: Execution) -> None:
    """Does every shard as a Ray task, as many at once as there are workers."""
    with (
        _ray(workers, execution.ray_address) as ray,
        Progress("ray", "shards", len(shards)) as progress,
    ):
        gpus = 1 if execution.on_gpus and ray.cluster_resources().get("GPU", 0) >= 1 else 0
        # Only a worker that died is tried again: the same bad input would fail in the same way.
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=_RETRIES)(_run_shard)
        folder, left = os.getcwd(), list(reversed(shards))
        running: dict[Any, Run] = {}
        while left or running:
            while left and len(running) < workers:
                shard = left.pop()
                running[task.remote(job, replace(shard, workers=1), folder)] = shard
            (done,), _ = ray.wait(list(running), num_returns=1)
            _finish(ray, done, running.pop(done))
            progress.add()
        progress.finish()


def _finish(ray: Any, done: Any, shard: Run) -> None:
    """Takes the end of a task. Raises what the job raised, and DataError if its workers died."""
    try:
        ray.get(done)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"shard {shard.shard}: its worker died {_RETRIES + 1} times, out of memory or killed ({first}); "
            "the same command goes on with the shards that are not there"
        ) from error


def _run_shard(job: Job, run: Run, folder: str) -> None:
    # Relative paths mean what they mean to the driver.
    os.chdir(folder)
    job(run)


@contextlib.contextmanager
def _ray(workers: int, address: str | None) -> Iterator[Any]:
    """Ray, connected to a cluster or started on this machine. Raises DataError."""
    # Nothing is reported home unless the user asks for it.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as error:
        raise DataError('--executor ray needs Ray: pip install "megatron-vlmoe[ray]"') from error
    address = address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"address": address} if address else {"num_cpus": workers}
    if not address:
        options["include_dashboard"] = False
    try:
        ray.init(**options, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"Ray {address or 'on this machine'}: {first}") from error
    try:
        yield ray
    finally:
        ray.shutdown()
