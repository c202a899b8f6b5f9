"""Errors that a user can mend, and the second half of their messages: what was probably meant, and values that fit.

Every command and tool shows the message as one line, without a traceback.
"""

from __future__ import annotations

import contextlib
import difflib
import math
from collections.abc import Iterable, Iterator

_LONGEST = 2000
"""Letters of a message; what a file holds may be in it."""


class UserError(Exception):
    """What is wrong with a user's options, files or data; the message is one line that names it.

    Every other exception is a mistake in a program and keeps its traceback.

    Attributes:
        exit_status: of the command: 2 where the command line or configuration is wrong, 1 otherwise.
    """

    exit_status = 1

    def __str__(self) -> str:
        # What a file says may be in it: line ends, and signs that a terminal obeys.
        return on_one_line(super().__str__())


class ConfigError(UserError, ValueError):
    """A configuration that cannot run; the message names the option and the reason."""

    exit_status = 2


class DataError(UserError, ValueError):
    """Bad input or a damaged file; the message names the file and, where known, the record."""


class FileError(OSError, DataError):
    """A file or folder that cannot be written; made of error number, reason and name, as the system's own errors."""

    def __str__(self) -> str:
        return on_one_line(f"{self.filename}: {self.strerror}")


class ConvertError(UserError, ValueError):
    """Something that cannot be converted; the message names the file or tensor."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that cannot be written or read; the message names it."""


class StartupError(UserError, RuntimeError):
    """Processes that do not come together, or a machine that has not what a run needs; the message says where."""


class TrainingError(UserError, RuntimeError):
    """A run that must not go on."""


class FillingError(UserError, ValueError):
    """An image, a text and an exported model that do not go together."""


class RoutingError(UserError, ValueError):
    """A model, pictures and captions between which there is no routing to show."""


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


@contextlib.contextmanager
def conversion_errors() -> Iterator[None]:
    """Around what a conversion asks of others: their errors name the file already, and are its own."""
    try:
        yield
    except (CheckpointError, ConfigError, DataError) as error:
        raise ConvertError(str(error)) from None


def did_you_mean(word: str, candidates: Iterable[str], likeness: float = 0.65) -> str:
    """`; did you mean X?` with the candidate closest to a misspelt word, or two equally close; else empty.

    `likeness` is the least, from 0 to 1, that a candidate must have.
    """
    # Compared without regard to case, hyphens and underscores, which are easily mixed up.
    plain = {_plain(candidate): candidate for candidate in candidates}
    score = {
        name: difflib.SequenceMatcher(None, _plain(word), name).ratio()
        for name in difflib.get_close_matches(_plain(word), plain, n=2, cutoff=likeness)
    }
    return _question(plain[name] for name in score if score[name] > max(score.values()) - 0.05)


def did_you_mean_option(name: str, known: Iterable[str]) -> str:
    """Like :func:`did_you_mean`, for `section.option` names: knows that the section may be wrong or absent.

    The name and all `known` ones may have leading hyphens.
    """
    known = list(known)
    last = _plain(name.rpartition(".")[2])
    same = [option for option in known if _plain(option.rpartition(".")[2]) == last]
    # A slip of one letter in the whole name is likelier than a wrong section: train.step is train.steps.
    return (
        did_you_mean(name, known, 0.88)
        or _question(same[:3])
        or did_you_mean(name, known)
        or did_you_mean(last, known)
    )


def unknown_name(name: str, names: Iterable[str]) -> str:
    """`unknown; choose one of X, Y, Z; did you mean X?`."""
    names = list(names)
    return f"unknown; choose one of {', '.join(names)}{did_you_mean(name, names)}"


def near_multiples(value: int, unit: int) -> str:
    """The multiples of `unit` around a value that is none: `24 or 32`; only the upper one if the lower is 0."""
    below = value // unit * unit
    return f"{below} or {below + unit}" if below > 0 else str(unit)


def divisors(number: int) -> list[int]:
    """The divisors of a number in order; takes time like its square root."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def near_divisors(value: int, number: int) -> str:
    """The divisors of a number around a value that does not divide it: `4 or 8`."""
    found = divisors(number)
    below = [d for d in found if d < value][-1:]
    above = [d for d in found if d > value][:1]
    return " or ".join(map(str, below + above))


def on_one_line(text: str) -> str:
    """The text: line ends are spaces, other signs that are not printed stand as escapes, as ``\\x1b``, and the middle
    of a very long one is left out.
    """
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
    if text.isprintable():
        return text
    spaced = " ".join(text.split("\n"))
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in spaced)


def _plain(word: str) -> str:
    return word.lower().lstrip("-").replace("-", "_")


def _question(names: Iterable[str]) -> str:
    listed = " or ".join(names)
    return f"; did you mean {listed}?" if listed else ""
