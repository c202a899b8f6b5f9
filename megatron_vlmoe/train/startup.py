"""What every training command does before its first step."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Sequence

import torch

from megatron_vlmoe.config.command_line import flat_options
from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.planning.dry_run import nodes_crossed
from megatron_vlmoe.runtime.accelerators import installed_accelerators
from megatron_vlmoe.runtime.distributed import from_rank_zero, own_store, union_over_ranks
from megatron_vlmoe.runtime.ranks import Ranks, environment_rank
from megatron_vlmoe.runtime.run_lock import run_lock
from megatron_vlmoe.runtime.watchdog import Limits, Watchdog, watch
from megatron_vlmoe.train.health import HEALTH_FOLDER
from megatron_vlmoe.train.run_log import open_run_log, write_to_run_log

log = logging.getLogger("megatron_vlmoe")


def make_run_folder(config: RunConfig) -> None:
    """Finds out before anything is loaded whether the run can write its files, and opens its log."""
    save = config.checkpoint.save
    if not save:
        if environment_rank() == 0:
            log.warning("no --save: nothing of this run will be kept")
        return
    try:
        Path(save).mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise ConfigError(f"--save {save} is a file, not a folder") from None
    except OSError as error:
        raise ConfigError(f"--save {save}: {error.strerror}") from None
    if not os.access(save, os.W_OK):
        raise ConfigError(f"--save {save}: not writable")
    open_run_log(Path(save))


@contextlib.contextmanager
def locked_run_folder(save: str) -> Iterator[None]:
    """Holds the lock of a run folder, if there is one, while the block runs; every rank must call it.

    Raises:
        ConfigError: on every rank, if another run holds it.
    """
    with contextlib.ExitStack() as held:
        if save:
            from_rank_zero(lambda: held.enter_context(run_lock(Path(save))))
        yield


def report_packages() -> None:
    """One line about the device and optional packages."""
    where = "no GPU: CPU runtime over gloo"
    if torch.cuda.is_available():
        where = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    # Those that are there were tried before megatron-core was imported.
    used = "used" if torch.cuda.is_available() else "installed, of no use without a GPU"
    states = (
        f"{name}: {used if there else 'not installed'}"
        for name, there in installed_accelerators().items()
    )
    if environment_rank() == 0:
        log.info(", ".join((f"torch {torch.__version__}", where, *states)))


def watch_ranks(config: RunConfig, ranks: Ranks) -> None:
    """Starts the thread that ends this run where any rank fails or hangs, until the process groups end."""
    save, health = config.checkpoint.save, config.health
    # A file that is cut while this process reads it ends it without an exception: at least its stack is on stderr.
    # Where stderr is no file, as in a notebook, there is no place for it.
    if not faulthandler.is_enabled():
        with contextlib.suppress(OSError, ValueError, AttributeError):
            faulthandler.enable()
    watch(
        Watchdog(
            own_store(),
            ranks.rank,
            ranks.world_size,
            Limits(health.hang_factor, health.hang_seconds),
            Path(save) / HEALTH_FOLDER if save else None,
            write_to_run_log,
        )
    )


def check_same_on_all_ranks(config: RunConfig) -> None:
    """Refuses a run whose ranks have read other numbers from their data; every rank must call it.

    Steps, warm-up, classes and vocabularies follow from files, which every node reads for itself. A node that sees
    others, such as an earlier state of a shared file system, would leave the collectives of the others.

    Args:
        config: after the data was opened.

    Raises:
        ConfigError: on every rank, naming the options that differ; paths may differ.
    """
    ours = flat_options(asdict(config))
    theirs = from_rank_zero(lambda: ours)
    numbers = [name for name, value in ours.items() if isinstance(value, (int, float))]
    different = union_over_ranks(
        name for name in (*numbers, "task.labels_sha256") if ours.get(name) != theirs.get(name)
    )
    if different:
        raise ConfigError(
            f"the ranks have read different data: {', '.join(sorted(different))} "
            f"{'differs' if len(different) == 1 else 'differ'} between them; do all nodes see the same files?"
        )


def log_layout(
    config: RunConfig, ranks: Ranks, precision: str, micro_batches: int, summary: Sequence[str]
) -> None:
    """The layout, a warning where experts span nodes, and the data; 0 micro-batches: a run without training."""
    log.info(
        "layout: TP %d, PP %d (virtual %d), EP %d, DP %d on %d rank(s), %s%s",
        ranks.tensor_size,
        ranks.pipeline_size,
        config.parallel.virtual_pipeline_model_parallel_size,
        ranks.expert_size,
        ranks.data_size,
        ranks.world_size,
        precision,
        f", {micro_batches} micro-batch(es) per step" if micro_batches else "",
    )
    if ranks.rank == 0 and nodes_crossed(
        ranks.expert_size, ranks.world_size, ranks.pipeline_size, ranks.local_world_size
    ):
        log.warning(
            "parallel.expert_model_parallel_size=%d spans nodes of %d rank(s): the all-to-all of every "
            "MoE block crosses the network",
            ranks.expert_size,
            ranks.local_world_size,
        )
    for line in summary:
        log.info(line)
