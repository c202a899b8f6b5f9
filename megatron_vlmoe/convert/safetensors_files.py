"""Folders of safetensors files: written tensor by tensor, read lazily, damage found before anything is used.

The format: eight bytes with the length of a JSON header, the header (dtype, shape and place of every tensor), then the
values. The safetensors package itself can only write a file whose tensors are all in memory; reading goes through it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_vlmoe.config.errors import ConvertError
from megatron_vlmoe.convert.tensors import LazyTensor
from megatron_vlmoe.runtime.files import write_text_atomic

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SUMS_FILE = "SHA256SUMS"
_DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int64: "I64",
}
_FROM_NAME = {name: dtype for dtype, name in _DTYPES.items()}
# The format asks for values that start at a multiple of eight bytes.
_ALIGNMENT = 8


@dataclass(frozen=True)
class Group:
    """Tensors that are made together, because they come from one tensor.

    Args:
        names: of the tensors.
        shapes: in the order of the names.
        dtype: in which they are written.
        read: makes the values in this order.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    read: Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class _Shard:
    """One file: names with shape and dtype in order."""

    name: str
    content: tuple[tuple[str, tuple[int, ...], torch.dtype], ...]


def write_folder(folder: Path, groups: Sequence[Group], max_shard_bytes: int) -> Iterator[Group]:
    """Writes the tensors into one file, or into several with an index, and the checksums of the files.

    Args:
        folder: must exist.
        groups: what to write, in this order.
        max_shard_bytes: size of a file, unless a single tensor is larger.

    Yields:
        Every group after it is written, for a progress bar.
    """
    shards = _plan(groups, max_shard_bytes)
    values = _values(groups)
    sums = []
    for shard in shards:
        digest = hashlib.sha256()
        with (folder / shard.name).open("wb") as file:
            header = _header(shard)
            file.write(header)
            digest.update(header)
            for name, _, _ in shard.content:
                found, value, finished = next(values)
                assert found == name
                # safetensors is little-endian, as every machine that torch runs on.
                content = value.contiguous().reshape(-1).view(torch.uint8).numpy().data
                file.write(content)
                digest.update(content)
                if finished is not None:
                    yield finished
        sums.append((shard.name, digest.hexdigest()))
    if len(shards) > 1:
        total = sum(_nbytes(shape, dtype) for s in shards for _, shape, dtype in s.content)
        where = {name: shard.name for shard in shards for name, _, _ in shard.content}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        write_text_atomic(folder / INDEX_FILE, json.dumps(index, indent=2) + "\n")
    write_text_atomic(folder / SUMS_FILE, "".join(f"{digest}  {name}\n" for name, digest in sums))


def _values(groups: Sequence[Group]) -> Iterator[tuple[str, Tensor, Group | None]]:
    """Name and value of every tensor, with its group where it is the last of it."""
    for group in groups:
        parts = list(group.read())
        for index, name in enumerate(group.names):
            # Given away: the parts of a group need not be held until the last of them is written.
            value = parts[index]
            parts[index] = torch.empty(0)
            if tuple(value.shape) != group.shapes[index]:
                raise ConvertError(
                    f"{name}: has shape {list(value.shape)}, not {list(group.shapes[index])}"
                )
            last = index == len(group.names) - 1
            yield name, value.to(group.dtype), group if last else None


def _plan(groups: Sequence[Group], max_shard_bytes: int) -> list[_Shard]:
    shards: list[list[tuple[str, tuple[int, ...], torch.dtype]]] = [[]]
    size = 0
    for group in groups:
        for name, shape in zip(group.names, group.shapes, strict=True):
            nbytes = _nbytes(shape, group.dtype)
            if shards[-1] and size + nbytes > max_shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append((name, shape, group.dtype))
            size += nbytes
    if len(shards) == 1:
        return [_Shard(SINGLE_FILE, tuple(shards[0]))]
    return [
        _Shard(f"model-{number:05}-of-{len(shards):05}.safetensors", tuple(content))
        for number, content in enumerate(shards, 1)
    ]


def _header(shard: _Shard) -> bytes:
    # transformers reads only files that say what framework their tensors are for.
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape, dtype in shard.content:
        end = start + _nbytes(shape, dtype)
        header[name] = {
            "dtype": _DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
        start = end
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % _ALIGNMENT)
    return len(content).to_bytes(8, "little") + content


def _nbytes(shape: Iterable[int], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


class SafetensorsFolder:
    """The tensors of a Hugging Face folder, one file or several with an index.

    Args:
        folder: the folder.

    Raises:
        ConvertError: no safetensors there, a file is missing, truncated or no safetensors, or an index that names
            tensors its files do not have.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.tensors: dict[str, LazyTensor] = {}
        """By name."""
        where = self._files()
        for file in sorted(set(where.values()) if where else {SINGLE_FILE}):
            self._open(file)
        if where and (lost := sorted(set(where) - set(self.tensors))):
            raise ConvertError(f"{self.folder / INDEX_FILE}: names {lost[0]}, which no file has")

    def verify_checksums(self) -> bool:
        """Compares the files with `SHA256SUMS`.

        Returns:
            False where there is no such file (a folder that `save_pretrained` wrote).

        Raises:
            ConvertError: naming the first file that differs.
        """
        sums = self.folder / SUMS_FILE
        if not sums.is_file():
            return False
        for line in sums.read_text().splitlines():
            expected, _, name = line.partition("  ")
            file = self.folder / name
            if not file.is_file():
                raise ConvertError(f"{file}: missing, though {SUMS_FILE} lists it")
            with file.open("rb") as content:
                found = hashlib.file_digest(content, "sha256").hexdigest()
            if found != expected:
                raise ConvertError(
                    f"{file}: differs from what was exported ({SUMS_FILE}); if that was meant, delete {SUMS_FILE}"
                )
        return True

    def _files(self) -> dict[str, str]:
        """Name of every tensor and its file; empty where there is one file without an index."""
        index = self.folder / INDEX_FILE
        if not index.is_file():
            if not (self.folder / SINGLE_FILE).is_file():
                raise ConvertError(f"{self.folder}: no {SINGLE_FILE} and no {INDEX_FILE} there")
            return {}
        try:
            where = json.loads(index.read_bytes())["weight_map"]
            names = {str(name): str(file) for name, file in where.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConvertError(f"{index}: damaged ({type(error).__name__})") from None
        outside = [file for file in names.values() if Path(file).name != file]
        if outside or not names:
            raise ConvertError(f"{index}: damaged ({outside[0] if outside else 'no tensors'})")
        return names

    def _open(self, name: str) -> None:
        file = self.folder / name
        if not file.is_file():
            raise ConvertError(f"{file}: missing")
        try:
            with safe_open(file, framework="pt") as content:
                for key in content.keys():
                    if key in self.tensors:
                        raise ConvertError(f"{file}: has {key} a second time")
                    part = content.get_slice(key)
                    dtype = _FROM_NAME.get(part.get_dtype())
                    if dtype is None:
                        raise ConvertError(f"{file}: {key} is of type {part.get_dtype()}")
                    read = partial(_read, file, key)
                    self.tensors[key] = LazyTensor(tuple(part.get_shape()), dtype, read)
        except (SafetensorError, OSError) as error:
            raise ConvertError(f"{file}: damaged or truncated ({error})") from None


def _read(file: Path, name: str) -> Tensor:
    try:
        with safe_open(file, framework="pt") as content:
            value: Tensor = content.get_tensor(name)
            return value
    except (SafetensorError, OSError) as error:
        raise ConvertError(f"{file}: {name}: {error}") from None
