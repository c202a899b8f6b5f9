"""Indexing on Ray, with real workers. Needs `pip install "megatron-vlmoe[ray]"`; part of the nightly checks."""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from data_files import picture, tool
from sharded_inputs import prepared, same_files

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.prepare import executors
from megatron_vlmoe.prepare import tool as preprocess
from megatron_vlmoe.prepare.corpora import preprocess_text
from megatron_vlmoe.prepare.executors import Job, execute
from megatron_vlmoe.prepare.readers.text import TextInput
from megatron_vlmoe.prepare.tool import Execution, Run

ray = pytest.importorskip("ray", reason='Ray is not installed: pip install "megatron-vlmoe[ray]"')
# Workers have this file from the test, not from a package.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
pytestmark = pytest.mark.process


@pytest.mark.parametrize("kind", ["text", "images", "tars", "task"])
def test_ray_writes_the_bytes_of_one_run(kind: str, tmp_path: Path, tiny_tokenizer: str) -> None:
    index, words = prepared(kind, tmp_path, tiny_tokenizer)
    assert index([*words, "--output", f"{tmp_path}/whole/p"]) == 0
    words += ["--output", f"{tmp_path}/shards/p", "--executor", "ray", "--workers", "2"]
    assert index([*words, "--num-shards", "3"]) == 0
    for path in (tmp_path / "shards").glob("*.json"):
        path.write_text(path.read_text().replace(" --workers 2", ""))
    assert same_files(tmp_path / "whole", tmp_path / "shards")


def test_ray_writes_the_codes_of_one_run(tmp_path: Path, tokenizer_folder: Path) -> None:
    """Each worker has an image tokenizer of its own."""
    images = tmp_path / "images"
    images.mkdir()
    for number in range(7):
        picture(number).save(images / f"{number}.png")
    assert tool("preprocess_images")(["--input", str(images), "--output", f"{tmp_path}/p"]) == 0
    encode = tool("encode_images")
    words = [
        "--batch-size",
        "2",
        "--images",
        f"{tmp_path}/p",
        "--image-tokenizer",
        str(tokenizer_folder),
    ]
    assert encode([*words, "--output", f"{tmp_path}/whole/p"]) == 0
    words += ["--output", f"{tmp_path}/shards/p", "--executor", "ray", "--num-shards", "3"]
    assert encode([*words, "--workers", "2"]) == 0
    assert same_files(tmp_path / "whole", tmp_path / "shards")


@dataclass
class Waiting:
    """The work, whose first try of shard 1 says which process it is in, and waits, when its files are written."""

    job: Job
    pid: Path

    def __call__(self, run: Run) -> None:
        assert run.shard is not None
        if run.shard.index == 1 and not self.pid.exists():
            preprocess.DatasetOutput.commit = self._wait  # type: ignore[method-assign]
        self.job(run)

    def _wait(self, *_: object) -> None:
        staged = self.pid.with_suffix(".writing")
        staged.write_text(str(os.getpid()))
        staged.rename(self.pid)
        time.sleep(600)


@dataclass
class Dying:
    """The work, of which one shard takes every worker with it."""

    job: Job
    index: int

    def __call__(self, run: Run) -> None:
        assert run.shard is not None
        if run.shard.index == self.index:
            os.kill(os.getpid(), signal.SIGKILL)
        self.job(run)


@pytest.fixture
def job(tmp_path: Path, tiny_tokenizer: str) -> Job:
    prepared("text", tmp_path, tiny_tokenizer)
    source = TextInput((str(tmp_path / "raw" / "a.jsonl"), str(tmp_path / "raw" / "b.txt")))
    return functools.partial(preprocess_text, source, tiny_tokenizer)


def test_a_killed_worker_costs_its_shard_alone(tmp_path: Path, job: Job) -> None:
    run = Run(f"{tmp_path}/whole/p", 1, "skip", {"command": "", "inputs": []})
    execute(job, run, Execution())
    pid = tmp_path / "pid"

    def kill() -> None:
        while not pid.exists():
            time.sleep(0.05)
        os.kill(int(pid.read_text()), signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    sharded = Run(f"{tmp_path}/shards/p", 2, "skip", run.source)
    execute(Waiting(job, pid), sharded, Execution("ray", 4))
    killer.join(1)
    assert not killer.is_alive()
    # Nor is anything left of what the killed worker wrote.
    assert same_files(tmp_path / "whole", tmp_path / "shards")


def test_a_shard_that_kills_every_worker_ends_the_run(
    tmp_path: Path,
    job: Job,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """With one line; the shards that are there are not done again."""
    run = Run(f"{tmp_path}/whole/p", 1, "skip", {"command": "", "inputs": []})
    execute(job, run, Execution())
    sharded = Run(f"{tmp_path}/shards/p", 1, "skip", run.source)
    # Starting workers is what takes long.
    monkeypatch.setattr(executors, "_RETRIES", 1)
    with pytest.raises(DataError, match=r"shard 2/3: its worker died 2 times"):
        execute(Dying(job, 2), sharded, Execution("ray", 3))
    made = [tmp_path / "shards" / f"p-0000{number}-of-00003.json" for number in range(3)]
    assert [path.exists() for path in made] == [True, True, False]
    capfd.readouterr()
    execute(job, sharded, Execution("local", 3))
    assert capfd.readouterr().err.count("is complete, nothing to do") == 2
    assert same_files(tmp_path / "whole", tmp_path / "shards")


def test_bad_input_is_the_error_of_a_run_here(
    tmp_path: Path, tiny_tokenizer: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a star"}\n' * 50 + "no\n")
    words = ["--input", f"{tmp_path}/a.jsonl", "--text-tokenizer", tiny_tokenizer]
    words += ["--output", f"{tmp_path}/p", "--executor", "ray"]
    assert tool("preprocess_text")(words) == 1
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {tmp_path}/a.jsonl: line 51: invalid JSON")
