"""What torch saved, read without torch: a command that only asks what a checkpoint holds starts at once.

Nothing that such a file names is imported or run. Tensors and objects of torch come as stand-ins with their attributes.

torch itself reads the table of contents of a distributed checkpoint, and what is stored there besides tensors, with
Python's pickle, which runs whatever these name: `unknown_names` looks first.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

METADATA_FILE = ".metadata"
_LARGEST_PICKLE = 1 << 30
# Classes and functions that only hold data, of which tables of contents are made, and what stands beside tensors.
_HARMLESS = re.compile(
    r"torch (Size|device|(u?int|float|bfloat|complex|quint|qint)[0-9a-z_]*|bool|[A-Z][A-Za-z0-9]*Storage)"
    r"|torch\._utils (_rebuild_tensor_v2|_rebuild_parameter)"
    r"|torch\.storage (UntypedStorage|TypedStorage)"
    r"|torch\.serialization _get_layout"
    r"|torch\.distributed\.checkpoint\.metadata (ChunkStorageMetadata|_MEM_FORMAT_ENCODING|TensorProperties"
    r"|TensorStorageMetadata|BytesStorageMetadata|StorageMeta|Metadata|MetadataIndex)"
    r"|torch\.distributed\.checkpoint\.planner (SavePlan|WriteItem|WriteItemType|TensorWriteData|BytesIOWriteData)"
    r"|torch\.distributed\.checkpoint\.filesystem (_StorageInfo|_StoragePrefix|SerializationFormat)"
    r"|megatron\.core\.dist_checkpointing\.strategies\.torch MCoreMetadata"
    r"|numpy\.(_core|core)\.multiarray (_reconstruct|scalar)|numpy (ndarray|dtype)|numpy\.dtypes [A-Za-z0-9]*"
    r"|pathlib(\._local)? (Pure)?(Posix|Windows)?Path|collections OrderedDict|io BytesIO|_codecs encode"
    r"|(builtins|__builtin__) (set|frozenset|slice|complex|bytearray)"
)


class _StandIn:
    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.unknown: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        if not _HARMLESS.fullmatch(f"{module} {name}"):
            self.unknown.add(f"{module}.{name}")
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
    return _opened(content).load()


def unknown_names(folder: Path) -> list[str]:
    """What a distributed checkpoint names in its pickles that is more than data, as ``os.system``; empty if nothing.

    Looks at the table of contents and at all that is stored besides tensors. What ``torch.save`` wrote beside them,
    ``common.pt``, is not looked at: torch reads that without running anything.

    Raises:
        Exception: of whatever type, if the table cannot be read, or what it lists.
    """
    contents = _opened((folder / METADATA_FILE).read_bytes())
    table = contents.load()
    unknown = set(contents.unknown)
    kinds = {key: type(entry).__name__ for key, entry in table.state_dict_metadata.items()}
    for index, place in table.storage_data.items():
        if kinds.get(index.fqn) != "BytesStorageMetadata":
            continue
        with open(folder / place.relative_path, "rb") as file:
            file.seek(place.offset)
            data = file.read(place.length)
        if not zipfile.is_zipfile(io.BytesIO(data)):
            # Of several pickles in a row only the first would be looked at.
            raise ValueError(f"{index.fqn} is not as torch writes it")
        stored = _opened(data)
        stored.load()
        unknown |= stored.unknown
    return sorted(unknown)


def _opened(content: bytes) -> _Unpickler:
    if zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            (name,) = (n for n in archive.namelist() if n.endswith("/data.pkl"))
            if archive.getinfo(name).file_size > _LARGEST_PICKLE:
                raise ValueError(f"{name} has {archive.getinfo(name).file_size} bytes")
            content = archive.read(name)
    return _Unpickler(io.BytesIO(content))
