"""Starts a model from the weights of another: what fits is taken, positions are resized, new heads stay new."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch import Tensor

from megatron_vlmoe.config.errors import CheckpointError
from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.model.initial_values import resize_image_positions, resize_text_positions
from megatron_vlmoe.runtime.distributed import is_rank_zero, union_over_ranks
from megatron_vlmoe.train.checkpoint import (
    check_architecture,
    load_common,
    naming_checkpoint,
    warn_of_other_gates,
)
from megatron_vlmoe.train.setup import ModelParts, TrainingParts, checkpoint_metadata

log = logging.getLogger("megatron_vlmoe")

IMAGE_POSITIONS = "embedding.image.position"
TEXT_POSITIONS = "embedding.text.position"
# Options in which the two models may differ: only positions and heads depend on them.
FREE = (
    *("model.image_size", "model.text_length", "model.pair_text_length"),
    "model.visual_vocab_size",
)
HEADS = "heads."


@dataclass(frozen=True)
class WarmStart:
    """What became of every tensor; checkpoint keys in order.

    Args:
        taken: loaded as they are.
        resized: position tables that were fitted to another length.
        new: tensors of this model that the checkpoint does not have (heads only).
        left: tensors of the checkpoint that this model does not have (heads, optimizer).
    """

    taken: tuple[str, ...]
    resized: tuple[str, ...]
    new: tuple[str, ...]
    left: tuple[str, ...]

    def lines(self) -> list[str]:
        """For the log."""
        optimizer = [key for key in self.left if key.startswith("optimizer")]
        left = [key for key in self.left if not key.startswith("optimizer")]
        return [
            f"weights: {len(self.taken)} tensors taken, {len(self.resized)} resized, {len(self.new)} new, "
            f"{len(left)} left and {len(optimizer)} of the optimizer",
            *(f"  resized: {key}" for key in self.resized),
            *(f"  new: {key}" for key in self.new),
            *(f"  left: {key}" for key in left),
        ]


class WeightSource(Protocol):
    """Weights on disk under the names of our checkpoints."""

    path: Path
    """Names them in messages."""

    @property
    def sections(self) -> Mapping[str, Any]:
        """The configuration that they belong to, as nested dictionaries."""
        ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Key and whole shape of every tensor."""
        ...

    def load(self, wanted: Mapping[str, ShardedTensor]) -> None:
        """Fills the shards in place.

        Raises:
            CheckpointError: they cannot be read.
        """
        ...


class CheckpointWeights:
    """The weights of a checkpoint of any parallel layout.

    Args:
        path: iteration folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def sections(self) -> Mapping[str, Any]:
        """See `WeightSource`."""
        sections: Mapping[str, Any] = load_common(self.path).get("config", {})
        return sections

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """See `WeightSource`."""
        with naming_checkpoint(self.path):
            metadata = dist_checkpointing.load_tensors_metadata(str(self.path))
        return {key: tuple(entry.global_shape) for key, entry in metadata.items()}

    @torch.no_grad()
    def load(self, wanted: Mapping[str, ShardedTensor]) -> None:
        """See `WeightSource`."""
        places = {name: entry.data for name, entry in wanted.items()}
        with naming_checkpoint(self.path):
            loaded = dist_checkpointing.load(
                dict(wanted), str(self.path), strict=StrictHandling.RAISE_UNEXPECTED
            )
        for name, place in places.items():
            value: Tensor = loaded[name]
            place.copy_(value.view_as(place))


def warm_start(
    source: WeightSource, config: RunConfig, parts: ModelParts, with_heads: bool
) -> WarmStart:
    """Loads weights, of pretraining or of a task, into the model of this run.

    Args:
        source: the weights.
        config: of this run.
        parts: its model; the optimizer's copies follow.
        with_heads: whether the heads are taken too, where they fit.

    Raises:
        CheckpointError: if the architecture differs, a tensor other than a head is missing, a shape does not fit, or
            the checkpoint is damaged.
    """
    path, saved = source.path, source.shapes
    check_architecture(path, source.sections, config, FREE)
    wanted: dict[str, ShardedTensor] = {}
    known: set[str] = set()
    resized: dict[str, tuple[ShardedTensor, ShardedTensor]] = {}
    new: list[str] = []
    for index, chunk in enumerate(parts.chunks):
        state = chunk.sharded_state_dict(metadata=checkpoint_metadata())
        for name, entry in state.items():
            # Besides tensors there are only empty places for the state of other number formats.
            if not isinstance(entry, ShardedTensor):
                continue
            known.add(entry.key)
            is_head = entry.key.startswith(HEADS)
            if (is_head and not with_heads) or not _fits(path, entry, saved):
                new.append(entry.key)
                continue
            whole = _whole_table(entry, saved[entry.key])
            if whole is not None:
                resized[entry.key] = (entry, whole)
                entry = whole
            wanted[f"{index}/{name}"] = entry
    source.load(wanted)
    if is_rank_zero():
        warn_of_other_gates(path, source.sections, config)
    for entry, whole in resized.values():
        _resize(entry, whole)
    if isinstance(parts, TrainingParts):
        parts.optimizer.reload_model_params()
    all_known, all_new = union_over_ranks(known), union_over_ranks(new)
    taken = all_known - all_new - union_over_ranks(resized)
    return WarmStart(
        taken=tuple(sorted(taken)),
        resized=tuple(sorted(union_over_ranks(resized))),
        new=tuple(sorted(all_new)),
        left=tuple(sorted(saved.keys() - (all_known - all_new))),
    )


def _fits(path: Path, entry: ShardedTensor, saved: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the checkpoint has this tensor; False for heads that it lacks or has for another number of classes."""
    shape = tuple(entry.global_shape)
    theirs = saved.get(entry.key)
    is_head = entry.key.startswith(HEADS)
    if theirs is None:
        if is_head:
            return False
        raise CheckpointError(f"{path}: has no {entry.key}, which this model needs")
    if theirs == shape or entry.key in (IMAGE_POSITIONS, TEXT_POSITIONS):
        return True
    if is_head:
        return False
    raise CheckpointError(f"{path}: {entry.key} has shape {list(theirs)}, not {list(shape)}")


def _whole_table(entry: ShardedTensor, shape: tuple[int, ...]) -> ShardedTensor | None:
    """A place for a saved position table of another length; None where the entry can be loaded as it is."""
    if tuple(entry.global_shape) == shape:
        return None
    # Position tables are replicas on all ranks of a stage.
    data = torch.empty(shape, dtype=entry.data.dtype, device=entry.data.device)
    return ShardedTensor.from_rank_offsets(entry.key, data, replica_id=entry.replica_id)


@torch.no_grad()
def _resize(entry: ShardedTensor, whole: ShardedTensor) -> None:
    target, table = entry.data, whole.data
    if entry.key == IMAGE_POSITIONS:
        target.copy_(resize_image_positions(table, target.shape[0] - 1))
    else:
        target.copy_(resize_text_positions(table, target))
