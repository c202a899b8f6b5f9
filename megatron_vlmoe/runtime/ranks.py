"""Where a process stands among the others; needs neither torch nor megatron-core."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_vlmoe.config.errors import ConfigError, StartupError

# Launchers beside torchrun, and how they name rank, number of ranks, rank on the node and number of ranks on the node.
# Those of MPI come first: under Slurm they start their own processes with srun. SLURM_NTASKS would not do: it is set in
# a batch script too, which is a single process.
LAUNCHERS = (
    (
        "mpirun (Open MPI)",
        *("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        *("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ),
    ("mpiexec (Hydra)", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    (
        "srun",
        *("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
        *("SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    ),
)
# torchrun kills what has not ended 30 seconds after it was told to.
_SECONDS_TO_END = 40.0
_NUMBER = re.compile("[0-9]{1,9}")
MASTER_PORT = "29500"
"""Where rank 0 listens if nothing else is said, as with torchrun."""


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
    """Processes that a launcher started; 1 without one."""
    return _number("WORLD_SIZE", 1)


def environment_rank() -> int:
    """Number of this process among them; 0 without a launcher."""
    return _number("RANK", 0)


def _number(variable: str, default: int) -> int:
    """Also the default where a variable is no number: errors are told by rank, and `adopt_launcher` makes it one."""
    text = os.environ.get(variable, "")
    return int(text) if _NUMBER.fullmatch(text) else default


def gpu_of_process(count: int) -> int:
    """Number of the GPU that this process computes on, of the ``count`` that it sees.

    Raises:
        StartupError: if the node has fewer GPUs than processes.
    """
    number = int(os.environ.get("LOCAL_RANK", 0))
    if number < count:
        return number
    if count == 1 and os.environ.get("CUDA_VISIBLE_DEVICES"):
        # A launcher that shows every process its own GPU alone.
        return 0
    raise StartupError(
        f"LOCAL_RANK={number}, but this process sees {count} GPU(s): start one process per GPU"
    )


def adopt_launcher(environment: MutableMapping[str, str]) -> None:
    """Gives a process of srun, mpirun, mpiexec or DeepSpeed's launcher the variables that torchrun would give it.

    What is there stays. A single process needs none of them.

    Args:
        environment: of the process; gets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

    Raises:
        ConfigError: if the processes of several nodes are not told where rank 0 is.
        StartupError: if a variable is not the number that it is to be.
    """
    _adopt(environment)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        text = environment.get(name, "1")
        if not _NUMBER.fullmatch(text) or (name.endswith("SIZE") and int(text) == 0):
            raise StartupError(
                f"{name}={text}: expected a number, as launchers set it; unset it where none does"
            )
    if int(environment.get("MASTER_PORT", 0)) > 65535:
        raise StartupError(f"MASTER_PORT={environment['MASTER_PORT']}: ports end at 65535")
    rank, world = int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1))
    if rank >= world:
        raise StartupError(f"RANK={rank} is not below WORLD_SIZE={world}")


def _adopt(environment: MutableMapping[str, str]) -> None:
    by = "the launcher"
    if "RANK" not in environment:
        found = [row for row in LAUNCHERS if all(environment.get(name) for name in row[1:4])]
        if not found or environment[found[0][2]] == "1":
            return
        by, rank, count, local_rank, local_count = found[0]
        environment["RANK"], environment["WORLD_SIZE"] = environment[rank], environment[count]
        environment["LOCAL_RANK"] = environment[local_rank]
        if on_node := _on_this_node(environment, local_count):
            environment["LOCAL_WORLD_SIZE"] = on_node
    elif "LOCAL_SIZE" in environment:  # DeepSpeed's name
        environment.setdefault("LOCAL_WORLD_SIZE", environment["LOCAL_SIZE"])
    world = environment.get("WORLD_SIZE", "1")
    if not environment.get("MASTER_ADDR"):
        if world not in ("1", environment.get("LOCAL_WORLD_SIZE")):
            raise ConfigError(
                f"{by} has started {world} processes, but MASTER_ADDR (the host name of rank 0) is not set"
            )
        environment["MASTER_ADDR"] = "127.0.0.1"
    environment.setdefault("MASTER_PORT", MASTER_PORT)


def _on_this_node(environment: Mapping[str, str], name: str) -> str:
    """Processes of this node as a launcher says it; Slurm lists all nodes, `2(x3),1`. Empty if it does not say."""
    counts: list[str] = []
    for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get(name, "")):
        counts += [number] * int(times or 1)
    node = int(environment.get("SLURM_NODEID", 0)) if len(counts) > 1 else 0
    return counts[node] if node < len(counts) else ""


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
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT
        ) as launcher,
    ):
        try:
            status = launcher.wait()
        except BaseException:  # this process is told to end
            # torchrun ends its processes then, which would go on if it were killed.
            launcher.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                launcher.wait(_SECONDS_TO_END)
            launcher.kill()
            raise
    if status == 0:
        return ""
    return first_error(log.read_text(encoding="utf-8")) or f"exit status {status}, see {log}"
