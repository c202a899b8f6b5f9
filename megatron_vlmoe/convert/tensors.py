"""Tensors that are read when they are written: a converter holds one at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from megatron_vlmoe.config.errors import ConvertError
from megatron_vlmoe.runtime.progress import Progress

Item = TypeVar("Item")


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of known shape whose values come when they are asked for.

    Args:
        shape: of the tensor.
        dtype: of the tensor.
        read: makes it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return self.numel * self.dtype.itemsize

    @property
    def numel(self) -> int:
        """Number of values."""
        return torch.Size(self.shape).numel()


def type_name(dtype: torch.dtype) -> str:
    """As people write it: `float32`."""
    return str(dtype).removeprefix("torch.")


def check_tensors(
    where: Path,
    tensors: Mapping[str, LazyTensor],
    shapes: Mapping[str, tuple[int, ...]],
    said_by: str,
    other_side: str,
) -> None:
    """Compares what is there with what a configuration asks for.

    Args:
        where: the folder, for messages.
        tensors: what is there.
        shapes: name and shape of everything that must be there, and of nothing else.
        said_by: what says so, for messages.
        other_side: what they are to become, for messages.

    Raises:
        ConvertError: naming the first tensor that is missing, of another shape, or unknown.
    """
    for name, shape in shapes.items():
        if name not in tensors:
            raise ConvertError(f"{where}: has no {name}")
        if (found := tensors[name].shape) != shape:
            raise ConvertError(
                f"{where}: {name} has shape {list(found)}, but {said_by} says {list(shape)}"
            )
    if unknown := sorted(tensors.keys() - shapes.keys()):
        raise ConvertError(f"{where}: {unknown[0]} has no place in {other_side}")


def with_progress(items: Iterable[Item], total: int, what: str) -> Iterator[Item]:
    """The items; one is done when the next is asked for."""
    with Progress(what, "tensors", total) as progress:
        for item in items:
            yield item
            progress.add()
        progress.finish()


@contextlib.contextmanager
def counted(tensors: Mapping[str, LazyTensor], what: str) -> Iterator[dict[str, LazyTensor]]:
    """The tensors, which are done when they are read; for a writer that has a loop of its own."""
    with Progress(what, "tensors", len(tensors)) as progress:

        def read(tensor: LazyTensor) -> Tensor:
            value = tensor.read()
            progress.add()
            return value

        yield {key: replace(tensor, read=partial(read, tensor)) for key, tensor in tensors.items()}
        progress.finish()
