"""Checkpoints that training loads at any layout, written without megatron-core, tensor by tensor."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Optional

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

from megatron_vlmoe.config.errors import ConvertError, FileError
from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.convert.checkpoint_reader import COMMON_FILE
from megatron_vlmoe.convert.tensors import LazyTensor
from megatron_vlmoe.runtime.files import folder_atomic, write_text_atomic
from megatron_vlmoe.train.checkpoint_files import (
    CONTENT_METADATA,
    TRACKER,
    TrainState,
    checkpoint_root,
    has_checkpoints,
    iteration_name,
    one_line,
)

# megatron-core's marker of a complete checkpoint, and which code reads it.
MARKER_FILE = "metadata.json"
MARKER = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def write_checkpoint(
    root: Path,
    tensors: Mapping[str, LazyTensor],
    extra_states: Iterable[str],
    config: RunConfig,
    state: Optional[TrainState] = None,
    optimizer: Optional[Mapping[str, Any]] = None,
    overwrite: bool = False,
) -> Path:
    """Writes ``root/iter_N`` whole or not at all, then the tracker file.

    Args:
        root: checkpoint folder; made where it is missing.
        tensors: the model's by checkpoint key, and the optimizer's where it travels.
        extra_states: keys of the empty states that megatron-core's linear layers keep.
        config: of the run; goes into the checkpoint.
        state: step and counters; None is step 0.
        optimizer: what the checkpoint holds of the optimizer besides tensors (`optimizer` and `scheduler`); None
            makes a checkpoint of weights that training starts from with a fresh optimizer.
        overwrite: replaces a checkpoint that is there.

    Returns:
        The iteration folder.

    Raises:
        ConvertError: see `check_output`; or a tensor cannot be read or written; nothing is left behind.
    """
    state = state or TrainState()
    target = root / iteration_name(state.step)
    check_output(root, overwrite)
    common = {
        **(optimizer or {}),
        "train_state": dataclasses.asdict(state),
        "config": dataclasses.asdict(config),
        "content_metadata": dict(CONTENT_METADATA),
    }
    try:
        with folder_atomic(target) as temporary:
            _write_tensors(temporary, tensors, extra_states)
            torch.save(common, temporary / COMMON_FILE)
            (temporary / MARKER_FILE).write_text(json.dumps(MARKER))
        write_text_atomic(root / TRACKER, f"{state.step}\n")
    except (ConvertError, FileError):
        raise
    except (OSError, RuntimeError, CheckpointException) as error:
        raise ConvertError(f"{target}: {one_line(error)}") from None
    return target


def check_output(root: Path, overwrite: bool = False) -> None:
    """Finds out before anything is read whether a checkpoint may be written to a folder.

    Raises:
        ConvertError: there is one already; or it is the folder of a run, whose own checkpoints (in a folder below)
            would not be found any more beside one that is written here.
    """
    if has_checkpoints(root) and not overwrite:
        raise ConvertError(f"{root}: has a checkpoint already (--overwrite replaces it)")
    below = checkpoint_root(root)
    if below != root and has_checkpoints(below):
        raise ConvertError(f"{root}: is the folder of a run with checkpoints: name another")


def _write_tensors(
    folder: Path, tensors: Mapping[str, LazyTensor], extra_states: Iterable[str]
) -> None:
    content: dict[str, Any] = {
        key: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for key, tensor in tensors.items()
    }
    # What megatron-core itself stores for a layer without state.
    content |= {key: [None] for key in extra_states}
    planner = _LazyPlanner(tensors)
    # Nothing is copied ahead: a tensor is given back before the next one is read.
    writer = FileSystemWriter(
        str(folder), thread_count=1, sync_files=False, per_thread_copy_ahead=0
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            dcp.save(content, storage_writer=writer, planner=planner, no_dist=True)
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0] if error.failures else error
        raise (
            cause
            if isinstance(cause, ConvertError)
            else ConvertError(f"{folder}: {one_line(error)}")
        ) from None


class _LazyPlanner(DefaultSavePlanner):
    """Plans by shape and reads a tensor when its turn to be written has come.

    torch keeps every tensor of a file until the file is complete, so the memory of a written one is taken from it.
    """

    def __init__(self, tensors: Mapping[str, LazyTensor]) -> None:
        super().__init__(flatten_state_dict=False)
        self.tensors = tensors
        self._written: Optional[Tensor] = None

    def resolve_data(self, write_item: WriteItem) -> Any:
        """The values of one item of the plan."""
        if write_item.type == WriteItemType.BYTE_IO:
            return super().resolve_data(write_item)
        if self._written is not None:
            self._written.untyped_storage().resize_(0)
        wanted = self.tensors[write_item.index.fqn]
        value = wanted.read()
        if tuple(value.shape) != wanted.shape:
            raise ConvertError(
                f"{write_item.index.fqn}: has shape {list(value.shape)}, not {list(wanted.shape)}"
            )
        # Memory of its own: what was read may be a part of another tensor, or of a mapped file.
        self._written = torch.empty(wanted.shape, dtype=wanted.dtype).copy_(value)
        return self._written
