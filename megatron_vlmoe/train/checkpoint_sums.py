"""SHA256SUMS of a checkpoint: the SHA-256 of every file beside it.

It is written before the checkpoint gets its name, and what the checkpoint holds besides tensors notes that there is
one: where it is gone, that is damage, and no checkpoint of an earlier version. Needs neither torch nor megatron-core.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Optional

from megatron_vlmoe.config.errors import CheckpointError
from megatron_vlmoe.runtime.sums import (
    SUMS_FILE,
    differing_files,
    flaw_words,
    folder_sums,
)

NOTE = "sums_file"
"""The note's key among what a checkpoint holds besides tensors."""

log = logging.getLogger("megatron_vlmoe")

# What a checkpoint cannot be read without; `common.pt` is not there in those of megatron-core 0.19.
_NEEDED = (".metadata", "metadata.json")
_PARTS = re.compile(r"\.metadata|metadata\.json|common\.pt|.*\.distcp")


def read_sums(folder: Path) -> Optional[dict[str, str]]:
    """SHA-256 in hex by file name; None where there is no SHA256SUMS.

    Raises:
        CheckpointError: it is damaged, or does not list every file that belongs to a checkpoint.
    """
    sums = folder_sums(folder)
    if sums is None:
        return None
    there = [name for entry in folder.iterdir() if _PARTS.fullmatch(name := entry.name)]
    for name in (*_NEEDED, *sorted(there)):
        if name not in sums:
            raise CheckpointError(f"{folder / SUMS_FILE}: damaged: does not list {name}")
    return sums


def check_note(folder: Path, common: Mapping[str, Any]) -> None:
    """Of a checkpoint without SHA256SUMS: says that it is not verified, if none was written with it.

    Args:
        common: what it holds besides tensors.

    Raises:
        CheckpointError: one was written, and is gone.
    """
    if common.get(NOTE):
        raise CheckpointError(
            f"{folder / SUMS_FILE}: missing, though it was written with the checkpoint; "
            "--checkpoint.verify false trains without it"
        )
    log.info("%s has no %s, as an earlier version wrote it: not verified", folder, SUMS_FILE)


def flaw_line(path: Path, reason: str, others: int = 0) -> str:
    """A damaged file of a checkpoint in one line, with the number of others that are damaged too."""
    return f"{path}: damaged: {flaw_words(reason, SUMS_FILE, others)}"


def check_files(folder: Path, common: Callable[[], Mapping[str, Any]]) -> None:
    """Compares a checkpoint with its SHA256SUMS; one process reads all of it.

    Args:
        common: gives what the checkpoint holds besides tensors, where it has no SHA256SUMS.

    Raises:
        CheckpointError: naming the first file that differs.
    """
    sums = read_sums(folder)
    if sums is None:
        check_note(folder, common())
        return
    flaws = differing_files({folder / name: digest for name, digest in sums.items()})
    if flaws:
        raise CheckpointError(flaw_line(*flaws[0], len(flaws) - 1))


def check_one_file(folder: Path, name: str) -> None:
    """Compares one small file that is read before the whole checkpoint is; nothing happens where it has no sum.

    Raises:
        CheckpointError: it differs, or SHA256SUMS is damaged.
    """
    digest = (read_sums(folder) or {}).get(name)
    if digest is not None and (flaws := differing_files({folder / name: digest}, 1)):
        raise CheckpointError(flaw_line(*flaws[0]))
