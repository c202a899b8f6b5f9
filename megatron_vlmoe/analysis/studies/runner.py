"""Runs what a study needs, several runs side by side; what is finished is left alone, what was interrupted goes on."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import IO, Any

from megatron_vlmoe import __version__
from megatron_vlmoe.analysis.plots import read_metrics
from megatron_vlmoe.analysis.studies.plan import PlannedRow, PlannedRun
from megatron_vlmoe.analysis.studies.results import (
    RUN_FILE,
    is_finished,
    noted_environment,
    starts_from_failed,
    training_seconds,
)
from megatron_vlmoe.analysis.studies.scales import Scale
from megatron_vlmoe.config.command_line import merge_file
from megatron_vlmoe.config.errors import ConfigError, DataError, UserError
from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.planning.estimate import hardware_flops_per_step
from megatron_vlmoe.runtime.files import write_text_atomic
from megatron_vlmoe.runtime.machine import processor_name
from megatron_vlmoe.runtime.ranks import first_error, program_environment, torchrun

SLURM_SCRIPT = "examples/slurm_pretrain.sh"
CONSOLE = "console.txt"
LOCK = ".lock"

_POLL_SECONDS = 0.2
# Start, first and last evaluation and saving of a run.
_OVERHEAD_SECONDS = 20.0
_PACKAGE = Path(__file__).resolve().parents[3]


def unique_runs(rows: Sequence[PlannedRow]) -> list[PlannedRun]:
    """Every run once, each after the one that it starts from."""
    return list({run.folder: run for row in rows for run in row.runs}.values())


def command_of(run: PlannedRun, program: Sequence[str]) -> list[str]:
    """The command line of a run, of which `program` starts one process of Python."""
    launcher = [*program]
    if run.processes > 1:
        launcher += torchrun(run.processes)
    return [*launcher, "-m", "megatron_vlmoe", run.command, *run.words, "--save", str(run.folder)]


def command_lines(runs: Sequence[PlannedRun], gpus_per_node: int, slurm: bool) -> Iterator[str]:
    """A script that runs what is not finished: torchrun here, or jobs for Slurm that wait for each other."""
    yield "set -e"
    # Paths of the options may be relative.
    yield shlex.join(["cd", str(Path.cwd())])
    jobs: dict[Path, str] = {}
    for run in runs:
        if is_finished(run):
            yield f"# finished: {run.folder}"
            continue
        words = [run.command, *run.words, "--save", str(run.folder)]
        if not slurm:
            torchrun = ["torchrun", "--standalone", "--nproc-per-node", str(run.processes)]
            launcher = torchrun if run.processes > 1 else ["python"]
            yield shlex.join([*launcher, "-m", "megatron_vlmoe", *words])
            continue
        jobs[run.folder] = name = f"JOB{len(jobs) + 1}"
        nodes = -(-run.processes // gpus_per_node)
        line = ["sbatch", "--parsable", f"--job-name={run.folder.name}", f"--nodes={nodes}"]
        gpus = min(run.processes, gpus_per_node)
        # A job that shares its nodes with no other is given all of their GPUs, however few it asks for, and a user may
        # have the variable set; another number of processes would be another run.
        line += [f"--gpus-per-node={gpus}", f"--export=ALL,GPUS_PER_NODE={gpus}"]
        text = shlex.join(line)
        if run.after is not None and run.after.folder in jobs:
            # Else it would wait for ever if that one fails.
            text += f" --dependency=afterok:${jobs[run.after.folder]} --kill-on-invalid-dep=yes"
        script = shlex.join([SLURM_SCRIPT, "examples/launch.sh", *words])
        yield f"{name}=$({text} {script})"


@dataclass(frozen=True)
class Estimate:
    """How long unfinished runs will take.

    Args:
        seconds: by folder; None where the length is known only with the data.
        rate: FLOP/s of a process.
        measured: finished pretrainings that the rate was measured on; 0: it is a guess.
    """

    seconds: Mapping[Path, float | None]
    rate: float
    measured: int


def estimate(runs: Sequence[PlannedRun], scale: Scale) -> Estimate:
    """From the FLOPs of every unfinished run's steps, at the rate of the finished ones among them or the scale's."""
    work = time_spent = 0.0
    done = [run for run in runs if run.command == "pretrain" and is_finished(run)]
    timed = 0
    for run in done:
        try:
            config = merge_file(RunConfig(), run.folder / "config.yaml")
            flops_done = hardware_flops_per_step(config) * run.config.train.steps / run.processes
            seconds_done = training_seconds(read_metrics(run.folder))[run.config.train.steps]
        except UserError:
            # Which is said where its results are wanted.
            continue
        work, time_spent, timed = work + flops_done, time_spent + seconds_done, timed + 1
    rate = work / time_spent if time_spent else scale.rate
    seconds: dict[Path, float | None] = {}
    for run in runs:
        if not is_finished(run):
            flops = _flops(run, scale) * run.config.train.steps
            seconds[run.folder] = (
                flops / (rate * run.processes) + _OVERHEAD_SECONDS if flops else None
            )
    return Estimate(seconds, rate, timed if time_spent else 0)


def _flops(run: PlannedRun, scale: Scale) -> float:
    """FLOPs of a step; those of a fine-tuning by its number of samples, from the step that trained the model."""
    first = run
    while first.after is not None:
        first = first.after
    model = first.config.model
    text, image = scale.vocabularies
    model = replace(
        model,
        vocab_size=model.vocab_size or text,
        visual_vocab_size=model.visual_vocab_size or image,
    )
    flops = hardware_flops_per_step(replace(first.config, model=model))
    if not isinstance(run.config, FinetuneConfig):
        return flops
    data, shape = first.config.data, run.config.sample_shape
    samples = data.global_texts + data.global_images + data.global_pairs
    own = run.config.task.global_batch_size * (shape.texts + shape.images + shape.pairs)
    return flops * own / max(samples, 1)


@contextlib.contextmanager
def locked(output: Path) -> Iterator[IO[str]]:
    """The folder of studies for this process alone, and for the runs that it starts, as long as any of them lives.

    Raises:
        ConfigError: another one works there.
        DataError: the folder cannot be made.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        file = (output / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise DataError(f"{output}: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            found = "; ".join(_holders(output / LOCK))
            raise ConfigError(
                f"{output}: another `vlmoe study`, or a run that it left behind, works in this folder"
                + (f" ({found})" if found else "")
                + "; wait for it, or give another --output"
            ) from None
        yield file


def _holders(lock: Path) -> list[str]:
    """The processes that have this file open, as far as this user may see: runs by their names, once each."""
    holders: dict[str, str] = {}
    for process in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        # Another user's, or one that has ended meanwhile.
        with contextlib.suppress(OSError):
            if process.name == str(os.getpid()):
                continue
            if not any(file.samefile(lock) for file in (process / "fd").iterdir() if file.exists()):
                continue
            words = (process / "cmdline").read_bytes().decode("utf-8", "replace").split("\0")
            name = "a study"
            if "--save" in words[:-1]:
                name = Path(words[words.index("--save") + 1]).name
            # A run's helpers have the file open too; it was there before them.
            holders.setdefault(name, f"{name}, process {process.name}")
    return list(holders.values())


def environment_of(processes: int, jobs: int) -> dict[str, Any]:
    """Machine, versions and commit that a run has, for the record."""
    versions = {}
    for name in ("torch", "megatron-core"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    found = {
        "megatron_vlmoe": __version__,
        "commit": _output(["git", "-C", str(_PACKAGE), "describe", "--always", "--dirty"]),
        "python": platform.python_version(),
        **versions,
        "machine": _machine(),
        "processes": processes,
        "side by side": jobs,
    }
    return {name: value for name, value in found.items() if value != ""}


def _machine() -> str:
    if shutil.which("nvidia-smi"):
        names = _output(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]).splitlines()
        if names:
            return f"{len(names)} x {names[0]}"
    return f"{os.cpu_count()} cores {processor_name()}"


def _output(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


@dataclass
class ActiveRun:
    """A run that has been started.

    Args:
        run: which.
        process: that runs it, or torchrun.
        console_start: bytes that its console held before.
        started: time of the monotonic clock.
        is_asked: it was asked to save and leave.
    """

    run: PlannedRun
    process: subprocess.Popen[bytes]
    console_start: int
    started: float
    is_asked: bool = False


@dataclass
class Runner:
    """Carries out the runs of a study.

    Args:
        runs: all of them, each after the one that it starts from.
        jobs: how many at a time.
        lock: which the runs hold too.
        has_changed: whether a run, before it is started, has become another one (`Planner.has_changed`).

    Attributes:
        failures: what was wrong with each run that failed, by its folder.
        is_stopped: a signal asked to leave.
    """

    runs: Sequence[PlannedRun]
    jobs: int
    lock: IO[str]
    has_changed: Callable[[PlannedRun], bool]
    failures: dict[Path, str] = field(default_factory=dict)
    is_stopped: bool = False

    def run(self) -> None:
        """Runs until all is done or tried, or a signal asks to leave; then the runs save, and go on another time."""
        waiting = [run for run in self.runs if not is_finished(run)]
        todo, started = len(waiting), time.monotonic()
        _say(f"{len(self.runs)} runs, {len(self.runs) - todo} of them finished before")
        if note := self._other_code(waiting):
            _say(note)
        active: list[ActiveRun] = []
        with self._signals():
            try:
                while active or (waiting and not self.is_stopped):
                    self._fill(waiting, active)
                    for own in [own for own in active if own.process.poll() is not None]:
                        active.remove(own)
                        done = todo - len(waiting) - len(active)
                        each = (time.monotonic() - started) / done
                        left = f"; about {each * (todo - done) / 60:.0f} min left"
                        self._end(own, f"{done} of {todo}", left if done < todo else "")
                    if self.is_stopped:
                        self._ask_to_leave(active)
                    time.sleep(_POLL_SECONDS)
            finally:
                # After an error here, such as output that nobody reads any more, nothing goes on unseen.
                self._ask_to_leave(active)
                for own in active:
                    own.process.wait()

    def _other_code(self, waiting: Sequence[PlannedRun]) -> str:
        """A note on finished runs of another version of the program, which is no part of what they are known by."""
        now = environment_of(1, 1)
        runs = [run for run in self.runs if run not in waiting]
        noted = [own for run in runs if (own := noted_environment(run.folder))]
        code = ("megatron_vlmoe", "commit")
        others = [own for own in noted if any(own.get(name) != now.get(name) for name in code)]
        if not others:
            return ""
        names = dict.fromkeys(str(own.get("commit") or own.get("megatron_vlmoe")) for own in others)
        return (
            f"{len(others)} finished run(s) are of another version ({', '.join(names)}) and taken as they are; "
            "another --output runs them again"
        )

    def _fill(self, waiting: list[PlannedRun], active: list[ActiveRun]) -> None:
        """Starts runs as long as there is room and what they start from is there."""
        busy = {own.run.folder for own in active} | {run.folder for run in waiting}
        for run in list(waiting):
            if self.is_stopped or len(active) >= self.jobs:
                return
            if run.after is not None and run.after.folder in busy:
                continue
            waiting.remove(run)
            if run.after is not None and run.after.folder in self.failures:
                self._fail(run, starts_from_failed(run.after))
            elif self.has_changed(run):
                self._fail(run, "its data have changed since this command began; give it again")
            else:
                active.append(self._start(run))

    def _end(self, own: ActiveRun, count: str, left: str) -> None:
        """Says what became of a run."""
        name = own.run.folder.name
        if is_finished(own.run):
            minutes = (time.monotonic() - own.started) / 60
            _say(f"{count}: {name} in {minutes:.1f} min{left}")
        elif own.is_asked:
            _say(f"stopped {name}, which goes on another time")
        else:
            console = own.run.folder / CONSOLE
            reason = _reason(console, own.console_start, own.process.returncode)
            self._fail(own.run, reason)
            # Later commands say it too.
            with contextlib.suppress(OSError):
                self._note(own.run, {"failed": reason})

    def _start(self, run: PlannedRun) -> ActiveRun:
        folder = run.folder
        folder.mkdir(parents=True, exist_ok=True)
        command = command_of(run, [sys.executable])
        self._note(run, {})
        threads = max(1, (os.cpu_count() or 1) // (self.jobs * run.processes))
        environment = {"OMP_NUM_THREADS": str(threads), **program_environment()}
        _say(f"started {folder.name}")
        with (folder / CONSOLE).open("ab") as console:
            before = console.tell()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                env=environment,
                # What the terminal sends comes through this process, once.
                start_new_session=True,
                pass_fds=(self.lock.fileno(),),
            )
        return ActiveRun(run, process, before, time.monotonic())

    def _note(self, run: PlannedRun, more: Mapping[str, str]) -> None:
        """Writes study.json into a run's folder."""
        command = command_of(run, [sys.executable])
        noted = {
            "command": shlex.join(["vlmoe", *command[command.index(run.command) :]]),
            "environment": environment_of(run.processes, self.jobs),
            **more,
        }
        write_text_atomic(run.folder / RUN_FILE, json.dumps(noted, indent=1) + "\n")

    def _fail(self, run: PlannedRun, reason: str) -> None:
        self.failures[run.folder] = reason
        print(f"failed: {run.folder.name}: {reason}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Takes note of a request to leave."""

        def leave(number: int, frame: FrameType | None) -> None:
            self.is_stopped = True

        numbers = [signal.SIGINT, signal.SIGTERM]
        # A terminal that closes, but under nohup.
        if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
            numbers.append(signal.SIGHUP)
        previous = {number: signal.signal(number, leave) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _ask_to_leave(self, active: Sequence[ActiveRun]) -> None:
        """SIGTERM to each run, once; to the ranks of torchrun, which would kill them before they have saved."""
        for own in active:
            if own.is_asked:
                continue
            own.is_asked = True
            leader = own.process.pid
            targets = [leader]
            if own.run.processes > 1:
                with contextlib.suppress(OSError):
                    children = Path(f"/proc/{leader}/task/{leader}/children").read_text()
                    targets = [int(pid) for pid in children.split()] or targets
            for pid in targets:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)


def _reason(console: Path, before: int, status: int) -> str:
    """The error line of a run that ended, from what it has said since it was started."""
    said = first_error(console.read_bytes()[before:].decode("utf-8", "replace"))
    if not said:
        said = f"exit status {status}" if status else "ended before its last step"
    return f"{said} ({console})"


def _say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)
