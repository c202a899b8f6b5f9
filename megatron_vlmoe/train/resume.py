"""Where a run starts: it goes on from its own checkpoint or that of `--load`, or takes the weights of another model.

What the folder of a run that goes on holds of later steps is set aside: nothing reads it, nothing is lost.
`checkpoints/set_aside/` and `best/set_aside/` have such checkpoints, `metrics.set_aside.jsonl` (see `JsonlWriter`) such
metrics.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Protocol

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch import Tensor

from megatron_vlmoe.config.errors import CheckpointError, ConfigError
from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.model.initial_values import (
    IMAGE_POSITIONS,
    TEXT_POSITIONS,
    resize_image_positions,
    resize_text_positions,
)
from megatron_vlmoe.runtime.distributed import from_rank_zero, is_rank_zero, union_over_ranks
from megatron_vlmoe.runtime.files import naming, write_text_atomic
from megatron_vlmoe.train.checkpoint import (
    changed_options,
    check_architecture,
    load_checkpoint,
    load_common,
    load_sharded,
    naming_checkpoint,
    warn_of_other_gates,
)
from megatron_vlmoe.train.checkpoint_files import (
    NEWEST,
    SET_ASIDE,
    TRACKER,
    TrainState,
    check_harmless,
    find_checkpoint,
    is_complete,
    is_optimizer_key,
    is_tracked,
    iteration_name,
    later_checkpoints,
)
from megatron_vlmoe.train.own_checkpoint import own_checkpoint
from megatron_vlmoe.train.rank_sums import verify_checkpoint
from megatron_vlmoe.train.setup import ModelParts, TrainingParts, checkpoint_metadata

log = logging.getLogger("megatron_vlmoe")

# They say how a run starts, and nothing of one that goes on.
START_OPTIONS = (
    *("checkpoint.load", "checkpoint.load_optimizer", "checkpoint.save_initial"),
    *("checkpoint.require", "model.init_std", "model.init_sincos_std", "model.init_qk_correlation"),
    *("model.layer_scale_init", "task.architecture", "contrastive.temperature"),
)
# Options in which the two models may differ: only positions and heads depend on them.
FREE = (
    *("model.image_size", "model.text_length", "model.pair_text_length"),
    "model.visual_vocab_size",
)


def resume(
    config: RunConfig,
    parts: TrainingParts,
    starts_from_load: bool,
    best_metric: str,
    own: Optional[Path] = None,
) -> TrainState:
    """Loads what a run goes on from, its own checkpoint or that of `--load`, and sets aside what is later.

    Args:
        starts_from_load: whether `--load` names a run to go on with.
        best_metric: name of the metric that chooses the best checkpoint; empty keeps none.
        own: what `own_checkpoint` has found, where that was asked for before.

    Returns:
        Where the run stands; step 0 if there is nothing to go on from.

    Raises:
        ConfigError: there is no such checkpoint, or it has more steps than the run.
        CheckpointError: a checkpoint is damaged or of something else.
    """
    checkpoint = config.checkpoint
    own = own or own_checkpoint(checkpoint)
    if own is not None and own == Path(checkpoint.save):
        raise ConfigError(f"--save {own}: is a checkpoint, not the folder of a run")
    # Other objectives have taken their weights from it by now.
    continues = bool(checkpoint.load) and starts_from_load and own is None
    other = (
        from_rank_zero(lambda: find_checkpoint(checkpoint.load, checkpoint.step))
        if continues
        else None
    )
    if continues and other is None:
        raise ConfigError(f"--load {checkpoint.load}: no checkpoint there")
    if own is None and not checkpoint.load:
        where = checkpoint.save or "without --save"
        if checkpoint.require:
            raise ConfigError(
                f"checkpoint.require=true, but there is no checkpoint to resume from: {where}"
            )
        if checkpoint.step not in ("", NEWEST):
            raise ConfigError(f"checkpoint.step={checkpoint.step}: no checkpoint there: {where}")
    # A run that was interrupted goes on from its own checkpoint, wherever it once started from.
    path = own or other
    state = TrainState()
    if other is not None and checkpoint.verify:
        verify_checkpoint(other, lambda: load_common(other))
    if path is not None:
        if own is not None:
            from_rank_zero(lambda: _tell_changes(own, config))
        state = load_checkpoint(path, config, parts, own is not None or checkpoint.load_optimizer)
        if state.step > config.train.steps:
            raise ConfigError(
                f"train.steps={config.train.steps}: {path} has {state.step} steps already; raise it, or go on from an "
                "earlier checkpoint with --checkpoint.step N"
            )
        if own is None and is_rank_zero():
            warn_of_other_gates(path, load_common(path).get("config", {}), config)
        log.info("loaded %s: starting after step %d", path, state.step)
    if checkpoint.save:
        if best_metric:
            loaded, best = state, Path(checkpoint.save) / "best"
            state = from_rank_zero(lambda: agree_with_best(best, loaded, best_metric))
        if own is not None:
            from_rank_zero(lambda: go_on_from(own.parent, state.step))
    return state


def _tell_changes(own: Path, config: RunConfig) -> None:
    changed = changed_options(load_common(own).get("config", {}), config)
    without_effect = [line for line in changed if line.partition(":")[0] in START_OPTIONS]
    effective = [line for line in changed if line not in without_effect]
    if effective:
        log.warning("going on in %s with other options: %s", own, "; ".join(effective))
    if without_effect:
        log.warning("no effect on a run that goes on from %s: %s", own, "; ".join(without_effect))


def agree_with_best(folder: Path, state: TrainState, metric: str) -> TrainState:
    """Forgets the best result so far if it is of another metric, or if SAVE/best does not have its weights.

    What SAVE/best has then is of later steps, or of another metric, and is set aside. Rank 0 calls it for all.

    Returns:
        The state, without a best result if there is none to compare with.
    """
    why = ""
    if state.best_metric not in ("", metric):
        why = f"it is one of {state.best_metric}, not of {metric}"
    elif later_checkpoints(folder, state.step) or not is_complete(
        folder / iteration_name(state.best_step)
    ):
        why = f"{folder} does not have the weights of step {state.best_step}"
    if state.best_value is not None and not why:
        go_on_from(folder, state.best_step)
        return state
    _drop_tracker(folder)
    _set_aside(folder, later_checkpoints(folder, -1))
    if state.best_value is None:
        return state
    log.warning("the best result so far does not count any more: %s", why)
    return dataclasses.replace(
        state, best_value=None, best_step=0, worse_evaluations=0, best_metric=""
    )


def go_on_from(root: Path, step: int) -> None:
    """Makes a step the last one of a checkpoint folder; later checkpoints are set aside. Rank 0 calls it for all.

    Raises:
        FileError: one cannot be moved, of those that others may not enter for example.
    """
    later = later_checkpoints(root, step)
    if not is_tracked(root, step):
        # First: a run that dies in between goes on from here too.
        _drop_tracker(root)
        write_text_atomic(root / TRACKER, f"{step}\n")
    _set_aside(root, later)


def _drop_tracker(root: Path) -> None:
    tracker = root / TRACKER
    if tracker.is_dir():
        os.replace(tracker, root / f"{TRACKER}.{SET_ASIDE}")
    else:
        tracker.unlink(missing_ok=True)


def _set_aside(root: Path, paths: Iterable[Path]) -> None:
    """Moves checkpoints to a folder beside them that nothing reads."""
    for path in paths:
        target, number = root / SET_ASIDE / path.name, 1
        with naming(target):
            while target.exists():
                number += 1
                target = target.with_name(f"{path.name}.{number}")
            target.parent.mkdir(exist_ok=True)
            os.replace(path, target)
        log.warning("%s is not what the run goes on from: it is now %s", path, target)


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
        optimizer = [key for key in self.left if is_optimizer_key(key)]
        left = [key for key in self.left if not is_optimizer_key(key)]
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
    """The weights of a checkpoint of any parallel layout (a `WeightSource`); every rank must make one.

    Args:
        path: its folder.
        in_parallel: see `load_sharded`.
        verify: compares its files with their sums.

    Raises:
        CheckpointError: the folder is no readable checkpoint, or a file is damaged.
    """

    def __init__(self, path: Path, in_parallel: bool = False, verify: bool = True) -> None:
        self.path = path
        self.in_parallel = in_parallel
        if verify:
            verify_checkpoint(path, lambda: load_common(path))

        def contents() -> tuple[dict[str, tuple[int, ...]], Mapping[str, Any]]:
            check_harmless(path)
            with naming_checkpoint(path):
                metadata = dist_checkpointing.load_tensors_metadata(str(path))
            shapes = {key: tuple(entry.global_shape) for key, entry in metadata.items()}
            return shapes, load_common(path).get("config", {})

        self.shapes, self.sections = from_rank_zero(contents)

    @torch.no_grad()
    def load(self, wanted: Mapping[str, ShardedTensor]) -> None:
        """See `WeightSource`."""
        places = {name: entry.data for name, entry in wanted.items()}
        loaded = load_sharded(
            dict(wanted), self.path, StrictHandling.RAISE_UNEXPECTED, self.in_parallel
        )
        for name, place in places.items():
            place.copy_(loaded[name].view_as(place))


@torch.no_grad()
def warm_start(
    source: WeightSource, config: RunConfig, parts: ModelParts, with_heads: bool
) -> WarmStart:
    """Loads the weights of another model: what fits is taken, positions are resized, new heads stay new.

    Args:
        source: the weights, of pretraining or of a task.
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
    new: set[str] = set()
    resized: dict[str, tuple[Tensor, Tensor]] = {}
    for index, chunk in enumerate(parts.chunks):
        state = chunk.sharded_state_dict(metadata=checkpoint_metadata())
        for name, entry in state.items():
            # Besides tensors there are only empty places for the state of other number formats.
            if not isinstance(entry, ShardedTensor):
                continue
            key, shape, theirs = entry.key, tuple(entry.global_shape), saved.get(entry.key)
            known.add(key)
            if key.startswith("heads.") and (theirs != shape or not with_heads):
                new.add(key)
                continue
            if theirs is None:
                raise CheckpointError(f"{path}: has no {key}, which this model needs")
            if theirs != shape:
                if key not in (IMAGE_POSITIONS, TEXT_POSITIONS):
                    raise CheckpointError(
                        f"{path}: {key} has shape {list(theirs)}, not {list(shape)}"
                    )
                # Position tables are replicas on all ranks of a stage.
                table = torch.empty(theirs, dtype=entry.data.dtype, device=entry.data.device)
                resized[key] = (entry.data, table)
                entry = ShardedTensor.from_rank_offsets(key, table, replica_id=entry.replica_id)
            wanted[f"{index}/{name}"] = entry
    source.load(wanted)
    if is_rank_zero():
        warn_of_other_gates(path, source.sections, config)
    for key, (target, table) in resized.items():
        if key == IMAGE_POSITIONS:
            target.copy_(resize_image_positions(table, target.shape[0] - 1))
        else:
            target.copy_(resize_text_positions(table, target))
    if isinstance(parts, TrainingParts):
        parts.optimizer.reload_model_params()
    all_known, all_new = union_over_ranks(known), union_over_ranks(new)
    all_resized = union_over_ranks(resized)
    return WarmStart(
        taken=tuple(sorted(all_known - all_new - all_resized)),
        resized=tuple(sorted(all_resized)),
        new=tuple(sorted(all_new)),
        left=tuple(sorted(saved.keys() - (all_known - all_new))),
    )
