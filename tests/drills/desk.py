"""What drills share: a corpus, runs that nothing disturbed, processes that can be broken, and the verdict."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import psutil
from commands import Outcome, as_ranks, child, environment, run
from helpers import start_process
from small_corpus import Corpus, assert_same_metrics, make_corpus, metrics

from megatron_vlmoe.runtime.torch_files import read_torch_file

STEPS = 10
EVERY = 2
"""Steps between checkpoints, of which the last two are kept."""
LIMIT = 240.0
"""Seconds after which what has not ended hangs, but for those that it waited for a core, which other work has."""
STARTUP_MINUTES = "1"
"""So long a rank waits for one that was killed before they met."""
TRACKER = "checkpoints/latest_checkpointed_iteration.txt"
HASTY = (
    *("--health.hang_seconds", "15", "--health.hang_factor", "3"),
    *("--parallel.distributed_timeout_minutes", "1"),
)
"""So long ranks wait for one that does not answer: in steps by the watchdog, in saves by the limit of collectives."""
VARIANTS: Mapping[str, tuple[str, ...]] = {
    "plain": (),
    "background saves": ("--checkpoint.async_save", "true"),
    "expert parallel": ("--parallel.expert_model_parallel_size", "2"),
    "tensor parallel": ("--parallel.tensor_model_parallel_size", "2"),
}


class Verdict(Enum):
    """What came of a drill."""

    RECOVERED = "recovered"  # it went on, or was started again, and ended as the undisturbed run
    CLEAR = "clear error"  # one line that names what broke
    UNCLEAR = "unclear error"  # it ended, but not with such a line
    HANG = "hang"
    SILENT = "silent corruption"  # it ended well, and its results are others
    NOT_RUN = "not run"


@dataclass(frozen=True)
class Result:
    """Of one drill.

    Args:
        verdict: what came of it.
        detail: where it was broken, and what the program said.
        lost_steps: finished steps before the break that the last checkpoint had, and that were trained again.
        training_kills: whether it was a kill of a training of several processes.
    """

    verdict: Verdict
    detail: str
    lost_steps: int = 0
    training_kills: int = 0


class Processes:
    """A command, or the ranks of a run, in processes of their own."""

    def __init__(
        self, words: Sequence[str], folder: Path, output: Path, ranks: int = 1, **variables: str
    ) -> None:
        self.words = tuple(words)
        self.folder = folder
        output.mkdir(parents=True, exist_ok=True)
        self.out, self.err = output / "out", output / "err"
        for path in (self.out, self.err):
            path.touch()
        own = environment(**variables)
        environs = as_ranks(own, ranks) if ranks > 1 else [own]
        self.ranks = [
            start_process(child, list(words), str(folder), one, str(self.out), str(self.err))
            for one in environs
        ]

    def wait(self, limit: float = LIMIT) -> bool:
        """Whether all ended within the limit; those that did not are killed."""
        ended = within(limit, lambda: not self.alive, self.numbers, 0.05)
        self.kill(range(len(self.ranks)))
        return ended

    def kill(self, numbers: Sequence[int]) -> None:
        """SIGKILL to some ranks, and to whatever they started where all are to end."""
        for number in numbers:
            process = self.ranks[number]
            if len(numbers) == len(self.ranks):
                # One that has just begun leads no group yet.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.kill()
        for number in numbers:
            self.ranks[number].join()

    def helpers(self) -> list[psutil.Process]:
        """What the ranks have started and still runs."""
        found: list[psutil.Process] = []
        for process in self.ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                found += psutil.Process(process.pid).children(recursive=True)
        return found

    @property
    def numbers(self) -> list[int]:
        """Process numbers of the ranks."""
        return [process.pid for process in self.ranks]

    @property
    def alive(self) -> bool:
        """Whether any still runs."""
        return any(process.is_alive() for process in self.ranks)

    def outcome(self) -> Outcome:
        """Of processes that have ended."""
        codes = [process.exitcode for process in self.ranks]
        failed = next((code for code in codes if code), 0)
        return Outcome(self.words, failed or 0, self.out.read_text(), self.err.read_text())


@dataclass
class Desk:
    """The folder that drills work in.

    Args:
        folder: where everything is made.
        rng: decides where things break.
    """

    folder: Path
    rng: random.Random
    references: dict[str, Path] = field(default_factory=dict)
    number: int = 0

    @classmethod
    def prepare(cls, folder: Path, seed: int) -> Desk:
        """Makes the corpus where it is not there yet, and forgets what another version of the program made of it."""
        for made in ("references", "drills"):
            shutil.rmtree(folder / made, ignore_errors=True)
        corpus = folder / "corpus"
        if not (corpus / "image_tokenizer").is_dir():
            shutil.rmtree(corpus, ignore_errors=True)
            corpus.mkdir(parents=True)
            make_corpus(corpus)
        return cls(folder, random.Random(seed))

    @property
    def corpus(self) -> Corpus:
        """The corpus that nothing breaks."""
        return Corpus(self.folder / "corpus")

    @property
    def own(self) -> Path:
        """The folder of the present drill."""
        return self.folder / "drills" / f"{self.number:04d}"

    def words(self, save: Path, variant: str, *more: str) -> list[str]:
        """A training of `STEPS` steps that saves every `EVERY`."""
        options = (
            *("--save-interval", str(EVERY), "--checkpoint.keep_last", "2"),
            *("--train.eval_steps", "0", "--parallel.startup_timeout_minutes", STARTUP_MINUTES),
            *VARIANTS[variant],
        )
        return ["-m", "megatron_vlmoe", *self.corpus.words(save, STEPS, *options, *more)]

    def reference(self, variant: str) -> Path:
        """The run folder of a variant that nothing disturbed, made once."""
        if variant not in self.references:
            target = self.folder / "references" / variant.replace(" ", "_")
            if not (target / "done").exists():
                shutil.rmtree(target, ignore_errors=True)
                started = self.train(target, variant)
                assert started.wait(2 * LIMIT), "the undisturbed run hangs"
                started.outcome().succeeded()
                (target / "done").touch()
            self.references[variant] = target
        return self.references[variant]

    def train(self, save: Path, variant: str, *more: str, **variables: str) -> Processes:
        """Starts a training on two ranks."""
        words = self.words(save, variant, *more)
        output = save.parent / f"{save.name} output {time.monotonic_ns()}"
        return Processes(words, self.corpus.folder, output, 2, **variables)

    def finished(self, save: Path, variant: str, before: int, detail: str) -> Result:
        """Runs a broken training to its end, and compares it with the undisturbed one.

        Args:
            save: its folder.
            variant: its options.
            before: step of the last checkpoint when it broke.
            detail: what was done to it.
        """
        again = self.train(save, variant)
        if not again.wait():
            return Result(Verdict.HANG, f"{detail}; started again it hangs")
        outcome = again.outcome()
        if outcome.code:
            return Result(Verdict.UNCLEAR, f"{detail}; does not go on: {last_line(outcome)}")
        resumed = resumed_after(outcome.stdout + outcome.stderr)
        return self.compared(save, variant, detail, max(before - resumed, 0))

    def compared(self, save: Path, variant: str, detail: str, lost: int = 0) -> Result:
        """The verdict on a run that has ended well."""
        reference = self.reference(variant)
        try:
            assert_same_metrics(metrics(save), metrics(reference))
        except (AssertionError, OSError, ValueError) as error:
            return Result(Verdict.SILENT, f"{detail}; metrics differ: {error}")
        mine, theirs = (path / "checkpoints" / f"iter_{STEPS:07d}" for path in (save, reference))
        check = ["sha256sum", "--check", "--quiet", "SHA256SUMS"]
        sums = subprocess.run(check, cwd=mine, capture_output=True, text=True, check=False)
        if sums.returncode:
            return Result(Verdict.SILENT, f"{detail}; {sums.stdout}{sums.stderr}")
        if _tensors(mine) != _tensors(theirs):
            # Stored in another way, or other numbers.
            words = ("compare-checkpoints", "--optimizer", mine, theirs)
            same = run("-m", "megatron_vlmoe", *words)
            if same.code:
                return Result(Verdict.SILENT, f"{detail}; checkpoints differ: {same.stdout[-300:]}")
        if left := [str(path.relative_to(save)) for path in save.rglob("*.tmp*")]:
            return Result(Verdict.UNCLEAR, f"{detail}; left behind: {', '.join(left)}")
        return Result(Verdict.RECOVERED, detail, lost)


def _tensors(checkpoint: Path) -> tuple[dict[str, bytes], list[Any]]:
    """The files of a checkpoint that hold tensors, and where in them each of these lies."""
    places = [
        (index.fqn, str(getattr(getattr(index, "offset", None), "arguments", "")), vars(place))
        for index, place in read_torch_file(checkpoint / ".metadata").storage_data.items()
    ]
    files = {path.name: path.read_bytes() for path in checkpoint.glob("*.distcp")}
    return files, sorted(places, key=str)


def tracked(save: Path) -> int:
    """The step of the last checkpoint, 0 without."""
    with contextlib.suppress(OSError, ValueError):
        return int((save / TRACKER).read_text())
    return 0


def logged(save: Path) -> int:
    """Steps that are in the log."""
    with contextlib.suppress(OSError):
        return (save / "metrics.jsonl").read_bytes().count(b"\n")
    return 0


def resumed_after(text: str) -> int:
    """The step after which a run went on, by its log."""
    found = [line.rpartition("starting after step ")[2] for line in text.splitlines()]
    steps = [int(word) for word in found if word.isdigit()]
    return steps[0] if steps else 0


def last_line(outcome: Outcome) -> str:
    """What a failed command says last."""
    lines = [line for line in outcome.stderr.splitlines() if line.strip()]
    return f"exit {outcome.code}: {lines[-1][:300] if lines else 'nothing'}"


def error_verdict(outcome: Outcome, *names: str) -> tuple[Verdict, str]:
    """Whether a command that failed says why in one line, with one of these names in it."""
    text = outcome.stderr + outcome.stdout
    # Another rank repeats what the first one said.
    repeated = re.compile(r"error: (rank \d+ has failed: )?")
    found = [line for line in outcome.stderr.splitlines() if line.startswith("error:")]
    lines = [repeated.sub("error: ", line, count=1) for line in found]
    if "Traceback" in text or not lines:
        return Verdict.UNCLEAR, last_line(outcome)
    # Every rank may say it.
    if len(set(lines)) > 1 or (names and not any(name in lines[0] for name in names)):
        return Verdict.UNCLEAR, f"{len(set(lines))} lines: {' and '.join(lines)[:600]}"
    return Verdict.CLEAR, lines[0][:300]


def until(condition: Callable[[], Any], processes: Processes, limit: float = LIMIT) -> bool:
    """Waits for an instant; whether it came while the processes ran."""
    came = within(limit, lambda: condition() or not processes.alive, processes.numbers, 0.001)
    return came and (processes.alive or bool(condition()))


def within(
    limit: float, condition: Callable[[], Any], processes: Sequence[int], pause: float
) -> bool:
    """Whether something comes within a limit.

    Args:
        limit: seconds, but for those that one of the processes waited for a core.
        condition: looked at again and again.
        processes: by number; some may have ended.
        pause: seconds between two looks.
    """
    start = time.monotonic()
    while not condition():
        spent = time.monotonic() - start
        if spent > limit and spent > limit + max(map(_starved, processes), default=0.0):
            return False
        time.sleep(pause)
    return True


def _starved(process: int) -> float:
    """Seconds that the thread of a process which has waited longest for a core has done so, since it began."""
    waited = [0]
    for path in Path(f"/proc/{process}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):
            waited.append(int(path.read_text().split()[1]))
    return max(waited) / 1e9
