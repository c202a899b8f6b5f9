"""RUN/log.txt: what is in it, from which rank, and what it leaves alone."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_vlmoe.commands.main import run_command
from megatron_vlmoe.config.errors import CheckpointError, ConfigError
from megatron_vlmoe.config.schema import CheckpointConfig, RunConfig
from megatron_vlmoe.train.metrics import progress_line
from megatron_vlmoe.train.run_log import RunLog, begin_run_logs, open_run_log
from megatron_vlmoe.train.startup import make_run_folder

log = logging.getLogger("megatron_vlmoe")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The logger as it was, afterwards."""
    before, level = list(log.handlers), log.level
    log.setLevel(logging.INFO)
    yield
    for handler in [handler for handler in log.handlers if handler not in before]:
        log.removeHandler(handler)
        handler.close()
    log.setLevel(level)


def lines(folder: Path) -> list[str]:
    """Lines of the log without their times."""
    every = (folder / "log.txt").read_text(encoding="utf-8").splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in every), every
    return [line[20:] for line in every]


def start(folder: Path) -> None:
    make_run_folder(RunConfig(checkpoint=CheckpointConfig(save=str(folder))))
    begin_run_logs()


def leave() -> None:
    """As at the end of a process."""
    for handler in [handler for handler in log.handlers if isinstance(handler, RunLog)]:
        log.removeHandler(handler)
        handler.close()


def test_a_resumed_run_goes_on_in_the_same_file(tmp_path: Path) -> None:
    for step in (1, 2):
        start(tmp_path / "run")
        log.info("step %d: größer", step)
        leave()
    first, one, second, two = lines(tmp_path / "run")
    assert first == second and "1 rank(s)" in first
    assert (one, two) == ("INFO step 1: größer", "INFO step 2: größer")


def test_other_ranks_add_warnings_with_their_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    start(tmp_path)
    log.info("said by every rank")
    log.warning("a sample is odd")
    assert lines(tmp_path) == ["rank 3 WARNING a sample is odd"]


def test_the_line_that_a_run_ends_with_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> int:
        start(tmp_path)
        raise ConfigError("train.steps=0: no")

    assert run_command(fail) == 2
    assert lines(tmp_path)[1:] == ["ERROR train.steps=0: no"]
    assert capsys.readouterr().err == "error: train.steps=0: no\n"


def test_a_refused_run_leaves_no_log(tmp_path: Path) -> None:
    def refuse() -> int:
        make_run_folder(RunConfig(checkpoint=CheckpointConfig(save=str(tmp_path))))
        log.info("layout")
        raise ConfigError("task.data: of another task")

    assert run_command(refuse) == 2
    assert list(tmp_path.iterdir()) == []


def test_an_error_before_a_resumed_run_begins_is_in_its_log(tmp_path: Path) -> None:
    start(tmp_path)
    leave()

    def fail() -> int:
        make_run_folder(RunConfig(checkpoint=CheckpointConfig(save=str(tmp_path))))
        log.info("layout")
        raise CheckpointError("iter_0000004: is of another model")

    assert run_command(fail) == 1
    first, second, *rest = lines(tmp_path)
    assert first == second
    assert rest == ["INFO layout", "ERROR iter_0000004: is of another model"]


def test_a_programming_error_leaves_its_traceback(tmp_path: Path) -> None:
    def fail() -> int:
        make_run_folder(RunConfig(checkpoint=CheckpointConfig(save=str(tmp_path))))
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError):
        run_command(fail)
    text = (tmp_path / "log.txt").read_text()
    assert "ERROR Traceback" in text and text.endswith("ZeroDivisionError: a bug\n")


def test_a_seed_is_logged_in_its_folder_and_in_that_of_all(tmp_path: Path) -> None:
    start(tmp_path)
    for seed in (1, 2):
        start(tmp_path / f"seed_{seed}")
        start(tmp_path / f"seed_{seed}")
        log.info("seed %d", seed)
    assert lines(tmp_path)[1:] == ["INFO seed 1", "INFO seed 2"]
    for seed in (1, 2):
        assert lines(tmp_path / f"seed_{seed}")[1:] == [f"INFO seed {seed}"]


def test_a_progress_line_names_the_pools_that_drop_tokens() -> None:
    metrics = {"loss/total": 2.0, "loss/mlm": 1.5, "grad_norm": 1.0, "lr": 1e-3}
    metrics |= {"moe/text/dropped_fraction": 0.0, "moe/vision/dropped_fraction": 0.107}
    metrics |= {"tokens_per_second": 10.0, "data_wait_fraction": 0.0}
    line = progress_line(3, 9, metrics, 60.0)
    assert "| drop % text 0.0 vision 10.7 |" in line


def test_a_log_that_cannot_be_written_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "log.txt").mkdir()
    with pytest.raises(ConfigError, match=f"--save {tmp_path}: log.txt: Is a directory"):
        open_run_log(tmp_path)
