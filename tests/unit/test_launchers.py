"""Which ranks a process has, whoever started it, which GPU it takes, and what becomes of a start that fails."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from commands import run
from helpers import Layout, Workers, free_port

from megatron_vlmoe.commands.main import main, run_command
from megatron_vlmoe.config.errors import ConfigError, StartupError
from megatron_vlmoe.config.schema import ParallelConfig
from megatron_vlmoe.runtime import accelerators
from megatron_vlmoe.runtime.distributed import device
from megatron_vlmoe.runtime.ranks import adopt_launcher, gpu_of_process

ADOPTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def variables(prefix: str, text: str) -> dict[str, str]:
    """`A=1 B=2` with names that begin with the prefix."""
    return {prefix + word.split("=")[0]: word.split("=")[1] for word in text.split()}


OPEN_MPI = variables("OMPI_COMM_WORLD_", "RANK=5 SIZE=8 LOCAL_RANK=1 LOCAL_SIZE=4")
HYDRA = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
SLURM = variables(
    "SLURM_", "PROCID=5 LOCALID=1 NODEID=1 STEP_NUM_TASKS=8 STEP_TASKS_PER_NODE=4(x2)"
)
DEEPSPEED = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"}
TORCHRUN = {**DEEPSPEED, "LOCAL_SIZE": "9", "LOCAL_WORLD_SIZE": "4"}
OF_A_DAEMON = variables("SLURM_", "PROCID=0 LOCALID=0 STEP_NUM_TASKS=2 STEP_TASKS_PER_NODE=1(x2)")


@pytest.mark.parametrize(
    "started",
    [
        *(OPEN_MPI, HYDRA, SLURM, DEEPSPEED, TORCHRUN),
        # MPI's own processes are started by srun, and srun --mpi=pmi2 sets the variables of PMI too.
        *({**OF_A_DAEMON, **OPEN_MPI}, {**OF_A_DAEMON, **HYDRA}),
        {**SLURM, "PMI_RANK": "5", "PMI_SIZE": "8"},
        {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "3,4,1", "SLURM_NODEID": "1"},
    ],
)
def test_every_launcher_gives_the_same_ranks(started: dict[str, str]) -> None:
    environment = {**started, "MASTER_ADDR": "node1"}
    adopt_launcher(environment)
    assert [environment[name] for name in ADOPTED] == ["5", "8", "1", "4", "node1", "29500"]
    environment = {**started, "MASTER_ADDR": "node1", "MASTER_PORT": "7"}
    adopt_launcher(environment)
    assert environment["MASTER_PORT"] == "7"


@pytest.mark.parametrize(
    "environment",
    [
        {},
        # A batch script, in which srun starts the processes, and a step of one process.
        variables("SLURM_", "PROCID=0 LOCALID=0 NTASKS=8 TASKS_PER_NODE=4(x2)"),
        variables("SLURM_", "PROCID=0 LOCALID=0 STEP_NUM_TASKS=1 STEP_TASKS_PER_NODE=1"),
        variables("OMPI_COMM_WORLD_", "RANK=0 SIZE=1 LOCAL_RANK=0 LOCAL_SIZE=1"),
    ],
)
def test_a_process_alone_stays_alone(environment: dict[str, str]) -> None:
    before = dict(environment)
    adopt_launcher(environment)
    assert environment == before


def test_several_nodes_need_the_address_of_rank_0() -> None:
    for started, by in ((OPEN_MPI, "mpirun"), (SLURM, "srun"), (DEEPSPEED, "the launcher")):
        with pytest.raises(ConfigError, match=f"{by}.* has started 8 processes, but MASTER_ADDR"):
            adopt_launcher(dict(started))
    one_node = {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "8"}
    adopt_launcher(one_node)
    assert one_node["MASTER_ADDR"] == "127.0.0.1"


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"RANK": "x"}, "RANK=x: expected a number"),
        ({"RANK": "5", "WORLD_SIZE": "2"}, "RANK=5 is not below WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE=0: expected a number"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1: expected a number"),
        ({"LOCAL_WORLD_SIZE": ""}, "LOCAL_WORLD_SIZE=: expected a number"),
        ({"MASTER_PORT": "29500a"}, "MASTER_PORT=29500a: expected a number"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT=99999: ports end at 65535"),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "many"}, "WORLD_SIZE=many: expected a number"),
    ],
)
def test_variables_that_are_no_numbers_are_named(environment: dict[str, str], line: str) -> None:
    """Status 1: it may be so on one rank alone, which has to say it."""
    with pytest.raises(StartupError, match=line):
        adopt_launcher({"MASTER_ADDR": "node1", **environment})


@pytest.mark.parametrize("number", ["all", "0", "-3"])
def test_processes_of_a_node_are_a_number(
    number: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GPUS_PER_NODE", number)
    assert main(["check", "pretrain-random", "--preset", "tiny-dense"]) == 2
    assert f"error: GPUS_PER_NODE={number}: expected a number" in capsys.readouterr().err


def test_a_rank_tells_that_its_variables_are_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of wrong options rank 0 alone speaks, because all ranks have the same."""
    monkeypatch.setenv("RANK", "5")
    assert run_command(lambda: gpu_of_process(2)) == 0
    monkeypatch.setenv("LOCAL_RANK", "5")
    assert run_command(lambda: gpu_of_process(2)) == 1
    assert "error: LOCAL_RANK=5, but this process sees 2 GPU(s)" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["check", "check-options"])
def test_a_check_of_nothing_is_an_error(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A script that has lost the words would start its run as if all were well."""
    assert main([command]) == 2
    assert "error: no command to check" in capsys.readouterr().err


@pytest.mark.process
def test_a_check_before_a_run_is_of_the_ranks_of_its_launcher() -> None:
    words = ("-m", "megatron_vlmoe", "check", "pretrain-random", "--preset", "tiny-dense")
    found = run(*words, environ={**SLURM, "SLURM_PROCID": "0"})
    found.refused("srun has started 8 processes, but MASTER_ADDR")


@pytest.mark.parametrize(
    ("local_rank", "count", "visible", "expected"),
    [
        *(("", 1, "", 0), ("3", 8, "", 3), ("1", 2, "6,7", 1)),
        # Each process is shown its own GPU alone.
        *(("3", 1, "3", 0), ("1", 1, "GPU-5ebe", 0)),
        *(("1", 1, "", None), ("2", 2, "0,1", None)),
    ],
)
def test_the_gpu_of_a_process(
    local_rank: str,
    count: int,
    visible: str,
    expected: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    for name, value in (("LOCAL_RANK", local_rank), ("CUDA_VISIBLE_DEVICES", visible)):
        monkeypatch.delenv(name, raising=False)
        if value:
            monkeypatch.setenv(name, value)
    if expected is None:
        with pytest.raises(StartupError, match=f"LOCAL_RANK={local_rank}.* sees {count} GPU"):
            device()
    else:
        assert device() == torch.device("cuda", expected)


def test_the_rank_that_deepspeed_puts_first_is_passed_over(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for word in ("--local_rank=3", "--local-rank=3"):
        assert main([word, "--version"]) == 0
        assert main([word, "no-such-command"]) == 2
    assert "unknown command 'no-such-command'" in capsys.readouterr().err


RANDOM = ("-m", "megatron_vlmoe", "pretrain-random", "--preset", "tiny-8e", "--train.steps", "1")


@pytest.mark.process
@pytest.mark.parametrize(
    ("rank", "named"),
    [
        ("0", ("1 of 2 ranks have not started within", "startup_timeout_minutes=0.02: 1")),
        ("1", ("rank 1 does not reach MASTER_ADDR=127.0.0.1 MASTER_PORT=",)),
    ],
)
def test_a_start_without_the_others_ends_soon_and_names_them(
    rank: str, named: tuple[str, ...]
) -> None:
    place = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    started = run(
        *(*RANDOM, "--parallel.startup_timeout_minutes", "0.02"),
        environ={**place, "MASTER_PORT": str(free_port())},
    )
    started.refused(*named, code=1)


def late(seconds: float) -> None:
    """A rank that keeps the others waiting once all have started."""
    import torch.distributed as dist

    from megatron_vlmoe.runtime.distributed import agree, initialize

    initialize(ParallelConfig(startup_timeout_minutes=seconds / 2 / 60), seed=1)
    if dist.get_rank() == 1:
        time.sleep(seconds)
    assert agree(dist.get_rank() == 1)


def test_the_time_to_start_in_does_not_limit_collectives(workers: Workers) -> None:
    workers.run(Layout(2), late, 2.0)


@pytest.mark.process
@pytest.mark.parametrize(
    ("files", "line"),
    [
        (
            {"transformer_engine/__init__.py": "raise ImportError('libcudnn.so.9: not found')"},
            "transformer-engine is installed but unusable: .*libcudnn.so.9: not found",
        ),
        ({"apex/__init__.py": ""}, "apex is installed but unusable: .*No module named 'apex.opt"),
        (
            {"apex/__init__.py": "", "apex/optimizers.py": "class FusedAdam: pass"},
            "apex is installed but unusable: .*No module named 'amp_C'",
        ),
        (
            {"transformer_engine/__init__.py": "import time; time.sleep(60)"},
            "transformer-engine is installed but unusable: .*not imported within 1 s",
        ),
        ({"transformer_engine/__init__.py": "", "transformer_engine/pytorch.py": ""}, ""),
    ],
)
def test_packages_that_do_not_work_are_refused(
    files: dict[str, str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    if "sleep" in str(files):
        monkeypatch.setattr(accelerators, "PROBE_SECONDS", 1.0)
    if line:
        with pytest.raises(ConfigError, match=line):
            accelerators.check_accelerators()
    else:
        accelerators.check_accelerators()


@pytest.mark.process
def test_they_are_tried_before_megatron_core_imports_them(tmp_path: Path) -> None:
    (tmp_path / "transformer_engine.py").write_text("raise OSError('no CUDA')")
    words = (
        "from megatron_vlmoe.commands.main import main; import sys; sys.exit(main(sys.argv[1:]))",
    )
    path = os.pathsep.join((str(tmp_path), str(Path(__file__).parents[2])))
    done = run("-c", *words, *RANDOM[2:], environ={"PYTHONPATH": path})
    done.refused("transformer-engine is installed but unusable", "no CUDA", code=2)
