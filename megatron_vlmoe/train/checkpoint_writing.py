"""How the content of a checkpoint is handed to the processes that write it: what training waits for."""

from __future__ import annotations

import inspect
import queue
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch import Tensor

from megatron_vlmoe.runtime.distributed import agree, device
from megatron_vlmoe.runtime.files import sync
from megatron_vlmoe.runtime.forked_memory import SharedPages
from megatron_vlmoe.train.finite import not_finite


@dataclass
class ContentSaver:
    """Saves one content after another, and plans only what it has not planned before.

    Which rank writes what, and that together they write everything once, follows from the structure of the content:
    keys, shapes, types and replicas on all ranks. megatron-core exchanges and checks it in every save unless told that
    it stays; here it is told so by structure, so that a save of another kind in between is planned by itself.
    """

    # Structures, each with the strategy that knows its plan.
    planned: list[tuple[list[Any], Any]] = field(default_factory=list)

    def save(
        self,
        content: dict[str, Any],
        folder: Path,
        metadata: Mapping[str, Any],
        in_background: bool,
        not_written: Sequence[Tensor] = (),
    ) -> Any:
        """Writes a sharded state dict, which is changed; every rank must call it.

        Args:
            content: what `dist_checkpointing.save` takes.
            folder: exists and is empty.
            metadata: of the content.
            in_background: nothing is written yet.
            not_written: tensors that the process which writes in the background never reads.

        Returns:
            In the background the request that writes, for an `AsyncCallsQueue`. Until its process has been forked the
            content must not change; from then on it may.

        Raises:
            Exception: of whatever type, or CheckpointException, which is none, if writing fails.
        """
        apply_factories(content)
        sharded = [value for value in nested_values(content) if isinstance(value, ShardedBase)]
        structure = [_structure(value) for value in sharded]
        strategy = next((known for own, known in self.planned if own == structure), None)
        is_new = agree(strategy is None)
        if strategy is None or is_new:
            strategy = _planning_strategy()
            self.planned = [(own, known) for own, known in self.planned if own != structure]
            self.planned.append((structure, strategy))
        for value in sharded:
            if isinstance(value, ShardedTensor) and value.data is not None:
                value.data = with_own_storage(value.data)
        # From 0.19 on its own background saves have to be asked for: else nvidia-resiliency-ext writes.
        takes = inspect.signature(dist_checkpointing.save).parameters
        own = {"async_strategy": "mcore"} if "async_strategy" in takes else {}
        request = dist_checkpointing.save(
            content,
            str(folder),
            strategy,
            validate_access_integrity=is_new,
            async_sharded_save=in_background,
            content_metadata=dict(metadata),
            **own,
        )
        if not is_forked(in_background) or request.async_fn is None:
            return request
        # megatron-core's function has the transforms of what is written as its first argument. There is nothing to copy
        # to the host.
        writer = _ForkedWriter(request.async_fn.args[0], not_written)
        return request._replace(async_fn=writer, preload_fn=None)


def is_forked(in_background: bool) -> bool:
    """Whether what is written is read only by the process that writes it, which also looks for values not finite."""
    return in_background and device().type == "cpu"


def _planning_strategy() -> Any:
    """Exchanges plans in its first saves, and then knows them."""
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, cached_metadata=True)
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    if group.size() == 1:
        return strategy
    # What data-parallel ranks hold in common is divided among them, where rank 0 would write it all.
    return FullyParallelSaveStrategyWrapper(strategy, group, do_cache_distribution=True)


def _structure(value: ShardedBase) -> list[Any]:
    """All of a part of the content but what it holds."""
    return [type(value), *(item for name, item in vars(value).items() if name != "data")]


def with_own_storage(tensor: Tensor) -> Tensor:
    """The same memory as a tensor whose storage ends where it does; a tensor on a GPU, or with gaps, as it is.

    Optimizers and gradient buffers keep parameters as pieces of large buffers. torch.save writes the storage of a
    tensor whole, so megatron-core first copies every piece, before it forks the process that writes. That process has
    the memory of the moment of the fork in any case.
    """
    is_whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    if tensor.device.type != "cpu" or is_whole or not tensor.is_contiguous():
        return tensor
    as_bytes = tensor.detach().reshape(-1).view(torch.uint8)
    return torch.from_numpy(as_bytes.numpy()).view(tensor.dtype).view(tensor.shape)


@dataclass(frozen=True)
class _ForkedWriter:
    """What the process that was forked to write does: all files in it, by megatron-core's function for one.

    megatron-core forks a process more for every file, each of which has all memory as it was. As long as one of them
    has a page, training copies it when it writes there. This one gives every page back when it is in the file, before
    the files are synced to the disk; gradients, which the next step writes first, at once.
    """

    transforms: list[Any]
    not_written: Sequence[Tensor]

    def __call__(self, rank: int, files: Sequence[Any], results: Any) -> None:
        # Threads of the parent, on which a parallel loop would wait, are not here.
        torch.set_num_threads(1)
        tensors = [tensor for *_, (_, entries) in files for _, tensor in entries]
        pages = SharedPages([*tensors, *self.not_written])
        for tensor in self.not_written:
            pages.give_back(tensor)
        written: Any = {}
        for number, (path, name, (objects, entries)) in enumerate(files):
            outcome: Any = queue.Queue()
            unfinished: Any = queue.Queue()
            unfinished.put(number)
            file = (path, name, (objects, _given_back(entries, pages)))
            FileSystemWriterAsync.write_preloaded_data(
                self.transforms, number, file, outcome, unfinished, use_fsync=False
            )
            written[number] = outcome.get_nowait()[1]
        try:
            for path, *_ in files:
                sync(path)
        except OSError as error:
            written[0] = error
        failed = [result for result in written.values() if isinstance(result, Exception)]
        results.put(failed[0] if failed else written)


def _given_back(entries: Sequence[Any], pages: SharedPages) -> Iterator[Any]:
    """What is to be written with its tensor, whose pages are given back when the next is asked for.

    Raises:
        TrainingError: a tensor is not finite.
    """
    for item, tensor in entries:
        if tensor.is_floating_point() and tensor.numel() and not tensor.abs().max().isfinite():
            raise not_finite(item.index.fqn)
        yield item, tensor
        pages.give_back(tensor)
