"""JSON that is read with checks: what is wrong with it is one line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from megatron_vlmoe.config.errors import DataError, UserError

Content = TypeVar("Content")


LARGEST_NUMBER = 1e100
"""More than anything that is measured; sums and squares of numbers up to it are finite."""


def is_number(value: Any) -> bool:
    """Whether a value of JSON or YAML is a number to reckon with: no truth value, finite, up to 1e100 in size."""
    is_kind = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_kind and abs(value) <= LARGEST_NUMBER


def is_version(value: Any) -> bool:
    """Whether a value of JSON is the number of a format: an integer from 1 on, and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def parse_json(content: bytes | str) -> Any:
    """One value. Raises DataError with the reason why there is none, which the caller puts after file and record."""
    try:
        return json.loads(content if isinstance(content, str) else content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"invalid UTF-8 at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"invalid JSON: {error}") from error


def read_json(path: Path, missing: str = "not found") -> Any:
    """The value in a file that this program wrote.

    Args:
        missing: what the error says if there is no such file.

    Raises:
        DataError: the file is missing or damaged; the message names it.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{path}: {missing}") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: damaged: {error}") from error


def read_versioned(
    path: Path, version: int, what: str, missing: str, make: Callable[[Any], Content]
) -> Content:
    """What a file with a ``format_version`` holds.

    Args:
        version: the newest format that is known.
        what: the kind of file, for errors.
        missing: what the error says if there is no such file.
        make: what the value stands for; it fails where the value has not the fields that it should have, with
            a `UserError` where the file is not to blame.

    Raises:
        DataError: the file is missing, damaged, or of a newer format; the message names it.
    """
    raw = read_json(path, missing)
    found = raw.get("format_version", 1) if isinstance(raw, dict) else 1
    if not is_version(found):
        raise DataError(f"{path}: damaged: format_version is {found!r}, not a number from 1 on")
    if found > version:
        raise DataError(f"{path}: format version {found} is newer than this program's {version}")
    try:
        return make(raw)
    except UserError as error:
        # The file is as it should be, but something else is not.
        raise DataError(f"{path}: {error}") from error
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise DataError(f"{path}: damaged: not {what} ({error})") from error


def logged_step(line: bytes | str) -> float:
    """The step of a line of ``metrics.jsonl``; infinite for one that a killed run left half-written."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
