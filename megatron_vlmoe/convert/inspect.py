"""What a checkpoint holds and whether it is sound: one pass over its tensors, one of them in memory at a time."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from torch import Tensor

from megatron_vlmoe.convert.checkpoint_reader import CheckpointReader
from megatron_vlmoe.convert.parts import activated_by_part, part_of, part_order
from megatron_vlmoe.convert.statistics import (
    Measure,
    mean_cosine,
    measure,
    row_digests,
    row_norms,
)
from megatron_vlmoe.convert.tensor_source import (
    Problem,
    TensorSource,
    open_source,
    optimizer_key,
)
from megatron_vlmoe.convert.tensors import LazyTensor, with_progress

_EXPERTS = re.compile(r"decoder\.layers\.(\d+)\.mlp\.moe\.experts\.([a-z]+)\.(\w+)$")
_ROUTER = re.compile(r"decoder\.layers\.(\d+)\.mlp\.moe\.router\.([a-z]+)\.weight$")
_FILE_RANK = re.compile(r"__(\d+)_\d+\.distcp$")


@dataclass
class PoolSummary:
    """The experts of one block and pool.

    Args:
        block: number of the block, from 1.
        pool: name of the pool.
        fc1_norms: Euclidean norm of every expert's first matrix.
        fc2_norms: of every expert's second matrix.
        router_norms: of every expert's row of the router.
        fc1_cosine: mean cosine between the first matrices of two experts; None for less than two.
        identical: numbers of experts, from 0, that are equal in every weight and bias, by group.
    """

    block: int
    pool: str
    fc1_norms: list[float] = field(default_factory=list)
    fc2_norms: list[float] = field(default_factory=list)
    router_norms: list[float] = field(default_factory=list)
    fc1_cosine: Optional[float] = None
    identical: list[list[int]] = field(default_factory=list)


@dataclass(frozen=True)
class PartSummary:
    """The parameters of one part of the model.

    Args:
        part: as config/estimate names it.
        total: parameters that the checkpoint holds.
        activated: of these, those that one image-text pair applies.
        rms: root mean square of the values.
        largest: largest absolute value.
    """

    part: str
    total: int
    activated: int
    rms: float
    largest: float


@dataclass(frozen=True)
class OptimizerSummary:
    """The optimizer state of a checkpoint.

    Args:
        kinds: number of tensors by kind, such as `exp_avg`.
        nbytes: bytes of their values.
        steps: updates that the optimizer counts; None where the checkpoint does not tell.
        parts: root mean square and largest value by kind.
    """

    kinds: Mapping[str, int]
    nbytes: int
    steps: Optional[int]
    parts: Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Written:
    """How a checkpoint lies on the disk.

    Args:
        files: number of files with tensors.
        file_bytes: bytes of all files of the folder.
        writers: processes that wrote them; 0 for a Hugging Face folder.
        attention_pieces: pieces of a tensor-parallel matrix: the tensor-parallel size that wrote it.
        expert_pieces: pieces of a pool of experts: the expert-parallel size; 0 without experts.
        parallel: the layout that the configuration notes.
    """

    files: int
    file_bytes: int
    writers: int
    attention_pieces: int
    expert_pieces: int
    parallel: Mapping[str, Any]


@dataclass(frozen=True)
class Inspection:
    """Everything that `inspect_checkpoint` finds.

    Args:
        source: the checkpoint.
        written: how it lies on the disk.
        weight_bytes: bytes of the model's values.
        types: number of tensors by type.
        parts: the parameters by part, in the order of the model.
        optimizer: None for a checkpoint of weights alone.
        pools: the experts by block and pool.
        problems: whatever is wrong with it.
    """

    source: TensorSource
    written: Written
    weight_bytes: int
    types: Mapping[str, int]
    parts: tuple[PartSummary, ...]
    optimizer: Optional[OptimizerSummary]
    pools: tuple[PoolSummary, ...]
    problems: tuple[Problem, ...]

    @property
    def total(self) -> int:
        """Parameters in the checkpoint."""
        return sum(part.total for part in self.parts)

    @property
    def activated(self) -> int:
        """Parameters that one image-text pair applies."""
        return sum(part.activated for part in self.parts)


def inspect_checkpoint(location: str | Path) -> Inspection:
    """Reads every tensor once.

    Args:
        location: run, checkpoint or iteration folder of any layout, or Hugging Face folder.

    Raises:
        ConvertError: there is none, or it cannot be read.
    """
    source = open_source(location)
    scan = _Scan(source)
    tensors = {**source.tensors, **source.optimizer_tensors}
    for name, tensor in with_progress(tensors.items(), len(tensors), "inspect"):
        scan.add(name, tensor.read())
    return Inspection(
        source,
        written=_written(source),
        weight_bytes=_nbytes(source.tensors.values()),
        types=_types(source.tensors.values()),
        parts=scan.part_summaries(),
        optimizer=_optimizer(source, scan.states),
        pools=scan.pool_summaries(),
        problems=(*source.problems, *scan.problems),
    )


class _Scan:
    """What is known after some of the tensors.

    Args:
        source: the checkpoint.
    """

    def __init__(self, source: TensorSource) -> None:
        self.source = source
        self.parts: dict[str, Measure] = {}
        self.states: dict[str, Measure] = {}
        self.pools: dict[tuple[int, str], PoolSummary] = {}
        self.digests: dict[tuple[int, str], list[tuple[bytes, ...]]] = {}
        self.problems: list[Problem] = []

    def add(self, name: str, value: Tensor) -> None:
        """Takes in one tensor."""
        found = measure(value)
        if found.first is not None:
            self.problems += self._not_finite(name, found)
        kind, key = optimizer_key(name)
        if kind:
            self.states[kind] = self.states.get(kind, Measure()) + found
            return
        part = part_of(name)
        self.parts[part] = self.parts.get(part, Measure()) + found
        if match := _EXPERTS.match(name):
            self._add_experts((int(match[1]) + 1, match[2]), match[3], value)
        elif match := _ROUTER.match(name):
            self._pool((int(match[1]) + 1, match[2])).router_norms = row_norms(value)

    def _pool(self, where: tuple[int, str]) -> PoolSummary:
        return self.pools.setdefault(where, PoolSummary(*where))

    def _add_experts(self, where: tuple[int, str], name: str, value: Tensor) -> None:
        pool = self._pool(where)
        if name == "weight1":
            pool.fc1_norms, pool.fc1_cosine = row_norms(value), mean_cosine(value)
        elif name == "weight2":
            pool.fc2_norms = row_norms(value)
        known = self.digests.setdefault(where, [()] * len(value))
        # Pools of the wrong shape are a problem already.
        self.digests[where] = [(*old, new) for old, new in zip(known, row_digests(value))]

    def _not_finite(self, key: str, found: Measure) -> list[Problem]:
        stored = self.source.stored_as(key)
        measures = {key: found}
        if list(stored) != [key]:
            # Named, counted and placed as the files have it.
            measures = {name: measure(tensor.read()) for name, tensor in stored.items()}
        return [
            Problem("not finite", name, _places(one))
            for name, one in measures.items()
            if one.first is not None
        ]

    def part_summaries(self) -> tuple[PartSummary, ...]:
        """The parts in the order of the model."""
        activated = activated_by_part(self.source.config)
        return tuple(
            PartSummary(
                part, self.parts[part].numel, activated.get(part, 0), found.rms, found.largest
            )
            for part, found in sorted(self.parts.items(), key=lambda entry: part_order(entry[0]))
        )

    def pool_summaries(self) -> tuple[PoolSummary, ...]:
        """The pools by block, with the groups of equal experts."""
        for where, experts in self.digests.items():
            groups: dict[tuple[bytes, ...], list[int]] = {}
            for number, digests in enumerate(experts):
                groups.setdefault(digests, []).append(number)
            self.pools[where].identical = [group for group in groups.values() if len(group) > 1]
        return tuple(self.pools[where] for where in sorted(self.pools))


def _places(found: Measure) -> str:
    counts = [
        f"{count:,} {name}"
        for name, count in (("NaN", found.nans), ("Inf", found.infinities))
        if count
    ]
    return f"{' and '.join(counts)} of {found.numel:,} values, first at {list(found.first or ())}"


def _written(source: TensorSource) -> Written:
    files = source.files
    ranks = {match[1] for file in files if (match := _FILE_RANK.match(file.name))}
    pieces = source.reader.num_shards if source.reader else {}
    return Written(
        files=len(files),
        file_bytes=sum(path.stat().st_size for path in source.path.iterdir() if path.is_file()),
        writers=len(ranks),
        attention_pieces=_most(pieces, ".self_attention.linear_qkv.weight"),
        expert_pieces=max(
            (n for key, n in pieces.items() if _EXPERTS.match(key) and key.endswith(".weight1")),
            default=0,
        ),
        parallel=dataclasses.asdict(source.config.parallel),
    )


def _most(pieces: Mapping[str, int], ending: str) -> int:
    found = (n for key, n in pieces.items() if key.startswith("decoder.") and key.endswith(ending))
    return max(found, default=0)


def _optimizer(source: TensorSource, states: Mapping[str, Measure]) -> Optional[OptimizerSummary]:
    if not source.optimizer_tensors:
        return None
    assert source.reader is not None
    kinds: dict[str, int] = {}
    for name in source.optimizer_tensors:
        kind = optimizer_key(name)[0]
        kinds[kind] = kinds.get(kind, 0) + 1
    return OptimizerSummary(
        kinds,
        _nbytes(source.optimizer_tensors.values()),
        _optimizer_steps(source.reader),
        {kind: (found.rms, found.largest) for kind, found in states.items()},
    )


def _optimizer_steps(reader: CheckpointReader) -> Optional[int]:
    """Adam's own count, which lags behind the run's step where fp16 skipped updates."""
    steps: list[int] = []
    stack: list[Any] = [reader.common.get("optimizer")]
    while stack:
        item = stack.pop()
        if isinstance(item, Mapping):
            if isinstance(item.get("step"), (int, float)):
                steps.append(int(item["step"]))
            stack.extend(item.values())
        elif isinstance(item, (list, tuple)):
            stack.extend(item)
    return max(steps, default=None)


def _nbytes(tensors: Iterable[LazyTensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _types(tensors: Iterable[LazyTensor]) -> dict[str, int]:
    types: dict[str, int] = {}
    for tensor in tensors:
        name = str(tensor.dtype).removeprefix("torch.")
        types[name] = types.get(name, 0) + 1
    return types


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Minimum, mean and maximum; NaN of nothing."""
    if not values:
        return (math.nan, math.nan, math.nan)
    return (min(values), sum(values) / len(values), max(values))
