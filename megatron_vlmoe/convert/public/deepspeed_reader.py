"""Checkpoints with DeepSpeed-MoE layers, read without DeepSpeed.

DeepSpeed writes the dense part into ``mp_rank_00_model_states.pt`` and every expert into a file of its own,
``layer_{l}_expert_{e}_mp_rank_00_model_states.pt``, where l counts the MoE layers of the model in the order of its
modules and e the experts over all ranks. Here they become one state dict.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from torch import Tensor

from megatron_vlmoe.config.errors import ConvertError
from megatron_vlmoe.convert.public.torch_files import PublicState, as_lazy, read_torch, state_of
from megatron_vlmoe.convert.tensors import LazyTensor

DENSE_FILE = "mp_rank_00_model_states.pt"
EXPERT_FILE = "layer_{}_expert_{}_mp_rank_00_model_states.pt"
EXPERT_NAME = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_(\d+)_model_states\.pt")
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
    _check_kind(folder)
    dense = folder / DENSE_FILE
    content, skipped = read_torch(dense, allow_pickle)
    state = state_of(content, dense)
    residual = [name for name in state if re.search(r"\.coefficient\.(weight|bias)$", name)]
    gates = [name.removesuffix(GATE) for name in state if name.endswith(GATE)]
    residual = [name for name in residual if name.rpartition(".coefficient.")[0] in gates]
    if residual:
        raise ConvertError(f"{dense}: residual MoE ({residual[0]}) has no counterpart here")
    tensors = as_lazy(state)
    experts = {gate: PublicState(folder, tensors).shape(gate + GATE, 2)[0] for gate in gates}
    _check_complete(folder, list(experts.values()))
    all_skipped = set(skipped)
    for layer, (gate, count) in enumerate(experts.items()):
        names: set[str] = set()
        for expert in range(count):
            found, more = _expert(folder, layer, expert, gate, allow_pickle)
            all_skipped |= set(more)
            own = {name.partition(f"{EXPERTS}{expert}.")[2] for name in found}
            if own != (names or own) or not own:
                file = folder / EXPERT_FILE.format(layer, expert)
                raise ConvertError(f"{file}: has {sorted(own)}, other experts {sorted(names)}")
            names = own
            tensors |= found
    return PublicState(folder, tensors, tuple(sorted(all_skipped)))


def find_folder(location: Path) -> Path:
    """The folder with the model's files that a checkpoint folder names.

    Raises:
        ConvertError: there is none, or more than one.
    """
    if not location.is_dir():
        raise ConvertError(f"{location}: no such folder")
    latest = location / "latest"
    if latest.is_file():
        return location / latest.read_text(errors="replace").strip()
    steps = sorted(path for path in location.glob("global_step*") if path.is_dir())
    if len(steps) > 1 and not (location / DENSE_FILE).exists():
        names = ", ".join(path.name for path in steps)
        raise ConvertError(f"{location}: has {names} and no file `latest`: name one of them")
    return steps[0] if steps and not (location / DENSE_FILE).exists() else location


def _check_kind(folder: Path) -> None:
    if not folder.is_dir():
        raise ConvertError(f"{folder}: no such folder, though `latest` names it")
    names = [path.name for path in folder.iterdir()]

    def some(pattern: str) -> bool:
        return any(re.fullmatch(pattern, name) for name in names)

    if some(r"(layer_\d+_expert_\d+_)?mp_rank_(?!00)\d+_model_states\.pt"):
        raise ConvertError(f"{folder}: of several tensor-parallel ranks, which are not merged")
    if DENSE_FILE in names:
        return
    if some(r"zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt"):
        raise ConvertError(f"{folder}: of ZeRO stage 3, whose files hold pieces of weights")
    if some(r"layer_\d+-model_\d+-model_states\.pt|layer_\d+-model_states\.pt"):
        raise ConvertError(f"{folder}: of DeepSpeed's pipeline engine, which is not read")
    raise ConvertError(f"{folder}: has no {DENSE_FILE}: not a DeepSpeed checkpoint")


def _check_complete(folder: Path, counts: Iterable[int]) -> None:
    """Every gate's experts must be there, and no other expert."""
    wanted = {
        EXPERT_FILE.format(layer, expert)
        for layer, count in enumerate(counts)
        for expert in range(count)
    }
    there = {path.name for path in folder.iterdir() if EXPERT_NAME.fullmatch(path.name)}
    missing, extra = sorted(wanted - there, key=_numbers), sorted(there - wanted, key=_numbers)
    if missing:
        raise ConvertError(
            f"{folder}: {len(missing)} of {len(wanted)} expert files are missing (each expert-parallel rank writes its "
            f"own): {_some(missing)}"
        )
    if extra:
        raise ConvertError(
            f"{folder}: {len(extra)} expert files belong to no gate of {DENSE_FILE}: {_some(extra)}"
        )


def _expert(
    folder: Path, layer: int, expert: int, gate: str, allow_pickle: bool
) -> tuple[dict[str, LazyTensor], tuple[str, ...]]:
    """The tensors of one expert, which must be the one that its place says."""
    file = folder / EXPERT_FILE.format(layer, expert)
    content, skipped = read_torch(file, allow_pickle)
    found = {
        name: LazyTensor(
            tuple(value.shape), value.dtype, partial(_reread, file, name, allow_pickle)
        )
        for name, value in state_of(content, file).items()
    }
    for name in found:
        if not name.startswith(f"{gate}{EXPERTS}{expert}."):
            raise ConvertError(f"{file}: holds {name}, expected expert {expert} of {gate}")
    return found, skipped


def _reread(file: Path, name: str, allow_pickle: bool) -> Tensor:
    """Files of experts are many: none stays open."""
    content, _ = read_torch(file, allow_pickle)
    return state_of(content, file)[name]


def _numbers(name: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", name))


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more
