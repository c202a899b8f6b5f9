"""An inspection for people and for programs."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.convert.inspect import Inspection, PoolSummary, spread
from megatron_vlmoe.convert.parts import architecture_lines
from megatron_vlmoe.planning.dry_run import table

SHOWN_PROBLEMS = 50


def inspection_lines(inspection: Inspection) -> list[str]:
    """The report as text."""
    sections = (
        [str(inspection.source.path), *_indented(_origin_lines(inspection))],
        ["Model", *_indented(architecture_lines(inspection.source.config))],
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
    names = ("fc1", "fc2", "router row")
    header = ["block", "pool", "E"]
    for name in names:
        header += [f"{name} min", "mean", "max"]
    rows = []
    for pool in pools:
        values = (pool.fc1_norms, pool.fc2_norms, pool.router_norms)
        cells = [number(value) for entry in values for value in spread(entry)]
        cosine = "-" if pool.fc1_cosine is None else f"{pool.fc1_cosine:.3f}"
        twins = sum(len(group) for group in pool.identical)
        count = max(len(entry) for entry in values)
        rows.append((str(pool.block), pool.pool, str(count), *cells, cosine, str(twins)))
    lines = ["Experts (norms over experts; cosine between the fc1 of two experts)"]
    lines += table([*header, "cosine", "identical"], rows)
    lines += [f"  {note}" for pool in pools for note in _pool_notes(pool)]
    return lines


def _pool_notes(pool: PoolSummary) -> list[str]:
    notes = []
    where = f"block {pool.block}, {pool.pool}"
    if pool.identical:
        groups = "; ".join(", ".join(str(number) for number in group) for group in pool.identical)
        notes.append(
            f"{where}: experts {groups} are identical: copies (upcycling) that were not trained yet"
        )
    if pool.router_norms and not any(pool.router_norms):
        notes.append(f"{where}: the router is zero, every gate is 1/E")
    return notes


def _problem_lines(inspection: Inspection) -> list[str]:
    problems = inspection.problems
    if not problems:
        return ["No problem: every tensor is there and finite."]
    lines = [f"{len(problems)} problem(s)"]
    lines += [f"  {p.kind}: {p.name}: {p.detail}" for p in problems[:SHOWN_PROBLEMS]]
    if len(problems) > SHOWN_PROBLEMS:
        lines.append(f"  and {len(problems) - SHOWN_PROBLEMS} more (--json lists all)")
    return lines
