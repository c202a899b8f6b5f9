"""Which checkpoint of a run folder counts, for everything that reads one, and what becomes of later metrics."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any, Callable, Optional

import pytest
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata

from megatron_vlmoe.config.errors import CheckpointError, ConfigError, ConvertError, DataError
from megatron_vlmoe.convert.checkpoints import check_output, resolve_checkpoint
from megatron_vlmoe.train.checkpoint_files import (
    TRACKER,
    TrainState,
    find_best_or_last,
    find_checkpoint,
)
from megatron_vlmoe.train.metrics import JsonlWriter
from megatron_vlmoe.train.resume import agree_with_best, go_on_from

# Two tensors of two bytes in one file.
CONTENTS = Metadata(
    {}, storage_data={start: _StorageInfo("__0_0.distcp", start, 2) for start in (0, 2)}
)
CHOICE = "--checkpoint.step newest or --checkpoint.step N"


def make(root: Path, *steps: int, tracked: Optional[int] = None) -> Path:
    """A checkpoint folder with the files that mark complete checkpoints."""
    for step in steps:
        folder = root / f"iter_{step:07d}"
        folder.mkdir(parents=True)
        (folder / "metadata.json").write_text(
            '{"sharded_backend": "torch_dist", "common_backend": "torch"}'
        )
        (folder / "common.pt").write_bytes(b"x")
        (folder / "__0_0.distcp").write_bytes(b"1234")
        (folder / ".metadata").write_bytes(pickle.dumps(CONTENTS))
    if tracked is not None:
        (root / TRACKER).write_text(f"{tracked}\n")
    return root


def refusal(action: Callable[..., Any], *arguments: Any) -> str:
    """The one line with which something refuses."""
    with pytest.raises((CheckpointError, ConfigError, ConvertError)) as caught:
        action(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("below", ["checkpoints", "."])
def test_checkpoints_without_tracker_are_named_and_can_be_chosen(
    below: str, tmp_path: Path
) -> None:
    root = make(tmp_path / "run" / below, 2, 4, 10)
    (root / "iter_0000012.tmp").mkdir()
    run = tmp_path / "run"
    message = refusal(find_checkpoint, run, "")
    assert str(root) in message and f"no {TRACKER}" in message and CHOICE in message
    assert "iter_0000002, iter_0000004, iter_0000010, but no" in message
    newest = find_checkpoint(run, "newest")
    assert newest is not None and newest.name == "iter_0000010"
    assert find_checkpoint(run, "4") == root / "iter_0000004"
    missing = refusal(find_checkpoint, run, "3")
    assert "no checkpoint of step 3, but iter_0000002, iter_0000004, iter_0000010" in missing
    (root / TRACKER).write_text("10")
    assert find_checkpoint(run) == root / "iter_0000010"
    assert find_checkpoint(run, "2") == root / "iter_0000002"


@pytest.mark.parametrize("reader", [resolve_checkpoint, find_best_or_last])
@pytest.mark.parametrize("below", ["checkpoints", "best"])
def test_every_reader_refuses_a_run_without_tracker(
    below: str, reader: Callable[[str], Any], tmp_path: Path
) -> None:
    make(tmp_path / "checkpoints", 2, tracked=2)
    shutil.rmtree(tmp_path / below, ignore_errors=True)
    root = make(tmp_path / below, 2, 4)
    message = refusal(reader, str(tmp_path))
    # They have no option to choose by.
    assert "iter_0000002, iter_0000004" in message and "--checkpoint.step" not in message
    assert "name the folder" in message
    assert reader(str(root / "iter_0000004")) == root / "iter_0000004"


def test_no_checkpoints_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoints/iter_0000004.tmp").mkdir(parents=True)
    for step in ("", "newest", "4"):
        assert find_checkpoint(tmp_path, step) is None
    assert find_checkpoint(tmp_path / "nowhere") is None


TRACKERS: dict[str, Any] = {
    "no regular file": None,
    "found bytes that are no text": b"\xff\xfe4",
    "found ''": b"",
    "found 'release'": b"release\n",
    "found '-4'": b"-4",
    "found bytes": "\u00b2".encode(),
    "found '4 5'": b"4 5",
    "names step 6, but iter_0000006 is not there": b"6\n",
}


@pytest.mark.parametrize("expected", TRACKERS)
def test_damaged_tracker_is_one_line(expected: str, tmp_path: Path) -> None:
    root = make(tmp_path / "checkpoints", 2, 4)
    content = TRACKERS[expected]
    if content is None:
        (root / TRACKER).mkdir()
    else:
        (root / TRACKER).write_bytes(content)
    message = refusal(find_checkpoint, tmp_path, "")
    assert message.startswith(f"{root / TRACKER}: ") and expected in message
    assert "iter_0000002, iter_0000004" in message and CHOICE in message
    assert find_checkpoint(tmp_path, "newest") == root / "iter_0000004"


def test_dangling_tracker_is_not_taken_for_none(tmp_path: Path) -> None:
    root = make(tmp_path / "checkpoints")
    root.mkdir()
    os.symlink(root / "gone", root / TRACKER)
    assert "no regular file; no checkpoint there" in refusal(find_checkpoint, tmp_path, "")


@pytest.mark.parametrize("name", ["metadata.json", ".metadata", "common.pt", "__0_0.distcp"])
def test_incomplete_checkpoint(name: str, tmp_path: Path) -> None:
    root = make(tmp_path / "checkpoints", 2, 4, tracked=4)
    (root / "iter_0000004" / name).unlink()
    message = refusal(find_checkpoint, tmp_path, "")
    assert f"incomplete: no {name}" in message
    assert "iter_0000002, iter_0000004 (incomplete)" in message
    assert f"incomplete: no {name}" in refusal(find_checkpoint, tmp_path, "4")
    assert find_checkpoint(tmp_path, "newest") == root / "iter_0000002"
    if name == "metadata.json":
        assert "incomplete" in refusal(find_checkpoint, root / "iter_0000004")
        for content in ("{", "{}", "[]", '{"common_backend": "torch"}'):
            (root / "iter_0000004" / name).write_text(content)
            for place in (tmp_path, root / "iter_0000004"):
                assert "metadata.json is damaged" in refusal(find_checkpoint, place, "4")


@pytest.mark.parametrize(
    ("name", "flaw"),
    [("__0_0.distcp", "__0_0.distcp has 3 bytes of 4"), (".metadata", ".metadata is damaged")],
)
def test_a_checkpoint_that_was_cut_off_is_not_the_newest(
    name: str, flaw: str, tmp_path: Path
) -> None:
    root = make(tmp_path / "checkpoints", 2, 4, tracked=4)
    os.truncate(root / "iter_0000004" / name, 3)
    assert f"incomplete: {flaw}" in refusal(find_checkpoint, tmp_path, "")
    assert find_checkpoint(tmp_path, "newest") == root / "iter_0000002"


def test_a_table_of_contents_that_names_no_files_is_of_no_checkpoint(tmp_path: Path) -> None:
    path = make(tmp_path, 4, tracked=4) / "iter_0000004"
    for names in (("a", ("b",)), ("\0",)):
        places = {n: _StorageInfo(name, 0, 2) for n, name in enumerate(names)}  # type: ignore[arg-type]
        (path / ".metadata").write_bytes(pickle.dumps(Metadata({}, storage_data=places)))
        assert "incomplete: no " in refusal(find_checkpoint, tmp_path)


def test_checkpoint_of_a_later_megatron_core_has_no_common_file(tmp_path: Path) -> None:
    path = make(tmp_path, 4, tracked=4) / "iter_0000004"
    (path / "common.pt").unlink()
    (path / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    assert find_checkpoint(tmp_path, "4") == find_checkpoint(tmp_path) == path


@pytest.mark.parametrize("step", ["last", "-1", "4.0", "1e3"])
def test_what_is_no_step(step: str, tmp_path: Path) -> None:
    make(tmp_path, 4, tracked=4)
    assert f"checkpoint.step={step}: expected newest" in refusal(find_checkpoint, tmp_path, step)


def test_step_against_the_folder_of_one_checkpoint(tmp_path: Path) -> None:
    path = make(tmp_path, 2, 4, tracked=4) / "iter_0000004"
    assert find_checkpoint(path, "4") == path
    assert "is one checkpoint" in refusal(find_checkpoint, path, "2")


def test_a_step_is_of_the_run_and_not_of_its_best(tmp_path: Path) -> None:
    root = make(tmp_path / "checkpoints", 2, 4, tracked=4)
    best = make(tmp_path / "best", 3, tracked=3)
    assert find_best_or_last(tmp_path) == best / "iter_0000003"
    assert find_best_or_last(tmp_path, "2") == root / "iter_0000002"


def test_many_checkpoints_are_not_all_listed(tmp_path: Path) -> None:
    make(tmp_path, *range(100, 1000, 100))
    message = refusal(find_checkpoint, tmp_path, "")
    assert "9 checkpoints, the last ones iter_0000400, iter_0000500" in message
    assert "iter_0000300" not in message


def test_converters_do_not_write_beside_checkpoints_without_tracker(tmp_path: Path) -> None:
    run, folder = tmp_path / "run", tmp_path / "folder"
    make(run / "checkpoints", 2)
    make(folder, 2)
    assert "folder of a run with checkpoints" in refusal(check_output, run)
    assert "has a checkpoint already" in refusal(check_output, folder)
    check_output(folder, overwrite=True)


def test_later_metrics_are_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": step / 2}) for step in range(5)]
    odd = ["[3]", '{"step": "x"}', '{"loss": 1}', "\udcff"]
    content = "\n".join([*lines, *odd, '{"step": 4, "lo'])
    path.write_bytes(content.encode(errors="surrogateescape"))
    writer = JsonlWriter(path, 2)
    writer.write(3, {"loss": 9.0})
    writer.close()
    assert path.read_text().splitlines() == [*lines[:3], '{"step": 3, "loss": 9.0}']
    aside = tmp_path / "metrics.set_aside.jsonl"
    expected = [*lines[3:], *odd, '{"step": 4, "lo']
    assert aside.read_bytes().decode(errors="surrogateescape").splitlines() == expected
    # From the start: everything goes aside, behind what is there.
    JsonlWriter(path, 0).close()
    assert path.read_bytes() == b""
    assert len(aside.read_bytes().splitlines()) == len(expected) + 4


def folders(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("iter_*"))


def test_later_checkpoints_are_set_aside(tmp_path: Path) -> None:
    root = make(tmp_path, 2, 4, 6, tracked=6)
    make(root / "set_aside", 4)
    (root / "iter_0000004/mark").touch()
    go_on_from(root, 2)
    assert (root / TRACKER).read_text() == "2\n"
    kept = ["iter_0000002", "set_aside/iter_0000004"]
    assert folders(root) == [*kept, "set_aside/iter_0000004.2", "set_aside/iter_0000006"]
    assert (root / "set_aside/iter_0000004.2/mark").exists()
    assert find_checkpoint(root, "newest") == root / "iter_0000002"


def test_what_stands_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(DataError, match=r"metrics\.jsonl: Is a directory"):
        JsonlWriter(tmp_path / "metrics.jsonl", 0)
    root = make(tmp_path, 2, 4, tracked=4)
    (root / "set_aside").touch()
    with pytest.raises(DataError, match="set_aside/iter_0000004: "):
        go_on_from(root, 2)
    assert folders(root) == ["iter_0000002", "iter_0000004"]


BEST = TrainState(step=4, best_value=9.0, best_step=3, worse_evaluations=1, best_metric="val/a")


def test_the_best_result_stays_with_its_weights(tmp_path: Path) -> None:
    root = make(tmp_path, 3)
    assert agree_with_best(root, BEST, "val/a") == BEST
    assert find_checkpoint(root) == root / "iter_0000003" and folders(root) == ["iter_0000003"]


@pytest.mark.parametrize(
    ("there", "state", "metric"),
    [
        ((5,), BEST, "val/a"),
        ((), BEST, "val/a"),
        ((3,), BEST, "val/b"),
        ((3,), TrainState(), "val/a"),
    ],
    ids=["of-a-later-step", "gone", "other-metric", "from-the-start"],
)
def test_a_best_result_without_its_weights_does_not_count(
    there: tuple[int, ...], state: TrainState, metric: str, tmp_path: Path
) -> None:
    root = make(tmp_path, *there, tracked=9)
    assert agree_with_best(root, state, metric) == TrainState(step=state.step)
    assert folders(root) == [f"set_aside/iter_000000{step}" for step in there]
    assert find_checkpoint(root) is None
