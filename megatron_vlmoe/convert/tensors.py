"""Tensors that are read when they are written, so that a converter holds one at a time; folders of safetensors files.

Such a folder is written tensor by tensor and read lazily; damage is found before anything is used. The format: eight
bytes with the length of a JSON header, the header (dtype, shape and place of every tensor), then the values. The
safetensors package itself can only write a file whose tensors are all in memory; reading goes through it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_vlmoe.config.errors import ConvertError, conversion_errors
from megatron_vlmoe.runtime.files import write_text_atomic
from megatron_vlmoe.runtime.json_files import parse_json
from megatron_vlmoe.runtime.progress import Progress
from megatron_vlmoe.runtime.sums import SUMS_FILE, differing_files, folder_sums, write_sums

Item = TypeVar("Item")
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
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
class LazyTensor:
    """A tensor of known shape and type, which is read when its values are asked for."""

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
    """Compares tensors with name and shape of everything that must be there, and of nothing else.

    Messages name the folder, what asks for these shapes, and what the tensors are to become.

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


@dataclass(frozen=True)
class Group:
    """Tensors that are made together, because they come from one; names, shapes and values have one order."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    read: Callable[[], Sequence[Tensor]]


def write_folder(folder: Path, groups: Sequence[Group], max_shard_bytes: int) -> Iterator[Group]:
    """Writes the tensors, in this order, into one file, or into several with an index, and the checksums of the files.

    The folder must exist. A file is at most of `max_shard_bytes`, unless a single tensor is larger.

    Yields:
        Every group after it is written, for a progress bar.
    """
    shards: list[list[tuple[str, tuple[int, ...], torch.dtype]]] = [[]]
    sizes = [0]
    for group in groups:
        for name, shape in zip(group.names, group.shapes, strict=True):
            nbytes = torch.Size(shape).numel() * group.dtype.itemsize
            if shards[-1] and sizes[-1] + nbytes > max_shard_bytes:
                shards.append([])
                sizes.append(0)
            shards[-1].append((name, shape, group.dtype))
            sizes[-1] += nbytes
    files = [SINGLE_FILE]
    if len(shards) > 1:
        numbers = range(1, len(shards) + 1)
        files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in numbers]
    values, last_of = _values(groups), {group.names[-1]: group for group in groups}
    sums, where = {}, {}
    for file_name, shard in zip(files, shards):
        digest = hashlib.sha256()
        with (folder / file_name).open("wb") as file:
            header = _header(shard)
            file.write(header)
            digest.update(header)
            for name, _, _ in shard:
                found, value = next(values)
                assert found == name
                where[name] = file_name
                # safetensors is little-endian, as every machine that torch runs on.
                content = value.contiguous().reshape(-1).view(torch.uint8).numpy().data
                file.write(content)
                digest.update(content)
                if name in last_of:
                    yield last_of[name]
        sums[file_name] = digest.hexdigest()
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": where}
        write_text_atomic(folder / INDEX_FILE, json.dumps(index, indent=2) + "\n")
    write_sums(folder, sums)


def _values(groups: Sequence[Group]) -> Iterator[tuple[str, Tensor]]:
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
            yield name, value.to(group.dtype)


def _header(shard: Iterable[tuple[str, tuple[int, ...], torch.dtype]]) -> bytes:
    # transformers reads only files that say what framework their tensors are for.
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape, dtype in shard:
        end = start + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {
            "dtype": _DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
        start = end
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % _ALIGNMENT)
    return len(content).to_bytes(8, "little") + content


class SafetensorsFolder:
    """The tensors of a Hugging Face folder, one file or several with an index.

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

    def verify_checksums(self) -> None:
        """Compares the files with `SHA256SUMS`, where there is one: `save_pretrained` writes none.

        Raises:
            ConvertError: naming the first file that differs, or SHA256SUMS where it is damaged.
        """
        with conversion_errors():
            sums = folder_sums(self.folder) or {}
        files = {self.folder / name: digest for name, digest in sums.items()}
        if lost := [file for file in files if not file.is_file()]:
            raise ConvertError(f"{lost[0]}: missing, though {SUMS_FILE} lists it")
        if flaws := differing_files(files):
            raise ConvertError(
                f"{flaws[0][0]}: differs from what was exported ({SUMS_FILE}); if that was meant, delete {SUMS_FILE}"
            )

    def _files(self) -> dict[str, str]:
        """Name of every tensor and its file; empty where there is one file without an index."""
        index = self.folder / INDEX_FILE
        if not index.is_file():
            if not (self.folder / SINGLE_FILE).is_file():
                raise ConvertError(f"{self.folder}: no {SINGLE_FILE} and no {INDEX_FILE} there")
            return {}
        try:
            where = parse_json(index.read_bytes())["weight_map"]
            names = {str(name): str(file) for name, file in where.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConvertError(f"{index}: damaged ({type(error).__name__})") from None
        outside = [file for file in names.values() if Path(file).name != file]
        if outside or not names:
            raise ConvertError(f"{index}: damaged ({outside[0] if outside else 'no tensors'})")
        return names

    def _open(self, name: str) -> None:
        file = self.folder / name
        if not os.path.isfile(file):
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
