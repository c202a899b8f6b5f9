"""The `pretrain` command: from a command line to a trained model."""

from __future__ import annotations

import logging
import os
from typing import Any, Callable, Optional, Sequence

from megatron_vlmoe.config.command_line import ParsedCommand, parse_run, to_yaml
from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.planning.dry_run import dry_run_text
from megatron_vlmoe.planning.validate import validate
from megatron_vlmoe.runtime.distributed import (
    Ranks,
    device,
    environment_world_size,
    is_rank_zero,
)
from megatron_vlmoe.runtime.helper_processes import lead_helpers
from megatron_vlmoe.stream.sizes import num_micro_batches
from megatron_vlmoe.train.run_files import TOKENIZER_FILE, keep_file
from megatron_vlmoe.train.startup import log_layout, make_run_folder, quiet_imports, report_packages

log = logging.getLogger("megatron_vlmoe")

OpenData = Callable[..., Any]


def main(arguments: Sequence[str], open_data: Optional[OpenData] = None) -> int:
    """Parses, checks and runs.

    Args:
        arguments: the command line.
        open_data: makes the source of batches of (configuration, share); None reads indexed datasets.
    """
    command = parse_run("pretrain", arguments)
    world_size = command.dry_run_world_size or environment_world_size()
    validate(command.config, world_size)
    if command.dry_run:
        if int(os.environ.get("RANK", 0)) == 0:
            print(to_yaml(command.config))
            print(dry_run_text(command.config, world_size, command.dry_run_gpus_per_node))
        return 0
    return pretrain(command, open_data)


def pretrain(command: ParsedCommand, open_data: Optional[OpenData] = None) -> int:
    """Trains; returns 0 at the end of the run and after a clean early exit."""
    config = command.config
    lead_helpers(config.train.exit_signals)
    make_run_folder(config)
    report_packages()
    quiet_imports()
    from megatron_vlmoe.runtime.distributed import destroy, initialize
    from megatron_vlmoe.runtime.precision import resolve_precision

    precision = resolve_precision(config.train)
    ranks = initialize(config.parallel, config.train.seed, config.train.deterministic)
    _train(config, ranks, precision, open_data)
    # Not after an error: other ranks may still wait in a collective, and the launcher ends them.
    destroy()
    return 0


def _train(config: RunConfig, ranks: Ranks, precision: Any, open_data: Optional[OpenData]) -> None:
    from megatron_vlmoe.data.batches import BatchShare, PretrainData
    from megatron_vlmoe.train.pretrain_objective import MaskedObjective
    from megatron_vlmoe.train.setup import build_training
    from megatron_vlmoe.train.trainer import Trainer

    data = (open_data or PretrainData.open)(config, BatchShare.of(ranks))
    config = data.config
    validate(config, ranks.world_size)
    if config.checkpoint.save and is_rank_zero():
        keep_file(config.data.text_tokenizer, config.checkpoint.save, TOKENIZER_FILE)
    micro_batches = num_micro_batches(config, ranks.data_size)
    log_layout(config, ranks, precision, micro_batches, data.summary())
    parts = build_training(config, precision)
    if parts.frozen:
        log.info("frozen, never reached by this run: %s", ", ".join(parts.frozen))
    tokenizer = data.image_tokenizer
    if tokenizer is not None:
        tokenizer.to(device())
    objective = MaskedObjective(config, ranks, data, micro_batches, tokenizer)
    Trainer(config, parts, ranks, data, micro_batches, precision, objective).run()
