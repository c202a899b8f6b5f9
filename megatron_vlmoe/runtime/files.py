"""Files and folders that appear whole or not at all, and that are still there after a power failure.

Until it is complete and synced, what is written is called ``NAME.tmp-PID`` and lies beside its place. What stood at
the place before stays as it was until then. A write that fails leaves nothing behind; its `FileError` names the place.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from megatron_vlmoe.config.errors import FileError

_BUFFER_BYTES = 1 << 20

_unpublished: set[Path] = set()
"""Temporary files of this process that are neither published nor deleted."""


class StagedFile:
    """A file under its temporary name until `publish`; the folder is made where it is missing.

    Several that belong together are all finished first and then published.

    Args:
        path: its place.
        mode: as of `open`: for bytes ``wb`` or ``w+b``, for UTF-8 text ``w``.

    Attributes:
        temporary: its path before `publish`.
        file: what to write to; errors that name the place are those of `write`.

    Raises:
        FileError: it cannot be written; so do the methods.
    """

    def __init__(self, path: str | Path, mode: str = "wb") -> None:
        self.path = Path(path)
        self.temporary = _temporary(self.path)
        text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
        with naming(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _unpublished.add(self.temporary)
            self.file: IO[Any] = open(self.temporary, mode, _BUFFER_BYTES, **text)

    def write(self, content: Any) -> None:
        """Appends bytes or text."""
        with naming(self.path):
            self.file.write(content)

    def finish(self) -> None:
        """Syncs and closes the file, which keeps its temporary name."""
        if not self.file.closed:
            with naming(self.path):
                self.file.flush()
                os.fsync(self.file.fileno())
                self.file.close()

    def publish(self) -> None:
        """Gives the finished file its name."""
        self.finish()
        with naming(self.path):
            os.replace(self.temporary, self.path)
            _unpublished.discard(self.temporary)
            sync(self.path.parent)

    def abort(self) -> None:
        """Deletes the file unless it is published."""
        # Closing flushes, which fails again on a full disk; the first error is the one told.
        with contextlib.suppress(OSError):
            self.file.close()
        with contextlib.suppress(OSError):
            self.temporary.unlink(missing_ok=True)
            _unpublished.discard(self.temporary)


def delete_unpublished() -> None:
    """Deletes the temporary files that are left where SIGTERM ended this process before a block took them over."""
    while _unpublished:
        with contextlib.suppress(OSError):
            _unpublished.pop().unlink(missing_ok=True)


@contextmanager
def open_atomic(path: str | Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """A stream to one file, which gets its name where the block ends without an error; see `StagedFile`."""
    staged = StagedFile(path, mode)
    try:
        try:
            yield staged.file
        except OSError as error:
            if error.filename:
                raise  # about another file, which was read in the block
            raise _named(error, staged.path) from error
        staged.publish()
    finally:
        staged.abort()


def write_text_atomic(path: str | Path, *parts: str) -> None:
    """Writes a UTF-8 file. Raises FileError."""
    write_parts_atomic(path, parts)


def write_parts_atomic(path: str | Path, parts: Iterable[str]) -> None:
    """Writes a UTF-8 file, part by part as they come. Raises FileError."""
    with open_atomic(path, "w") as file:
        file.writelines(parts)


def write_bytes_atomic(path: str | Path, content: bytes) -> None:
    """Writes a file of bytes. Raises FileError."""
    with open_atomic(path) as file:
        file.write(content)


@contextmanager
def folder_atomic(path: Path) -> Iterator[Path]:
    """A folder to fill, which replaces the one at ``path``, if any, where the block ends without an error.

    What processes that were killed have left beside it is deleted first; those that run here still, keep theirs.

    Yields:
        Its path before that.

    Raises:
        FileError: it cannot be written.
    """
    temporary = _temporary(path)
    for left in [temporary, *_left(path, ".tmp-*")]:
        shutil.rmtree(left, ignore_errors=True)
    try:
        with naming(path):
            temporary.mkdir(parents=True)
        yield temporary
        publish_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def delete_left_files(stem: str) -> None:
    """Deletes temporary files of ``STEM.SUFFIX`` that processes which were killed on this machine have left."""
    for left in _left(Path(stem), ".*.tmp-*"):
        left.unlink(missing_ok=True)


def is_remote(path: str) -> bool:
    """Whether a path is an address, as ``s3://bucket/key``."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", path) is not None


def publish_folder(temporary: Path, path: Path) -> None:
    """Syncs a complete folder and gives it the name ``path``, in place of what stood there. Raises FileError."""
    with naming(path):
        for inside in (*sorted(temporary.rglob("*")), temporary):
            sync(inside)
        if path.is_symlink():
            path.unlink()
        elif path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
        sync(path.parent)


def sync(path: str | Path) -> None:
    """Waits until a file is on the disk; of a folder, until renames inside it are."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """An error of the system in the block becomes a `FileError` that names ``path``."""
    try:
        yield
    except OSError as error:
        raise _named(error, path) from error


def _named(error: OSError, path: str | Path) -> FileError:
    return FileError(error.errno or 0, error.strerror or str(error), str(path))


def _left(path: Path, ending: str) -> Iterator[Path]:
    """What lies there under temporary names that begin with ``path``, of processes that do not run any more."""
    for left in path.parent.glob(glob.escape(path.name) + ending):
        process = left.name.rpartition("-")[2]
        if process.isdecimal() and not _runs(int(process)):
            yield left


def _runs(process: int) -> bool:
    """Whether a process of this number runs on this machine."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}.tmp-{os.getpid()}")
