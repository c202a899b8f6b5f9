"""SHA-256 of files, several at a time: hashlib and the kernel leave the interpreter to others meanwhile.

The sums of a folder's files are in its SHA256SUMS, in the format of `sha256sum`, which checks them by hand:
``sha256sum --check SHA256SUMS``.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Optional, TypeVar

from megatron_vlmoe.config.errors import CheckpointError
from megatron_vlmoe.runtime.files import write_text_atomic

Item = TypeVar("Item")

SUMS_FILE = "SHA256SUMS"
# 255 bytes are the most that a file system takes for a name.
_LINE = re.compile(r"([0-9a-f]{64})  ([^/\n\0]{1,255})")
_OTHER_CONTENTS = "its contents have another SHA-256"
_BLOCK_BYTES = 1 << 22
_MOST_THREADS = 8


def file_sha256(path: str | Path, sync: bool = False) -> str:
    """SHA-256 of a file, in hex.

    Args:
        sync: also waits until the file is on the disk.

    Raises:
        OSError: it cannot be read.
    """
    digest, block = hashlib.sha256(), memoryview(bytearray(_BLOCK_BYTES))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(block[:size])
        if sync:
            os.fsync(file.fileno())
    return digest.hexdigest()


def reading_threads() -> int:
    """Threads for the files of one rank: its share of the cores of its node, at most 8."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(_MOST_THREADS, len(os.sched_getaffinity(0)) // ranks))


def differing_files(sums: Mapping[Path, str], threads: int = 0) -> list[tuple[Path, str]]:
    """The files, in their order, that are not as their sums say, each with the reason in a few words.

    Args:
        sums: SHA-256 in hex of each.
        threads: that read; 0: as many as `reading_threads` says.
    """

    def reason(item: tuple[Path, str]) -> str:
        path, expected = item
        try:
            return "" if file_sha256(path) == expected else _OTHER_CONTENTS
        except OSError as error:
            return error.strerror or "cannot be read"

    with ThreadPoolExecutor(threads or reading_threads()) as pool:
        reasons = pool.map(reason, sums.items())
        return [(path, why) for path, why in zip(sums, reasons) if why]


def flaw_words(reason: str, record: str, others: int) -> str:
    """A reason of `differing_files`, the record that says otherwise (it may be damaged itself), and other files."""
    than = f" than {record} says" if reason == _OTHER_CONTENTS else ""
    more = f"; so are {others} other files" if others > 1 else "; so is another file"
    return reason + than + (more if others else "")


def write_sums(folder: Path, sums: Mapping[str, str]) -> None:
    """Writes SHA256SUMS, and waits until it is on the disk.

    Args:
        sums: SHA-256 in hex by file name.

    Raises:
        FileError: it cannot be written.
    """
    write_text_atomic(folder / SUMS_FILE, *(f"{sums[name]}  {name}\n" for name in sorted(sums)))


def folder_sums(folder: Path) -> Optional[dict[str, str]]:
    """SHA-256 in hex by file name, as a folder's SHA256SUMS has them; None where there is none.

    Raises:
        CheckpointError: it cannot be read, or is damaged; the message names it.
    """
    path = folder / SUMS_FILE
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    sums: dict[str, str] = {}
    *lines, rest = content.decode("utf-8", "replace").split("\n")
    for number, line in enumerate(lines, 1):
        found = _LINE.fullmatch(line)
        if found is None or found[2] in sums or found[2] in (".", ".."):
            raise CheckpointError(f"{path}: damaged: line {number} is not SHA-256 and file name")
        sums[found[2]] = found[1]
    if rest:
        raise CheckpointError(f"{path}: damaged: its last line has no end")
    return sums


def shared_out(sizes: Mapping[Item, int], shares: int) -> list[list[Item]]:
    """Divides items so that sums of sizes are about equal, the same on every rank: the largest goes first, to whoever
    has least."""
    divided: list[list[Item]] = [[] for _ in range(shares)]
    loads = [0] * shares
    for item in sorted(sizes, key=lambda item: (-sizes[item], str(item))):
        least = loads.index(min(loads))
        divided[least].append(item)
        loads[least] += sizes[item]
    return divided
