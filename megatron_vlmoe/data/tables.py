"""Tables of a dataset's order, of which the processes of a machine share one copy: files that they map into memory."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_vlmoe.runtime.files import open_atomic

log = logging.getLogger("megatron_vlmoe")

Tables = Mapping[str, npt.NDArray[Any]]
"""Arrays of one dimension by name."""


@dataclass(frozen=True)
class SharedTables:
    """A folder of tables; pickles as its path.

    A table is a pure function of its name and epoch, so a file may be deleted at any time, and one that is there is
    used by later runs too. The first process that needs a table makes it, while the others wait. Of each name the files
    of two epochs are kept.

    Args:
        folder: where the files are; empty for ``megatron_vlmoe-UID`` in the system's folder for temporary files.
        smallest: tables of fewer entries are kept in the memory of each process.
    """

    folder: str = ""
    smallest: int = 1 << 20

    def get(
        self, name: str, epoch: int, sizes: Mapping[str, int], build: Callable[[], Tables]
    ) -> Tables:
        """The tables of an epoch.

        Args:
            name: of the tables, with all that they depend on besides the epoch.
            epoch: from 0.
            sizes: entries of each.
            build: makes them.
        """
        if max(sizes.values()) < self.smallest:
            return build()
        built: Tables | None = None
        try:
            folder = self._made_folder()
            paths = {part: folder / f"{name}-{epoch}-{part}.npy" for part in sizes}
            if found := _mapped(paths, sizes):
                return found
            with _locked(folder / f"{name}.lock"):
                # Another process may have made them meanwhile.
                if found := _mapped(paths, sizes):
                    return found
                built = build()
                _delete_old(folder, name, epoch)
                for part, path in paths.items():
                    with open_atomic(path) as file:
                        np.save(file, built[part], allow_pickle=False)
            return _mapped(paths, sizes) or built
        except OSError as error:
            # A folder that cannot be written, or a full disk, costs memory, nothing else.
            log.warning("%s; each loader process keeps its own tables of the data's order", error)
            return built or build()

    def _made_folder(self) -> Path:
        if self.folder:
            folder = Path(self.folder)
            folder.mkdir(parents=True, exist_ok=True)
            return folder
        folder = Path(tempfile.gettempdir()) / f"megatron_vlmoe-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        # Anyone may have made a folder, or a link, of this name there before.
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise PermissionError(f"{folder}: is no folder that only this user can write to")
        return folder


def _mapped(paths: Mapping[str, Path], sizes: Mapping[str, int]) -> Tables | None:
    """The tables of files, mapped into memory; None if one is missing or damaged."""
    with contextlib.suppress(OSError, ValueError, EOFError):
        # As plain arrays, because single entries of a np.memmap are slow to read.
        found = {
            part: np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
            for part, path in paths.items()
        }
        if all(table.shape == (sizes[part],) for part, table in found.items()):
            return found
    return None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time is in the block; the system frees the lock of one that dies."""
    with open(path, "ab") as file:
        # Some network file systems have no locks: then processes may make the same table at the same time.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _delete_old(folder: Path, name: str, epoch: int) -> None:
    """Deletes files of epochs that are over, and unfinished ones; who has one mapped keeps its contents."""
    for path in folder.glob(f"{name}-*"):
        number = re.match(r"-(\d+)-", path.name[len(name) :])
        if number and (int(number[1]) < epoch - 1 or ".tmp-" in path.name):
            path.unlink(missing_ok=True)
