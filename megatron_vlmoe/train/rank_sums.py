"""The sums of a checkpoint, made and checked by all ranks together: each reads a share, so every file is read once."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_vlmoe.config.errors import CheckpointError
from megatron_vlmoe.runtime.distributed import from_rank_zero
from megatron_vlmoe.runtime.sums import differing_files, file_sha256, shared_out, write_sums
from megatron_vlmoe.train.checkpoint_sums import (
    check_note,
    flaw_line,
    read_sums,
)

# megatron-core names the files of tensors by the rank that wrote them.
_OF_RANK = re.compile(r"__([0-9]+)_[0-9]+\.distcp")


class RankSums:
    """Sums of the files that this rank has written, made in a thread; rank 0 has those of no rank too.

    A rank reads what it wrote, which its node still has in memory. The thread also waits until the files are on the
    disk. Every rank makes one when all have written, and then calls `write` on it.

    Args:
        folder: of the checkpoint.
        threads: that read; in the background of training one, which leaves the cores to others.
    """

    def __init__(self, folder: Path, threads: int = 1) -> None:
        self.folder = folder
        self._threads = threads
        self._sums: dict[str, str] = {}
        self._problem = ""
        self._thread = threading.Thread(target=self._read, name="checkpoint sums", daemon=True)
        self._thread.start()

    def is_ready(self) -> bool:
        """Whether this rank has read its files."""
        return not self._thread.is_alive()

    def write(self) -> None:
        """Writes SHA256SUMS of the files of all ranks; every rank must call it.

        Raises:
            CheckpointError: on every rank, if any cannot read its files, or nobody has read one.
        """
        self._thread.join()
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (self._sums, self._problem))

        def write() -> None:
            if problems := [problem for _, problem in gathered if problem]:
                raise CheckpointError(f"{self.folder}: {problems[0]}")
            sums = {name: digest for own, _ in gathered for name, digest in own.items()}
            if lost := {entry.name for entry in self.folder.iterdir()} - sums.keys():
                raise CheckpointError(f"{self.folder / min(lost)}: read by no rank")
            write_sums(self.folder, sums)

        from_rank_zero(write)

    def _read(self) -> None:
        rank = dist.get_rank()
        try:
            matches = {name: _OF_RANK.fullmatch(name) for name in os.listdir(self.folder)}
            own = [name for name, of in matches.items() if (int(of[1]) if of else 0) == rank]
            with ThreadPoolExecutor(self._threads) as pool:
                digests = pool.map(lambda name: file_sha256(self.folder / name, sync=True), own)
                self._sums.update(zip(own, digests))
        except OSError as error:
            self._problem = str(error)


def damage(folder: Path, common: Callable[[], Mapping[str, Any]]) -> str:
    """What is wrong with the files of a checkpoint, in one line; empty if nothing is. Every rank must call it.

    Args:
        common: gives what the checkpoint holds besides tensors, where it has no SHA256SUMS; called on rank 0.
    """

    def find() -> tuple[str, list[tuple[str, str, int]]]:
        try:
            sums = read_sums(folder)
            if sums is None:
                check_note(folder, common())
        except CheckpointError as error:
            return str(error), []
        found = []
        for name, digest in (sums or {}).items():
            path = folder / name
            found.append((name, digest, path.stat().st_size if os.path.isfile(path) else 0))
        return "", found

    flaw, files = from_rank_zero(find)
    if flaw or not files:
        return flaw
    flaws = differing_on_ranks(
        {folder / name: digest for name, digest, _ in files},
        {folder / name: size for name, _, size in files},
    )
    return flaw_line(*flaws[0], len(flaws) - 1) if flaws else ""


def differing_on_ranks(
    sums: Mapping[Path, str], sizes: Mapping[Path, int]
) -> list[tuple[Path, str]]:
    """As `differing_files`, in order of the paths; every rank must call it, with the same, and reads a share."""
    own = shared_out(sizes, dist.get_world_size())[dist.get_rank()]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, differing_files({path: sums[path] for path in own}))
    return sorted(flaw for rank in gathered for flaw in rank)


def verify_checkpoint(folder: Path, common: Callable[[], Mapping[str, Any]]) -> None:
    """Compares a checkpoint with its SHA256SUMS; every rank must call it.

    Args:
        common: see `damage`.

    Raises:
        CheckpointError: on every rank, naming the first file that differs.
    """
    if flaw := damage(folder, common):
        raise CheckpointError(flaw)
