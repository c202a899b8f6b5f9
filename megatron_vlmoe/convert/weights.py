"""A Hugging Face folder as a source of weights for a run of any layout, without a checkpoint between."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from megatron_vlmoe.config.errors import CheckpointError, ConvertError
from megatron_vlmoe.convert.importing import HuggingFaceModel, open_hugging_face


class HuggingFaceWeights:
    """The weights of a folder that an export or `save_pretrained` wrote (a `WeightSource` of train/warm_start.py).

    Args:
        folder: the folder.
        verify: compares its files with the checksums of the export; once per node is enough.

    Raises:
        CheckpointError: see `open_hugging_face`.
    """

    def __init__(self, folder: str | Path, verify: bool = True) -> None:
        self.path = Path(folder)
        try:
            self.model: HuggingFaceModel = open_hugging_face(folder, verify)
        except ConvertError as error:
            raise CheckpointError(str(error)) from None

    @property
    def sections(self) -> Mapping[str, Any]:
        """The configuration that the weights belong to."""
        return dataclasses.asdict(self.model.config)

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Key of our checkpoints and whole shape of every tensor."""
        return {key: tensor.shape for key, tensor in self.model.tensors.items()}

    @torch.no_grad()
    def load(self, wanted: Mapping[str, Any]) -> None:
        """Fills shards (megatron-core's ShardedTensor) in place; one whole tensor is in memory at a time.

        Raises:
            CheckpointError: a file cannot be read.
        """
        for shard in wanted.values():
            try:
                whole = self.model.tensors[shard.key].read()
            except ConvertError as error:
                raise CheckpointError(str(error)) from None
            skip = shard.prepend_axis_num
            part = tuple(
                slice(start, start + size)
                for start, size in zip(shard.global_offset[skip:], shard.local_shape)
            )
            shard.data.copy_(whole[part].view_as(shard.data))
