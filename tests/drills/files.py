"""Flipped bits, lost ends and lost files, in every kind of file that a training reads."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from small_corpus import Corpus

from drills.desk import EVERY, STEPS, Desk, Processes, Result, Verdict, error_verdict

CORPUS: Mapping[str, str] = {
    "index": "*_train*.idx",
    "data": "*_train*.bin",
    "manifest": "*_train*.json",
    "text tokenizer": "text.model",
    "image tokenizer": "image_tokenizer/*",
}
"""Files of the corpus by kind, as patterns in its folder."""
CHECKPOINT: Mapping[str, str] = {
    "tensors": "{}/*.distcp",
    "common": "{}/common.pt",
    "table of contents": "{}/.metadata",
    "marker": "{}/metadata.json",
    "sums": "{}/SHA256SUMS",
    "tracker": "latest_checkpointed_iteration.txt",
}
"""Files of a checkpoint by kind, as patterns in the folder of all, with a place for its name."""


def flip(path: Path, rng: random.Random) -> str:
    """Turns one bit over."""
    content = bytearray(path.read_bytes())
    place = rng.randrange(len(content))
    content[place] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return f"a bit of byte {place} of {len(content)}"


def truncate(path: Path, rng: random.Random) -> str:
    """Cuts the end off."""
    size = path.stat().st_size
    left = rng.randrange(size)
    os.truncate(path, left)
    return f"cut to {left} of {size} bytes"


def remove(path: Path, rng: random.Random) -> str:
    """Deletes the file."""
    path.unlink()
    return "deleted"


def zero(path: Path, rng: random.Random) -> str:
    """Makes a part zero, as after a crash of a file system."""
    content = bytearray(path.read_bytes())
    start = rng.randrange(len(content))
    end = min(start + 4096, len(content))
    content[start:end] = bytes(end - start)
    path.write_bytes(content)
    return f"bytes {start} to {end} of {len(content)} are 0"


DAMAGES: Mapping[str, Callable[[Path, random.Random], str]] = {
    "flip": flip,
    "truncate": truncate,
    "remove": remove,
    "zero": zero,
}


def half_done(desk: Desk) -> Path:
    """A copy of a run in the middle, with two checkpoints."""
    whole = desk.folder / "references" / "half"
    if not (whole / "done").exists():
        shutil.rmtree(whole, ignore_errors=True)
        started = desk.train(whole, "plain", "--exit-interval", str(STEPS // 2 // EVERY * EVERY))
        assert started.wait(), "the undisturbed run hangs"
        started.outcome().succeeded()
        (whole / "done").touch()
    save = desk.own / "run"
    shutil.copytree(whole, save)
    (save / "done").unlink()
    return save


def damage_checkpoint(desk: Desk, kind: str, how: str) -> Result:
    """Damages a file of the newest checkpoint; the run must end with its name, or go on as if undisturbed.

    With `--checkpoint.on_damage previous` it must then go on from the checkpoint before, and end as undisturbed.
    """
    desk.reference("plain")
    save = half_done(desk)
    newest = sorted((save / "checkpoints").glob("iter_*"))[-1]
    path = desk.rng.choice(sorted(newest.parent.glob(CHECKPOINT[kind].format(newest.name))))
    detail = f"{path.name}: {DAMAGES[how](path, desk.rng)}"
    verdict, said = _train(desk, save, path.name)
    if verdict is not Verdict.CLEAR:
        return Result(verdict, f"{detail}; {said}")
    started = desk.train(save, "plain", "--checkpoint.on_damage", "previous")
    if not started.wait():
        return Result(Verdict.HANG, f"{detail}; with on_damage previous")
    if started.outcome().code:
        why = error_verdict(started.outcome())[1]
        return Result(Verdict.UNCLEAR, f"{detail}; on_damage previous does not go on: {why}")
    found = desk.compared(save, "plain", f"{detail}; {said}; went on from the previous one")
    return Result(
        Verdict.CLEAR if found.verdict is Verdict.RECOVERED else found.verdict, found.detail
    )


def damage_data(desk: Desk, kind: str, how: str) -> Result:
    """Damages a file of the corpus; with `--data.verify full` training must name it, or not be changed by it."""
    desk.reference("plain")
    whole, own = desk.corpus.folder, desk.own / "corpus"
    shutil.copytree(whole, own, ignore=shutil.ignore_patterns("raw", "runs"))
    (own / "raw").symlink_to(whole / "raw")
    files = sorted(
        path for path in own.glob(CORPUS[kind]) if path.is_file() and path.stat().st_size
    )
    path = desk.rng.choice(files)
    detail = f"{path.name}: {DAMAGES[how](path, desk.rng)}"
    save = desk.own / "run"
    words = desk.words(save, "plain", "--data.verify", "full")
    started = Processes(words, Corpus(own).folder, desk.own / "output", 2)
    # A prefix is named by its user without the ending.
    return _verdict(desk, started, save, detail, path.name, path.stem)


def _train(desk: Desk, save: Path, *names: str) -> tuple[Verdict, str]:
    found = _verdict(desk, desk.train(save, "plain"), save, "", *names)
    return found.verdict, found.detail


def _verdict(desk: Desk, started: Processes, save: Path, detail: str, *names: str) -> Result:
    if not started.wait():
        return Result(Verdict.HANG, detail)
    if not started.outcome().code:
        return desk.compared(save, "plain", f"{detail}; it changes nothing")
    verdict, said = error_verdict(started.outcome(), *names)
    return Result(verdict, f"{detail}; {said}" if detail else said)
