"""Tensors that are read when they are written: a converter holds one at a time."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from megatron_vlmoe.config.errors import ConvertError

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
    """The items, with a bar on the error stream: redrawn on a terminal, otherwise a line at the end."""
    start, terminal, done = time.monotonic(), sys.stderr.isatty(), 0
    for item in items:
        yield item
        done += 1
        if terminal:
            filled = 30 * done // max(total, 1)
            print(f"\r{what} [{'#' * filled:<30}] {done}/{total}", end="", file=sys.stderr)
    seconds = time.monotonic() - start
    ending = "\n" if terminal else ""
    print(f"{ending}{what}: {done} tensors in {seconds:.1f} s", file=sys.stderr)


@contextlib.contextmanager
def counted(tensors: Mapping[str, LazyTensor], what: str) -> Iterator[dict[str, LazyTensor]]:
    """The tensors with a bar that moves when one is read; for a writer that has a loop of its own."""
    progress = iter(with_progress(tensors, len(tensors), what))

    def read(tensor: LazyTensor) -> Tensor:
        value = tensor.read()
        next(progress, None)
        return value

    yield {key: replace(tensor, read=partial(read, tensor)) for key, tensor in tensors.items()}
    # The line at the end.
    next(progress, None)
