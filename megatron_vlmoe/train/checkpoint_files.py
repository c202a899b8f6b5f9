"""Where checkpoints lie and how they are found; needs neither torch nor megatron-core, so that tools start at once.

``iter_0000100/`` holds one checkpoint, ``latest_checkpointed_iteration.txt`` (the tracker) beside it names the one to
go on from. Everything that reads a run folder finds its checkpoint here.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Optional

from megatron_vlmoe.config.errors import CheckpointError, ConfigError
from megatron_vlmoe.runtime.torch_files import (
    METADATA_FILE,
    read_torch_bytes,
    read_torch_file,
    unknown_names,
)

TRACKER = "latest_checkpointed_iteration.txt"
# Where a run keeps what it no longer goes on from; nothing reads it.
SET_ASIDE = "set_aside"
NEWEST = "newest"
_ITERATION = re.compile(r"iter_([0-9]{1,18})")
_LISTED = 6
# megatron-core writes it last.
_MARKER = "metadata.json"
# Where a checkpoint keeps what is common to all ranks: 0.16 in a file, 0.19 among the tensors, as a list of one.
COMMON_FILE = "common.pt"
_COMMON_KEY = "common_state/shard_0_1"
# How a checkpoint stores the state of the distributed optimizer; the names are megatron-core's.
FULLY_RESHARDABLE = "fully_reshardable"
DP_RESHARDABLE = "dp_reshardable"
_FORMAT = "distrib_optim_sharding_type"
# megatron-core's choices by which any layout may load what another wrote.
CONTENT_METADATA: Mapping[str, Any] = MappingProxyType(
    {
        _FORMAT: FULLY_RESHARDABLE,
        "chained_optim_avoid_prefix": True,
        "non_homogeneous_layers": True,
    }
)
# In buckets, dense parameters and experts have optimizers of their own in the names.
_OPTIMIZER_KEY = re.compile(r"(chained_[0-9]+\.)?optimizer\.")


@dataclass(frozen=True)
class TrainState:
    """Where a run stands; data order, masks and noise follow from it.

    Args:
        step: finished optimizer steps.
        skipped_steps: steps without an update (fp16 overflow, and what `health` skips).
        skips_in_a_row: how many of them `health` has skipped since the last update.
        passed_steps: steps of data that were passed over on the way here, by going back to a checkpoint; what a step
            trains on follows from both numbers.
        bad_images: images that could not be decoded and were replaced, up to the last logged step.
        recent_norms: gradient norms of the last updates, where spikes are looked for.
        best_value: best result of the metric that chooses the best checkpoint; None before the first.
        best_step: step of that result.
        best_metric: name of that metric; empty in a checkpoint of an earlier version.
        worse_evaluations: evaluations since then.
        interval: sums of losses and routers since the last logged step (`IntervalSums.saved`); empty at a logged step,
            and in a checkpoint of an earlier version.
    """

    step: int = 0
    skipped_steps: int = 0
    best_value: Optional[float] = None
    best_step: int = 0
    worse_evaluations: int = 0
    best_metric: str = ""
    interval: Mapping[str, Any] = field(default_factory=dict)
    skips_in_a_row: int = 0
    passed_steps: int = 0
    bad_images: int = 0
    recent_norms: tuple[float, ...] = ()

    @property
    def data_step(self) -> int:
        """Steps of data before the next one."""
        return self.step + self.passed_steps


def content_metadata(optimizer_format: str) -> dict[str, Any]:
    """What a checkpoint notes of how it is stored, with its optimizer state in one of the two formats."""
    return {**CONTENT_METADATA, _FORMAT: optimizer_format}


def stored_format(common: Mapping[str, Any]) -> str:
    """The format of the optimizer state of a checkpoint that holds this besides tensors."""
    return str(common.get("content_metadata", CONTENT_METADATA)[_FORMAT])


def common_content(path: Path) -> bytes:
    """What an iteration folder holds besides tensors, as torch saved it; `of_common` unpacks what torch reads from it.

    Raises:
        Exception: of whatever type, if it cannot be read.
    """
    file = path / COMMON_FILE
    if file.is_file():
        return file.read_bytes()
    places = read_torch_file(path / ".metadata").storage_data
    (place,) = (place for index, place in places.items() if index.fqn == _COMMON_KEY)
    with (path / place.relative_path).open("rb") as data:
        data.seek(place.offset)
        return data.read(place.length)


def of_common(value: Any) -> dict[str, Any]:
    """What torch read from `common_content`: megatron-core 0.19 stores it in a list. Raises ValueError where not."""
    common = value[0] if isinstance(value, list) and value else value
    if not isinstance(common, dict) or not all(
        isinstance(common.get(name, {}), dict)
        for name in ("config", "content_metadata", "train_state")
    ):
        raise ValueError("not what a checkpoint holds besides tensors")
    if stored_format(common) not in (FULLY_RESHARDABLE, DP_RESHARDABLE):
        raise ValueError(f"optimizer state in an unknown format, {stored_format(common)!r}")
    state = common.get("train_state", {})
    counts = [state.get(f.name, 0) for f in fields(TrainState) if f.type == "int"]
    norms = state.get("recent_norms", ())
    if not (
        all(type(count) is int and count >= 0 for count in counts)
        and isinstance(state.get("interval", {}), dict)
        and isinstance(state.get("best_value"), (int, float, type(None)))
        and isinstance(norms, (list, tuple))
        and all(isinstance(norm, float) for norm in norms)
    ):
        raise ValueError("no state of training")
    return common


def saved_common(path: Path) -> Mapping[str, Any]:
    """What an iteration folder holds besides tensors, read without torch.

    Raises:
        CheckpointError: if it cannot be read.
    """
    try:
        return of_common(read_torch_bytes(common_content(path)))
    except Exception as error:
        raise CheckpointError(
            f"{path}: not a readable checkpoint ({type(error).__name__})"
        ) from None


def saved_config(path: Path) -> Any:
    """The `config` that an iteration folder holds, read without torch; None if there is none.

    Raises:
        CheckpointError: if it cannot be read.
    """
    return saved_common(path).get("config")


def is_optimizer_key(key: str) -> bool:
    """Whether a tensor of a checkpoint belongs to the optimizer's state, in either format."""
    return _OPTIMIZER_KEY.match(key) is not None


def iteration_name(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"iter_{step:07d}"


def checkpoint_root(run: str | Path) -> Path:
    """Folder of the checkpoints of a run folder (or the folder itself if it already is one)."""
    path, below = Path(run), Path(run) / "checkpoints"
    for folder in (path, below):
        if _has_tracker(folder):
            return folder
    return path if iterations(path) else below


def has_checkpoints(root: Path) -> bool:
    """Whether a checkpoint folder has a tracker, even a damaged one, or any `iter_N`, even an incomplete one."""
    return _has_tracker(root) or bool(iterations(root))


def is_complete(path: Path) -> bool:
    """Whether an iteration folder has all the files of a checkpoint."""
    return not _flaw(path)


def is_tracked(root: Path, step: int) -> bool:
    """Whether the tracker of a checkpoint folder names this step."""
    return _has_tracker(root) and _tracked(root / TRACKER) == (step, "")


def tracked_step(root: Path) -> int:
    """The step that the tracker of a checkpoint folder names; one after the newest if it names none."""
    step, flaw = _tracked(root / TRACKER)
    return max((number for number, _ in iterations(root)), default=0) + 1 if flaw else step


def later_checkpoints(root: Path, step: int) -> list[Path]:
    """The `iter_N` of a checkpoint folder, complete or not, of steps after this one, in order."""
    return [path for number, path in iterations(root) if number > step]


def find_checkpoint(location: str | Path, step: Optional[str] = None) -> Optional[Path]:
    """The checkpoint that a run folder, checkpoint folder or iteration folder names; None if there is none.

    Args:
        location: the folder.
        step: which one of a run: `newest`, a step, or empty for the one that the tracker names. None is that too, for
            readers that have no option to choose: their errors ask for the folder of a checkpoint instead.

    Raises:
        CheckpointError: there are checkpoints, but no tracker says which one counts; the tracker is damaged; or the
            checkpoint in question is missing, incomplete or cannot be looked at.
        ConfigError: `step` is none, or contradicts the iteration folder.
    """
    if step and step != NEWEST and not re.fullmatch("[0-9]{1,18}", step):
        raise ConfigError(f"checkpoint.step={step}: expected {NEWEST} or the number of a step")
    try:
        return _find(Path(location), step)
    except OSError as error:
        raise CheckpointError(f"{location}: {error.strerror}") from None


def _find(path: Path, step: Optional[str]) -> Optional[Path]:
    if (path / _MARKER).exists():
        named = _ITERATION.fullmatch(path.name)
        if step and step != NEWEST and named and int(named[1]) != int(step):
            raise ConfigError(f"checkpoint.step={step}: {path} is one checkpoint, not a run")
        if _marker(path) is None:
            raise CheckpointError(f"{path}: incomplete: {_MARKER} is damaged")
        return path
    if _ITERATION.fullmatch(path.name) and path.is_dir():
        raise CheckpointError(f"{path}: incomplete: {_flaw(path)}")
    root = checkpoint_root(path)
    found = iterations(root)
    if step:
        return _chosen(root, found, step)
    if not _has_tracker(root):
        if not found:
            return None
        raise CheckpointError(f"{root}: has {_listed(found)}, but no {TRACKER}; {_choices(step)}")
    number, flaw = _tracked(root / TRACKER)
    target = dict(found).get(number)
    where = root / TRACKER
    if not flaw and target is None:
        flaw = f"names step {number}, but {iteration_name(number)} is not there"
    elif not flaw and target is not None and _flaw(target):
        where, flaw = target, f"named by {TRACKER}, but incomplete: {_flaw(target)}"
    if flaw:
        beside = f"there is {_listed(found)}; {_choices(step)}" if found else "no checkpoint there"
        raise CheckpointError(f"{where}: {flaw}; {beside}")
    return target


def find_best_or_last(location: str | Path, step: Optional[str] = None) -> Optional[Path]:
    """The best checkpoint of a fine-tuning run where it kept one and no step is asked for, else as `find_checkpoint`.

    Raises:
        CheckpointError: as `find_checkpoint`.
    """
    best = Path(location) / "best"
    if not step and has_checkpoints(best):
        return find_checkpoint(best)
    return find_checkpoint(location, step)


def _chosen(root: Path, found: Sequence[tuple[int, Path]], step: str) -> Optional[Path]:
    if not found:
        return None
    if step == NEWEST:
        complete = next((path for _, path in reversed(found) if is_complete(path)), None)
        if complete is None:
            raise CheckpointError(f"{root}: has {_listed(found)}, of which none is complete")
        return complete
    target = dict(found).get(int(step))
    if target is None:
        raise CheckpointError(f"{root}: has no checkpoint of step {step}, but {_listed(found)}")
    if _flaw(target):
        raise CheckpointError(f"{target}: incomplete: {_flaw(target)}")
    return target


def iterations(root: Path) -> list[tuple[int, Path]]:
    """Step and folder of every `iter_N`, in order of the steps."""
    if not os.path.isdir(root):
        return []
    try:
        names = [path for path in root.iterdir() if path.is_dir()]
    except OSError as error:
        raise CheckpointError(f"{root}: {error.strerror}") from None
    return sorted((int(m[1]), path) for path in names if (m := _ITERATION.fullmatch(path.name)))


def _has_tracker(root: Path) -> bool:
    return os.path.lexists(root / TRACKER)


def _tracked(tracker: Path) -> tuple[int, str]:
    """The step that a tracker names, or what is wrong with it."""
    if not tracker.is_file():
        return -1, "is no regular file"
    try:
        text = tracker.read_bytes().decode("ascii").strip()
    except OSError as error:
        return -1, error.strerror or "cannot be read"
    except UnicodeDecodeError:
        return -1, "expected a step number, found bytes that are no text"
    if not re.fullmatch("[0-9]{1,18}", text):
        return -1, f"expected a step number, found {text[:40]!r}"
    return int(text), ""


def _flaw(path: Path) -> str:
    """Why an iteration folder is no complete checkpoint; empty if it is one as far as its files tell."""
    if not os.access(path, os.R_OK | os.X_OK):
        return "cannot be read (permissions)"
    if not (path / _MARKER).is_file():
        return f"no {_MARKER}"
    content = _marker(path)
    if content is None:
        return f"{_MARKER} is damaged"
    for name in (METADATA_FILE, *((COMMON_FILE,) if "common_backend" in content else ())):
        if not (path / name).is_file():
            return f"no {name}"
    # Which file of tensors is missing or too short, by this table of contents.
    ends: dict[str, int] = {}
    try:
        for place in read_torch_file(path / METADATA_FILE).storage_data.values():
            name, end = str(place.relative_path), int(place.offset + place.length)
            ends[name] = max(end, ends.get(name, 0))
    except Exception:
        return ".metadata is damaged"
    for name, end in sorted(ends.items()):
        try:
            size = (path / name).stat().st_size
        except (OSError, ValueError):
            return f"no {name}"
        if size < end:
            return f"{name} has {size} bytes of {end}"
    return ""


def _marker(path: Path) -> Optional[dict[str, Any]]:
    """What megatron-core notes of how it stored a checkpoint; None if it is damaged."""
    try:
        content = json.loads((path / _MARKER).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) and "sharded_backend" in content else None


def check_harmless(path: Path) -> None:
    """Refuses a checkpoint that would run something when torch reads it; to be called before it does.

    Raises:
        CheckpointError: its pickles name what is more than data, or cannot be read.
    """
    try:
        unknown = unknown_names(path)
    except Exception as error:
        raise CheckpointError(f"{path}: no readable {METADATA_FILE} ({one_line(error)})") from None
    if unknown:
        raise CheckpointError(
            f"{path}: names {', '.join(unknown[:4])}, which no checkpoint needs and torch would run: it is not read"
        )


def _listed(found: Sequence[tuple[int, Path]]) -> str:
    """The checkpoints that were found, the last ones by name."""
    last = [path.name + (" (incomplete)" if _flaw(path) else "") for _, path in found[-_LISTED:]]
    many = f"{len(found)} checkpoints, the last ones " if len(found) > len(last) else ""
    return many + ", ".join(last)


def _choices(step: Optional[str]) -> str:
    if step is None:
        return "name the folder of the one to read"
    return (
        f"choose one with --checkpoint.step {NEWEST} or --checkpoint.step N, or go on from the newest good one with "
        "--checkpoint.on_damage previous"
    )


def one_line(error: BaseException) -> str:
    """What went wrong; torch wraps the errors of all ranks in one that prints their tracebacks."""
    if failures := getattr(error, "failures", None):
        error = next(iter(failures.values()))[0]
    message = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
