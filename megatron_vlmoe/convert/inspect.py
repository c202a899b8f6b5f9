"""What a checkpoint holds and whether it is sound: one pass over its tensors, one of them in memory at a time.

A checkpoint of any layout and a Hugging Face folder are read as one mapping from our keys to whole tensors. Nothing is
refused that can be described: a missing, unexpected or misshapen tensor becomes a `Problem`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from torch import Tensor

from megatron_vlmoe.config.errors import CheckpointError, ConvertError
from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.convert.checkpoints import CheckpointReader, resolve_checkpoint
from megatron_vlmoe.convert.hf_config import import_config, read_config
from megatron_vlmoe.convert.name_table import VocabularyRows, name_table
from megatron_vlmoe.convert.statistics import Measure, mean_cosine, measure, row_digests, row_norms
from megatron_vlmoe.convert.tensors import LazyTensor, SafetensorsFolder, type_name, with_progress
from megatron_vlmoe.planning.dry_run import block_ranges, table
from megatron_vlmoe.planning.parameters import (
    Shape,
    checkpoint_shapes,
    parameters,
    part_of,
    part_order,
)
from megatron_vlmoe.runtime.sums import SUMS_FILE, differing_files
from megatron_vlmoe.stream.block_plan import block_plans, moe_layer_numbers
from megatron_vlmoe.train.checkpoint_files import FULLY_RESHARDABLE, is_optimizer_key
from megatron_vlmoe.train.checkpoint_sums import NOTE, read_sums
from megatron_vlmoe.train.run_files import is_hugging_face

_POOL = re.compile(
    r"decoder\.layers\.(\d+)\.mlp\.moe\.(?:router\.([a-z]+)\.weight|experts\.([a-z]+)\.(\w+))$"
)
_STATE = "optimizer.state."
_BUCKET = re.compile(r"\.bucket_idx_\d+$")
_FILE_RANK = re.compile(r"__(\d+)_\d+\.distcp$")


@dataclass(frozen=True)
class Problem:
    """Something that is wrong with what a checkpoint holds, in a few words.

    Its kind is `missing`, `unexpected`, `shape`, `not finite`, `not readable` or `checksum`; its name that of the
    tensor or file.
    """

    kind: str
    name: str
    detail: str


@dataclass(frozen=True)
class TensorSource:
    """Tensors by our key, wherever they come from: an iteration folder, or a Hugging Face folder.

    Args:
        tensors: the model's; of a Hugging Face folder they are joined by the name table, and those that have no key
            of ours come under their own name.
        optimizer_tensors: the optimizer's, see `CheckpointReader`.
        problems: what does not go with the configuration.
        reader: of a checkpoint; None for a Hugging Face folder.
        stored: of a Hugging Face folder, the tensors in the files that make a key's.
        has_sums: whether every file of a checkpoint has a sum; earlier versions wrote none.
    """

    path: Path
    config: RunConfig
    tensors: Mapping[str, LazyTensor]
    optimizer_tensors: Mapping[str, LazyTensor]
    problems: tuple[Problem, ...]
    reader: Optional[CheckpointReader] = None
    stored: Mapping[str, Mapping[str, LazyTensor]] = field(default_factory=dict)
    has_sums: bool = True

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
        raise ConvertError(f"{location}: no such folder")
    if is_hugging_face(folder):
        return _hugging_face(folder)
    path = resolve_checkpoint(folder)
    damaged, has_sums = _damaged_files(path)
    try:
        reader = CheckpointReader(path, verify=False)
        if not has_sums and not damaged and reader.common.get(NOTE):
            damaged = [
                Problem("missing", SUMS_FILE, "not there; it was written with the checkpoint")
            ]
    except ConvertError as error:
        why = [ConvertError(f"{path / problem.name}: {problem.detail}") for problem in damaged]
        raise (why or [error])[0] from None
    wanted = checkpoint_shapes(reader.config)
    problems = (
        *damaged,
        *_differences(reader.tensors, wanted),
        *_optimizer_problems(reader, wanted),
    )
    # In the order of the model, then what it does not know.
    tensors = {key: reader.tensors[key] for key in wanted if key in reader.tensors} | reader.tensors
    return TensorSource(
        reader.path,
        reader.config,
        tensors,
        reader.optimizer_tensors,
        problems,
        reader,
        has_sums=has_sums,
    )


def _damaged_files(path: Path) -> tuple[list[Problem], bool]:
    """The files that are not as SHA256SUMS says, and whether there is one."""
    try:
        sums = read_sums(path)
    except CheckpointError as error:
        return [
            Problem("checksum", SUMS_FILE, str(error).removeprefix(f"{path / SUMS_FILE}: "))
        ], True
    flaws = differing_files({path / name: digest for name, digest in (sums or {}).items()})
    return [Problem("checksum", file.name, reason) for file, reason in flaws], sums is not None


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
    """Kind and parameter of an optimizer's tensor: `exp_avg` and the key; two empty strings if it is none.

    A bucket has many parameters; its own name takes the place of the key.
    """
    if not is_optimizer_key(name):
        return "", ""
    bucket, _, kind = name.rpartition(".")
    if _BUCKET.search(bucket):
        return kind, bucket
    kind, _, key = name.removeprefix(_STATE).partition(".")
    return (kind, key) if name.startswith(_STATE) else ("other", name)


def _optimizer_problems(reader: CheckpointReader, wanted: Mapping[str, Shape]) -> Iterator[Problem]:
    """Frozen parameters have no state, so a parameter may lack all of it, but not one of its moments.

    Which buckets there are, the configuration does not tell.
    """
    if reader.optimizer_format != FULLY_RESHARDABLE:
        return
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
            yield Problem("missing", f"{_STATE}{kind}.{key}", "not there")


def _hugging_face(folder: Path) -> TensorSource:
    config = import_config(folder, read_config(folder))
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


@dataclass
class PoolSummary:
    """The experts of one block (from 1) and pool.

    The Euclidean norms are of every expert's two matrices and of its row of the router; the mean cosine is that between
    the first matrices of two experts, None for less than two; `identical` groups experts, numbered from 0, that are
    equal in every weight and bias.
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
    """The parameters of one part of the model, as planning/parameters.py names it.

    All that the checkpoint holds, of these those that one image-text pair applies, the root mean square of the values,
    and the largest absolute one.
    """

    part: str
    total: int
    activated: int
    rms: float
    largest: float


@dataclass(frozen=True)
class OptimizerSummary:
    """The optimizer state of a checkpoint.

    Its format; number of tensors by kind, such as `exp_avg`; bytes of their values; updates that the optimizer counts,
    None where the checkpoint does not tell; root mean square and largest value by kind.
    """

    format: str
    kinds: Mapping[str, int]
    nbytes: int
    steps: Optional[int]
    parts: Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Written:
    """How a checkpoint lies on the disk: files with tensors, and bytes of all files of the folder.

    Args:
        writers: processes that wrote them; 0 for a Hugging Face folder.
        attention_pieces: pieces of a tensor-parallel matrix: the tensor-parallel size that wrote it.
        expert_pieces: pieces of a pool of experts: the expert-parallel size; 0 without experts.
        parallel: the layout that the configuration notes.
        has_sums: whether every file has a sum to verify it by.
    """

    files: int
    file_bytes: int
    writers: int
    attention_pieces: int
    expert_pieces: int
    parallel: Mapping[str, Any]
    has_sums: bool


@dataclass(frozen=True)
class Inspection:
    """Everything that `inspect_checkpoint` finds: of the model bytes, numbers of tensors by type, and parts in order.

    A checkpoint of weights alone has no optimizer.
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
    """Reads every tensor of a run, checkpoint or iteration folder of any layout, or of a Hugging Face folder, once.

    Raises:
        ConvertError: there is none, or it cannot be read.
    """
    source = open_source(location)
    problems = list(source.problems)
    parts: dict[str, Measure] = {}
    states: dict[str, Measure] = {}
    pools: dict[tuple[int, str], PoolSummary] = {}
    digests: dict[tuple[int, str], list[tuple[bytes, ...]]] = {}
    tensors = {**source.tensors, **source.optimizer_tensors}
    for name, tensor in with_progress(tensors.items(), len(tensors), "inspect"):
        try:
            value = tensor.read()
        except ConvertError as error:
            if not source.problems:
                raise
            # Of a file that is known to be damaged.
            problems.append(Problem("not readable", name, str(error)))
            continue
        found = measure(value)
        if found.first is not None:
            problems += _not_finite(source, name, found)
        kind, _ = optimizer_key(name)
        measures, group = (states, kind) if kind else (parts, part_of(name))
        measures[group] = measures.get(group, Measure()) + found
        if match := _POOL.match(name):
            block, of_router, of_experts, end = match.groups()
            where = (int(block) + 1, of_router or of_experts)
            pool = pools.setdefault(where, PoolSummary(*where))
            if of_router:
                pool.router_norms = row_norms(value)
            else:
                known = digests.setdefault(where, [()] * len(value))
                # Pools of the wrong shape are a problem already.
                digests[where] = [(*old, new) for old, new in zip(known, row_digests(value))]
            if end == "weight1":
                pool.fc1_norms, pool.fc1_cosine = row_norms(value), mean_cosine(value)
            elif end == "weight2":
                pool.fc2_norms = row_norms(value)
        # Given back before the next one is read.
        del value
    for where, experts in digests.items():
        groups: dict[tuple[bytes, ...], list[int]] = {}
        for number, prints in enumerate(experts):
            groups.setdefault(prints, []).append(number)
        pools[where].identical = [group for group in groups.values() if len(group) > 1]
    activated: Counter[str] = Counter()
    for parameter in parameters(source.config):
        activated[parameter.part] += parameter.activated
    return Inspection(
        source,
        written=_written(source),
        weight_bytes=sum(tensor.nbytes for tensor in source.tensors.values()),
        types=dict(Counter(type_name(tensor.dtype) for tensor in source.tensors.values())),
        parts=tuple(
            PartSummary(part, found.numel, activated[part], found.rms, found.largest)
            for part, found in sorted(parts.items(), key=lambda entry: part_order(entry[0]))
        ),
        optimizer=_optimizer(source, states),
        pools=tuple(pools[where] for where in sorted(pools)),
        problems=tuple(problems),
    )


def _not_finite(source: TensorSource, key: str, found: Measure) -> Iterator[Problem]:
    measures = {key: found}
    if stored := source.stored.get(key):
        # Named, counted and placed as the files have it.
        measures = {name: measure(tensor.read()) for name, tensor in stored.items()}
    for name, one in measures.items():
        counts = {"NaN": one.nans, "Inf": one.infinities}
        many = " and ".join(f"{count:,} {what}" for what, count in counts.items() if count)
        if one.first is not None:
            detail = f"{many} of {one.numel:,} values, first at {list(one.first)}"
            yield Problem("not finite", name, detail)


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
        has_sums=source.has_sums,
    )


def _optimizer(source: TensorSource, states: Mapping[str, Measure]) -> Optional[OptimizerSummary]:
    if not source.optimizer_tensors:
        return None
    assert source.reader is not None
    # Adam's own count, which lags behind the run's step where fp16 skipped updates.
    steps: list[int] = []
    stack: list[Any] = [source.reader.common.get("optimizer")]
    while stack:
        item = stack.pop()
        if isinstance(item, Mapping):
            if isinstance(item.get("step"), (int, float)):
                steps.append(int(item["step"]))
            stack.extend(item.values())
        elif isinstance(item, (list, tuple)):
            stack.extend(item)
    if source.reader.optimizer_format != FULLY_RESHARDABLE:
        # It lies in the files of the ranks. The schedule counts the same updates.
        steps = [int(source.reader.common["scheduler"]["num_steps"])]
    return OptimizerSummary(
        source.reader.optimizer_format,
        dict(Counter(optimizer_key(name)[0] for name in source.optimizer_tensors)),
        sum(tensor.nbytes for tensor in source.optimizer_tensors.values()),
        max(steps, default=None),
        {kind: (found.rms, found.largest) for kind, found in states.items()},
    )


SHOWN_PROBLEMS = 50


def inspection_lines(inspection: Inspection) -> list[str]:
    """The report as text."""
    path, config = inspection.source.path, inspection.source.config
    parts = [
        (p.part, f"{p.total:,}", f"{p.activated:,}", number(p.rms), number(p.largest))
        for p in inspection.parts
    ]
    parts.append(("total", f"{inspection.total:,}", f"{inspection.activated:,}", "", ""))
    problems = ["No problem: every tensor is there and finite."]
    if inspection.problems:
        shown = [f"  {p.kind}: {p.name}: {p.detail}" for p in inspection.problems[:SHOWN_PROBLEMS]]
        problems = [f"{len(inspection.problems)} problem(s)", *shown]
        if more := len(inspection.problems) - len(shown):
            problems.append(f"  and {more} more (--json lists all)")
    sections = (
        [str(path), *(f"  {line}" for line in _origin_lines(inspection))],
        ["Model", *(f"  {line}" for line in _architecture_lines(config))],
        ["Written", *(f"  {line}" for line in _written_lines(inspection))],
        ["Parameters", *table(("part", "number", "per token of a pair", "RMS", "largest"), parts)],
        _pool_lines(inspection.pools),
        problems,
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
    """Strict JSON: numbers that are not finite are null."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def size_text(nbytes: int) -> str:
    """A number of bytes for people."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.1f} {unit}"
    return f"{nbytes} bytes"


def number(value: float) -> str:
    """Four significant digits."""
    return "-" if math.isnan(value) else f"{value:.4g}"


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
        if optimizer.format != FULLY_RESHARDABLE:
            of = f"{counts[-1]} buckets ({optimizer.format})"
        steps = f", {optimizer.steps} updates" if optimizer.steps is not None else ""
        lines.append(f"optimizer state: {kinds} of {of}, {size_text(optimizer.nbytes)}{steps}")
    if not inspection.source.reader:
        return lines
    if not written.has_sums:
        lines.append(f"no {SUMS_FILE}: the files are not verified")
    # The layout that the pieces tell (tensor and expert parallel; a pipeline leaves no trace), and the noted one.
    tensor = int(written.parallel["tensor_model_parallel_size"])
    expert = int(written.parallel["expert_model_parallel_size"])
    noted = {
        "TP": tensor,
        "PP": written.parallel["pipeline_model_parallel_size"],
        "VPP": written.parallel["virtual_pipeline_model_parallel_size"],
        "EP": expert,
    }
    pools = f", experts in {written.expert_pieces} (EP)" if written.expert_pieces else ""
    lines += [
        f"pieces: attention in {written.attention_pieces} (TP){pools}",
        "layout of the run: " + " x ".join(f"{name} {size}" for name, size in noted.items()),
    ]
    if (written.attention_pieces, written.expert_pieces or expert) != (tensor, expert):
        lines.append("the pieces are not those of that layout: a converter wrote them")
    return lines


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
