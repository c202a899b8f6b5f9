"""Files of `torch.save` that others wrote, read without running code of theirs.

A checkpoint often holds more than tensors: command-line arguments, enums, schedulers. `weights_only` reading refuses
such files. Here the unknown classes are replaced by empty ones, so that the tensors can be read and nothing that the
file names is imported or called.
"""

from __future__ import annotations

import contextlib
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor

from megatron_vlmoe.config.errors import ConvertError
from megatron_vlmoe.convert.tensors import LazyTensor
from megatron_vlmoe.tokenizers.vqkd.model import UNREADABLE
from megatron_vlmoe.train.checkpoint_files import one_line

# In the order in which VLMo's own loader looks for them; a file without any of them is the state dict itself.
CONTAINERS = ("state_dict", "module", "model")
# What wrappers put before a parameter's name: DeepSpeed and DistributedDataParallel, and Lightning's strategies.
WRAPPERS = ("module.", "_forward_module.")
# Besides what a damaged file gives: what following the names in somebody's file may.
_UNREADABLE = (*UNREADABLE, ImportError, AssertionError)


@dataclass(frozen=True)
class PublicState:
    """The tensors of a checkpoint that another project wrote.

    Args:
        path: file or folder.
        tensors: by the name of the parameter, wrappers' prefixes removed.
        skipped: classes whose objects were read as empty ones.
    """

    path: Path
    tensors: Mapping[str, LazyTensor]
    skipped: tuple[str, ...] = ()

    def shape(self, name: str, axes: Optional[int] = None) -> tuple[int, ...]:
        """Shape of a tensor.

        Args:
            name: of the tensor.
            axes: how many it must have; None allows any number.

        Raises:
            ConvertError: there is none of that name, or it has another number of axes.
        """
        if name not in self.tensors:
            raise ConvertError(f"{self.path}: has no tensor {name}")
        found = self.tensors[name].shape
        if axes is not None and len(found) != axes:
            raise ConvertError(f"{self.path}: {name} {list(found)} has not {axes} axes")
        return found


class _EmptyMapping:
    """Stands for a class of dictionaries; torch fills no object but a plain one, so that is what is made."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return OrderedDict()


class _EmptySequence:
    """Stands for a class of lists, likewise."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return []


class _Empty:
    """Stands for an object of a class that is not known here; takes what the real one would and keeps nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Empty:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Ignores everything."""

    def __setstate__(self, state: Any) -> None:
        """Ignores everything."""


def read_torch(path: Path, allow_pickle: bool = False) -> tuple[Any, tuple[str, ...]]:
    """Content of a file on the CPU, its tensors mapped into memory, not read.

    Args:
        path: what `torch.save` wrote.
        allow_pickle: where the file cannot be read without running what it names, run it.

    Returns:
        The content, and the names of classes whose objects were read as empty ones.

    Raises:
        ConvertError: the file is missing, damaged, or needs `allow_pickle`.
    """
    if not path.is_file():
        raise ConvertError(f"{path}: no such file")
    mapped = zipfile.is_zipfile(path)
    if not mapped and not _starts_as_pickle(path):
        raise ConvertError(f"{path}: not a file that torch.save wrote, or cut off")
    with _no_registered_classes():
        return _read(path, mapped, allow_pickle)


@contextlib.contextmanager
def _no_registered_classes() -> Iterator[None]:
    """What a file is read as must not depend on what other packages (megatron-core) have told torch to trust."""
    registered = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    finally:
        torch.serialization.add_safe_globals(registered)


def _read(path: Path, mapped: bool, allow_pickle: bool) -> tuple[Any, tuple[str, ...]]:
    load = partial(torch.load, path, map_location="cpu", mmap=mapped)
    try:
        return load(weights_only=True), ()
    except _UNREADABLE as error:
        reason: BaseException = error
    names: tuple[str, ...] = ()
    try:
        names = tuple(sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path)))
        return _load_emptied(load, names), names
    except _UNREADABLE as error:
        # A file of the format before torch 1.6 cannot be looked into; its first error says more.
        reason = error if names else reason
    if not isinstance(reason, pickle.UnpicklingError):
        raise ConvertError(f"{path}: cannot be read ({one_line(reason)})")
    if not allow_pickle:
        raise ConvertError(
            f"{path}: holds more than tensors ({', '.join(names) or one_line(reason)[:120]}) in a way that cannot be "
            "skipped; --allow-pickle reads it with Python's pickle, which imports and runs whatever the file names: "
            "only for files whose makers you trust"
        )
    try:
        return load(weights_only=False), ()
    except _UNREADABLE as error:
        raise ConvertError(
            f"{path}: cannot be read, also with pickle ({one_line(error)})"
        ) from None


def _load_emptied(load: Callable[..., Any], names: Sequence[str]) -> Any:
    """Reads a file with empty classes in place of those named.

    Whether a class is one of dictionaries or lists shows when an object of it is to be filled and torch names it.
    """
    classes: dict[str, type] = {name: type(name, (_Empty,), {}) for name in names}
    while True:
        try:
            with torch.serialization.safe_globals([(kind, name) for name, kind in classes.items()]):
                return load(weights_only=True)
        except pickle.UnpicklingError as error:
            message = str(error)
            name = next((n for n, k in classes.items() if f"but got {k}" in message), "")
            if not name or not issubclass(classes[name], _Empty):
                raise
            classes[name] = _EmptyMapping if "SETITEM" in message else _EmptySequence


def state_of(content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict inside a file's content: names without the prefixes of wrappers.

    Raises:
        ConvertError: there is none.
    """
    state = content
    if isinstance(content, Mapping):
        state = next((content[key] for key in CONTAINERS if _is_state(content.get(key))), content)
    if not _is_state(state):
        raise ConvertError(
            f"{path}: no tensors under {', '.join(CONTAINERS)}, nor at the top: not a checkpoint of weights"
        )
    return {bare_name(str(k)): v for k, v in state.items() if isinstance(v, Tensor)}


def read_public_file(path: Path, allow_pickle: bool = False) -> PublicState:
    """A checkpoint in one file; arguments and errors as `read_torch` and `state_of`."""
    content, skipped = read_torch(path, allow_pickle)
    return PublicState(path, as_lazy(state_of(content, path)), skipped)


def as_lazy(state: Mapping[str, Tensor]) -> dict[str, LazyTensor]:
    """Tensors that are mapped into memory already, as those that are read later."""
    return {
        name: LazyTensor(tuple(tensor.shape), tensor.dtype, partial(_same, tensor))
        for name, tensor in state.items()
    }


def bare_name(name: str) -> str:
    """A parameter's name without what wrappers put before it."""
    while prefix := next((p for p in WRAPPERS if name.startswith(p)), ""):
        name = name[len(prefix) :]
    return name


def _starts_as_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1) == b"\x80"


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(v, Tensor) for v in value.values())


def _same(tensor: Tensor) -> Tensor:
    return tensor
