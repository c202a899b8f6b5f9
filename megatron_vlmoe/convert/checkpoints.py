"""Checkpoints without a process group, a GPU, megatron-core or the layout of the run, one tensor at a time.

They are read whatever layout wrote them, and those that are written here load at any layout.
"""

from __future__ import annotations

import dataclasses
import io
import json
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Optional

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import (
    CheckpointException,
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
)
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

from megatron_vlmoe.config.command_line import from_dict
from megatron_vlmoe.config.errors import ConvertError, FileError, conversion_errors
from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.convert.tensors import LazyTensor
from megatron_vlmoe.planning.parameters import checkpoint_shapes
from megatron_vlmoe.runtime.files import folder_atomic, write_text_atomic
from megatron_vlmoe.runtime.sums import SUMS_FILE, file_sha256, write_sums
from megatron_vlmoe.train.checkpoint_files import (
    COMMON_FILE,
    CONTENT_METADATA,
    TRACKER,
    TrainState,
    check_harmless,
    checkpoint_root,
    common_content,
    find_best_or_last,
    has_checkpoints,
    is_optimizer_key,
    iteration_name,
    of_common,
    one_line,
    stored_format,
)
from megatron_vlmoe.train.checkpoint_sums import NOTE, check_files


class CheckpointReader:
    """A checkpoint on disk.

    Args:
        location: run, checkpoint or iteration folder. Of a fine-tuning run it is the best checkpoint where there is
            one, else the last.
        verify: compares all its files with their sums first.

    Raises:
        ConvertError: there is no checkpoint, it is damaged, or it is not of this project.
    """

    def __init__(self, location: str | Path, verify: bool = True) -> None:
        self.path = resolve_checkpoint(location)
        if verify:
            with conversion_errors():
                check_files(self.path, self._read_common)
        self._reader = _CachingReader(str(self.path))
        with conversion_errors():
            check_harmless(self.path)
        try:
            metadata = self._reader.read_metadata()
        except (Exception, CheckpointException) as error:
            raise ConvertError(f"{self.path}: no readable .metadata ({one_line(error)})") from None
        file = self.path / COMMON_FILE
        place = file if file.is_file() else self.path
        self.common = self._read_common()
        fields = {"config", "train_state"}
        if not isinstance(self.common, dict) or not fields <= self.common.keys():
            raise ConvertError(f"{place}: not of a checkpoint of this project")
        options = self.common["config"]
        root: RunConfig = FinetuneConfig() if "task" in options else RunConfig()
        with conversion_errors():
            self.config = from_dict(options, root, str(self.path))
        self._entries = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        stored = {
            key: LazyTensor(tuple(entry.size), entry.properties.dtype, partial(self._read, key))
            for key, entry in self._entries.items()
        }
        self.tensors = {k: t for k, t in stored.items() if not is_optimizer_key(k)}
        """The model's tensors by checkpoint key."""
        self.optimizer_tensors = {k: t for k, t in stored.items() if is_optimizer_key(k)}
        """The optimizer's, as `optimizer.state.{param,exp_avg,exp_avg_sq}.KEY`; or its buckets, under names that end
        with one of the three kinds, where `optimizer_format` is dp_reshardable."""
        self.optimizer_format = stored_format(self.common)
        self.num_shards = {key: len(entry.chunks) for key, entry in self._entries.items()}
        """Pieces in which each tensor was written."""

    def _read_common(self) -> dict[str, Any]:
        file = self.path / COMMON_FILE
        try:
            content = io.BytesIO(common_content(self.path))
            common = of_common(torch.load(content, map_location="cpu", weights_only=True))
        except Exception as error:
            place = file if file.is_file() else self.path
            raise ConvertError(f"{place}: not readable ({one_line(error)})") from None
        return common

    @property
    def train_state(self) -> TrainState:
        """Where the run stood. Raises ConvertError."""
        try:
            return TrainState(**self.common["train_state"])
        except TypeError as error:
            raise ConvertError(f"{self.path}: no state of training ({error})") from None

    def _read(self, key: str) -> Tensor:
        entry = self._entries[key]
        place = torch.empty(entry.size, dtype=entry.properties.dtype)
        try:
            with warnings.catch_warnings():
                # torch remarks that there is no process group; none is meant to be.
                warnings.simplefilter("ignore", UserWarning)
                dcp.load({key: place}, storage_reader=self._reader, no_dist=True)
        except (Exception, CheckpointException) as error:
            raise ConvertError(f"{self.path}: {key}: {one_line(error)}") from None
        return place


class _CachingReader(FileSystemReader):
    """Reads the index once, not once per tensor."""

    _metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index of the checkpoint."""
        if self._metadata is None:
            self._metadata = super().read_metadata(*args, **kwargs)
        return self._metadata

    def reset(self, checkpoint_id: Any = None) -> None:
        """Starts another load; the index stays."""
        metadata = self._metadata
        super().reset(checkpoint_id)
        self._metadata = metadata


def resolve_checkpoint(location: str | Path) -> Path:
    """The iteration folder that a run, checkpoint or iteration folder names.

    Raises:
        ConvertError: there is none, or it is incomplete.
    """
    with conversion_errors():
        path = find_best_or_last(location)
    if path is None:
        raise ConvertError(f"{location}: no checkpoint there")
    return path


def extra_state_keys(config: RunConfig) -> list[str]:
    """Keys of the empty extra states that megatron-core stores for its parallel linear layers."""
    layers = (
        *("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"),
        *("text.linear", "image.linear"),
    )
    weights = (key.removesuffix(".weight") for key in checkpoint_shapes(config))
    return [f"{key}._extra_state/shard_0_1" for key in weights if key.endswith(layers)]


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
    config: RunConfig,
    state: Optional[TrainState] = None,
    optimizer: Optional[Mapping[str, Any]] = None,
    overwrite: bool = False,
) -> Path:
    """Writes ``root/iter_N`` whole or not at all, then the tracker file; returns the former.

    Args:
        root: checkpoint folder; made where it is missing.
        tensors: the model's by checkpoint key, and the optimizer's where it travels.
        config: of the run.
        state: step and counters; None is step 0.
        optimizer: what the checkpoint holds of the optimizer besides tensors (`optimizer` and `scheduler`); None
            makes a checkpoint of weights that training starts from with a fresh optimizer.
        overwrite: replaces a checkpoint that is there.

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
        NOTE: SUMS_FILE,
    }
    try:
        with folder_atomic(target) as temporary:
            _write_tensors(temporary, tensors, config)
            torch.save(common, temporary / COMMON_FILE)
            (temporary / MARKER_FILE).write_text(json.dumps(MARKER))
            files = [path for path in temporary.iterdir() if path.is_file()]
            write_sums(temporary, {path.name: file_sha256(path) for path in files})
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


def _write_tensors(folder: Path, tensors: Mapping[str, LazyTensor], config: RunConfig) -> None:
    content: dict[str, Any] = {
        key: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for key, tensor in tensors.items()
    }
    # What megatron-core itself stores for a layer without state.
    content |= {key: [None] for key in extra_state_keys(config)}
    # Nothing is copied ahead: a tensor is given back before the next one is read.
    writer = FileSystemWriter(
        str(folder), thread_count=1, sync_files=False, per_thread_copy_ahead=0
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            dcp.save(content, storage_writer=writer, planner=_LazyPlanner(tensors), no_dist=True)
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0] if error.failures else error
        if not isinstance(cause, ConvertError):
            cause = ConvertError(f"{folder}: {one_line(error)}")
        raise cause from None


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
