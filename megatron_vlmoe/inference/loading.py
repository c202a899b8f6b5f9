"""A fine-tuned checkpoint, of any parallel layout, loaded whole into this process."""

from __future__ import annotations

import contextlib
import logging
import math
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Iterator, Optional, get_args

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.config.schema import ParallelConfig, Precision
from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.convert.importing import HuggingFaceModel
from megatron_vlmoe.data.task_labels import Labels
from megatron_vlmoe.finetune.saved import checkpoint_of, load_weights, saved_run
from megatron_vlmoe.model.task_heads import build_task_heads
from megatron_vlmoe.runtime import distributed
from megatron_vlmoe.runtime.precision import resolve_precision
from megatron_vlmoe.runtime.ranks import Ranks, environment_world_size
from megatron_vlmoe.tokenizers.text import TextTokenizer
from megatron_vlmoe.train.run_files import (
    LABELS_FILE,
    TOKENIZER_FILE,
    is_hugging_face,
    open_labels,
    open_text_tokenizer,
    run_file,
)
from megatron_vlmoe.train.setup import build_forward_only
from megatron_vlmoe.train.step import StepRunner

PRECISIONS = ("auto", *get_args(Precision))


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to run.

    Args:
        checkpoint: where it came from.
        config: its run, with everything in one process.
        runner: runs it.
        tokenizer: None for a task without text.
        labels: the classes; None for retrieval.
    """

    checkpoint: Path
    config: FinetuneConfig
    runner: StepRunner
    tokenizer: Optional[TextTokenizer]
    labels: Optional[Labels]


def read_run(location: str | Path) -> tuple[Path, FinetuneConfig]:
    """The checkpoint that a run, checkpoint or iteration folder names, and the run that wrote it.

    Of a run folder that is the best checkpoint where there is one, else the last.

    Raises:
        ConfigError: there is none, or it is not of a task.
        CheckpointError: it is damaged.
    """
    checkpoint = checkpoint_of(str(location))
    config = saved_run(str(checkpoint))
    if not isinstance(config, FinetuneConfig):
        raise ConfigError(f"{checkpoint}: is a pretraining checkpoint, not one of a task")
    return checkpoint, config


def load_model(
    location: str | Path,
    *,
    device: Optional[str] = None,
    precision: str = "auto",
    tokenizer: str | Path | None = None,
    labels: str | Path | None = None,
    capacity_factor: float = 0.0,
) -> LoadedModel:
    """Loads a fine-tuned model; the arguments are those of `VLMoE.from_checkpoint`.

    The global random generators are left as they were.

    Raises:
        ConfigError: no such checkpoint, or an argument or file that does not go with it.
        CheckpointError: a damaged checkpoint.
    """
    if not math.isfinite(capacity_factor):
        raise ConfigError(f"capacity_factor={capacity_factor}: not a finite number")
    checkpoint, config = read_run(location)
    if precision not in PRECISIONS:
        raise ConfigError(f"precision={precision}: choose one of {', '.join(PRECISIONS)}")
    config = _in_one_process(config, capacity_factor)
    text_tokenizer = _open_tokenizer(checkpoint, config, tokenizer)
    classes = _open_labels(checkpoint, config, labels)
    # As the command line does: it warns about our feed-forward spec once per block.
    logging.getLogger("megatron.core.transformer.transformer_layer").setLevel(logging.ERROR)
    _check_device(device)
    config = replace(config, train=replace(config.train, precision=precision))  # type: ignore[arg-type]
    with _unchanged_generators():
        ranks = _only_rank()
        parts = build_forward_only(config, resolve_precision(config.train), build_task_heads)
        load_weights(checkpoint, config, parts)
    runner = StepRunner(config, parts, ranks)
    return LoadedModel(checkpoint, config, runner, text_tokenizer, classes)


def _in_one_process(config: FinetuneConfig, capacity_factor: float) -> FinetuneConfig:
    """The run on one rank, with this expert capacity; 0 or less drops nothing."""
    moe = replace(config.moe, eval_capacity_factor=capacity_factor)
    if capacity_factor > 0.0 and moe.dispatcher == "dropless":
        moe = replace(moe, dispatcher="fixed_capacity")
    return replace(config, parallel=ParallelConfig(), moe=moe)


def _open_tokenizer(
    checkpoint: Path, config: FinetuneConfig, given: str | Path | None
) -> Optional[TextTokenizer]:
    if not config.task.spec.texts:
        return None
    path = given or run_file(checkpoint, TOKENIZER_FILE)
    if path is None and is_hugging_face(checkpoint):
        path = config.data.text_tokenizer
    if path is None:
        raise ConfigError(f"{checkpoint}: no {TOKENIZER_FILE} beside it; name the text tokenizer")
    return open_text_tokenizer(path, config, checkpoint)


def _open_labels(
    checkpoint: Path, config: FinetuneConfig, given: str | Path | None
) -> Optional[Labels]:
    if not config.task.spec.has_labels:
        return None
    path = given or run_file(checkpoint, LABELS_FILE)
    if path is None and is_hugging_face(checkpoint):
        # A library wrote the folder: the classes are in its config.json.
        return HuggingFaceModel(checkpoint, verify=False).labels
    if path is None:
        raise ConfigError(f"{checkpoint}: no {LABELS_FILE} beside it; name the file of its labels")
    return open_labels(path, config, checkpoint)


def _check_device(wanted: Optional[str]) -> None:
    if wanted not in (None, "cpu", "cuda"):
        raise ConfigError(f"device={wanted}: cpu or cuda; CUDA_VISIBLE_DEVICES chooses the GPU")
    here = distributed.device().type
    if wanted is not None and wanted != here:
        # megatron-core takes the GPU wherever it sees one.
        hint = "; hide its GPUs with CUDA_VISIBLE_DEVICES=''" if here == "cuda" else ""
        raise ConfigError(f"device={wanted}, but this process runs on {here}{hint}")


def _only_rank() -> Ranks:
    """The ranks of a process that is alone; process groups are made at the first call.

    Raises:
        ConfigError: other processes take part.
    """
    world = dist.get_world_size() if dist.is_initialized() else environment_world_size()
    if world > 1:
        raise ConfigError(f"a model is loaded by one process alone, not by {world}")
    if parallel_state.model_parallel_is_initialized():
        return distributed.current_ranks()
    # Nothing is drawn: any seed will do.
    return distributed.initialize(ParallelConfig(), seed=0)


@contextlib.contextmanager
def _unchanged_generators() -> Iterator[None]:
    """Puts the global random generators back: a script that loads a model goes on drawing as without it."""
    on_gpu = torch.cuda.is_available()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpu_state = torch.cuda.get_rng_state() if on_gpu else None
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if gpu_state is not None:
            torch.cuda.set_rng_state(gpu_state)
