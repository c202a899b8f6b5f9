"""Files of `torch.save` and folders of DeepSpeed that others wrote, read without running code of theirs.

A checkpoint often holds more than tensors: command-line arguments, enums, schedulers. `weights_only` reading refuses
such files. Here the unknown classes are replaced by empty ones, so that the tensors can be read and nothing that the
file names is imported or called.

DeepSpeed, not needed here, writes the dense part into ``mp_rank_00_model_states.pt`` and every expert into a file
of its own, ``layer_{l}_expert_{e}_mp_rank_00_model_states.pt``, where l counts the MoE layers of the model in the
order of its modules and e the experts over all ranks. They become one state dict.
"""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor

from megatron_vlmoe.config.errors import ConvertError
from megatron_vlmoe.convert.tensors import LazyTensor
from megatron_vlmoe.tokenizers.vqkd.model import UNREADABLE
from megatron_vlmoe.train.checkpoint_files import one_line

# In the order in which VLMo's own loader looks for them; a file without any of them is the state dict itself.
CONTAINERS = ("state_dict", "module", "model")
# What wrappers put before a parameter's name: DeepSpeed and DistributedDataParallel, and Lightning's strategies.
WRAPPERS = re.compile(r"^(module\.|_forward_module\.)+")
# Besides what a damaged file gives: what following the names in somebody's file may.
_UNREADABLE = (*UNREADABLE, ImportError)


@dataclass(frozen=True)
class PublicState:
    """The tensors of a checkpoint that another project wrote, a file or a folder.

    They are named as the parameters, without wrappers' prefixes; objects of `skipped` classes were read as empty.
    """

    path: Path
    tensors: Mapping[str, LazyTensor]
    skipped: tuple[str, ...] = ()

    def shape(self, name: str, axes: Optional[int] = None) -> tuple[int, ...]:
        """Shape of a tensor, which must have so many axes; None allows any number.

        Raises:
            ConvertError: there is none of that name, or it has another number of axes.
        """
        if name not in self.tensors:
            raise ConvertError(f"{self.path}: has no tensor {name}")
        found = self.tensors[name].shape
        if axes is not None and len(found) != axes:
            raise ConvertError(f"{self.path}: {name} {list(found)} has not {axes} axes")
        return found


def _stand_in(plain: type) -> type:
    """Stands for a class of dictionaries or lists; torch fills no object but a plain one, so that is what is made."""
    return type("_StandIn", (), {"__new__": lambda cls, *args, **kwargs: plain()})


class _Empty:
    """Stands for an object of a class that is not known here; takes what the real one would and keeps nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Empty:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Ignores everything."""

    def __setstate__(self, state: Any) -> None:
        """Ignores everything."""


def read_torch(path: Path, allow_pickle: bool = False) -> tuple[Any, tuple[str, ...]]:
    """Content of a file of `torch.save` on the CPU, its tensors mapped into memory, not read.

    With it the names of classes whose objects were read as empty ones. Where the file cannot be read without running
    what it names, `allow_pickle` runs it.

    Raises:
        ConvertError: the file is missing, damaged, or needs `allow_pickle`.
    """
    if not path.is_file():
        raise ConvertError(f"{path}: no such file")
    try:
        mapped = zipfile.is_zipfile(path)
    except zipfile.BadZipFile as error:
        raise ConvertError(f"{path}: cannot be read ({one_line(error)})") from None
    with path.open("rb") as file:
        if not mapped and file.read(1) != b"\x80":
            raise ConvertError(f"{path}: not a file that torch.save wrote, or cut off")
    # What a file is read as must not depend on what other packages (megatron-core) have told torch to trust.
    registered = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        return _read(path, mapped, allow_pickle)
    finally:
        torch.serialization.add_safe_globals(registered)


def _read(path: Path, mapped: bool, allow_pickle: bool) -> tuple[Any, tuple[str, ...]]:
    load = partial(torch.load, path, map_location="cpu", mmap=mapped)
    try:
        return load(weights_only=True), ()
    except _UNREADABLE as error:
        reason: BaseException = error
    names: tuple[str, ...] = ()
    try:
        names = tuple(sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path)))
        return _load_emptied(load, names), names
    except _UNREADABLE as error:
        # A file of the format before torch 1.6 cannot be looked into; its first error says more.
        reason = error if names else reason
    if not isinstance(reason, pickle.UnpicklingError):
        raise ConvertError(f"{path}: cannot be read ({one_line(reason)})")
    if not allow_pickle:
        raise ConvertError(
            f"{path}: holds more than tensors ({', '.join(names) or one_line(reason)[:120]}) in a way that cannot be "
            "skipped; --allow-pickle reads it with Python's pickle, which imports and runs whatever the file names: "
            "only for files whose makers you trust"
        )
    try:
        return load(weights_only=False), ()
    except _UNREADABLE as error:
        raise ConvertError(
            f"{path}: cannot be read, also with pickle ({one_line(error)})"
        ) from None


def _load_emptied(load: Callable[..., Any], names: Sequence[str]) -> Any:
    """Reads a file with empty classes in place of those named.

    Whether a class is one of dictionaries or lists shows when an object of it is to be filled and torch names it.
    """
    classes: dict[str, type] = {name: type(name, (_Empty,), {}) for name in names}
    while True:
        try:
            with torch.serialization.safe_globals([(kind, name) for name, kind in classes.items()]):
                return load(weights_only=True)
        except pickle.UnpicklingError as error:
            message = str(error)
            name = next((n for n, k in classes.items() if f"but got {k}" in message), "")
            if not name or not issubclass(classes[name], _Empty):
                raise
            classes[name] = _stand_in(OrderedDict if "SETITEM" in message else list)


def state_of(content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict inside a file's content: names without the prefixes of wrappers.

    Raises:
        ConvertError: there is none.
    """
    state = content
    if isinstance(content, Mapping):
        state = next((content[key] for key in CONTAINERS if _is_state(content.get(key))), content)
    if not _is_state(state):
        raise ConvertError(
            f"{path}: no tensors under {', '.join(CONTAINERS)}, nor at the top: not a checkpoint of weights"
        )
    return {WRAPPERS.sub("", str(k)): v for k, v in state.items() if isinstance(v, Tensor)}


def read_public_file(path: Path, allow_pickle: bool = False) -> PublicState:
    """A checkpoint in one file; arguments and errors as `read_torch` and `state_of`."""
    content, skipped = read_torch(path, allow_pickle)
    return PublicState(path, as_lazy(state_of(content, path)), skipped)


def as_lazy(state: Mapping[str, Tensor]) -> dict[str, LazyTensor]:
    """Tensors that are mapped into memory already, as those that are read later."""
    return {
        name: LazyTensor(tuple(tensor.shape), tensor.dtype, tensor.detach)
        for name, tensor in state.items()
    }


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(v, Tensor) for v in value.values())


DENSE_FILE = "mp_rank_00_model_states.pt"
EXPERT_FILE = "layer_{}_expert_{}_mp_rank_00_model_states.pt"
EXPERT_NAME = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_(\d+)_model_states\.pt")
# Files that tell a checkpoint of another kind: the first always, the others where there is no dense file.
UNREAD_KINDS = (
    (
        r"(layer_\d+_expert_\d+_)?mp_rank_(?!00)\d+_model_states\.pt",
        "several tensor-parallel ranks, which are not merged",
    ),
    (
        r"zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt",
        "ZeRO stage 3, whose files hold pieces of weights",
    ),
    (
        r"layer_\d+-(model_\d+-)?model_states\.pt",
        "DeepSpeed's pipeline engine, which is not read",
    ),
)
GATE = ".deepspeed_moe.gate.wg.weight"
EXPERTS = ".deepspeed_moe.experts.deepspeed_experts."


def read_deepspeed(location: Path, allow_pickle: bool = False) -> PublicState:
    """The dense part and all experts of a DeepSpeed checkpoint.

    A gate is ``{layer}.deepspeed_moe.gate.wg.weight [E, D]``, a tensor of expert e is
    ``{layer}.deepspeed_moe.experts.deepspeed_experts.{e}.{name}``. Tensors are read when they are asked for. Optimizer
    files are not looked at: with 16-bit training the weights are the 16-bit ones.

    Args:
        location: the folder with the files, or the one above it with `latest` or a single `global_step*`.
        allow_pickle: see `read_torch`.

    Raises:
        ConvertError: files are missing or damaged, or the checkpoint is of a kind that is not read (tensor parallel,
            pipeline, ZeRO stage 3, residual MoE).
    """
    folder = find_folder(location)
    dense = folder / DENSE_FILE
    content, skipped = read_torch(dense, allow_pickle)
    state = state_of(content, dense)
    gates = [name.removesuffix(GATE) for name in state if name.endswith(GATE)]
    for name in state:
        owner, found, end = name.rpartition(".coefficient.")
        if found and end in ("weight", "bias") and owner in gates:
            raise ConvertError(f"{dense}: residual MoE ({name}) has no counterpart here")
    tensors = as_lazy(state)
    experts = {gate: PublicState(folder, tensors).shape(gate + GATE, 2)[0] for gate in gates}
    _check_complete(folder, list(experts.values()))
    all_skipped = set(skipped)
    for layer, (gate, count) in enumerate(experts.items()):
        names: set[str] = set()
        for expert in range(count):
            file = folder / EXPERT_FILE.format(layer, expert)
            content, skipped = read_torch(file, allow_pickle)
            all_skipped |= set(skipped)
            prefix, own = f"{gate}{EXPERTS}{expert}.", set()
            for name, value in state_of(content, file).items():
                if not name.startswith(prefix):
                    raise ConvertError(f"{file}: holds {name}, expected expert {expert} of {gate}")
                own.add(name.removeprefix(prefix))
                # Files of experts are many: none stays open.
                read = partial(_reread, file, name, allow_pickle)
                tensors[name] = LazyTensor(tuple(value.shape), value.dtype, read)
            if own != (names or own) or not own:
                raise ConvertError(f"{file}: has {sorted(own)}, other experts {sorted(names)}")
            names = own
    return PublicState(folder, tensors, tuple(sorted(all_skipped)))


def _reread(file: Path, name: str, allow_pickle: bool) -> Tensor:
    return state_of(read_torch(file, allow_pickle)[0], file)[name]


def find_folder(location: Path) -> Path:
    """The folder with the model's files that a checkpoint folder names.

    Raises:
        ConvertError: there is none, or more than one, or the files are of a kind that is not read.
    """
    if not location.is_dir():
        raise ConvertError(f"{location}: no such folder")
    folder, latest = location, location / "latest"
    if latest.is_file():
        name = latest.read_text(errors="replace").strip()
        folder = location / name
        if not os.path.isdir(folder):  # also false for what cannot be a name
            shown = folder if len(name) <= 300 else f"{location / name[:300]}..."
            raise ConvertError(f"{shown}: no such folder, though `latest` names it")
    elif not (location / DENSE_FILE).exists():
        steps = sorted(path for path in location.glob("global_step*") if path.is_dir())
        if len(steps) > 1:
            found = ", ".join(path.name for path in steps)
            raise ConvertError(f"{location}: has {found} and no file `latest`: name one of them")
        folder = steps[0] if steps else location
    names = [path.name for path in folder.iterdir()]
    for pattern, what in UNREAD_KINDS[:1] if DENSE_FILE in names else UNREAD_KINDS:
        if any(re.fullmatch(pattern, name) for name in names):
            raise ConvertError(f"{folder}: of {what}")
    if DENSE_FILE not in names:
        raise ConvertError(f"{folder}: has no {DENSE_FILE}: not a DeepSpeed checkpoint")
    return folder


def _check_complete(folder: Path, counts: Sequence[int]) -> None:
    """Every gate's experts must be there, and no other expert."""
    wanted = {
        EXPERT_FILE.format(layer, expert)
        for layer, count in enumerate(counts)
        for expert in range(count)
    }
    there = {path.name for path in folder.iterdir() if EXPERT_NAME.fullmatch(path.name)}

    def listed(names: set[str]) -> str:
        return some(sorted(names, key=lambda name: [int(n) for n in re.findall(r"\d+", name)]), 8)

    if missing := wanted - there:
        raise ConvertError(
            f"{folder}: {len(missing)} of {len(wanted)} expert files are missing (each expert-parallel rank writes its "
            f"own): {listed(missing)}"
        )
    if extra := there - wanted:
        raise ConvertError(
            f"{folder}: {len(extra)} expert files belong to no gate of {DENSE_FILE}: {listed(extra)}"
        )


def some(names: Sequence[str], shown: int) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
