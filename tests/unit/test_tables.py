"""Tables that processes share: made once, mapped, and no obstacle where they cannot be."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_vlmoe.data.order import SampleOrder
from megatron_vlmoe.data.tables import SharedTables, Tables

SIZES = {"a": 6}


def build() -> Tables:
    return {"a": np.arange(6)}


def never() -> Tables:
    raise AssertionError("made again")


def npy(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.npy"))


def test_a_table_is_made_once_and_mapped(tmp_path: Path) -> None:
    tables = SharedTables(str(tmp_path / "new" / "folder"), smallest=6)
    assert tables.get("x", 0, SIZES, build)["a"].tolist() == list(range(6))
    again = pickle.loads(pickle.dumps(tables)).get("x", 0, SIZES, never)["a"]
    assert again.tolist() == list(range(6)) and not again.flags.writeable
    assert type(again) is np.ndarray and isinstance(again.base, np.memmap)


def test_small_tables_stay_in_memory(tmp_path: Path) -> None:
    SharedTables(str(tmp_path), smallest=7).get("x", 0, SIZES, build)
    assert not list(tmp_path.iterdir())


def test_files_of_two_epochs_are_kept(tmp_path: Path) -> None:
    tables = SharedTables(str(tmp_path), smallest=1)
    (tmp_path / "x-3-a.npy.tmp-1").write_text("of a process that died")
    first = tables.get("x", 0, SIZES, build)["a"]
    for epoch in (1, 2, 3):
        tables.get("x", epoch, SIZES, build)
    tables.get("xx", 0, SIZES, build)
    assert npy(tmp_path) == ["x-2-a.npy", "x-3-a.npy", "xx-0-a.npy"]
    assert not list(tmp_path.glob("*tmp*"))
    # Who has it mapped goes on reading it.
    assert first.tolist() == list(range(6))


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", None])
def test_a_damaged_file_is_made_again(tmp_path: Path, content: bytes | None) -> None:
    tables = SharedTables(str(tmp_path), smallest=1)
    tables.get("x", 0, SIZES, build)
    file = tmp_path / "x-0-a.npy"
    if content is None:
        np.save(file, np.arange(5))
    else:
        file.write_bytes(content)
    assert tables.get("x", 0, SIZES, build)["a"].tolist() == list(range(6))
    assert tables.get("x", 0, SIZES, never)["a"].tolist() == list(range(6))


def test_a_folder_that_cannot_be_made_costs_memory_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    tables = SharedTables(str(tmp_path / "file" / "x"), smallest=1)
    with caplog.at_level(logging.WARNING, "megatron_vlmoe"):
        assert tables.get("x", 0, SIZES, build)["a"].tolist() == list(range(6))
    assert "keeps its own tables" in caplog.text


def test_the_default_folder_is_this_users_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    tables = SharedTables(smallest=1)
    tables.get("x", 0, SIZES, build)
    folder = tmp_path / f"megatron_vlmoe-{os.getuid()}"
    assert npy(folder) == ["x-0-a.npy"] and folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    tables.get("x", 1, SIZES, build)
    assert npy(folder) == ["x-0-a.npy"]
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    tables.get("x", 1, SIZES, build)
    assert npy(tmp_path / "elsewhere") == ["x-0-a.npy"]


def _get_slowly(folder: str, made: str, results: multiprocessing.Queue[list[int]]) -> None:
    def build_slowly() -> Tables:
        time.sleep(0.3)
        with open(made, "a") as file:
            file.write("x")
        return build()

    tables = SharedTables(folder, smallest=1)
    results.put(tables.get("x", 0, SIZES, build_slowly)["a"].tolist())


@pytest.mark.process
def test_processes_wait_for_the_one_that_makes_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    arguments = (str(tmp_path / "tables"), str(tmp_path / "made"), results)
    processes = [context.Process(target=_get_slowly, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [list(range(6))] * 3
    for process in processes:
        process.join()
    assert (tmp_path / "made").read_text() == "x"


def test_orders_share_their_permutations(tmp_path: Path) -> None:
    tables = SharedTables(str(tmp_path), smallest=100)
    orders = [SampleOrder(100, 3, dataset=d, tables=tables) for d in (1, 1, 2)]
    plain = [SampleOrder(100, 3, dataset=d) for d in (1, 1, 2)]
    numbers = range(100, 300, 7)
    for order, expected in zip(orders, plain):
        assert [order.locate(n) for n in numbers] == [expected.locate(n) for n in numbers]
    # Epochs 1 and 2 of two datasets.
    assert len(npy(tmp_path)) == 4
