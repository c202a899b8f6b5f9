"""Runs damaged files through readers in processes of their own, and says what came of each.

A case is the files of one of a reader's folders of valid ones, some of them damaged. What runs a line for the first
time joins the files that later cases start from. Noticing lines takes as long as many readers do: once no new one has
come for a while, it is done in one case of many, and the others count the same but are not damaged further. Before a
case starts it is in memory that the parent shares: when the process dies or hangs, the parent has the case.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import fnmatch
import hashlib
import importlib
import io
import json
import mmap
import os
import random
import resource
import shutil
import signal
import struct
import sys
import time
import traceback
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mutations
from readers import Reader

from megatron_vlmoe.config.errors import UserError

SECONDS = 5
"""Of computing that a case may take; small files need milliseconds."""
WALL_SECONDS = 60
"""That it may wait for something; waiting for the processor, however long on a busy machine, does not count."""
MEGABYTES = 1024
"""That a case may take of memory."""
PATIENCE = 400
"""Cases without a new line after which lines are noticed in few of them."""
NOTICED = 1 / 16
"""Of the cases after that."""
_SHARED = 32 << 20
OUTCOMES = ("read", "refused", "finding")
_HEADER = struct.Struct(
    "<QQQdQ"
)  # cases by what came of them, when the present one began, its bytes

Files = Mapping[str, bytes]


class Finding(Exception):
    """What a reader must not do; the message says what."""


@dataclasses.dataclass(frozen=True)
class Case:
    """Damaged files among valid ones.

    Args:
        start: name of the folder of valid files.
        files: content of those that differ, by their path in it.
    """

    start: str
    files: Files

    def packed(self) -> bytes:
        """As bytes."""
        sizes = [[name, len(content)] for name, content in self.files.items()]
        return json.dumps([self.start, sizes]).encode() + b"\n" + b"".join(self.files.values())

    @classmethod
    def unpacked(cls, data: bytes) -> Case:
        """Raises ValueError."""
        head, _, rest = data.partition(b"\n")
        start, sizes = json.loads(head)
        stream = io.BytesIO(rest)
        return cls(start, {name: stream.read(size) for name, size in sizes})


# ---- one case


def outcome_of(reader: Reader, folder: Path, names: Iterable[str]) -> str:
    """Reads a folder: `read` or `refused`.

    Args:
        reader: what reads it.
        folder: the folder.
        names: of the files and folders in there, of which an error names one.

    Raises:
        Finding: it ends in any other way.
    """
    outcome = "read"
    try:
        with warnings.catch_warnings(), _quiet():
            warnings.simplefilter("ignore")
            reader.read(folder)
    except UserError as error:
        outcome = "refused"
        _check_message(reader, [str(folder), *names], error)
    except MemoryError as error:
        raise Finding("MemoryError") from error
    except Exception as error:
        raise Finding(_where(error)) from error
    return outcome


def _check_message(reader: Reader, names: Iterable[str], error: UserError) -> None:
    message = str(error)
    if not message or "\n" in message or "\r" in message:
        raise Finding(f"the error is not one line: {_where(error)}") from error
    if not reader.tells_reason_alone and not any(name in message for name in names):
        raise Finding(f"the error names no file: {_where(error)}") from error
    if len(message) > 4000:
        raise Finding(f"an error of {len(message)} letters: {_where(error)}") from error


def _where(error: BaseException) -> str:
    """Type of an error and the last place in the package that it came from, by which findings are told apart."""
    place = ""
    for frame in traceback.extract_tb(error.__traceback__):
        if "/megatron_vlmoe/" in frame.filename:
            place = f"{frame.filename.rpartition('/megatron_vlmoe/')[2]}:{frame.name}"
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {place} ({Path(last.filename).name}:{last.name})"


def _most_memory() -> int:
    """The most that this process has had yet, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


# ---- lines


def code_lines(module: str) -> dict[str, set[int]]:
    """Numbers of the lines of a module that can run inside functions, by the name of its file."""
    file = importlib.import_module(module).__file__
    assert file is not None
    found: set[int] = set()
    todo = [compile(Path(file).read_text(encoding="utf-8"), file, "exec")]
    top = todo[0]
    while todo:
        code = todo.pop()
        todo += [c for c in code.co_consts if isinstance(c, types.CodeType)]
        if code is not top and code.co_flags & 0x2:  # of a function: the others run on import
            found |= {line for *_, line in code.co_lines() if line and line != code.co_firstlineno}
    return {file: found}


class Lines:
    """Notices lines of some files that run for the first time."""

    def __init__(self, files: Mapping[str, set[int]]) -> None:
        self.files = files
        self.seen: set[tuple[str, int]] = set()
        self.is_new = False
        self._known: dict[types.CodeType, bool] = {}

    def call(self, run: Callable[[], Any]) -> Any:
        """Runs something; `is_new` says whether a line ran for the first time."""
        self.is_new = False
        sys.settrace(self._enter)
        try:
            return run()
        finally:
            sys.settrace(None)

    def _enter(self, frame: types.FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        known = self._known.get(code)
        if known is None:
            known = self._known[code] = code.co_filename not in self.files
        return None if known else self._line

    def _line(self, frame: types.FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        place = code.co_filename, frame.f_lineno
        if place not in self.seen:
            self.seen.add(place)
            self.is_new = True
            if all((code.co_filename, line) in self.seen for *_, line in code.co_lines() if line):
                self._known[code] = True
        return self._line


# ---- many cases


class Workshop:
    """The folders of one reader: its valid files, and a copy whose files are damaged and mended again.

    Args:
        reader: the reader.
        folder: where they are; what is there already is used.
    """

    def __init__(self, reader: Reader, folder: Path) -> None:
        self.reader = reader
        self.valid = folder / "valid"
        self.work = folder / "work"
        if not self.valid.is_dir():
            made = folder / "made"
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir(parents=True)
            with _quiet():
                reader.make(made)
            made.rename(self.valid)
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.valid, self.work)
        self.starts = [Case(path.name, {}) for path in sorted(self.valid.iterdir())]
        self._content = {
            start.start: {
                str(path.relative_to(self.valid / start.start)): path.read_bytes()
                for path in sorted((self.valid / start.start).rglob("*"))
                if path.is_file()
            }
            for start in self.starts
        }
        self._names = {
            start: {part for name in (*files, "out") for part in Path(name).parts}
            for start, files in self._content.items()
        }
        self._targets = {start.start: self.targets(start.start) for start in self.starts}
        self._memory = _most_memory()

    def targets(self, start: str) -> list[str]:
        """The files that are damaged."""
        names = self._content[start]
        patterns = self.reader.damaged
        return [n for n in names if any(fnmatch.fnmatch(n, p) for p in patterns)]

    def damage(self, rng: random.Random, case: Case) -> Case:
        """One file of a case, or two, damaged once more."""
        names = self._targets[case.start]
        content = self._content[case.start]
        files = dict(case.files)
        for name in rng.sample(names, min(len(names), rng.choice((1, 1, 1, 1, 2)))):
            others = [content[other] for other in names[:20]]
            files[name] = mutations.damaged(rng, name, files.get(name, content[name]), others)
        return Case(case.start, files)

    def run(self, case: Case) -> str:
        """Reads a case: see `outcome_of`."""
        folder = self.work / case.start
        for name, content in case.files.items():
            (folder / name).write_bytes(content)
        try:
            outcome = outcome_of(self.reader, folder, self._names[case.start])
            before, self._memory = self._memory, _most_memory()
            if self._memory - before > MEGABYTES:
                raise Finding(f"{MEGABYTES} MB of memory for {len(case.packed())} bytes")
            return outcome
        finally:
            for name in case.files:
                (folder / name).write_bytes(self._content[case.start][name])


class Board:
    """Memory that a worker and its parent share: how many cases are done, and which one is running."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, _SHARED)
        self.outcomes = dict.fromkeys(OUTCOMES, 0)

    def begin(self, case: bytes) -> None:
        """A case is about to run."""
        self.memory[_HEADER.size : _HEADER.size + len(case)] = case
        self._write(time.monotonic(), len(case))

    def end(self, outcome: str) -> None:
        """It has run."""
        self.outcomes[outcome] += 1
        self._write(0.0, 0)

    def _write(self, began: float, size: int) -> None:
        self.memory[: _HEADER.size] = _HEADER.pack(*self.outcomes.values(), began, size)

    def state(self) -> tuple[Counter[str], float, bytes]:
        """Cases that are done by what came of them, and of the running one when it began and what it is."""
        *numbers, began, size = _HEADER.unpack(self.memory[: _HEADER.size])
        outcomes = Counter(dict(zip(OUTCOMES, numbers, strict=True)))
        return outcomes, began, self.memory[_HEADER.size : _HEADER.size + size]


@dataclasses.dataclass
class Tally:
    """What came of the cases of one reader."""

    outcomes: Counter[str] = dataclasses.field(default_factory=Counter)
    findings: dict[str, str] = dataclasses.field(default_factory=dict)
    """Folder of the first case by what is wrong."""
    found: Counter[str] = dataclasses.field(default_factory=Counter)
    """Cases of each finding."""
    lines: set[tuple[str, int]] = dataclasses.field(default_factory=set)
    possible: int = 0
    seconds: float = 0.0


def limit_process(report: Path) -> None:
    """Ends this process, with a traceback in a file, when a case computes for too long or takes too much memory."""
    file = report.open("w")
    faulthandler.enable(file)
    faulthandler.register(signal.SIGPROF, file, all_threads=False, chain=True)
    with open("/proc/self/statm") as statm:
        present = int(statm.read().split()[0]) * resource.getpagesize()
    limit = present + (2 * MEGABYTES << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def work(
    workshop: Workshop,
    board: Board,
    seed: int,
    cases: int,
    until: float,
    notes: Path,
    again: Sequence[Case] = (),
) -> None:
    """Runs cases until there were enough, `again` first; writes what it finds into a file, a line of JSON each."""
    files: dict[str, set[int]] = {}
    for module in workshop.reader.modules:
        files |= code_lines(module)
    lines = Lines(files)
    pool, rng = list(workshop.starts), random.Random(seed)
    given = [*again, *workshop.starts]
    with notes.open("a") as file:

        def note(**content: Any) -> None:
            file.write(json.dumps(content) + "\n")
            file.flush()

        note(possible=sum(map(len, files.values())))
        noted: set[tuple[str, int]] = set()
        number = since_new = 0
        while number < cases and time.monotonic() < until:
            case = given[number] if number < len(given) else workshop.damage(rng, rng.choice(pool))
            number += 1
            packed = case.packed()
            board.begin(packed)
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            try:
                if since_new < PATIENCE or rng.random() < NOTICED:
                    outcome = lines.call(lambda case=case: workshop.run(case))
                    since_new = 0 if lines.is_new else since_new + 1
                else:
                    lines.is_new = False
                    outcome = workshop.run(case)
            except Finding as finding:
                outcome = "finding"
                trace = "".join(traceback.format_exception(finding))
                note(finding=str(finding), trace=trace[-6000:], case=packed.hex())
            signal.setitimer(signal.ITIMER_PROF, 0)
            board.end(outcome)
            if not case.files and outcome != "read":
                told = f"valid files of {case.start} are not read"
                note(finding=told, trace="", case=packed.hex())
            if lines.is_new:
                if outcome != "finding" and case.files and len(packed) < 200_000:
                    pool.append(case)
                note(lines=[*lines.seen - noted])
                noted = set(lines.seen)


def fuzz(
    reader: Reader,
    folder: Path,
    seed: int,
    cases: int,
    seconds: float,
    again: Sequence[Case] = (),
) -> Tally:
    """Runs cases of one reader in processes, a new one for each that dies.

    Args:
        folder: of the reader; findings go into `findings` in there.
        seed: of the first process; the next ones count on.
        cases: how many.
        seconds: after which no case is begun.
        again: cases that are run first.
    """
    todo = list(again)
    tally, done, began = Tally(), 0, time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    notes, report = folder / "notes.jsonl", folder / "fault.txt"
    workshop: Workshop | None = None
    while done < cases and time.monotonic() - began < seconds:
        notes.unlink(missing_ok=True)
        report.unlink(missing_ok=True)
        board = Board()
        child = os.fork()
        if not child:
            status = 1
            try:
                # Decoders in C write there whatever they think of a file.
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                workshop = Workshop(reader, folder)
                # What the first call imports is no part of a case.
                for start in workshop.starts:
                    with contextlib.suppress(Finding):
                        workshop.run(start)
                limit_process(report)
                work(workshop, board, seed, cases - done, began + seconds, notes, todo)
                status = 0
            except BaseException:
                with report.open("a") as file:
                    traceback.print_exc(file=file)
            os._exit(status)
        reason = _watch(child, board)
        finished, _, packed = board.state()
        _collect(tally, notes)
        if reason and not packed:
            raise RuntimeError(f"{reader.name}: {reason}\n{report.read_text()}")
        finished += Counter(finding=bool(reason))
        tally.outcomes += finished
        if reason:
            told = f"{reason} ({_fault(report)})"
            todo = todo[finished.total() :]
            _keep(tally, folder, told, report.read_text(), packed)
        done += finished.total()
        seed += 1
    tally.seconds = time.monotonic() - began
    return tally


def _watch(child: int, board: Board) -> str:
    """Waits for a worker; what ended it, or nothing."""
    case, since = Counter[str](), 0.0
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        cases, began, _ = board.state()
        if not began or cases != case or not _sleeps(child):
            case, since = cases, time.monotonic()
        elif time.monotonic() - since > WALL_SECONDS:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return f"waits for more than {WALL_SECONDS} s"
        time.sleep(0.05)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return (
            f"computes for more than {SECONDS} s"
            if number == signal.SIGPROF
            else f"ended by {signal.Signals(number).name}"
        )
    return f"exit status {os.WEXITSTATUS(status)}" if os.WEXITSTATUS(status) else ""


def _sleeps(process: int) -> bool:
    """Whether a process waits for something other than the processor."""
    stat = Path(f"/proc/{process}/stat").read_text()
    return stat.rpartition(")")[2].split()[0] in "SD"


def _fault(report: Path) -> str:
    """The innermost line of the package in a traceback of faulthandler."""
    for line in report.read_text().splitlines() if report.is_file() else ():
        if "/megatron_vlmoe/" in line:
            file, _, function = line.partition(", line ")
            return f"{file.rpartition('/megatron_vlmoe/')[2].rstrip(chr(34))}:{function.rpartition(' ')[2]}"
    return "?"


def _collect(tally: Tally, notes: Path) -> None:
    for line in notes.read_text().splitlines() if notes.is_file() else ():
        try:
            note = json.loads(line)
        except ValueError:  # of a process that died while it wrote
            continue
        tally.possible = note.get("possible", tally.possible)
        tally.lines |= {(file, number) for file, number in note.get("lines", ())}
        if "finding" in note:
            packed = bytes.fromhex(note["case"])
            _keep(tally, notes.parent, note["finding"], note["trace"], packed)


def _keep(tally: Tally, folder: Path, finding: str, trace: str, packed: bytes) -> None:
    """Counts a finding, and saves its first case."""
    tally.found[finding] += 1
    if finding in tally.findings:
        return
    case = Case.unpacked(packed)
    name = hashlib.sha256(finding.encode()).hexdigest()[:10]
    target = folder / "findings" / name
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder / "valid" / case.start, target / "files")
    for file, content in case.files.items():
        (target / "files" / file).write_bytes(content)
    (target / "case.bin").write_bytes(packed)
    (target / "finding.txt").write_text(f"{finding}\n\n{trace}\n")
    tally.findings[finding] = str(target)
