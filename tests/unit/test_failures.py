"""Whom a run waits for, and what becomes of errors that are nobody's mistake."""

from __future__ import annotations

import errno
import json
import mmap
import os
import queue
import signal
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import Dataset

from megatron_vlmoe.config.errors import DataError, FileError, StartupError, TrainingError
from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.data.collate import Loader
from megatron_vlmoe.runtime.distributed import own_store
from megatron_vlmoe.runtime.ranks import Ranks
from megatron_vlmoe.runtime.watchdog import HANG_STATUS, Limits, Sign, Watchdog, suspects
from megatron_vlmoe.train.failures import training_failures
from megatron_vlmoe.train.metrics import JsonlWriter
from megatron_vlmoe.train.stragglers import StragglerWatch


def sign(rank: int, step: int = 5, where: str = "train/step.py:1 (all_reduce)") -> Sign:
    return Sign(rank, f"node{rank // 2}", 100 + rank, 7, step, "training", where)


def test_a_step_may_take_a_multiple_of_the_median_and_never_less_than_the_floor() -> None:
    assert Limits(20.0, 300.0).of([]) is None, "the first step compiles"
    assert Limits(0.0, 300.0).of([1.0]) is None
    assert Limits(20.0, 300.0).of([1.0, 1.0, 900.0]) == 300.0
    assert Limits(20.0, 300.0).of([30.0, 40.0, 50.0]) == 800.0


def test_whom_the_others_wait_for() -> None:
    hosts = {0: "node0", 3: "node1"}
    silent = suspects({0: sign(0), 3: None}, hosts)
    assert "no sign of life from rank 3 on node1" in silent
    behind = suspects({0: sign(0), 1: sign(1, 4, "data/collate.py:9"), 2: sign(2)}, hosts)
    assert "rank 1 on node0 after step 4 in data/collate.py:9" in behind
    apart = suspects({0: sign(0), 1: sign(1), 2: sign(2, where="data/collate.py:9")}, hosts)
    assert apart.startswith("rank 2 on node1 in data/collate.py:9") and "all others" in apart
    assert suspects({0: sign(0), 1: sign(1)}, hosts).startswith("all ranks are alive")


class SilentStore:
    """torch's store behind a network that is down: it waits for an answer and has no limit."""

    def wait(self, *_: object) -> bytes:
        threading.Event().wait()
        return b""

    set = get = check = compare_set = delete_key = wait


def test_a_rank_whose_store_is_silent_ends_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left: queue.Queue[int] = queue.Queue()
    monkeypatch.setattr(os, "_exit", left.put)
    monkeypatch.setenv("LOCAL_RANK", "1")
    store, limits = SilentStore(), Limits(20.0, 0.05)
    watch = Watchdog(store, 1, 2, limits, None, print, beat=0.01)  # type: ignore[arg-type]
    watch.start()
    assert left.get(timeout=60) == HANG_STATUS
    assert "has not answered" in capsys.readouterr().err
    # What its main thread asks meanwhile, on its way out, has a limit too.
    assert watch.missing() == watch.fail("an error") == ""
    watch.close()


def test_a_first_rank_that_dies_before_training_begins_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def gone(*_: object, **__: object) -> None:
        raise dist.DistNetworkError("The client socket has timed out\nand a stack")

    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "TCPStore", gone)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(StartupError, match="rank 1 lost MASTER_ADDR=.*has timed out$"):
        own_store()


def no_change() -> None:
    """All files are as they were."""


def line_of(error: BaseException, check_files: object = no_change) -> str:
    with pytest.raises(TrainingError) as caught:
        with training_failures(RunConfig(), check_files):  # type: ignore[arg-type]
            raise error
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("error", "names"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\n  GPU 0"),
            ["GPU", "2.00 GiB", "data.micro_texts=64", "train.recompute=full", "head_chunk_rows"],
        ),
        (MemoryError(), ["host", "data.num_workers", "data.micro_images=64"]),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
            ["host", "9 bytes", "data.prefetch=2"],
        ),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), ["host", "data.num_workers"]),
        (
            RuntimeError("DataLoader worker (pid 77) is killed by signal: Killed. "),
            ["77", "Killed", "data.num_workers"],
        ),
        (
            RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"),
            ["7, 8", "ended unexpectedly"],
        ),
        (
            RuntimeError("DataLoader worker (pid 77) is killed by signal: Bus error. It is ..."),
            ["77", "Bus error", "/dev/shm"],
        ),
        (
            RuntimeError("[unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation"),
            ["Timed out", "distributed_timeout_minutes=30"],
        ),
    ],
    ids=["gpu", "python", "allocator", "fork", "killed", "gone", "bus", "gloo"],
)
def test_one_line_says_what_helps(error: BaseException, names: list[str]) -> None:
    text = line_of(error)
    for name in names:
        assert name in text, name


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="shapes differ"):
        with training_failures(RunConfig(), no_change):
            raise RuntimeError("shapes differ")


def test_a_file_that_was_cut_under_a_worker_is_named() -> None:
    def cut() -> None:
        raise DataError("x.bin: 7 bytes, but 9 are recorded")

    with pytest.raises(DataError, match="x.bin"):
        with training_failures(RunConfig(), cut):
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. ")


def test_a_slow_rank_is_told_from_those_of_its_own_stage() -> None:
    ranks = Ranks(0, 8, 4, 0, 1, 0, 2, 0, 4, 0, 1)
    # The second stage has the heads and takes longer.
    even, uneven = (
        [1.0, 1.0, 1.1, 1.0, 2.0, 2.0, 2.1, 2.0],
        [1.0, 1.0, 1.1, 1.0, 2.0, 4.0, 2.0, 2.0],
    )
    watch = StragglerWatch(1.5, ranks)
    # Three times in a row, and said once.
    said = [watch.report(own) for own in (even, uneven, uneven, even, *[uneven] * 4)]
    assert [bool(text) for text in said] == [False] * 6 + [True, False]
    assert "rank 5 on node 1 takes 2.00 times" in said[6]


def test_a_full_disk_under_the_metrics_is_one_line(tmp_path: Path) -> None:
    writer = JsonlWriter(tmp_path / "metrics.jsonl", 0)
    writer.write(1, {"loss/total": 1.0})
    with open("/dev/full", "a", encoding="utf-8") as full:
        os.dup2(full.fileno(), writer.file.fileno())
    with pytest.raises(FileError, match=r"metrics\.jsonl: No space left"):
        writer.write(2, {"loss/total": 2.0})
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1


def test_metrics_of_a_run_that_goes_back_are_set_aside(tmp_path: Path) -> None:
    writer = JsonlWriter(tmp_path / "metrics.jsonl", 0)
    for step in (1, 2, 3):
        writer.write(step, {"loss/total": 1.0})
    writer.rewind(1)
    writer.write(2, {"loss/total": 5.0})
    writer.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert (tmp_path / "metrics.set_aside.jsonl").read_text().count("\n") == 2


class Fatal(Dataset[int]):
    """Kills the worker that asks for its second item, as the kernel would."""

    def __init__(self, path: Path, number: signal.Signals) -> None:
        self.path, self.number = path, number

    def __getitem__(self, key: int) -> int:
        if key and self.number == signal.SIGBUS:
            with self.path.open("r+b") as file:
                content = mmap.mmap(file.fileno(), 0)
                file.truncate(0)
                return content[0]
        if key:
            os.kill(os.getpid(), self.number)
        return key


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS], ids=["kill", "bus"])
def test_a_loader_worker_that_dies_is_named(tmp_path: Path, number: signal.Signals) -> None:
    path = tmp_path / "data.bin"
    path.write_bytes(bytes(10_000))

    def check_files() -> None:
        if path.stat().st_size != 10_000:
            raise DataError(f"{path}: {path.stat().st_size} bytes, but 10000 are recorded")

    with pytest.raises((TrainingError, DataError)) as caught:
        with training_failures(RunConfig(), check_files):
            list(Loader(Fatal(path, number), range(3), 1))
    expected = "loader worker" if number == signal.SIGKILL else "data.bin: 0 bytes"
    assert expected in str(caught.value)
