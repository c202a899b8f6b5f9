"""Safe reads of files that torch wrote."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
