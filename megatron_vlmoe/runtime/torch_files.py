"""What torch saved, read without torch: a command that only asks what a checkpoint holds starts at once.

Nothing that such a file names is imported or run. Tensors and objects of torch come as stand-ins with their attributes.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any


class _StandIn:
    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict") or (
            module == "builtins" and name in ("set", "frozenset", "slice", "complex", "bytearray")
        ):
            return super().find_class(module, name)
        return type(name, (_StandIn,), {})

    def persistent_load(self, storage: Any) -> Any:
        return storage


def read_torch_file(path: Path) -> Any:
    """The value in a file of `torch.save`, or in the ``.metadata`` of a distributed checkpoint, without its tensors.

    Raises:
        Exception: of whatever type, if the file cannot be read or is neither.
    """
    return read_torch_bytes(path.read_bytes())


def read_torch_bytes(content: bytes) -> Any:
    """The value in what such a file holds.

    Raises:
        Exception: as `read_torch_file`.
    """
    if zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            (name,) = (n for n in archive.namelist() if n.endswith("/data.pkl"))
            content = archive.read(name)
    return _Unpickler(io.BytesIO(content)).load()
