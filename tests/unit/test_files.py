"""Files and folders appear whole or not at all, whatever interrupts them."""

import errno
import os
import signal
from pathlib import Path

import pytest

from megatron_vlmoe.commands.main import TERMINATED, run_command
from megatron_vlmoe.config.errors import FileError, UserError
from megatron_vlmoe.runtime.files import (
    StagedFile,
    folder_atomic,
    open_atomic,
    write_bytes_atomic,
    write_text_atomic,
)


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def full_disk(_: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_texts_bytes_and_streams(tmp_path: Path) -> None:
    write_text_atomic(tmp_path / "new" / "a.txt", "ä\n", "b\n")
    write_bytes_atomic(tmp_path / "new" / "b.bin", b"\0")
    with open_atomic(tmp_path / "new" / "c.bin") as file:
        file.write(b"12")
        assert not (tmp_path / "new" / "c.bin").exists()
    assert (tmp_path / "new" / "a.txt").read_bytes() == "ä\nb\n".encode()
    assert (tmp_path / "new" / "c.bin").read_bytes() == b"12"
    assert names(tmp_path) == ["new", "new/a.txt", "new/b.bin", "new/c.bin"]


def test_an_interrupted_stream_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_bytes_atomic(path, b"old")
    with pytest.raises(KeyboardInterrupt), open_atomic(path) as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and names(tmp_path) == ["a"]


def test_a_full_disk_is_one_line_with_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(UserError) as caught:
        write_text_atomic(tmp_path / "a", "x")
    assert str(caught.value) == f"{tmp_path}/a: No space left on device"
    with pytest.raises(FileError, match="/b: No space"), folder_atomic(tmp_path / "b") as folder:
        (folder / "x").write_text("x")
    assert names(tmp_path) == []


def test_an_error_about_another_file_keeps_its_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="gone"), open_atomic(tmp_path / "a") as file:
        file.write((tmp_path / "gone").read_bytes())
    assert names(tmp_path) == []


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").write_text("x")
    with pytest.raises(ValueError), folder_atomic(target) as folder:
        (folder / "half").write_text("x")
        raise ValueError
    assert names(tmp_path) == ["model", "model/old"]
    with folder_atomic(target) as folder:
        (folder / "new").write_text("x")
    assert names(tmp_path) == ["model", "model/new"]


@pytest.mark.parametrize("target", ["there", "gone"])
def test_a_folder_takes_the_place_of_a_link_to_one(target: str, tmp_path: Path) -> None:
    """What the link names stays."""
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "kept").touch()
    (tmp_path / "made").symlink_to(tmp_path / target)
    with folder_atomic(tmp_path / "made") as folder:
        (folder / "new").touch()
    assert names(tmp_path) == ["made", "made/new", "there", "there/kept"]


def test_what_a_killed_process_left_beside_a_folder_goes(tmp_path: Path) -> None:
    gone = 2**22 + 1  # Linux numbers no process as high
    target = tmp_path / "iter_0000004"
    names = [f"iter_0000004.tmp-{number}" for number in (gone, os.getppid(), "notes")]
    others = [f"iter_0000040.tmp-{gone}"]
    for name in (*names, *others):
        (tmp_path / name).mkdir()
    with folder_atomic(target) as folder:
        (folder / "file").write_text("new")
    # Of a process that runs, of none, and of another folder.
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == sorted(["iter_0000004", *names[1:], *others])


def test_files_that_belong_together_are_published_together(tmp_path: Path) -> None:
    staged = [StagedFile(tmp_path / name, "w") for name in "ab"]
    for one in staged:
        one.write("x")
        one.finish()
    assert not {"a", "b"} & set(names(tmp_path))
    staged[0].publish()
    for one in staged:
        one.abort()
    assert names(tmp_path) == ["a"]


def test_a_terminated_command_leaves_no_file_that_nobody_has_taken_yet(tmp_path: Path) -> None:
    """SIGTERM comes where a file exists and the block that would delete it has not begun."""

    def open_files() -> None:
        StagedFile(tmp_path / "whole").publish()
        StagedFile(tmp_path / "one")
        os.kill(os.getpid(), signal.SIGTERM)

    assert run_command(open_files, cleans_up=True) == TERMINATED
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]
