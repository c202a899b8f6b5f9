"""What a checkpoint holds and whether it is sound: one pass over its tensors, one of them in memory at a time."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from torch import Tensor

from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.convert.checkpoints import CheckpointReader
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
from megatron_vlmoe.convert.tensors import type_name, with_progress
from megatron_vlmoe.planning.dry_run import block_ranges, table
from megatron_vlmoe.planning.parameters import parameters, part_of, part_order
from megatron_vlmoe.stream.block_plan import block_plans, moe_layer_numbers

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
        weight_bytes=sum(tensor.nbytes for tensor in source.tensors.values()),
        types=dict(Counter(type_name(tensor.dtype) for tensor in source.tensors.values())),
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
        measures = {key: found}
        if stored := self.source.stored.get(key):
            # Named, counted and placed as the files have it.
            measures = {name: measure(tensor.read()) for name, tensor in stored.items()}
        problems = []
        for name, one in measures.items():
            counts = {"NaN": one.nans, "Inf": one.infinities}
            many = " and ".join(f"{count:,} {what}" for what, count in counts.items() if count)
            if one.first is not None:
                detail = f"{many} of {one.numel:,} values, first at {list(one.first)}"
                problems.append(Problem("not finite", name, detail))
        return problems

    def part_summaries(self) -> tuple[PartSummary, ...]:
        """The parts in the order of the model."""
        activated: Counter[str] = Counter()
        for parameter in parameters(self.source.config):
            activated[parameter.part] += parameter.activated
        return tuple(
            PartSummary(part, found.numel, activated[part], found.rms, found.largest)
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


def _written(source: TensorSource) -> Written:
    files = list(source.path.glob("*.distcp" if source.reader else "*.safetensors"))
    ranks = {match[1] for file in files if (match := _FILE_RANK.match(file.name))}
    pieces = source.reader.num_shards if source.reader else {}

    def most(ending: str) -> int:
        found = (n for k, n in pieces.items() if k.startswith("decoder.") and k.endswith(ending))
        return max(found, default=0)

    return Written(
        files=len(files),
        file_bytes=sum(path.stat().st_size for path in source.path.iterdir() if path.is_file()),
        writers=len(ranks),
        attention_pieces=most(".self_attention.linear_qkv.weight"),
        expert_pieces=most(".weight1"),
        parallel=dataclasses.asdict(source.config.parallel),
    )


def _optimizer(source: TensorSource, states: Mapping[str, Measure]) -> Optional[OptimizerSummary]:
    if not source.optimizer_tensors:
        return None
    assert source.reader is not None
    return OptimizerSummary(
        dict(Counter(optimizer_key(name)[0] for name in source.optimizer_tensors)),
        sum(tensor.nbytes for tensor in source.optimizer_tensors.values()),
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


SHOWN_PROBLEMS = 50


def inspection_lines(inspection: Inspection) -> list[str]:
    """The report as text."""
    sections = (
        [str(inspection.source.path), *_indented(_origin_lines(inspection))],
        ["Model", *_indented(_architecture_lines(inspection.source.config))],
        ["Written", *_indented(_written_lines(inspection))],
        ["Parameters", *_parameter_lines(inspection)],
        _pool_lines(inspection.pools),
        _problem_lines(inspection),
    )
    return "\n\n".join("\n".join(lines) for lines in sections if lines).split("\n")


def inspection_json(inspection: Inspection) -> str:
    """Everything, the whole configuration included; numbers that are not finite are null."""
    source = inspection.source
    content = {
        "path": str(source.path),
        "format": "checkpoint" if source.reader else "hugging face",
        "train_state": dataclasses.asdict(source.reader.train_state) if source.reader else None,
        "written": dataclasses.asdict(inspection.written),
        "weight_bytes": inspection.weight_bytes,
        "types": dict(inspection.types),
        "parameters": {"total": inspection.total, "activated": inspection.activated},
        "parts": [dataclasses.asdict(part) for part in inspection.parts],
        "optimizer": dataclasses.asdict(inspection.optimizer) if inspection.optimizer else None,
        "pools": [dataclasses.asdict(pool) for pool in inspection.pools],
        "problems": [dataclasses.asdict(problem) for problem in inspection.problems],
        "config": dataclasses.asdict(source.config),
    }
    return to_json(content)


def to_json(content: Any) -> str:
    """Strict JSON."""
    return json.dumps(_plain(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def size_text(nbytes: int) -> str:
    """A number of bytes for people."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.1f} {unit}"
    return f"{nbytes} bytes"


def number(value: float) -> str:
    """Four significant digits."""
    return "-" if math.isnan(value) else f"{value:.4g}"


def _indented(lines: list[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def _architecture_lines(config: RunConfig) -> list[str]:
    model, moe = config.model, config.moe
    vl = block_ranges(range(model.num_layers - model.num_vl_layers + 1, model.num_layers + 1))
    lines = [
        f"{model.num_layers} blocks, hidden size {model.hidden_size}, {model.num_attention_heads} heads, "
        f"FFN {model.ffn_hidden_size}, VL-FFN in blocks {vl}",
        f"tokens: text {model.text_length}, caption {model.pair_text_length}, image {model.image_length} "
        f"({model.image_size} px, patches of {model.patch_size} px)",
        f"vocabulary {model.vocab_size or 'none'}, visual vocabulary {model.visual_vocab_size or 'none'}",
    ]
    numbers = moe_layer_numbers(model, moe)
    if not numbers:
        lines.append("no experts")
    else:
        pools = {p.name: p.num_experts for plan in block_plans(model, moe) for p in plan.pools}
        counts = ", ".join(f"{count} {name}" for name, count in pools.items())
        lines.append(f"experts: {counts} in blocks {block_ranges(numbers)}; top {moe.topk}")
    if isinstance(config, FinetuneConfig):
        classes = f", {config.task.num_classes} classes" if config.task.num_classes else ""
        lines.append(f"task: {config.task.name}{classes}")
    return lines


def _origin_lines(inspection: Inspection) -> list[str]:
    reader, config = inspection.source.reader, inspection.source.config
    if reader is None:
        return ["Hugging Face folder; holds no step and no optimizer state"]
    state = reader.train_state
    lines = [f"step {state.step} of {config.train.steps}, seed {config.train.seed}"]
    if state.skipped_steps:
        lines[0] += f", {state.skipped_steps} steps skipped"
    if isinstance(config, FinetuneConfig) and state.best_value is not None:
        lines.append(
            f"best {config.task.spec.best_metric} {state.best_value:.4g} at step {state.best_step}"
        )
    return lines


def _written_lines(inspection: Inspection) -> list[str]:
    written = inspection.written
    types = ", ".join(f"{count} {name}" for name, count in inspection.types.items())
    by = f" by {written.writers} process(es)" if written.writers else ""
    lines = [
        f"{written.files} file(s){by}, {size_text(written.file_bytes)} with all that belongs to it",
        f"weights: {types} tensors, {size_text(inspection.weight_bytes)}",
    ]
    optimizer = inspection.optimizer
    if optimizer is None:
        lines.append("optimizer state: none")
    else:
        counts = sorted({*optimizer.kinds.values()})
        kinds = ", ".join(
            name if len(counts) == 1 else f"{name} ({count})"
            for name, count in optimizer.kinds.items()
        )
        of = f"{counts[-1]} of {sum(inspection.types.values())} tensors"
        steps = f", {optimizer.steps} updates" if optimizer.steps is not None else ""
        lines.append(f"optimizer state: {kinds} of {of}, {size_text(optimizer.nbytes)}{steps}")
    return lines + (_layout_lines(inspection) if inspection.source.reader else [])


def _layout_lines(inspection: Inspection) -> list[str]:
    """The layout that the pieces tell (tensor and expert parallel; a pipeline leaves no trace), and the noted one."""
    written = inspection.written
    tensor = int(written.parallel["tensor_model_parallel_size"])
    expert = int(written.parallel["expert_model_parallel_size"])
    noted = {
        "TP": tensor,
        "PP": written.parallel["pipeline_model_parallel_size"],
        "VPP": written.parallel["virtual_pipeline_model_parallel_size"],
        "EP": expert,
    }
    pools = f", experts in {written.expert_pieces} (EP)" if written.expert_pieces else ""
    lines = [
        f"pieces: attention in {written.attention_pieces} (TP){pools}",
        "layout of the run: " + " x ".join(f"{name} {size}" for name, size in noted.items()),
    ]
    told = (written.attention_pieces, written.expert_pieces or expert)
    if told != (tensor, expert):
        lines.append("the pieces are not those of that layout: a converter wrote them")
    return lines


def _parameter_lines(inspection: Inspection) -> list[str]:
    rows = [
        (
            part.part,
            f"{part.total:,}",
            f"{part.activated:,}",
            number(part.rms),
            number(part.largest),
        )
        for part in inspection.parts
    ]
    rows.append(("total", f"{inspection.total:,}", f"{inspection.activated:,}", "", ""))
    return table(("part", "number", "per token of a pair", "RMS", "largest"), rows)


def _pool_lines(pools: tuple[PoolSummary, ...]) -> list[str]:
    if not pools:
        return []
    header = ["block", "pool", "E"]
    for name in ("fc1", "fc2", "router row"):
        header += [f"{name} min", "mean", "max"]
    rows = []
    for pool in pools:
        values = (pool.fc1_norms, pool.fc2_norms, pool.router_norms)
        cells = []
        for norms in values:
            mean = sum(norms) / len(norms) if norms else math.nan
            ends = (min(norms, default=math.nan), mean, max(norms, default=math.nan))
            cells += [number(value) for value in ends]
        cosine = "-" if pool.fc1_cosine is None else f"{pool.fc1_cosine:.3f}"
        twins = sum(len(group) for group in pool.identical)
        count = max(len(entry) for entry in values)
        rows.append((str(pool.block), pool.pool, str(count), *cells, cosine, str(twins)))
    lines = ["Experts (norms over experts; cosine between the fc1 of two experts)"]
    lines += table([*header, "cosine", "identical"], rows)
    for pool in pools:
        where = f"  block {pool.block}, {pool.pool}"
        if pool.identical:
            groups = "; ".join(", ".join(map(str, group)) for group in pool.identical)
            lines.append(
                f"{where}: experts {groups} are identical: copies (upcycling) that were not trained yet"
            )
        if pool.router_norms and not any(pool.router_norms):
            lines.append(f"{where}: the router is zero, every gate is 1/E")
    return lines


def _problem_lines(inspection: Inspection) -> list[str]:
    problems = inspection.problems
    if not problems:
        return ["No problem: every tensor is there and finite."]
    lines = [f"{len(problems)} problem(s)"]
    lines += [f"  {p.kind}: {p.name}: {p.detail}" for p in problems[:SHOWN_PROBLEMS]]
    if len(problems) > SHOWN_PROBLEMS:
        lines.append(f"  and {len(problems) - SHOWN_PROBLEMS} more (--json lists all)")
    return lines
