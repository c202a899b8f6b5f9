"""Damaged checkpoints, weights that are not finite, and two runs in one folder, through the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from commands import Outcome, run

from megatron_vlmoe.runtime.run_lock import LOCK_FILE, run_lock
from megatron_vlmoe.runtime.sums import SUMS_FILE
from megatron_vlmoe.train.checkpoint_sums import read_sums

RUN = """
-m megatron_vlmoe pretrain-random --preset tiny-8e --model.num_layers 2 --model.num_vl_layers 1
--model.hidden_size 32 --model.num_attention_heads 2 --model.ffn_hidden_size 64 --moe.layers 2
--model.image_size 32 --model.patch_size 16 --model.text_length 16 --model.pair_text_length 16
--data.micro_texts 2 --data.micro_images 2 --data.micro_pairs 2
--data.global_texts 2 --data.global_images 2 --data.global_pairs 2
--train.eval_steps 0 --log.interval 1 --save-interval 2
""".split()


def train(folder: Path, steps: int, *more: str) -> Outcome:
    return run(*RUN, "--train.steps", str(steps), "--save", folder, *more)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps that has checkpoints of steps 2 and 4; the last one is written in the background."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(folder, 4, "--checkpoint.async_save", "true").succeeded()
    assert not (folder / LOCK_FILE).exists()
    for step in (2, 4):
        path = folder / "checkpoints" / f"iter_000000{step}"
        names = {entry.name for entry in path.iterdir()}
        assert set(read_sums(path) or ()) == names - {SUMS_FILE}
    return folder


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_a_damaged_last_checkpoint_stops_a_run_or_the_one_before_takes_its_place(
    trained: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    root = folder / "checkpoints"
    damaged = next((root / "iter_0000004").glob("*.distcp"))
    flip(damaged)
    train(folder, 6).refused(
        *(str(damaged), "iter_0000002", "--checkpoint.on_damage previous"), code=1
    )
    assert (root / "iter_0000004").is_dir()
    done = train(folder, 6, "--checkpoint.on_damage", "previous").succeeded()
    (line,) = (line for line in done.stdout.splitlines() if ": damaged: " in line)
    assert str(damaged) in line and "going on from" in line and "iter_0000002" in line
    assert "starting after step 2" in done.stdout
    # It is trained again, and what was there is not lost.
    assert (root / "set_aside" / "iter_0000004" / damaged.name).is_file()
    assert sorted(path.name for path in root.glob("iter_*")) == [
        f"iter_000000{step}" for step in (2, 4, 6)
    ]


def test_a_damaged_checkpoint_is_not_started_from(trained: Path, tmp_path: Path) -> None:
    path = Path(
        shutil.copytree(trained / "checkpoints" / "iter_0000004", tmp_path / "iter_0000004")
    )
    flip(path / "common.pt")
    train(tmp_path / "run", 6, "--load", str(path)).refused(f"{path / 'common.pt'}: damaged")


def test_a_checkpoint_under_the_name_of_another_step_is_refused(
    trained: Path, tmp_path: Path
) -> None:
    """Going on from it would set aside what lies between, and itself."""
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    root = folder / "checkpoints"
    shutil.rmtree(root / "iter_0000004")
    shutil.copytree(root / "iter_0000002", root / "iter_0000004")
    train(folder, 6).refused(
        *(str(root / "iter_0000004"), "holds the checkpoint of step 2", "is iter_0000002"), code=1
    )
    assert len(list(root.glob("iter_*"))) == 2
    copied = Path(shutil.copytree(root / "iter_0000002", tmp_path / "kept"))
    train(copied, 6).refused(f"--save {copied}: is a checkpoint, not the folder of a run", code=2)


def test_a_step_is_replayed_on_sound_weights_alone(trained: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    checkpoint = folder / "checkpoints" / "iter_0000004"
    ranks = [{"rank": 0, "micro_batches": [{"micro_batch": 4}]}]
    event = {"format_version": 1, "step": 5, "reason": "a spike", "random_data": True}
    (folder / "health").mkdir()
    path = folder / "health" / "step_5.json"
    path.write_text(json.dumps({**event, "checkpoint": str(checkpoint), "ranks": ranks}))
    said = run("-m", "megatron_vlmoe", "replay", path).succeeded().stdout
    # What pads a vocabulary is -inf, and no cause of anything.
    assert "micro-batch 4 (rank 0): " in said and "not finite" not in said
    flip(checkpoint / "common.pt")
    run("-m", "megatron_vlmoe", "replay", path).refused("common.pt: damaged", code=1)
    ranks[0]["micro_batches"] = [{"micro_batch": -1}]
    path.write_text(json.dumps({**event, "checkpoint": str(checkpoint), "ranks": ranks}))
    run("-m", "megatron_vlmoe", "replay", path).refused(f"{path}: damaged", code=1)


def test_weights_that_are_not_finite_are_not_published(trained: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    with run_lock(folder):
        train(folder, 6).refused("trains in this folder", str(folder), code=2)
    wild = "--optim.lr 1e30 --optim.min_lr 1e30 --optim.lr_warmup_steps 0 --train.stop_on_nan false"
    for more in ((), ("--checkpoint.async_save", "true")):
        train(folder, 6, *wild.split(), *more).refused("NaN or infinite values", code=1)
    root = folder / "checkpoints"
    assert (root / "latest_checkpointed_iteration.txt").read_text() == "4\n"
    assert sorted(path.name for path in root.iterdir() if path.is_dir()) == [
        "iter_0000002",
        "iter_0000004",
    ]
    assert not (folder / LOCK_FILE).exists()
