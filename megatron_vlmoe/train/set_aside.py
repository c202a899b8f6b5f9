"""What a run folder holds of later steps than the run goes on from is set aside: nothing reads it, nothing is lost.

`checkpoints/set_aside/` and `best/set_aside/` have such checkpoints, `metrics.set_aside.jsonl` (see `JsonlWriter`) such
metrics.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterable
from pathlib import Path

from megatron_vlmoe.runtime.distributed import barrier, is_rank_zero
from megatron_vlmoe.runtime.files import write_text_atomic
from megatron_vlmoe.train.checkpoint_files import (
    SET_ASIDE,
    TRACKER,
    TrainState,
    is_complete,
    is_tracked,
    iteration_name,
    later_checkpoints,
)

log = logging.getLogger("megatron_vlmoe")


def agree_with_best(folder: Path, state: TrainState, metric: str) -> TrainState:
    """Forgets the best result so far if it is of another metric, or if SAVE/best does not have its weights.

    What SAVE/best has then is of later steps, or of another metric, and is set aside. Every rank must call it.

    Args:
        folder: SAVE/best.
        state: where the run goes on from.
        metric: name of the metric that chooses the best checkpoint.

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
    barrier()
    if state.best_value is not None and not why:
        go_on_from(folder, state.best_step)
        return state
    if is_rank_zero():
        _drop_tracker(folder)
        _set_aside(folder, later_checkpoints(folder, -1))
    if state.best_value is None:
        return state
    if is_rank_zero():
        log.warning("the best result so far does not count any more: %s", why)
    return dataclasses.replace(
        state, best_value=None, best_step=0, worse_evaluations=0, best_metric=""
    )


def go_on_from(root: Path, step: int) -> None:
    """Makes a step the last one of a checkpoint folder; later checkpoints are set aside. Every rank must call it."""
    later = later_checkpoints(root, step)
    barrier()
    if not is_rank_zero():
        return
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
        while target.exists():
            number += 1
            target = target.with_name(f"{path.name}.{number}")
        target.parent.mkdir(exist_ok=True)
        os.replace(path, target)
        log.warning("%s is not what the run goes on from: it is now %s", path, target)
