"""The scripts of examples/ that start runs, on several nodes, which are processes here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import REPOSITORY
from packaging.specifiers import SpecifierSet

pytestmark = pytest.mark.process

# Indexing takes a moment and is recorded; everything else that the scripts ask of Python is in order.
PYTHON = """#!/bin/bash
case "$*" in *index-task*|*upcycle*) ;; *) exit 0 ;; esac
echo "node $NODE_RANK prepares" >> "$RECORD"
sleep "${SECONDS_TO_PREPARE:-0}"
[ -z "${FAILS:-}" ] || { echo "error: no questions in $RAW" >&2; exit 1; }
"""
TORCHRUN = """#!/bin/bash
echo "node $NODE_RANK trains" >> "$RECORD"
echo "$TORCH_DISABLE_SHARE_RDZV_TCP_STORE $*" > "$RECORD.torchrun"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "bin").mkdir()
    for name, text in (("python", PYTHON), ("torchrun", TORCHRUN)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def start(folder: Path, node: int, **variables: str) -> subprocess.Popen[str]:
    """The fine-tuning script of VQA on one of two nodes."""
    fixed = {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        **{"VIRTUAL_ENV": sys.prefix, "RECORD": str(folder / "record"), "NODE_RANK": str(node)},
        **{"NNODES": "2", "GPUS_PER_NODE": "1", "MASTER_ADDR": "localhost"},
        **{"DATA": str(folder / "data" / "vqa"), "RAW": "raw", "LOAD": "run"},
    }
    return subprocess.Popen(
        ["bash", "examples/finetune_vqa.sh"],
        cwd=REPOSITORY,
        env={**fixed, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def record(folder: Path) -> list[str]:
    return (folder / "record").read_text().splitlines() if (folder / "record").exists() else []


def test_nodes_wait_for_the_one_that_prepares(folder: Path) -> None:
    second = start(folder, 1)
    assert second.stderr is not None
    assert "node 1 waits for" in second.stderr.readline()
    first = start(folder, 0, SECONDS_TO_PREPARE="1")
    assert first.wait(60) == 0 and second.wait(60) == 0
    assert record(folder)[0] == "node 0 prepares"
    assert sorted(record(folder)[1:]) == ["node 0 trains", "node 1 trains"]
    # What said that node 0 was at work is gone.
    assert [path.name for path in (folder / "data").iterdir()] == ["vqa.prepared"]


def test_nodes_with_disks_of_their_own_prepare_each(folder: Path) -> None:
    for node in (0, 1):
        own = {"DATA": str(folder / str(node) / "vqa"), "PREPARE": "every"}
        assert start(folder, node, **own).wait(60) == 0
    expected = [f"node {node} {what}" for node in (0, 1) for what in ("prepares", "trains")]
    assert record(folder) == expected


def test_a_node_does_not_wait_for_one_that_does_nothing(folder: Path) -> None:
    failed = start(folder, 0, FAILS="1")
    assert "no questions" in failed.communicate(timeout=60)[1] and failed.returncode == 1
    waiting = start(folder, 1, WAIT_MINUTES="0")
    lines = waiting.communicate(timeout=60)[1].splitlines()
    assert waiting.returncode == 2 and lines[-1].startswith("error: ")
    for words in ("vqa.prepared is not there", "PREPARE=every", "WAIT_MINUTES"):
        assert words in lines[-1]
    assert record(folder) == ["node 0 prepares"]


def test_what_torchrun_is_told(folder: Path) -> None:
    (folder / "data").mkdir()
    (folder / "data" / "vqa.prepared").touch()
    assert start(folder, 1, MAX_RESTARTS="3", WAIT_MINUTES="20").wait(60) == 0
    told = (folder / "record.torchrun").read_text()
    assert told.startswith("1 ")
    for words in ("--node-rank 1", "--max-restarts 3", "--rdzv-conf timeout=1200"):
        assert words in told


@pytest.mark.parametrize(
    "wrong",
    [
        *(
            "GPUS_PER_NODE=all",
            "GPUS_PER_NODE=08",
            "NNODES=0",
            "NNODES=-1",
            "NNODES=two",
            "NODE_RANK=-1",
        ),
        *("TP=0", "PP=x", "MAX_RESTARTS=x", "WAIT_MINUTES=-1", "MASTER_PORT=x"),
    ],
)
def test_numbers_that_are_none_start_nothing(wrong: str, folder: Path) -> None:
    """Bash complains of them in words of its own, and goes on with a single process."""
    name, _, value = wrong.partition("=")
    started = start(folder, 0, **{name: value})
    assert started.communicate(timeout=60)[1].startswith(f"error: {wrong}: expected a whole number")
    assert started.returncode == 2 and not record(folder)


SBATCH = """#!/bin/bash
echo "sbatch $*" >> "$RECORD"
echo "41;cluster"
"""


def test_shards_of_a_corpus_are_an_array_of_jobs_and_one_that_joins_them(folder: Path) -> None:
    script, python = "examples/slurm_index.sh", '#!/bin/bash\necho "$*" >> "$RECORD"\n'
    (folder / "bin" / "python").write_text(python)
    (folder / "bin" / "sbatch").write_text(SBATCH)
    (folder / "bin" / "sbatch").chmod(0o755)

    def call(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        path = f"{folder / 'bin'}:{os.environ['PATH']}"
        own = {"PATH": path, "VIRTUAL_ENV": sys.prefix, "RECORD": str(folder / "record")}
        words = ("bash", script, *words)
        return subprocess.run(
            words, cwd=REPOSITORY, env={**own, **variables}, capture_output=True, text=True
        )

    assert call("16", "data/text", "index-text", "--input", "a b").returncode == 0
    assert record(folder) == [
        f"sbatch --parsable --array=0-15 {script} shard 16 data/text index-text --input a b",
        "sbatch --dependency=afterok:41 --kill-on-invalid-dep=yes --cpus-per-task=1"
        f" --output=%x-%j.log {script} join data/text",
    ]
    job = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "1", "SLURM_CPUS_PER_TASK": "8"}
    call("shard", "16", "data/text", "index-text", "--input", "a", **job)
    call("join", "data/text")
    assert record(folder)[2:] == [
        "-m megatron_vlmoe index-text --workers 8 --input a --output data/text --shard 3/16",
        "-m megatron_vlmoe merge-data --shards data/text",
    ]
    for words in (
        *(("some", "data/text", "index-text"), ("0", "x", "y"), ("16",), ("4", "data/x")),
        *(("08", "data/x", "index-text"), ("", "data/x", "index-text"), ("4", "", "index-text")),
        *(("4", "data/x", "index-txt"), ("join", "data/x", "data/y")),
    ):
        done = call(*words)
        assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert len(record(folder)) == 4


# An interpreter that passes for another one, and an environment that it makes, whose pip is recorded.
INTERPRETER = """#!/bin/bash
if [ "$1" = - ]; then {{ echo "{before}"; cat; }} | {python} "$@"; exit; fi
if [ "$1" = -c ]; then exit 0; fi
mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; echo "$(basename "$0") made it" >> {record}
printf '#!/bin/bash\\necho pip >> {record}\\n' > "$3/bin/pip"; chmod +x "$3/bin/pip"
"""
GOOD, OLD = "", "import sys; sys.version_info = (3, 10, 4)"
BARE = "import sys; sys.modules['ensurepip'] = None"


def set_up(folder: Path, interpreters: dict[str, str], **variables: str) -> tuple[list[str], str]:
    """What was done, by interpreters of these names alone, and what was said; an old one is python3 by itself."""
    (folder / "examples").mkdir(exist_ok=True)
    for name in ("examples/setup_env.sh", "pyproject.toml", "requirements.txt", "setup.py"):
        shutil.copy(REPOSITORY / name, folder / name)
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    for tool in ("bash", "sed", "mkdir", "cp", "basename", "chmod", "touch", "dirname", "cat"):
        (tools / tool).unlink(missing_ok=True)
        (tools / tool).symlink_to(str(shutil.which(tool)))
    record = folder / "record"
    for name, before in interpreters.items():
        text = INTERPRETER.format(before=before, python=sys.executable, record=record)
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    done = subprocess.run(
        [str(tools / "bash"), str(folder / "examples" / "setup_env.sh")],
        env={"PATH": str(tools), **variables},
        capture_output=True,
        text=True,
    )
    assert (done.returncode == 2) == bool(done.stderr), done.stderr
    return record.read_text().splitlines() if record.exists() else [], done.stderr


@pytest.mark.parametrize(
    ("interpreters", "variables", "chosen"),
    [
        ({"python3": GOOD}, {}, "python3"),
        ({"python3": OLD, "python3.12": BARE, "python3.11": GOOD}, {}, "python3.11"),
        ({"python3": GOOD, "own": GOOD}, {"PYTHON": "own"}, "own"),
        ({"python3": GOOD, "my own": GOOD}, {"PYTHON": "my own"}, "my own"),
    ],
)
def test_setting_up_finds_an_interpreter(
    interpreters: dict[str, str], variables: dict[str, str], chosen: str, tmp_path: Path
) -> None:
    done, said = set_up(tmp_path, interpreters, **variables)
    assert done == [f"{chosen} made it", "pip"], said


def test_setting_up_says_what_is_missing_before_it_downloads(tmp_path: Path) -> None:
    version = ".".join(map(str, sys.version_info[:2]))
    done, said = set_up(tmp_path, {"python3": OLD, "python3.12": BARE})
    assert not done and said.count("\n") == 1 and said.startswith("error: Python >=3.11,<3.")
    for words in (
        *("python3 is Python 3.10", "python3.13 not found", "python3.11 not found"),
        f"python3.12 has no venv (Debian and Ubuntu: apt-get install python{version}-venv)",
    ):
        assert words in said
    done, said = set_up(tmp_path, {"python3": OLD, "own": OLD, "python3.11": GOOD}, PYTHON="own")
    assert not done and "needed: own is Python 3.10; PYTHON names" in said
    for name in ("true", "cat"):
        done, said = set_up(tmp_path, {}, PYTHON=name)
        assert not done and f"needed: {name} does not run, or is no Python; PYTHON" in said
    # An environment that an older interpreter has made.
    shutil.copytree(tmp_path / "tools", tmp_path / ".venv" / "bin", symlinks=True)
    (tmp_path / ".venv" / "bin" / "own").rename(tmp_path / ".venv" / "bin" / "python")
    done, said = set_up(tmp_path, {"python3": GOOD})
    assert not done and "/.venv/bin/python is Python 3.10; delete" in said


def test_the_image_copies_what_is_there_and_pins_what_it_installs() -> None:
    text = (REPOSITORY / "docker" / "Dockerfile").read_text()
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    words = {line.split()[0]: line for line in lines if line and line[0] not in "# "}
    base = words["FROM"].split()[1]
    assert re.fullmatch(r"[a-z/]+:\d[\w.-]+", base), f"{base} has no exact tag"
    copied = [name for line in lines if line.startswith("COPY") for name in line.split()[1:-1]]
    assert {"megatron_vlmoe", "tools", "examples", "requirements.txt"} <= set(copied)
    allowed = (REPOSITORY / ".dockerignore").read_text().splitlines()
    assert not [name for name in copied if not (REPOSITORY / name).exists()]
    assert not [name for name in copied if f"!{name}" not in allowed]
    installed = [word for line in lines for word in re.findall(r'"([^"$]*(?:==|@)[^"]*)"', line)]
    names = {re.split(r"[\[ =@]", word)[0]: word for word in installed}
    assert {"torch", "transformer-engine", "apex", "setuptools"} <= set(names)
    for word in installed:
        assert re.search(r"==\d[\w.]*$|@[0-9a-f]{40}$", word), f"{word} is not one version"
    # The image's Python is 3.12.
    setup = (REPOSITORY / "setup.py").read_text()
    extra = re.search(r"'transformer-engine\[pytorch\]([^;]*); python_version >= \"3.12\"'", setup)
    assert extra and names["transformer-engine"].rpartition("==")[2] in SpecifierSet(extra[1])
    assert "USER" in words and words["USER"].split()[1] not in ("root", "0")
