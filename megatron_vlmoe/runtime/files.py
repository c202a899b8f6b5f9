"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def write_text_atomic(path: Path, *parts: str) -> None:
    """Writes a UTF-8 file; see `write_parts_atomic`."""
    write_parts_atomic(path, parts)


def write_parts_atomic(path: Path, parts: Iterable[str]) -> None:
    """Writes a UTF-8 file, part by part, under a temporary name beside its place, synced, then renames it.

    Makes its folder where that is missing.

    A file that stood there before stays as it was until the new one is complete.

    Raises:
        OSError: it cannot be written; the message names ``path``, and nothing is left behind.
    """
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("w", encoding="utf-8", newline="\n") as file:
                file.writelines(parts)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def sync_tree(folder: Path) -> None:
    """Makes all files below a folder, and the folder's entries, durable."""
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            _sync_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    """Makes a rename inside the folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
