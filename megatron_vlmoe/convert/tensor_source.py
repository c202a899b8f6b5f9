"""A checkpoint of any layout or a Hugging Face folder as one mapping from our keys to whole tensors.

Nothing is refused that can be described: a missing, unexpected or misshapen tensor becomes a `Problem`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from torch import Tensor

from megatron_vlmoe.config.errors import ConvertError
from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.convert.checkpoints import OPTIMIZER, CheckpointReader
from megatron_vlmoe.convert.hf_config import import_config, read_config
from megatron_vlmoe.convert.name_table import VocabularyRows, name_table
from megatron_vlmoe.convert.safetensors_files import SafetensorsFolder
from megatron_vlmoe.convert.tensors import LazyTensor
from megatron_vlmoe.planning.parameters import Shape, checkpoint_shapes
from megatron_vlmoe.train.run_files import is_hugging_face


@dataclass(frozen=True)
class Problem:
    """Something that is wrong with what a checkpoint holds.

    Args:
        kind: `missing`, `unexpected`, `shape`, `not finite` or `checksum`.
        name: of the tensor in the files, or the file.
        detail: what is wrong, in a few words.
    """

    kind: str
    name: str
    detail: str


@dataclass(frozen=True)
class TensorSource:
    """Tensors by our key, wherever they come from.

    Args:
        path: iteration folder, or Hugging Face folder.
        config: of the run.
        tensors: the model's; of a Hugging Face folder they are joined by the name table, and those that have no key
            of ours come under their own name.
        optimizer_tensors: the optimizer's, as `optimizer.state.KIND.KEY`.
        problems: what does not go with the configuration.
        reader: of a checkpoint; None for a Hugging Face folder.
        stored: of a Hugging Face folder, the tensors in the files that make a key's.
    """

    path: Path
    config: RunConfig
    tensors: Mapping[str, LazyTensor]
    optimizer_tensors: Mapping[str, LazyTensor]
    problems: tuple[Problem, ...]
    reader: Optional[CheckpointReader] = None
    stored: Mapping[str, Mapping[str, LazyTensor]] = field(default_factory=dict)

    def without_padding(self) -> dict[str, LazyTensor]:
        """The tensors with zeros in the rows that only fill a vocabulary up, which do not travel with an export.

        They take no part in the model, but were drawn at random in checkpoints of the first version.
        """
        tensors = dict(self.tensors)
        for entry in name_table(self.config):
            tensor = tensors.get(entry.ours)
            padded = isinstance(entry.transform, VocabularyRows)
            if padded and tensor is not None and tensor.shape == entry.shape:
                rows = entry.their_shapes(self.config.model)[entry.theirs[0]][0]

                def read(tensor: LazyTensor = tensor, rows: int = rows) -> Tensor:
                    value = tensor.read()
                    value[rows:] = 0.0
                    return value

                tensors[entry.ours] = dataclasses.replace(tensor, read=read)
        return tensors


def open_source(location: str | Path) -> TensorSource:
    """Opens a run, checkpoint or iteration folder, or a Hugging Face folder.

    Raises:
        ConvertError: neither is there, or what tells its tensors and its configuration is damaged.
    """
    folder = Path(location)
    if not folder.is_dir():
        raise ConvertError(f"{folder}: no such folder")
    return _hugging_face(folder) if is_hugging_face(folder) else _checkpoint(folder)


def _checkpoint(folder: Path) -> TensorSource:
    reader = CheckpointReader(folder)
    wanted = checkpoint_shapes(reader.config)
    problems = (*_differences(reader.tensors, wanted), *_optimizer_problems(reader, wanted))
    # In the order of the model, then what it does not know.
    tensors = {key: reader.tensors[key] for key in wanted if key in reader.tensors} | reader.tensors
    return TensorSource(
        reader.path, reader.config, tensors, reader.optimizer_tensors, problems, reader
    )


def _differences(
    tensors: Mapping[str, LazyTensor], wanted: Mapping[str, Shape]
) -> Iterator[Problem]:
    """What is missing, of another shape, or not wanted."""
    for name, shape in wanted.items():
        if name not in tensors:
            yield Problem("missing", name, f"not there; expected {list(shape)}")
        elif tensors[name].shape != shape:
            found = list(tensors[name].shape)
            yield Problem("shape", name, f"{found}, but the configuration says {list(shape)}")
    for name in tensors:
        if name not in wanted:
            yield Problem("unexpected", name, "no tensor of this configuration")


def optimizer_key(name: str) -> tuple[str, str]:
    """Kind and parameter of an optimizer's tensor: `exp_avg` and the key; two empty strings if it is none."""
    if not name.startswith(OPTIMIZER):
        return "", ""
    kind, _, key = name.removeprefix(f"{OPTIMIZER}state.").partition(".")
    return (kind, key) if name.startswith(f"{OPTIMIZER}state.") else ("other", name)


def _optimizer_problems(reader: CheckpointReader, wanted: Mapping[str, Shape]) -> Iterator[Problem]:
    """Frozen parameters have no state, so a parameter may lack all of it, but not one of its moments."""
    kinds_of: dict[str, set[str]] = {}
    for name, tensor in reader.optimizer_tensors.items():
        kind, key = optimizer_key(name)
        if key not in wanted:
            yield Problem("unexpected", name, "no optimizer state of this configuration")
            continue
        kinds_of.setdefault(key, set()).add(kind)
        if tensor.shape != wanted[key]:
            detail = f"{list(tensor.shape)}, but the configuration says {list(wanted[key])}"
            yield Problem("shape", name, detail)
    # Copies in fp32 are kept of what is stored in less.
    moments = {kind for kinds in kinds_of.values() for kind in kinds if "param" not in kind}
    for key, found in kinds_of.items():
        for kind in sorted(moments - found):
            yield Problem("missing", f"{OPTIMIZER}state.{kind}.{key}", "not there")


def _hugging_face(folder: Path) -> TensorSource:
    content = read_config(folder)
    config = import_config(folder, content)
    names = content.get("id2label")
    if isinstance(config, FinetuneConfig) and config.task.spec.has_labels and names:
        task = dataclasses.replace(config.task, num_classes=len(names))
        config = dataclasses.replace(config, task=task)
    files = SafetensorsFolder(folder)
    table = name_table(config)
    wanted = {name: shape for e in table for name, shape in e.their_shapes(config.model).items()}
    problems = list(_differences(files.tensors, wanted))
    try:
        files.verify_checksums()
    except ConvertError as error:
        name, _, detail = str(error).partition(": ")
        problems.append(Problem("checksum", Path(name).name, detail))
    bad = {problem.name for problem in problems}
    whole = [entry for entry in table if not bad.intersection(entry.theirs)]
    stored = {e.ours: {name: files.tensors[name] for name in e.theirs} for e in whole}
    tensors = {e.ours: e.joined(stored[e.ours], config.model) for e in whole}
    used = {name for parts in stored.values() for name in parts}
    tensors |= {name: tensor for name, tensor in files.tensors.items() if name not in used}
    return TensorSource(folder, config, tensors, {}, tuple(problems), None, stored)
