"""Runs the batch of a step that went wrong again, in one process, and looks where the first wrong number comes from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_vlmoe.config.command_line import from_dict, read_yaml
from megatron_vlmoe.config.errors import ConfigError, DataError
from megatron_vlmoe.config.schema import ParallelConfig, RunConfig
from megatron_vlmoe.data.batches import PretrainData
from megatron_vlmoe.data.collate import BatchShare
from megatron_vlmoe.data.random_batches import RandomData
from megatron_vlmoe.model.heads import VocabHead
from megatron_vlmoe.runtime.distributed import destroy, device, initialize, resolve_precision
from megatron_vlmoe.runtime.json_files import read_versioned
from megatron_vlmoe.train.checkpoint import load_checkpoint, load_common
from megatron_vlmoe.train.checkpoint_files import find_checkpoint
from megatron_vlmoe.train.health import FORMAT_VERSION
from megatron_vlmoe.train.pretrain import pretraining_objective
from megatron_vlmoe.train.rank_sums import verify_checkpoint
from megatron_vlmoe.train.setup import TrainingParts, build_training
from megatron_vlmoe.train.step import StepRunner


@dataclasses.dataclass(frozen=True)
class Event:
    """What RUN/health/step_N.json says of a step.

    Args:
        micro_batches: number of every micro-batch of the step, counted over the run, and the ranks that had it.
    """

    step: int
    reason: str
    checkpoint: str
    random_data: bool
    micro_batches: dict[int, list[int]]

    @classmethod
    def read(cls, path: Path) -> Event:
        """Raises DataError, naming the file."""

        def make(raw: dict[str, Any]) -> Event:
            found: dict[int, list[int]] = {}
            for rank in raw["ranks"]:
                for batch in rank["micro_batches"]:
                    number = int(batch["micro_batch"])
                    if not 0 <= number < 2**63:
                        raise ValueError(f"micro_batch {number}")
                    found.setdefault(number, []).append(int(rank["rank"]))
            words = str(raw["reason"]), str(raw["checkpoint"]), bool(raw["random_data"])
            return cls(int(raw["step"]), *words, dict(sorted(found.items())))

        return read_versioned(path, FORMAT_VERSION, "the record of a step", "not found", make)


def replay(path: Path, load: str) -> Iterator[str]:
    """Forward and backward of every micro-batch of a step, each by itself, with the weights of a checkpoint.

    A micro-batch has its samples, masks and noise of then. Where experts have a limited capacity, a run with tensor
    parallelism may have dropped other tokens.

    Args:
        path: RUN/health/step_N.json of a pretraining run.
        load: run or checkpoint folder; empty: the checkpoint that the step was nearest to.

    Yields:
        Lines for the screen.

    Raises:
        DataError: the file is damaged, or a dataset is not what it was.
        ConfigError: there is no checkpoint, or the run is one of a task.
    """
    event = Event.read(path)
    config = _config_of(path.resolve().parent.parent)
    checkpoint = find_checkpoint(load or event.checkpoint) if load or event.checkpoint else None
    if checkpoint is None:
        raise ConfigError(f"{path}: there was no checkpoint before step {event.step}; give --load")
    ranks = initialize(config.parallel, config.train.seed, config.train.deterministic)
    data = (RandomData if event.random_data else PretrainData.open)(config, BatchShare.of(ranks))
    config = data.config
    parts = build_training(config, resolve_precision(config.train))
    if data.image_tokenizer is not None:
        data.image_tokenizer.to(device())
    verify_checkpoint(checkpoint, lambda: load_common(checkpoint))
    load_checkpoint(checkpoint, config, parts, with_optimizer=False)
    yield f"step {event.step}: {event.reason}"
    yield f"weights: {checkpoint}"
    (model,) = parts.chunks
    if broken := [name for name, value in model.named_parameters() if not _is_finite(value)]:
        yield f"weights that are not finite: {_listed(broken)}"
    objective = pretraining_objective(config, ranks, data, 1, data.image_tokenizer)
    runner = StepRunner(config, parts, ranks)
    for number, owners in event.micro_batches.items():
        with _first_not_finite(model) as first:
            runner.start_step()
            results = runner.train(iter(data.loader("train", number, 1)), 1, objective)
        losses = {name: float(value) for name, value in results[0].items()}
        said = ", ".join(f"{name} {value:.4f}" for name, value in losses.items())
        norm, bad = _gradients(parts)
        yield (
            f"micro-batch {number} (rank {', '.join(map(str, owners))}): {said}, gradient norm {norm:.4g}"
        )
        if first:
            yield f"  first output that is not finite: {first[0]}"
        elif not all(map(math.isfinite, losses.values())):
            yield "  all outputs of the model are finite: it is a loss"
        if bad:
            yield f"  gradients that are not finite: {_listed(bad)}"
    destroy()


def _config_of(run: Path) -> RunConfig:
    """The options of a run, for one process."""
    path = run / "config.yaml"
    content = read_yaml(path, str(path))
    if not isinstance(content, dict):
        raise DataError(f"{path}: damaged: it has no options")
    if "task" in content:
        raise ConfigError(f"{path}: is of a downstream task; replay is for pretraining")
    config = from_dict(content, RunConfig(), where=str(path))
    return dataclasses.replace(
        config,
        parallel=ParallelConfig(overlap_grad_reduce=False),
        data=dataclasses.replace(config.data, num_workers=0),
        train=dataclasses.replace(config.train, cuda_graph=False, compile=False),
        checkpoint=dataclasses.replace(config.checkpoint, save="", load=""),
    )


@contextmanager
def _first_not_finite(model: nn.Module) -> Iterator[list[str]]:
    """Inside, notes the modules whose outputs are not finite, in the order in which they end."""
    found: list[str] = []

    def hook(name: str) -> Any:
        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(module, VocabHead):
                # What pads a vocabulary is -inf.
                output = output[..., : module.valid_rows]
            if not all(_is_finite(value) for value in _tensors(output)):
                found.append(f"{name} ({type(module).__name__})")

        return note

    handles = [
        module.register_forward_hook(hook(name)) for name, module in model.named_modules() if name
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        yield from _tensors(list(vars(value).values()) if hasattr(value, "__dict__") else [])
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _is_finite(value: Tensor) -> bool:
    return not value.is_floating_point() or bool(torch.isfinite(value).all())


def _gradients(parts: TrainingParts) -> tuple[float, list[str]]:
    """Norm over all parameters, and the names of those whose gradient is not finite."""
    total, bad = 0.0, []
    for chunk in parts.chunks:
        for name, parameter in chunk.named_parameters():
            gradient = getattr(parameter, "main_grad", None)
            if parameter.requires_grad and gradient is not None:
                total += float(gradient.double().square().sum())
                if not _is_finite(gradient):
                    bad.append(name)
    return math.sqrt(total), bad


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more
