"""Pretraining: from a checked configuration to a trained model."""

from __future__ import annotations

import logging
from typing import Callable

from megatron_vlmoe.config.schema import Precision, RunConfig
from megatron_vlmoe.data.batches import PretrainData
from megatron_vlmoe.data.collate import BatchShare
from megatron_vlmoe.planning.validate import validate
from megatron_vlmoe.runtime.distributed import (
    destroy,
    device,
    initialize,
    is_rank_zero,
    resolve_precision,
)
from megatron_vlmoe.runtime.helper_processes import lead_helpers
from megatron_vlmoe.runtime.ranks import Ranks
from megatron_vlmoe.stream.sizes import num_micro_batches
from megatron_vlmoe.train.objective import PretrainSource
from megatron_vlmoe.train.pretrain_objective import MaskedObjective
from megatron_vlmoe.train.run_files import TOKENIZER_FILE, keep_file
from megatron_vlmoe.train.setup import build_training
from megatron_vlmoe.train.startup import log_layout, make_run_folder, report_packages
from megatron_vlmoe.train.trainer import Trainer

log = logging.getLogger("megatron_vlmoe")

OpenData = Callable[[RunConfig, BatchShare], PretrainSource]


def pretrain(config: RunConfig, open_data: OpenData = PretrainData.open) -> None:
    """Trains, to the end of the run or to a clean early exit.

    Args:
        config: the run, checked by `validate`.
        open_data: makes the source of batches of (configuration, share).
    """
    lead_helpers(config.train.exit_signals)
    make_run_folder(config)
    report_packages()
    precision = resolve_precision(config.train)
    ranks = initialize(config.parallel, config.train.seed, config.train.deterministic)
    _train(config, ranks, precision, open_data)
    # Not after an error: other ranks may still wait in a collective, and the launcher ends them.
    destroy()


def _train(config: RunConfig, ranks: Ranks, precision: Precision, open_data: OpenData) -> None:
    data = open_data(config, BatchShare.of(ranks))
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
