"""What a training step really does, to compare with its plan: tensors at its peak, collectives and FLOPs."""

from __future__ import annotations

import gc
import time
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from helpers import Layout, layout
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_vlmoe.config.command_line import parse_run
from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.stream.sizes import num_micro_batches

LAYOUTS = {
    "1 process": layout(1),
    "DP 2": layout(2),
    "TP 2": layout(2, tp=2),
    "PP 2": layout(2, pp=2),
    "EP 2": layout(2, ep=2),
}

OPERATIONS = {
    "allreduce_": "all-reduce",
    "allreduce_coalesced_": "all-reduce",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "_allgather_base_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather",
    "alltoall_base_": "all-to-all",
    "send": "send",
    "recv_": "receive",
}
"""Operators of torch.distributed, and what they are called in a plan."""


class TensorBytes(TorchDispatchMode):
    """Adds up the storages that operators make, as long as they live; what a kernel needs inside itself is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                is_sparse = tensor.layout is torch.sparse_coo
                for dense in (tensor._indices(), tensor._values()) if is_sparse else (tensor,):
                    self.add(dense.untyped_storage())
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        """Counts a storage, if it is new."""
        key = storage._cdata
        if key not in self.alive:
            self.alive[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self.alive.pop(key)


class CollectiveBytes(TorchDispatchMode):
    """Calls and bytes of collectives in groups of several ranks, by operation and group.

    Args:
        names: names of groups of torch.distributed, and what they are called in a plan.
    """

    def __init__(self, names: dict[str, str]) -> None:
        super().__init__()
        self.names = names
        self.calls: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func.overloadpacket.__name__, tree_leaves(args))
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, arguments: list[Any]) -> None:
        group: Any = None
        for value in arguments:
            if isinstance(value, torch.ScriptObject) and group is None:
                group = torch.distributed.ProcessGroup.unbox(value)
        if group.size() == 1:
            return
        tensors = [value for value in arguments if isinstance(value, torch.Tensor)]
        # The larger side is the whole that is reduced or gathered; both sides of an all-to-all are as large.
        whole = max(tensor.nbytes for tensor in tensors)
        # Neighbours of a pipeline have groups of their own.
        neighbours = name in ("send", "recv_")
        key = (
            OPERATIONS[name],
            "pipeline" if neighbours else self.names.get(group.group_name, "world"),
        )
        self.calls[key] += 1
        self.bytes[key] += whole


@dataclass
class Measured:
    """What one rank did in a training step.

    Args:
        stage: its pipeline stage.
        idle: bytes of tensors between steps.
        peak: most bytes of tensors within a step.
        flops: of matrix multiplications, as torch's counter has them.
        calls: collectives by operation and group.
        bytes: their bytes.
    """

    stage: int
    idle: int
    peak: int
    flops: int
    calls: dict[tuple[str, str], int] = field(default_factory=dict)
    bytes: dict[tuple[str, str], int] = field(default_factory=dict)


SMALL = (
    *("--preset", "tiny-8e", "--model.num_layers", "4", "--model.num_vl_layers", "1"),
    *("--model.image_size", "64", "--model.patch_size", "8"),
    *("--model.vocab_size", "2000", "--model.visual_vocab_size", "500"),
    *("--objectives.num_masked_patches", "25", "--objectives.caption_mask_slots", "8"),
    *(word for kind in ("texts", "images", "pairs") for word in (f"--data.micro_{kind}", "8")),
    *(word for kind in ("texts", "images", "pairs") for word in (f"--data.global_{kind}", "16")),
)
"""Options of a run whose sizes do not depend on data; both vocabularies need padding."""


def planned_config(where: Layout, arguments: tuple[str, ...]) -> RunConfig:
    """The run of some options at a layout."""
    return parse_run("pretrain", [*arguments, *where.arguments]).config


@dataclass
class Built:
    """What takes steps: `step` takes one of random data."""

    config: RunConfig
    ranks: Any
    step: Callable[[], None]


def build(where: Layout, arguments: tuple[str, ...]) -> Built:
    """Process groups, model, optimizer and data of a run."""
    from megatron_vlmoe.data.collate import BatchShare
    from megatron_vlmoe.data.random_batches import RandomData
    from megatron_vlmoe.runtime.distributed import initialize, resolve_precision
    from megatron_vlmoe.train.pretrain import pretraining_objective
    from megatron_vlmoe.train.setup import build_training
    from megatron_vlmoe.train.step import StepRunner

    config = planned_config(where, arguments)
    ranks = initialize(config.parallel, config.train.seed)
    parts = build_training(config, resolve_precision(config.train))
    count = num_micro_batches(config, ranks.data_size)
    data = RandomData(config, BatchShare.of(ranks))
    batches = data.loader("train", 0, None)
    objective = pretraining_objective(config, ranks, data, count)
    runner = StepRunner(config, parts, ranks)

    def step() -> None:
        runner.start_step()
        runner.train(batches, count, objective)
        parts.optimizer.step()

    return Built(config, ranks, step)


def timed(where: Layout, arguments: tuple[str, ...], steps: int) -> list[float]:
    """Seconds of single steps of a rank, after one to warm up."""
    built = build(where, arguments)
    built.step()
    seconds = []
    for _ in range(steps):
        torch.distributed.barrier()
        start = time.perf_counter()
        built.step()
        seconds.append(time.perf_counter() - start)
    return seconds


def measure(where: Layout, arguments: tuple[str, ...]) -> Measured:
    """Takes a step to warm up, a step that is counted, and one for the FLOPs."""
    from megatron.core import parallel_state
    from torch.utils.flop_counter import FlopCounterMode

    memory = TensorBytes()
    with memory:
        built = build(where, arguments)
        built.step()
    gc.collect()
    idle = memory.peak = memory.now
    with memory:
        built.step()
    partial = {"partial_data_parallel": True, "with_context_parallel": True}
    groups = {
        "tensor": parallel_state.get_tensor_model_parallel_group(),
        "pipeline": parallel_state.get_pipeline_model_parallel_group(),
        "expert": parallel_state.get_expert_model_parallel_group(),
        "data": parallel_state.get_data_parallel_group(**partial),
        "expert data": parallel_state.get_expert_data_parallel_group(
            partial_expert_data_parallel=True
        ),
    }
    names = {group.group_name: name for name, group in groups.items()}
    # Groups of the same ranks that have another name.
    for name, group in (
        ("data", parallel_state.get_data_parallel_group()),
        ("expert", parallel_state.get_expert_tensor_and_model_parallel_group()),
        ("stage", parallel_state.get_tensor_and_data_parallel_group()),
    ):
        names.setdefault(group.group_name, name)
    collectives = CollectiveBytes(names)
    with FlopCounterMode(display=False) as counter, collectives:
        built.step()
    return Measured(
        built.ranks.pipeline,
        idle,
        memory.peak,
        counter.get_total_flops(),
        dict(collectives.calls),
        dict(collectives.bytes),
    )
