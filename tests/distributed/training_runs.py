"""What the processes of a layout do: train a few steps on random batches and report everything."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Iterator, Mapping
from unittest import mock

import torch
from helpers import Layout, Shard, small_config


def start(where: Layout, *arguments: str) -> tuple[Any, Any, Any, Any]:
    """Process groups, model and data of a run: configuration, ranks, training parts, random data."""
    from megatron_vlmoe.data.collate import BatchShare
    from megatron_vlmoe.data.random_batches import RandomData
    from megatron_vlmoe.runtime.distributed import initialize, resolve_precision

    config = small_config(*arguments, where=where)
    ranks = initialize(config.parallel, config.train.seed)
    from megatron_vlmoe.train.setup import build_training

    parts = build_training(config, resolve_precision(config.train))
    share = BatchShare(
        ranks.data,
        ranks.data_size,
        ranks.tensor,
        ranks.tensor_size,
        ranks.is_first_stage,
        ranks.is_last_stage,
    )
    return config, ranks, parts, RandomData(config, share)


def shards(parts: Any, gradients: bool = False) -> dict[str, list[Shard]]:
    """Weights of this rank and what else its model saves, or the reduced gradients, by checkpoint key."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from megatron_vlmoe.train.setup import checkpoint_metadata

    found: dict[str, list[Shard]] = {}
    for chunk in parts.chunks:
        by_pointer = {p.data_ptr(): p for p in chunk.parameters()}
        by_pointer |= {b.data_ptr(): b for n, b in chunk.named_buffers() if "balance_bias" in n}
        state = chunk.sharded_state_dict(metadata=checkpoint_metadata())
        entries = [entry for entry in state.values() if isinstance(entry, ShardedTensor)]
        assert len(entries) == len(by_pointer), "tensors and checkpoint entries differ"
        for entry in entries:
            value = entry.data
            if gradients:
                parameter = by_pointer[entry.data.data_ptr()]
                if not parameter.requires_grad:
                    continue
                value = parameter.main_grad
            skip = entry.prepend_axis_num
            shape = tuple(int(n) for n in entry.global_shape[skip:])
            offset = tuple(int(n) for n in entry.global_offset[skip:])
            copy = value.detach().float().reshape(entry.local_shape).numpy().copy()
            found.setdefault(entry.key, []).append((shape, offset, copy))
    return found


def optimizer_shards(parts: Any) -> dict[str, Any]:
    """Optimizer state of this rank by name, as arrays."""
    found: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                walk(f"{prefix}/{key}", item)
        elif isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                walk(f"{prefix}/{index}", item)
        elif torch.is_tensor(value):
            found[prefix] = value.detach().float().numpy().copy()
        elif isinstance(value, (int, float)):
            found[prefix] = value

    optimizers = getattr(parts.optimizer, "chained_optimizers", [parts.optimizer])
    for index, optimizer in enumerate(optimizers):
        inner = optimizer.optimizer
        walk(f"{index}", inner.state_dict())
        for number, group in enumerate(inner.param_groups):
            walk(f"{index}/master/{number}", [p.data for p in group["params"]])
    return found


def groups(parts: Any) -> list[dict[str, Any]]:
    """Options of every parameter group that has parameters here, with the group's factor as `lr_mult`."""
    return [
        {key: value for key, value in group.items() if key != "params"}
        for group in parts.optimizer.param_groups
        if group["params"]
    ]


class Recorder:
    """Takes steps and keeps what happened.

    Args:
        run: what `start` returned.
    """

    def __init__(self, run: tuple[Any, Any, Any, Any]) -> None:
        from megatron_vlmoe.stream.sizes import num_micro_batches
        from megatron_vlmoe.train.pretrain import pretraining_objective
        from megatron_vlmoe.train.step import StepRunner

        self.config, self.ranks, self.parts, self.data = run
        self.count = num_micro_batches(self.config, self.ranks.data_size)
        self.objective = pretraining_objective(self.config, self.ranks, self.data, self.count)
        self.runner = StepRunner(self.config, self.parts, self.ranks)
        self.numbers: list[int] = []
        self.batches = self._numbered(self.data.loader("train", 0, None))

    def skip(self, steps: int) -> None:
        """Starts the data after some steps."""
        self.batches = self._numbered(self.data.loader("train", steps * self.count, None))

    def _numbered(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            self.numbers.append(int(batch["micro_batch"]))
            yield batch

    def step(self, gradients: bool = False) -> dict[str, Any]:
        """One step: losses by (micro-batch, name), gradient norm, MoE counters, and gradients on request."""
        from megatron_vlmoe.train.metrics import collect

        self.numbers.clear()
        self.runner.start_step()
        results = self.runner.train(self.batches, self.count, self.objective)
        report: dict[str, Any] = {
            "losses": {
                f"{number}/{name}": float(value)
                for number, result in zip(self.numbers, results)
                for name, value in result.items()
            }
        }
        if gradients:
            report["gradients"] = shards(self.parts, gradients=True)
        updated, norm, _ = self.parts.optimizer.step()
        assert updated
        self.parts.scheduler.step(increment=1)
        report["grad_norm"] = float(norm)
        report["counters"] = {
            f"{number}/{pool}": vector.numpy()
            for (number, pool), vector in collect(self.parts.chunks, self.config).items()
        }
        return report

    def evaluate(self) -> dict[str, float]:
        """Evaluation metrics."""
        return self.objective.evaluate(self.runner)


def train(
    where: Layout, arguments: tuple[str, ...], steps: int = 3, gradients: bool = True
) -> dict[str, Any]:
    """Trains and reports every step, the first step's gradients, the final weights and an evaluation."""
    recorder = Recorder(start(where, *arguments))
    reports = [recorder.step(gradients and step == 0) for step in range(steps)]
    return {
        "steps": reports,
        "evaluation": recorder.evaluate(),
        "weights": shards(recorder.parts),
        "frozen": recorder.parts.frozen,
    }


def train_uncompiled(where: Layout, arguments: tuple[str, ...], steps: int) -> dict[str, Any]:
    """The same with `train.compile`, whose functions are called as they are: compiling them takes minutes."""
    from unittest import mock

    with mock.patch.object(torch, "compile", lambda function, **options: function):
        return train(where, (*arguments, "--train.compile", "true"), steps)


def merge(results: list[dict[str, Any]]) -> dict[str, Any]:
    """One report of all ranks: losses of all micro-batches, whole gradients and weights.

    Raises:
        AssertionError: if ranks disagree on a loss, a norm, a counter, an evaluation or a replica.
    """
    from helpers import assemble

    steps = []
    for index in range(len(results[0]["steps"])):
        parts = [result["steps"][index] for result in results]
        losses: dict[str, float] = {}
        for part in parts:
            for key, value in part["losses"].items():
                assert losses.setdefault(key, value) == value, f"ranks disagree on loss {key}"
        assert len({part["grad_norm"] for part in parts}) == 1, "ranks disagree on the norm"
        steps.append({**parts[0], "losses": losses})
        if "gradients" in parts[0]:
            steps[-1]["gradients"] = assemble([part["gradients"] for part in parts])
    for result in results:
        assert result["evaluation"] == results[0]["evaluation"], "ranks disagree on the evaluation"
    merged = {"steps": steps, "evaluation": results[0]["evaluation"]}
    for name in ("start", "weights"):
        if name in results[0]:
            merged[name] = assemble([result[name] for result in results])
    return merged


def run(
    workers: Any,
    where: Layout,
    *arguments: str,
    steps: int = 3,
    gradients: bool = True,
) -> dict[str, Any]:
    """Trains on a layout and merges the reports of its ranks."""
    return merge(workers.run(where, train, where, arguments, steps, gradients))


class Killed(BaseException):
    """Stands for a kill: nothing in the code under test catches it."""


def _no_disk(path: Any) -> Any:
    from collections import namedtuple

    return namedtuple("usage", "total used free")(10**9, 10**9 - 10, 10)


def _killed_rename(replace: Any) -> Any:
    def replace_or_die(source: Any, target: Any) -> None:
        if Path(target).name.startswith("iter_"):
            raise Killed(f"{source} -> {target}")
        replace(source, target)

    return replace_or_die


def _lost_tracker(replace: Any) -> Any:
    def replace_and_lose(source: Any, target: Any) -> None:
        replace(source, target)
        if Path(target).name == "latest_checkpointed_iteration.txt":
            Path(target).unlink()

    return replace_and_lose


def check_data_of_ranks(where: Layout) -> str:
    """What a run is refused with whose second rank has counted other samples, and finds its files elsewhere."""
    from megatron_vlmoe.config.errors import ConfigError
    from megatron_vlmoe.runtime.distributed import initialize
    from megatron_vlmoe.train.startup import check_same_on_all_ranks

    config = small_config(where=where)
    ranks = initialize(config.parallel, config.train.seed)
    config = replace(
        config, data=replace(config.data, text_tokenizer=f"/node{ranks.rank}/text.model")
    )
    check_same_on_all_ranks(config)
    try:
        check_same_on_all_ranks(replace(config, train=replace(config.train, steps=3 + ranks.rank)))
    except ConfigError as error:
        return str(error)
    return ""


def _stale_client() -> contextlib.ExitStack:
    """On rank 1, a file system that has not yet seen the checkpoints of the run."""
    from megatron_vlmoe.train import resume, trainer

    stack = contextlib.ExitStack()
    if os.environ.get("RANK") == "1":
        for module, name, value in (
            (trainer, "is_tracked", False),
            (trainer, "is_complete", False),
            (resume, "find_checkpoint", None),
            (resume, "is_tracked", False),
            (resume, "later_checkpoints", []),
        ):
            stack.enter_context(mock.patch.object(module, name, return_value=value))
    return stack


def _killed_writer(schedule: Any, is_manager: bool) -> Any:
    def schedule_and_kill(queue: Any, request: Any) -> Any:
        result = schedule(queue, request)
        process = queue.async_calls[-1].async_caller.process
        if process is not None:  # a rank may have nothing to write
            for child in multiprocessing.active_children() if is_manager else [process]:
                child.kill()
        return result

    return schedule_and_kill


def _multiplied(loss: Any, factors: Mapping[int, float]) -> Any:
    def multiplied(batch: Any, outputs: Any) -> Any:
        total, single = loss(batch, outputs)
        factor = factors.get(int(batch["micro_batch"]), 1.0)
        return total * factor, {name: value * factor for name, value in single.items()}

    return multiplied


def trainer_run(
    where: Layout,
    arguments: tuple[str, ...],
    folder: str,
    fault: str = "",
    factors: Mapping[int, float] = MappingProxyType({}),
) -> dict[str, Any]:
    """A whole run through the Trainer, saved in a folder; failures of the checkpoint come back as text.

    Args:
        where: layout.
        arguments: options.
        folder: `--save`.
        fault: `disk` fills the disk, `kill` kills between writing and renaming, `tracker` deletes every tracker once
            it is there, `writer` kills the background process that writes a checkpoint, `manager` also the one that
            keeps what it reports, `stale` shows rank 1 none.
        factors: what the losses of micro-batches with these numbers are multiplied by.
    """
    import logging
    import shutil

    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

    from megatron_vlmoe.config.errors import CheckpointError, ConfigError, TrainingError
    from megatron_vlmoe.stream.sizes import num_micro_batches
    from megatron_vlmoe.train.pretrain import pretraining_objective
    from megatron_vlmoe.train.trainer import Trainer

    Path(folder).mkdir(parents=True, exist_ok=True)
    try:
        config, ranks, parts, data = start(where, *arguments, "--save", folder)
    except ConfigError as error:
        return {"error": "ConfigError", "message": str(error)}
    precision = "bf16" if parts.transformer_config.bf16 else "fp32"
    count = num_micro_batches(config, ranks.data_size)
    objective = pretraining_objective(config, ranks, data, count)
    objective.loss = _multiplied(objective.loss, factors)  # type: ignore[method-assign]
    trainer = Trainer(config, parts, ranks, data, count, precision, objective)
    patches = {
        "disk": mock.patch.object(shutil, "disk_usage", _no_disk),
        "kill": mock.patch.object(os, "replace", _killed_rename(os.replace)),
        "tracker": mock.patch.object(os, "replace", _lost_tracker(os.replace)),
        **{
            name: mock.patch.object(
                AsyncCallsQueue,
                "schedule_async_request",
                _killed_writer(AsyncCallsQueue.schedule_async_request, name == "manager"),
            )
            for name in ("writer", "manager")
        },
        "": contextlib.nullcontext(),
    }
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("megatron_vlmoe")
    logger.addHandler(handler)
    try:
        with _stale_client() if fault == "stale" else patches[fault]:
            state = trainer.run()
    except (CheckpointError, ConfigError, TrainingError, Killed) as error:
        return {"error": type(error).__name__, "message": str(error)}
    finally:
        logger.removeHandler(handler)
    return {
        "step": state.step,
        "warnings": warnings,
        "weights": shards(parts),
        "optimizer": optimizer_shards(parts),
        "groups": groups(parts),
        "dtypes": sorted({str(p.dtype) for chunk in parts.chunks for p in chunk.parameters()}),
    }


def _report_from(recorder: Recorder, steps: int) -> dict[str, Any]:
    start_weights = shards(recorder.parts)
    evaluation = recorder.evaluate()
    return {
        "start": start_weights,
        "evaluation": evaluation,
        "steps": [recorder.step() for _ in range(steps)],
        "weights": shards(recorder.parts),
    }


def save_and_go_on(where: Layout, arguments: tuple[str, ...], folder: str) -> dict[str, Any]:
    """Two steps, a checkpoint, then an evaluation and two more steps."""

    from megatron_vlmoe.train.checkpoint import CheckpointWriter
    from megatron_vlmoe.train.checkpoint_files import TrainState

    recorder = Recorder(start(where, *arguments))
    for _ in range(2):
        recorder.step()
    writer = CheckpointWriter(Path(folder) / "checkpoints", 0, False)
    writer.save(TrainState(step=2), recorder.config, recorder.parts)
    return _report_from(recorder, 2)


def load_and_go_on(where: Layout, arguments: tuple[str, ...], folder: str) -> dict[str, Any]:
    """Loads that checkpoint, then an evaluation and two more steps."""
    from megatron_vlmoe.train.checkpoint import load_checkpoint
    from megatron_vlmoe.train.checkpoint_files import find_checkpoint

    recorder = Recorder(start(where, *arguments))
    path = find_checkpoint(folder)
    assert path is not None
    state = load_checkpoint(path, recorder.config, recorder.parts)
    assert state.step == 2
    recorder.skip(state.step)
    return _report_from(recorder, 2)


def save_in_both_formats(
    where: Layout, arguments: tuple[str, ...], folder: str
) -> tuple[dict[str, list[Shard]], int]:
    """Two steps, then the same state in FOLDER/fully_reshardable and FOLDER/dp_reshardable.

    Returns:
        The weights, and how many bytes of optimizer state the rank has gathered for the former.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from megatron_vlmoe.train.checkpoint import CheckpointWriter, sharded_content
    from megatron_vlmoe.train.checkpoint_files import TrainState

    recorder = Recorder(start(where, *arguments))
    for _ in range(2):
        recorder.step()
    for form in FORMATS:
        config = recorder.config
        config = replace(config, checkpoint=replace(config.checkpoint, optimizer_format=form))
        writer = CheckpointWriter(Path(folder) / form, 0, False)
        writer.save(TrainState(step=2), config, recorder.parts)
    content = sharded_content(recorder.parts, is_loading=False, with_optimizer=True)
    state = nested_values(content["optimizer"])
    gathered = sum(value.data.nbytes for value in state if isinstance(value, ShardedTensor))
    return shards(recorder.parts), gathered


FORMATS = ("fully_reshardable", "dp_reshardable")


def load_every_way(where: Layout, arguments: tuple[str, ...], folder: str) -> dict[Any, Any]:
    """Loads those by (format, in parallel), each over the state of a further step.

    Returns:
        For each way the weights, the optimizer's state and the bytes that this rank has read of tensors; or the line
        with which it is refused, and then the weights that are loaded alone.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    from megatron_vlmoe.config.errors import CheckpointError
    from megatron_vlmoe.train.checkpoint import load_checkpoint

    recorder = Recorder(start(where, *arguments))
    found = {}
    piece = FileSystemReader._slice_file
    read: list[int] = []

    def counted(reader: Any, file: Any, place: Any) -> Any:
        read.append(place.length)
        return piece(reader, file, place)

    for form in FORMATS:
        path = Path(folder) / form / "iter_0000002"
        for in_parallel in (False, True):
            recorder.step()
            # A schedule goes on from where it is by as many steps as it loads.
            recorder.parts.scheduler.num_steps = 0
            read.clear()
            config = recorder.config
            checkpoint = replace(config.checkpoint, parallel_load=in_parallel)
            config = replace(config, checkpoint=checkpoint)
            refused = ""
            with mock.patch.object(FileSystemReader, "_slice_file", counted):
                try:
                    load_checkpoint(path, config, recorder.parts)
                except CheckpointError as error:
                    refused = str(error)
                    load_checkpoint(path, config, recorder.parts, with_optimizer=False)
            found[form, in_parallel] = {
                "weights": shards(recorder.parts),
                "optimizer": optimizer_shards(recorder.parts),
                "read": sum(read),
                "refused": refused,
            }
    return found


def overwrite_behind_saves(
    where: Layout, arguments: tuple[str, ...], folder: str
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Saves in the background, in one format after the other, and overwrites all that was saved as soon as it may.

    torch works on two threads, as it has done before the processes that write are forked.

    Returns:
        Of every save weights and optimizer state by name, as they were then and as they were loaded.
    """
    from megatron_vlmoe.train.checkpoint import CheckpointWriter, load_checkpoint
    from megatron_vlmoe.train.checkpoint_files import TrainState

    recorder = Recorder(start(where, *arguments))
    parts = recorder.parts
    torch.set_num_threads(2)
    torch.ones(1 << 20).mul_(2.0)
    recorder.step()
    writer = CheckpointWriter(Path(folder), 0, async_save=True)

    def state() -> dict[str, Any]:
        arrays = {k: v for k, v in optimizer_shards(parts).items() if "param_groups" not in k}
        for key, pieces in shards(parts).items():
            arrays |= {f"{key} {offset}": piece for _, offset, piece in pieces}
        return arrays

    found = []
    for step, form in enumerate((*FORMATS, *FORMATS, FORMATS[0]), start=1):
        config = recorder.config
        config = replace(config, checkpoint=replace(config.checkpoint, optimizer_format=form))
        number = float(step)
        recorder.step()
        saved = state()
        writer.save(TrainState(step=step), config, parts)
        _overwrite(parts, number)
        writer.finish()
        assert load_checkpoint(writer.root / f"iter_{step:07d}", config, parts).step == step
        found.append((saved, state()))
    writer.close()
    return found


def _overwrite(parts: Any, number: float) -> None:
    """Puts a number everywhere: weights, gradients, state of the optimizer."""
    tensors = [value for chunk in parts.chunks for value in chunk.parameters()]
    tensors += [p.main_grad for chunk in parts.chunks for p in chunk.parameters()]
    for optimizer in getattr(parts.optimizer, "chained_optimizers", [parts.optimizer]):
        for group in optimizer.optimizer.param_groups:
            tensors += group["params"]
        for state in optimizer.optimizer.state.values():
            tensors += [value for value in state.values() if torch.is_tensor(value)]
    with torch.no_grad():
        for tensor in tensors:
            tensor.fill_(number)


def state_both_ways(
    where: Layout, arguments: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, Any], int]:
    """What a checkpoint has of the optimizer, as megatron-core gathers it and without that.

    Returns:
        By key and offset all that a shard says of itself, and its bytes; of each way. Last, how many tensors are views
        of the optimizer's own memory.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from megatron_vlmoe.runtime.optimizer_state import install_state_views
    from megatron_vlmoe.train.checkpoint import sharded_content

    recorder = Recorder(start(where, *arguments))
    for _ in range(2):
        recorder.step()
    install_state_views()
    views = DistributedOptimizer.get_parameter_state_dp_zero
    gathered = views.__wrapped__
    own = {
        value.untyped_storage().data_ptr()
        for optimizer in recorder.parts.optimizer.chained_optimizers
        for state in optimizer.optimizer.state.values()
        for value in state.values()
    }
    found: list[dict[str, Any]] = []
    number = 0
    for way in (gathered, views):
        with mock.patch.object(DistributedOptimizer, "get_parameter_state_dp_zero", way):
            content = sharded_content(recorder.parts, is_loading=False, with_optimizer=True)
        found.append({})
        for value in nested_values(content["optimizer"]):
            if isinstance(value, ShardedTensor):
                about = {name: item for name, item in vars(value).items() if name != "data"}
                key = f"{value.key} {value.global_offset}"
                found[-1][key] = (str(about), value.data.detach().numpy().tobytes())
                number += value.data.untyped_storage().data_ptr() in own
    return found[0], found[1], number
