"""Two runs never share a folder, and no lock that was left behind stops one."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.runtime import run_lock as module
from megatron_vlmoe.runtime.run_lock import LOCK_FILE, run_lock

HOLDER = """
import sys, time
from pathlib import Path
from megatron_vlmoe.runtime.run_lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()


@pytest.fixture
def lines(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> pytest.LogCaptureFixture:
    # Whatever commands have left here: each line reaches the root logger, once.
    logger = logging.getLogger("megatron_vlmoe")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.INFO, "megatron_vlmoe")
    return caplog


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("BEAT_SECONDS", 0.05), ("SILENT_SECONDS", 0.6), ("_POLL_SECONDS", 0.02)):
        monkeypatch.setattr(module, name, seconds)


@pytest.mark.process
def test_a_second_process_is_refused_and_names_the_first(
    tmp_path: Path, lines: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    with holder(folder) as process:
        said = json.loads((folder / LOCK_FILE).read_text())
        with pytest.raises(ConfigError) as caught:
            with run_lock(folder):
                pass
        for part in (said["host"], f"process {process.pid}", said["started"], str(folder)):
            assert part in str(caught.value)
        assert "\n" not in str(caught.value)
        process.kill()
        # Before its parent has asked for its status too.
        time.sleep(0.2)
        with run_lock(folder):
            assert json.loads((folder / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert [name for name in os.listdir(folder)] == []
    (line,) = lines.messages
    assert "left behind by" in line and f"process {process.pid}" in line


def test_an_error_releases_it(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), run_lock(tmp_path):
        _ = 1 / 0
    with run_lock(tmp_path):
        pass
    assert os.listdir(tmp_path) == []


def test_a_number_that_another_process_has_now_is_not_the_holder(tmp_path: Path) -> None:
    with run_lock(tmp_path):
        said = json.loads((tmp_path / LOCK_FILE).read_text())
    said["process_started"] -= 1000.0
    (tmp_path / LOCK_FILE).write_text(json.dumps(said))
    with run_lock(tmp_path):
        pass
    (tmp_path / LOCK_FILE).write_text(json.dumps({**said, "pid": float("inf")}))
    with run_lock(tmp_path):
        pass


def test_a_lock_that_is_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    """It can be neither made nor read: a run would try both for ever."""
    (tmp_path / LOCK_FILE).symlink_to("nowhere")
    with pytest.raises(ConfigError, match=rf"{LOCK_FILE} is a link to a file that is not there"):
        with run_lock(tmp_path):
            pass


@pytest.mark.parametrize("content", ["elsewhere", "damaged", "", "[" * 100_000])
def test_a_lock_of_another_host_is_taken_over_when_it_is_silent(
    content: str, tmp_path: Path, hasty: None, lines: pytest.LogCaptureFixture
) -> None:
    said = {"host": "elsewhere", "pid": 7, "started": "then", "space": "another"}
    text = json.dumps(said) if content == "elsewhere" else content
    (tmp_path / LOCK_FILE).write_text(text)
    with run_lock(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    waiting, taken = lines.messages
    assert "waiting up to" in waiting and "left behind" in taken
    assert ("process 7 on elsewhere" in taken) == (content == "elsewhere")


def test_a_lock_of_another_host_that_is_renewed_is_held(
    tmp_path: Path, hasty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with run_lock(tmp_path):
        there = json.loads((tmp_path / LOCK_FILE).read_text())
        monkeypatch.setattr(module, "_space", lambda: "here")
        with pytest.raises(ConfigError, match=f"process {there['pid']} on"):
            with run_lock(tmp_path):
                pass


def test_of_many_that_find_a_lock_left_behind_one_takes_it(tmp_path: Path) -> None:
    with run_lock(tmp_path):
        said = json.loads((tmp_path / LOCK_FILE).read_text())
    said["process_started"] -= 1000.0
    (tmp_path / LOCK_FILE).write_text(json.dumps(said))
    outcomes: list[str] = []
    start, end = threading.Barrier(8), threading.Event()

    def attempt() -> None:
        start.wait()
        try:
            with run_lock(tmp_path):
                outcomes.append("held")
                end.wait(30)
        except ConfigError:
            outcomes.append("refused")

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    while len(outcomes) < 8:
        time.sleep(0.01)
    end.set()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["held", *["refused"] * 7]
