"""The `pretrain` command: from a command line to a trained model."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any, Callable, Optional, Sequence

from megatron_vlmoe.config.command_line import ParsedCommand, parse_run, to_yaml
from megatron_vlmoe.config.dry_run import dry_run_text, nodes_crossed
from megatron_vlmoe.config.schema import ConfigError, RunConfig
from megatron_vlmoe.config.validate import num_micro_batches, validate
from megatron_vlmoe.runtime.distributed import (
    Ranks,
    device,
    environment_world_size,
    is_rank_zero,
)
from megatron_vlmoe.runtime.helper_processes import lead_helpers
from megatron_vlmoe.train.run_files import TOKENIZER_FILE, keep_file

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
    from megatron_vlmoe.train.masked import MaskedObjective
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
    objective = MaskedObjective(
        config, ranks, data, micro_batches, _image_tokenizer(config, ranks, data)
    )
    Trainer(config, parts, ranks, data, micro_batches, precision, objective).run()


def _image_tokenizer(config: RunConfig, ranks: Ranks, data: Any) -> Optional[Any]:
    """The frozen tokenizer, where visual tokens are computed on the fly (last stage only)."""
    uses_images = config.data.micro_images or config.data.micro_pairs
    if data.stored_codes or not uses_images or not ranks.is_last_stage:
        return None
    from megatron_vlmoe.tokenizers.image import ImageTokenizer

    return ImageTokenizer.from_pretrained(config.data.image_tokenizer, device=device())


def quiet_imports() -> None:
    """Silences warnings that no user can act on."""
    # megatron-core warns on import about packages that are optional here.
    warnings.filterwarnings("ignore", module="megatron")
    # torch 2.13 deprecates the collectives that megatron-core 0.16.1 calls.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def make_run_folder(config: RunConfig) -> None:
    """Finds out before anything is loaded whether the run can write its files."""
    save = config.checkpoint.save
    if not save:
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


def report_packages() -> None:
    """One line about optional packages; an unusable one is an error."""
    from megatron_vlmoe.runtime.probe import accelerator_report, unusable_packages

    if int(os.environ.get("RANK", 0)) == 0:
        log.info(accelerator_report())
    problems = unusable_packages()
    if problems:
        raise ConfigError("; ".join(problems))


def log_layout(
    config: RunConfig, ranks: Ranks, precision: str, micro_batches: int, summary: Sequence[str]
) -> None:
    """The layout, a warning where experts span nodes, and the data."""
    parallel = config.parallel
    log.info(
        "layout: TP %d, PP %d (virtual %d), EP %d, DP %d on %d rank(s), %s, %d micro-batch(es) per step",
        ranks.tensor_size,
        ranks.pipeline_size,
        parallel.virtual_pipeline_model_parallel_size,
        ranks.expert_size,
        ranks.data_size,
        ranks.world_size,
        precision,
        micro_batches,
    )
    if nodes_crossed(
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
