"""RUN/log.txt: what a run has said, for the time when its console is gone."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from pathlib import Path

from megatron_vlmoe import __version__
from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.runtime.ranks import environment_rank, environment_world_size

LOG_FILE = "log.txt"

log = logging.getLogger("megatron_vlmoe")


def open_run_log(folder: Path) -> None:
    """Adds what this process logs from here on to FOLDER/log.txt: all of rank 0, warnings and errors of the others.

    A new file is written from `begin_run_logs` on, so that a run that is refused leaves none. A run inside another
    one (a seed of several) is written to both files. Logs of other folders end.

    Args:
        folder: of the run; it exists.

    Raises:
        ConfigError: the file cannot be written.
    """
    place = folder.resolve()
    for other in _open_logs():
        if other.folder == place:
            return
        if other.folder not in place.parents:
            log.removeHandler(other)
            other.close()
    try:
        handler = RunLog(place, environment_rank())
    except OSError as error:
        raise ConfigError(f"--save {folder}: {LOG_FILE}: {error.strerror}") from None
    log.addHandler(handler)


def begin_run_logs() -> None:
    """Writes what has been logged so far, and from here on every line at once."""
    for handler in _open_logs():
        handler.begin()


def write_to_run_log(text: str) -> None:
    """Writes as an error what only stderr would have: the line or the traceback that a command ends with.

    Nothing happens where no run has begun.
    """
    for handler in _open_logs():
        handler.write(logging.ERROR, text)


def _open_logs() -> list[RunLog]:
    return [handler for handler in log.handlers if isinstance(handler, RunLog)]


class RunLog(logging.Handler):
    """Appends lines to a file that all ranks share, at once where it is there already, else from `begin` on.

    Every record is one write to a file in append mode, so that lines of ranks on one file system do not mix.

    Args:
        folder: where log.txt is.
        rank: of this process; lines of ranks other than 0 name it.

    Raises:
        OSError: there is a file that cannot be opened.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        super().__init__(logging.INFO if rank == 0 else logging.WARNING)
        self.folder = folder
        self._waiting: list[bytes] = []
        self._file = -1
        # A run that goes on here may fail before it has begun, while it loads its checkpoint.
        self._has_begun = (folder / LOG_FILE).exists()
        if self._has_begun:
            self._file = os.open(folder / LOG_FILE, os.O_WRONLY | os.O_APPEND)
        origin = f"rank {rank} " if rank else ""
        layout = f"%(asctime)s {origin}%(levelname)s %(message)s"
        self.setFormatter(logging.Formatter(layout, "%Y-%m-%d %H:%M:%S"))
        if rank == 0:
            host, ranks = socket.gethostname(), environment_world_size()
            self.write(
                logging.INFO, f"started on {host}: {ranks} rank(s), megatron_vlmoe {__version__}"
            )

    def write(self, level: int, text: str) -> None:
        """Writes text that is no record of a logger."""
        self.handle(logging.LogRecord(log.name, level, "", 0, text, None, None))

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a record, or lets it wait for the run to begin."""
        self._waiting.append(f"{self.format(record)}\n".encode("utf-8", "backslashreplace"))
        if self._has_begun:
            self.begin()

    def begin(self) -> None:
        """Writes the lines that have waited; later ones do not wait."""
        self._has_begun = True
        # A line that cannot be written (full disk) is left to the console, and the run goes on.
        with contextlib.suppress(OSError):
            if self._file < 0:
                flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
                self._file = os.open(self.folder / LOG_FILE, flags, 0o644)
            while self._waiting:
                os.write(self._file, self._waiting.pop(0))

    def close(self) -> None:
        """Closes the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        super().close()
