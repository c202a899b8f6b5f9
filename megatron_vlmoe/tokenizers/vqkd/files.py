"""Whole-file writes (a reader sees the old file or the new one, never a part) and safe reads."""

from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megatron_vlmoe.config.errors import DataError

# What torch's unpickler raises for bytes that are cut off or were never a checkpoint.
UNREADABLE = (
    pickle.UnpicklingError,
    struct.error,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
)


@contextmanager
def open_atomically(path: Path) -> Iterator[BinaryIO]:
    """Write to a temporary name in the same folder; synced and renamed over `path` at the end.

    After an error the temporary file is gone and `path` is as it was.
    """
    temporary = path.with_name(f"{path.name}.tmp.{os.getpid()}")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by `content` as a whole."""
    with open_atomically(path) as stream:
        stream.write(content)


def read_torch_file(path: Path, device: torch.device | str, allowed: Sequence[type] = ()) -> Any:
    """`torch.load` that builds tensors and plain containers only, and the `allowed` classes.

    Raises ValueError (one line) naming the path if it is missing, damaged or holds anything else.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location=device, weights_only=True)
    except UNREADABLE as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DataError(f"{path}: cannot be read as a checkpoint: {reason}") from error
