"""What every training command does before its first step."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Sequence

from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.planning.dry_run import nodes_crossed
from megatron_vlmoe.runtime.probe import accelerator_report, unusable_packages
from megatron_vlmoe.runtime.ranks import Ranks, environment_rank
from megatron_vlmoe.train.run_log import open_run_log

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


def report_packages() -> None:
    """One line about optional packages; an unusable one is an error."""
    if environment_rank() == 0:
        log.info(accelerator_report())
    problems = unusable_packages()
    if problems:
        raise ConfigError("; ".join(problems))


def log_layout(
    config: RunConfig, ranks: Ranks, precision: str, micro_batches: int, summary: Sequence[str]
) -> None:
    """The layout, a warning where experts span nodes, and the data; 0 micro-batches: a run without training."""
    parallel = config.parallel
    steps = f", {micro_batches} micro-batch(es) per step" if micro_batches else ""
    log.info(
        "layout: TP %d, PP %d (virtual %d), EP %d, DP %d on %d rank(s), %s%s",
        ranks.tensor_size,
        ranks.pipeline_size,
        parallel.virtual_pipeline_model_parallel_size,
        ranks.expert_size,
        ranks.data_size,
        ranks.world_size,
        precision,
        steps,
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
