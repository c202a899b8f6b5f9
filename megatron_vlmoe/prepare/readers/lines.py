"""Lines of a file with their numbers, decompressed if need be."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.prepare.readers.file_kinds import (
    DAMAGE,
    MAX_DOCUMENT_BYTES,
    check_characters,
    open_binary,
)
from megatron_vlmoe.prepare.readers.records import Reject

_SKIP_BYTES = 1 << 17

Payload = tuple[int, bytes]
"""Number of a line, row or entry, and its bytes."""


def numbered_lines(path: str, strip: bool = True) -> Iterator[Payload | Reject]:
    """Lines with their numbers, from 1.

    Args:
        path: file to read, decompressed if need be.
        strip: take white space off both ends, so that a blank line is ``b""``; else the line end
            alone.

    Raises:
        DataError: the file cannot be opened, or is binary. What breaks off later is a `Reject`.
    """
    check_characters(path)
    number = 0
    try:
        with open_binary(path) as file:
            while line := file.readline(MAX_DOCUMENT_BYTES + 1):
                number += 1
                if len(line) > MAX_DOCUMENT_BYTES and not line.endswith(b"\n"):
                    while (rest := file.readline(_SKIP_BYTES)) and not rest.endswith(b"\n"):
                        pass
                    yield too_long(path, "line", number)
                    continue
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                yield number, line.strip() if strip else line.rstrip(b"\r\n")
    except OSError as error:
        if number == 0:
            raise DataError(f"{path}: {error.strerror or error}") from error
        yield Reject(path, f"line {number + 1}", f"unreadable from here on: {error}")
    except (*DAMAGE, ValueError) as error:
        yield Reject(path, f"line {number + 1}", f"unreadable from here on: {error}")


def too_long(path: str, unit: str, number: int, why: str = "") -> Reject:
    """The reject of a line or document over `MAX_DOCUMENT_BYTES`."""
    return Reject(path, f"{unit} {number}", f"longer than {MAX_DOCUMENT_BYTES} bytes{why}")
