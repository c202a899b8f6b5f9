"""The checkpoint that a run goes on from, with what becomes of it if a file of it is damaged."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from megatron_vlmoe.config.errors import CheckpointError
from megatron_vlmoe.config.schema import CheckpointConfig
from megatron_vlmoe.runtime.distributed import from_rank_zero
from megatron_vlmoe.train.checkpoint import load_common
from megatron_vlmoe.train.checkpoint_files import (
    checkpoint_root,
    find_checkpoint,
    is_complete,
    iterations,
    tracked_step,
)
from megatron_vlmoe.train.rank_sums import damage

log = logging.getLogger("megatron_vlmoe")


def own_checkpoint(checkpoint: CheckpointConfig) -> Optional[Path]:
    """The checkpoint in `--save` that the run goes on from, verified; None if there is none. Every rank must call it.

    Rank 0 looks for it, and all ranks read it. With `checkpoint.on_damage` previous, the newest good one before a
    damaged one takes its place; whoever goes on from it sets the damaged one aside, as all later ones.

    Raises:
        ConfigError: see `find_checkpoint`.
        CheckpointError: it is damaged, and so are all earlier ones, or they are not asked for.
    """
    if not checkpoint.save:
        return None

    def find() -> tuple[Optional[Path], str, list[Path]]:
        """The checkpoint, or what is wrong with it, and those before it, the newest first."""
        root = checkpoint_root(checkpoint.save)
        try:
            path, flaw = find_checkpoint(checkpoint.save, checkpoint.step), ""
            before = _step(path) if path is not None and path != Path(checkpoint.save) else 0
        except CheckpointError as error:
            if checkpoint.on_damage == "stop":
                raise
            path, flaw = None, str(error)
            before = int(checkpoint.step) if checkpoint.step.isdecimal() else tracked_step(root)
        earlier = [p for step, p in iterations(root) if step < before and is_complete(p)]
        return path, flaw, earlier[::-1]

    path, flaw, earlier = from_rank_zero(find)
    if path is not None and checkpoint.verify and path != Path(checkpoint.save):
        flaw = _damage(path)
    if not flaw:
        return path
    good = _first_good(earlier, checkpoint.verify)
    if good is None:
        raise CheckpointError(f"{flaw}; there is no good checkpoint before it")
    if checkpoint.on_damage == "stop":
        raise CheckpointError(
            f"{flaw}; the last good checkpoint is {good.name}, from which --checkpoint.on_damage previous goes on"
        )
    log.warning("%s; going on from %s, the newest good checkpoint before it", flaw, good)
    return good


def _first_good(paths: Sequence[Path], verify: bool) -> Optional[Path]:
    return next((path for path in paths if not verify or not _damage(path)), None)


def _damage(path: Path) -> str:
    return damage(path, lambda: load_common(path)) or from_rank_zero(lambda: _misnamed(path))


def _misnamed(path: Path) -> str:
    """What is wrong where a folder of one step has the checkpoint of another: later steps would be set aside."""
    try:
        step = load_common(path).get("train_state", {}).get("step", 0)
    except CheckpointError as error:
        return str(error)
    return "" if step == _step(path) else f"{path}: holds the checkpoint of step {step}"


def _step(path: Path) -> int:
    return int(path.name.removeprefix("iter_"))
