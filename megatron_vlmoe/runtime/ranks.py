"""Where a process stands among the others; needs neither torch nor megatron-core."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Ranks:
    """Where this process stands in the layout (rank order tp-cp-ep-dp-pp).

    Args:
        rank: rank in the world.
        world_size: processes.
        local_world_size: processes on this machine.
        tensor: rank and size along TP, likewise the others.
    """

    rank: int
    world_size: int
    local_world_size: int
    tensor: int
    tensor_size: int
    pipeline: int
    pipeline_size: int
    data: int
    data_size: int
    expert: int
    expert_size: int

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embeddings."""
        return self.pipeline == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the heads."""
        return self.pipeline == self.pipeline_size - 1


def environment_world_size() -> int:
    """Processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def environment_rank() -> int:
    """Number of this process among them; 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def torchrun(number: int) -> list[str]:
    """What stands between Python and `-m megatron_vlmoe` to start so many processes on this machine."""
    launcher = ["-m", "torch.distributed.run", "--standalone"]
    return [*launcher, "--nproc-per-node", str(number)]


def program_environment() -> dict[str, str]:
    """That of a process of this program, also where the package is not installed and the folder is another one."""
    path = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}


def first_error(said: str) -> str:
    """The first error line of this program in what it has said, without its prefix; empty if there is none."""
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    return errors[0].removeprefix("error: ") if errors else ""


def run_on_ranks(number: int, words: Sequence[str], log: Path) -> str:
    """Runs a command of this program in so many processes of torchrun, with one thread each if nothing else is said.

    Args:
        words: the command and its options.
        log: a new file for what it prints.

    Returns:
        Why it failed, in one line; nothing if it did not.
    """
    command = [sys.executable, *torchrun(number), "-m", "megatron_vlmoe", *words]
    environment = {"OMP_NUM_THREADS": "1", **program_environment()}
    with log.open("w", encoding="utf-8") as file:
        status = subprocess.run(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False
        ).returncode
    if status == 0:
        return ""
    return first_error(log.read_text(encoding="utf-8")) or f"exit status {status}, see {log}"
