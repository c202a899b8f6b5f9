"""Errors that a user can mend: every command and tool shows their message as one line, without a traceback."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class UserError(Exception):
    """What is wrong with a user's options, files or data; the message is one line that names it.

    Every other exception is a mistake in a program and keeps its traceback.

    Attributes:
        exit_status: of the command: 2 where the command line or configuration is wrong, 1 otherwise.
    """

    exit_status = 1


class ConfigError(UserError, ValueError):
    """A configuration that cannot run; the message names the option and the reason."""

    exit_status = 2


class DataError(UserError, ValueError):
    """Bad input or a damaged file; the message names the file and, where known, the record."""


class FileError(OSError, DataError):
    """A file or folder that cannot be written; made of error number, reason and name, as the system's own errors."""

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


class ConvertError(UserError, ValueError):
    """Something that cannot be converted; the message names the file or tensor."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that cannot be written or read; the message names it."""


class TrainingError(UserError, RuntimeError):
    """A run that must not go on."""


class FillingError(UserError, ValueError):
    """An image, a text and an exported model that do not go together."""


class MetricsError(UserError, ValueError):
    """Metrics that cannot be read; the message names the file."""


@contextlib.contextmanager
def user_files() -> Iterator[None]:
    """Around work on files that a user named: where one cannot be read or written, that is a DataError."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        named = f"{error.filename}: {reason}" if error.filename else reason
        raise DataError(named) from error
