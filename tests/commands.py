"""Runs command lines of this repository as its users do, and says what came of it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Mapping, Sequence

from helpers import free_port, start_process

REPOSITORY = Path(__file__).resolve().parents[1]
# The server that processes are forked from takes the CPU for the device.
GPU = Path("/dev/nvidiactl")


@dataclass(frozen=True)
class Outcome:
    """What a command left.

    Args:
        words: the command line.
        code: exit status.
    """

    words: tuple[str, ...]
    code: int
    stdout: str
    stderr: str

    @property
    def text(self) -> str:
        """For messages of failing tests."""
        return f"{' '.join(self.words)}\nexit {self.code}\n{self.stdout[-3000:]}\n{self.stderr[-3000:]}"

    def succeeded(self) -> "Outcome":
        """Asserts status 0."""
        assert self.code == 0, self.text
        return self

    def refused(self, *names: str, code: int | None = None) -> str:
        """Asserts one error line without a traceback, which has all `names`; returns it."""
        assert self.code in ((1, 2) if code is None else (code,)), self.text
        assert "Traceback" not in self.stderr + self.stdout, self.text
        lines = [line for line in self.stderr.splitlines() if line.startswith("error:")]
        assert len(lines) == 1, self.text
        for name in names:
            assert name in lines[0], f"{name!r} is not in {lines[0]!r}"
        return lines[0]


def environment(**more: str) -> dict[str, str]:
    """One thread per process, this repository first on the path."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
        **more,
    }


def run(
    *words: str | Path,
    cwd: Path | str = REPOSITORY,
    timeout: float = 300.0,
    environ: Mapping[str, str] | None = None,
    ranks: int = 0,
) -> Outcome:
    """Runs `python WORDS...`, in a process of its own.

    Importing torch and megatron-core takes seconds, so that modules and scripts run in a process that is forked from
    one that has imported them. A new interpreter is started for `-c` and where there is a GPU.

    Args:
        *words: what follows `python`.
        cwd: folder.
        timeout: seconds until it is killed, which fails the test.
        environ: variables beside those of `environment`.
        ranks: if positive, as many processes run it with what torchrun would put into their environment, and none is
            a new interpreter.
    """
    command = [str(word) for word in words]
    variables = environment(**(environ or {}))
    if ranks:
        return _run_forked(command, str(cwd), variables, timeout, ranks)
    if command[0] != "-c" and not GPU.exists():
        return _run_forked(command, str(cwd), variables, timeout)
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=variables,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    return Outcome(tuple(command), done.returncode, done.stdout, done.stderr)


def _run_forked(
    words: list[str], cwd: str, variables: dict[str, str], timeout: float, ranks: int = 0
) -> Outcome:
    owns = as_ranks(variables, ranks) if ranks else [variables]
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        for path in (out, err):
            path.touch()
        processes = [start_process(child, words, cwd, own, str(out), str(err)) for own in owns]
        deadline = time.monotonic() + timeout
        for process in processes:
            process.join(max(deadline - time.monotonic(), 0.1))
        codes = [process.exitcode for process in processes]
        for process in processes:
            if process.exitcode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.join()
        texts = [path.read_text() for path in (out, err)]
    failed = next((code for code in codes if code != 0), 0)
    outcome = Outcome(tuple(words), -signal.SIGKILL if failed is None else failed, *texts)
    assert failed is not None, f"not done after {timeout:.0f} s: {outcome.text}"
    return outcome


def as_ranks(variables: Mapping[str, str], ranks: int) -> list[dict[str, str]]:
    """The environment of each process of one node."""
    size = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "CUDA_VISIBLE_DEVICES": ""}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        {**variables, **size, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        for rank in range(ranks)
    ]


def child(words: list[str], cwd: str, variables: dict[str, str], out: str, err: str) -> None:
    """Becomes what `python WORDS...` is: folder, variables, output, path of modules and arguments."""
    os.setsid()
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(cwd)
    for path, number in ((out, 1), (err, 2)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    # What started this process chose these for its own children.
    multiprocessing.set_start_method(None, force=True)
    warnings.filters[:] = sys.modules["preload"].FILTERS  # type: ignore[index]
    is_module = words[0] == "-m"
    tests = str(REPOSITORY / "tests")
    first = cwd if is_module else str(Path(words[0]).parent)
    others = [path for path in sys.path if not path.startswith(tests)]
    sys.path[:] = [first, *variables["PYTHONPATH"].split(os.pathsep), *others]
    sys.argv = words[1:] if is_module else words
    try:
        if is_module:
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[0], run_name="__main__")
    finally:
        if (torch := sys.modules.get("torch")) and torch.distributed.is_initialized():
            print("process group", file=sys.stderr)


def tool(
    name: str, *words: str | Path, cwd: Path | str = REPOSITORY, timeout: float = 300.0
) -> Outcome:
    """Runs `python tools/NAME.py WORDS...`, by default in the repository's root."""
    return run(REPOSITORY / "tools" / f"{name}.py", *words, cwd=cwd, timeout=timeout)


def run_many(
    command_lines: Sequence[Sequence[str]],
    cwd: Path | str | Sequence[str] = REPOSITORY,
    timeout: float = 300.0,
) -> list[Outcome]:
    """Runs `python -m megatron_vlmoe WORDS...` for each command line.

    Args:
        command_lines: what follows the program.
        cwd: folder of all, or one for each.
        timeout: seconds for each.
    """
    folders = [str(cwd)] * len(command_lines) if isinstance(cwd, (str, Path)) else cwd
    return [
        run("-m", "megatron_vlmoe", *words, cwd=folder, timeout=timeout)
        for words, folder in zip(command_lines, folders, strict=True)
    ]
