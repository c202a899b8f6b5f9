"""SHA256SUMS of a checkpoint: whatever changes in any file of it is found by every reader."""

from __future__ import annotations

import logging
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from small_checkpoints import CONFIGS, adam_moments, random_tensors, save

from megatron_vlmoe.config.errors import CheckpointError, ConfigError, ConvertError
from megatron_vlmoe.convert.checkpoints import CheckpointReader
from megatron_vlmoe.convert.compare import compare_checkpoints
from megatron_vlmoe.convert.inspect import inspect_checkpoint, inspection_lines
from megatron_vlmoe.finetune.options import saved_run
from megatron_vlmoe.runtime.sums import SUMS_FILE, shared_out
from megatron_vlmoe.train.checkpoint import CheckpointWriter, load_common
from megatron_vlmoe.train.checkpoint_files import find_checkpoint, saved_common
from megatron_vlmoe.train.checkpoint_sums import NOTE, check_files, read_sums
from megatron_vlmoe.train.run_files import is_hugging_face

DENSE = CONFIGS["dense"]
PARTS = (".metadata", "metadata.json", "common.pt", "__0_0.distcp", SUMS_FILE)
OFFSETS = (0.0, 0.1, 0.33, 0.5, 0.77, 1.0)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sound")
    return save(root, DENSE, random_tensors(DENSE), moments=adam_moments(DENSE))


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "iter_0000000"))


def flip(path: Path, share: float, bit: int) -> None:
    """Turns one bit around, at a share of the length of a file."""
    content = bytearray(path.read_bytes())
    content[int(share * (len(content) - 1))] ^= 1 << bit
    path.write_bytes(content)


def common(path: Path) -> dict[str, object]:
    return dict(torch.load(path / "common.pt", weights_only=True))


def check(path: Path) -> None:
    check_files(path, lambda: common(path))


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        check(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.process
def test_all_files_have_a_sum_that_sha256sum_checks(sound: Path) -> None:
    check(sound)
    names = {path.name for path in sound.iterdir()}
    assert names == set(PARTS) and set(read_sums(sound) or ()) == names - {SUMS_FILE}
    words = ["sha256sum", "--check", "--strict", SUMS_FILE]
    done = subprocess.run(words, cwd=sound, capture_output=True, text=True, check=True)
    assert done.stdout.count(": OK") == len(names) - 1


@pytest.mark.parametrize("name", PARTS)
def test_a_flipped_bit_is_found(name: str, copy: Path) -> None:
    whole = (copy / name).read_bytes()
    for number, share in enumerate(OFFSETS):
        flip(copy / name, share, number % 8)
        # Either of the two may be at fault, and the line names both.
        message = refusal(copy)
        assert SUMS_FILE in message
        assert name == SUMS_FILE or f"{copy / name}: damaged" in message
        (copy / name).write_bytes(whole)
    check(copy)


@pytest.mark.parametrize("name", PARTS)
def test_a_truncated_or_missing_file_is_found(name: str, copy: Path) -> None:
    whole = (copy / name).read_bytes()
    # At the end of a line, the sums are whole but for the last file.
    for size in (0, len(whole) // 2, len(whole) - 1, whole.rfind(b"\n", 0, -1) + 1):
        (copy / name).write_bytes(whole[:size])
        assert name in refusal(copy)
    (copy / name).unlink()
    assert name in refusal(copy)


@pytest.mark.parametrize("name", ["a\0b", "x" * 256], ids=["zero byte", "long"])
def test_a_name_that_no_file_can_have_is_damage(name: str, copy: Path) -> None:
    with (copy / SUMS_FILE).open("a") as file:
        file.write(f"{'0' * 64}  {name}\n")
    assert "line 5 is not SHA-256 and file name" in refusal(copy)


def test_files_that_changed_places_and_foreign_sums_are_found(copy: Path, tmp_path: Path) -> None:
    other = save(tmp_path / "other", DENSE, random_tensors(DENSE, seed=1))
    own = (copy / SUMS_FILE).read_bytes()
    shutil.copy(other / SUMS_FILE, copy)
    assert f"{copy / '.metadata'}: damaged" in refusal(copy)
    assert "so are 2 other files" in refusal(copy)
    (copy / SUMS_FILE).write_bytes(own)
    shutil.copy(other / "__0_0.distcp", copy)
    assert f"{copy / '__0_0.distcp'}: damaged" in refusal(copy)


def test_a_checkpoint_of_an_earlier_version_is_read_with_a_line(
    copy: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (copy / SUMS_FILE).unlink()
    content = common(copy)
    assert content.pop(NOTE) == SUMS_FILE
    torch.save(content, copy / "common.pt")
    # Whatever commands have left here: each line reaches the root logger, once.
    logger = logging.getLogger("megatron_vlmoe")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", True)
    with caplog.at_level(logging.INFO, "megatron_vlmoe"):
        assert CheckpointReader(copy).tensors
    (line,) = caplog.messages
    assert f"has no {SUMS_FILE}" in line and "not verified" in line
    inspection = inspect_checkpoint(copy)
    assert not inspection.problems
    assert f"  no {SUMS_FILE}: the files are not verified" in inspection_lines(inspection)


def test_tools_name_the_damaged_file(copy: Path, sound: Path) -> None:
    flip(copy / "__0_0.distcp", 0.4, 3)
    with pytest.raises(ConvertError, match=r"__0_0\.distcp: damaged"):
        CheckpointReader(copy)
    with pytest.raises(ConvertError, match=r"__0_0\.distcp: damaged"):
        compare_checkpoints(sound, copy)
    problems = inspect_checkpoint(copy).problems
    assert ("checksum", "__0_0.distcp") in {(problem.kind, problem.name) for problem in problems}
    (copy / SUMS_FILE).unlink()
    with pytest.raises(ConvertError, match=rf"{SUMS_FILE}: damaged: not there"):
        compare_checkpoints(sound, copy)
    assert ("missing", SUMS_FILE) in {(p.kind, p.name) for p in inspect_checkpoint(copy).problems}


def test_the_configuration_of_a_damaged_checkpoint_is_not_believed(copy: Path) -> None:
    flip(copy / "common.pt", 0.5, 1)
    with pytest.raises(ConfigError, match=r"common\.pt: damaged"):
        saved_run(str(copy))


@pytest.mark.parametrize(
    "stored",
    [
        5,
        [],
        {"config": "no options"},
        {"config": {}, "content_metadata": None},
        {"config": {}, "content_metadata": {"distrib_optim_sharding_type": "of tomorrow"}},
        *({"config": {}, "train_state": {"step": step}} for step in ("four", -1, 4.0, True, None)),
        {"config": {}, "train_state": {"step": 4, "recent_norms": "high"}},
        {"config": {}, "train_state": {"step": 4, "interval": 4}},
        {"config": {}, "train_state": {"step": 4, "best_value": "best"}},
    ],
)
def test_what_no_checkpoint_holds_is_one_line(stored: object, copy: Path) -> None:
    torch.save(stored, copy / "common.pt")
    (copy / SUMS_FILE).unlink()
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        load_common(copy)
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        saved_common(copy)
    with pytest.raises(ConvertError, match="common.pt: not"):
        CheckpointReader(copy)


def test_a_place_that_cannot_be_looked_at_is_one_line() -> None:
    with pytest.raises(CheckpointError, match="yy: File name too long"):
        find_checkpoint("y" * 300)
    assert not is_hugging_face("y" * 300)


def test_files_are_shared_out_evenly() -> None:
    sizes = {"a": 5, "b": 4, "c": 3, "d": 3, "e": 1}
    shares = shared_out(sizes, 2)
    assert sorted(name for share in shares for name in share) == list(sizes)
    assert [sum(sizes[name] for name in share) for share in shares] == [8, 8]


def test_a_table_of_contents_that_finds_no_room_is_one_line(tmp_path: Path) -> None:
    """Rank 0 writes it when the helpers of a background save are done."""
    writer = CheckpointWriter(tmp_path, 0, True)
    writer.pending = 6
    (tmp_path / "iter_0000006.tmp").mkdir()

    class Queue:
        def maybe_finalize_async_calls(self, blocking: bool) -> None:
            raise OSError(28, "No space left on device")

    writer.queue = Queue()  # type: ignore[assignment]
    with pytest.raises(CheckpointError, match=r"iter_0000006\.tmp: .*No space left"):
        writer.finish()
    assert not list(tmp_path.iterdir())
