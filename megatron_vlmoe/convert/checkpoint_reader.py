"""Whole tensors of a checkpoint of any parallel layout, one at a time.

Needs torch alone: no process group, no GPU, no megatron-core, and not the layout of the run.
"""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_vlmoe.config.command_line import from_dict
from megatron_vlmoe.config.errors import CheckpointError, ConfigError, ConvertError
from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.convert.tensors import LazyTensor
from megatron_vlmoe.train.checkpoint_files import TrainState, find_best_or_last, one_line

COMMON_FILE = "common.pt"
OPTIMIZER = "optimizer."
EXTRA_STATE = "._extra_state/"


class CheckpointReader:
    """A checkpoint on disk.

    Args:
        location: run, checkpoint or iteration folder. Of a fine-tuning run it is the best checkpoint where there is
            one, else the last.

    Raises:
        ConvertError: there is no checkpoint, it is damaged, or it is not of this project.
    """

    def __init__(self, location: str | Path) -> None:
        self.path = resolve_checkpoint(location)
        self._reader = _CachingReader(str(self.path))
        try:
            metadata = self._reader.read_metadata()
        except (Exception, CheckpointException) as error:
            raise ConvertError(f"{self.path}: no readable .metadata ({one_line(error)})") from None
        self.common = _read_common(self.path)
        self.config = _config_of(self.path, self.common)
        stored = {
            key: LazyTensor(tuple(entry.size), entry.properties.dtype, partial(self._read, key))
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self.tensors = {k: t for k, t in stored.items() if not k.startswith(OPTIMIZER)}
        """The model's tensors by checkpoint key."""
        self.optimizer_tensors = {k: t for k, t in stored.items() if k.startswith(OPTIMIZER)}
        """The optimizer's, as `optimizer.state.{param,exp_avg,exp_avg_sq}.KEY`."""
        self.num_shards = {
            key: len(entry.chunks)
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        """Pieces in which each tensor was written."""

    @property
    def train_state(self) -> TrainState:
        """Where the run stood."""
        return TrainState(**self.common["train_state"])

    def _read(self, key: str) -> Tensor:
        entry = self._reader.read_metadata().state_dict_metadata[key]
        assert isinstance(entry, TensorStorageMetadata)
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
    try:
        path = find_best_or_last(location)
    except CheckpointError as error:
        raise ConvertError(str(error)) from None
    if path is None:
        raise ConvertError(f"{location}: no checkpoint there")
    return path


def _read_common(path: Path) -> dict[str, Any]:
    file = path / COMMON_FILE
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ConvertError(f"{file}: not readable ({one_line(error)})") from None
    if not isinstance(content, dict) or not {"config", "train_state"} <= content.keys():
        raise ConvertError(f"{file}: not of a checkpoint of this project")
    return content


def _config_of(path: Path, common: dict[str, Any]) -> RunConfig:
    root: RunConfig = FinetuneConfig() if "task" in common["config"] else RunConfig()
    try:
        return from_dict(common["config"], root, str(path))
    except ConfigError as error:
        raise ConvertError(str(error)) from None
