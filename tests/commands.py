"""Runs command lines of this repository as its users do, and says what came of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Mapping, Sequence

REPOSITORY = Path(__file__).resolve().parents[1]

# Importing torch and megatron-core takes seconds: one process imports them and forks for each command line.
MANY = """
import json, os, runpy, signal, sys, tempfile
import torch
from megatron_vlmoe.runtime.lazy import load
load("megatron_vlmoe.train.pretrain")

def child(words, folder, out, err):
    signal.alarm(100)
    os.chdir(folder)
    for stream, number in ((out, 1), (err, 2)):
        os.dup2(stream.fileno(), number)
    sys.argv = ["megatron_vlmoe", *words]
    code, traced = 0, False
    try:
        runpy.run_module("megatron_vlmoe", run_name="__main__")
    except SystemExit as leave:
        code = leave.code or 0
    except BaseException:
        import traceback
        traceback.print_exc()
        code = 1
    if torch.distributed.is_initialized():
        print("process group", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

def run(words, folder):
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        sys.stdout.flush()
        process = os.fork()
        if process == 0:
            child(words, folder, out, err)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read())
        return [status, *texts]

json.dump([run(words, folder) for words, folder in json.load(sys.stdin)], sys.stdout)
"""


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
        "PYTHONDONTWRITEBYTECODE": "1",
        **more,
    }


def run(
    *words: str | Path,
    cwd: Path | str = REPOSITORY,
    timeout: float = 120.0,
    environ: Mapping[str, str] | None = None,
) -> Outcome:
    """Runs `python WORDS...`."""
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment(**(environ or {})),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    return Outcome(tuple(command[1:]), done.returncode, done.stdout, done.stderr)


def tool(
    name: str, *words: str | Path, cwd: Path | str = REPOSITORY, timeout: float = 120.0
) -> Outcome:
    """Runs `python tools/NAME.py WORDS...`, by default in the repository's root."""
    return run(REPOSITORY / "tools" / f"{name}.py", *words, cwd=cwd, timeout=timeout)


def run_many(
    command_lines: Sequence[Sequence[str]],
    cwd: Path | str | Sequence[str] = REPOSITORY,
    timeout: float = 200.0,
) -> list[Outcome]:
    """Runs `python -m megatron_vlmoe WORDS...` for each command line, in a forked process each.

    Args:
        command_lines: what follows the program.
        cwd: folder of all, or one for each.
        timeout: seconds for all.
    """
    folders = [str(cwd)] * len(command_lines) if isinstance(cwd, (str, Path)) else cwd
    done = subprocess.run(
        [sys.executable, "-c", MANY],
        input=json.dumps([[list(words), folder] for words, folder in zip(command_lines, folders)]),
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr
    return [
        Outcome(tuple(words), *result)
        for words, result in zip(command_lines, json.loads(done.stdout))
    ]
