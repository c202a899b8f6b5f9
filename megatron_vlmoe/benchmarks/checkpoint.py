"""How long a checkpoint holds up training, and how long it takes to load, beside torch.save and torch.load of the same
tensors.

One process. A training run waits for as long as `CheckpointWriter.save` takes; of a background save the rest goes on
beside the next steps. There the next update of the optimizer pays for the save once more: on a CPU, what it writes to
while the writing process still has the page is copied first.
"""

from __future__ import annotations

import logging
import os
import statistics
import tempfile
import warnings
from pathlib import Path
from typing import Callable, Iterator, Mapping

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from megatron_vlmoe.benchmarks.compare import Build, Contender, Row, compare, now, ready, say
from megatron_vlmoe.benchmarks.options import CheckpointOptions
from megatron_vlmoe.config.command_line import parse_run
from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.runtime.distributed import destroy, initialize, resolve_precision
from megatron_vlmoe.runtime.memory import settled_objects
from megatron_vlmoe.train.checkpoint import CheckpointWriter, load_checkpoint, sharded_content
from megatron_vlmoe.train.checkpoint_files import TrainState, iteration_name
from megatron_vlmoe.train.checkpoint_writing import with_own_storage
from megatron_vlmoe.train.setup import TrainingParts, build_training


def run(options: CheckpointOptions) -> Iterator[list[Row]]:
    """Measures saving, then loading, preset by preset.

    Raises:
        RuntimeError: a loaded tensor is not what was saved.
    """
    warnings.filterwarnings("ignore")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    words = ["--model.vocab_size", str(options.vocab_size)]
    words += ["--model.visual_vocab_size", str(options.visual_vocab_size), *options.words]
    runs = {
        name: parse_run("pretrain", ["--preset", name, *words]).config for name in options.preset
    }
    for name, config in runs.items():
        already = dist.is_initialized()
        initialize(config.parallel, config.train.seed)
        try:
            parts = trained_parts(config)
            folders = tempfile.TemporaryDirectory(dir=options.folder or None)
            with settled_objects(), folders as folder:
                yield from saving_and_loading(name, config, parts, Path(folder), options)
        finally:
            if not already:
                destroy()


def trained_parts(config: RunConfig) -> TrainingParts:
    """A model whose optimizer has state: after one step with random gradients."""
    parts = build_training(config, resolve_precision(config.train))
    for chunk in parts.chunks:
        for parameter in chunk.parameters():
            if parameter.requires_grad:
                parameter.main_grad.normal_(std=1e-3)
    parts.optimizer.step()
    return parts


def state_tensors(parts: TrainingParts) -> dict[str, Tensor]:
    """All tensors of a checkpoint by key: weights and the optimizer's state."""
    content = sharded_content(parts, is_loading=False, with_optimizer=True)
    found = {}
    for value in nested_values(content):
        if isinstance(value, ShardedTensor) and value.data is not None:
            found[f"{value.key}@{value.global_offset}"] = with_own_storage(value.data)
    return found


def saving_and_loading(
    name: str, config: RunConfig, parts: TrainingParts, folder: Path, options: CheckpointOptions
) -> Iterator[list[Row]]:
    """The rows of saving a model, then those of loading it."""
    tensors = state_tensors(parts)
    megabytes = round(sum(t.numel() * t.element_size() for t in tensors.values()) / 1e6)
    case = {"preset": name, "megabytes": megabytes}
    say(f"{case}")
    background: list[float] = []
    in_turn = CheckpointWriter(folder / "sync", 1, async_save=False)
    beside = CheckpointWriter(folder / "async", 1, async_save=True)
    state = TrainState(step=1)

    def torch_save(sync: bool) -> None:
        with open(folder / "state.pt", "wb") as file:
            torch.save(state_tensors(parts), file)
            if sync:
                file.flush()
                os.fsync(file.fileno())

    def save_beside(seconds: float) -> dict[str, float]:
        """Training waits for the save, goes on for a while, and then writes to all of its state."""
        start = now()
        beside.save(state, config, parts)
        stall = now() - start
        compute(start + stall + seconds)
        while_written = seconds_to_update(parts)
        beside.finish()
        if not seconds:
            background.append(now() - start)
        return {"stall": stall, "page_copies": max(while_written - seconds_to_update(parts), 0.0)}

    try:
        torch_save(sync=False)
        for writer in (in_turn, beside):
            writer.save(state, config, parts)
            writer.finish()
            check_loaded(writer.root / iteration_name(1), config, parts)
        rows = compare(
            {"what": "save", **case},
            [
                Contender("torch_save", timed("stall", lambda: torch_save(sync=False))),
                Contender("torch_save_synced", timed("stall", lambda: torch_save(sync=True))),
                Contender("ours", timed("stall", lambda: in_turn.save(state, config, parts))),
                Contender("ours_async", ready(lambda: save_beside(options.step_seconds))),
                Contender("ours_async_updated_at_once", ready(lambda: save_beside(0.0))),
            ],
            reference="torch_save_synced",
            rounds=options.rounds,
            turn_seconds=options.turn_seconds,
            items=megabytes,
        )
        in_turn_row, *background_rows = rows[2:]
        for row in background_rows:
            pairs = zip(row.rounds_ms, in_turn_row.rounds_ms, strict=True)
            row.note = f"{statistics.median(own / whole for own, whole in pairs):.3f} of ours"
        rows[-1].note += f", complete after {1e3 * statistics.median(background):.4g} ms"
        yield rows
        path = in_turn.root / iteration_name(1)
        yield compare(
            {"what": "load", **case},
            [
                Contender("torch_load", timed("load", lambda: torch_load(folder, parts))),
                Contender("ours", timed("load", lambda: load_checkpoint(path, config, parts))),
            ],
            reference="torch_load",
            rounds=options.rounds,
            turn_seconds=options.turn_seconds,
            items=megabytes,
        )
    finally:
        beside.close()


def compute(until: float) -> None:
    """Arithmetic on all threads up to a moment of `now`."""
    factor = torch.ones(512, 512)
    while now() < until:
        factor @ factor


def seconds_to_update(parts: TrainingParts) -> float:
    """How long it takes to write every tensor of a checkpoint anew in place, as an optimizer does."""
    tensors = list(state_tensors(parts).values())
    start = now()
    with torch.no_grad():
        torch._foreach_mul_(tensors, 1.0)
    return now() - start


def timed(phase: str, work: Callable[[], object]) -> Build:
    """A contender's `build`, of work that is ready."""

    def repetition() -> Mapping[str, float]:
        start = now()
        work()
        return {phase: now() - start}

    return ready(repetition)


def torch_load(folder: Path, parts: TrainingParts) -> None:
    """Reads the file of torch.save into the run's own tensors."""
    loaded = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    with torch.no_grad():
        for key, tensor in state_tensors(parts).items():
            tensor.copy_(loaded[key])


def check_loaded(path: Path, config: RunConfig, parts: TrainingParts) -> None:
    """Loads a checkpoint over other values.

    Raises:
        RuntimeError: a tensor is not what it was.
    """
    before = {key: tensor.clone() for key, tensor in state_tensors(parts).items()}
    with torch.no_grad():
        for tensor in state_tensors(parts).values():
            tensor.zero_()
    load_checkpoint(path, config, parts)
    after = state_tensors(parts)
    wrong = [key for key, tensor in before.items() if not torch.equal(tensor, after[key])]
    if wrong or before.keys() != after.keys():
        raise RuntimeError(f"{path}: {len(wrong)} tensors of {len(before)} are not what was saved")
