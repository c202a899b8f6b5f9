"""The device of this machine, for plans: a GPU by its name, a CPU by what it reaches in half a minute.

On a CPU as many processes work at once as a node of the plan has, as its ranks would, and share cores, memory bandwidth
and the loopback interface that gloo takes.
"""

from __future__ import annotations

import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.planning.devices import DEVICES, Device, named_device

SECONDS = 1.5
"""For each rate."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def this_device(config: RunConfig, per_node: int) -> Device:
    """The device of this machine; prints what was measured.

    Args:
        config: the run whose widths are measured, in its precision (`auto` is fp32 on a CPU).
        per_node: processes that share this machine.

    Raises:
        ConfigError: for a GPU that is not in the table, and for more processes than cores.
    """
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        known = named_device(name)
        if known is None:
            raise ConfigError(
                f"--gpu this: {name} is not in the table ({', '.join(DEVICES)}); describe it by --gpu custom"
            )
        total = torch.cuda.get_device_properties(0).total_memory
        return replace(known, memory=float(total))
    cores = len(os.sched_getaffinity(0))
    if per_node > cores:
        raise ConfigError(
            f"--gpu this: {per_node} processes per node, but this machine has {cores} cores: --gpus-per-node {cores}"
        )
    precision = "fp32" if config.train.precision == "auto" else config.train.precision
    if precision not in DTYPES:
        raise ConfigError(f"train.precision={precision} needs a GPU; use fp32 or bf16 on CPU")
    # torchrun gives every one of several processes one thread, if nothing else is said.
    threads = 1 if per_node > 1 else cores
    if os.environ.get("OMP_NUM_THREADS"):
        threads = torch.get_num_threads()
    sizes = (config.model.hidden_size, config.model.ffn_hidden_size)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (per_node, threads, precision, sizes, folder)
        mp.start_processes(_measure, arguments, nprocs=per_node, start_method="spawn")
        found = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(per_node)]
    # The slowest process makes the others wait.
    rates: Mapping[str, float] = {
        name: min(own[name] for own in found) for name in ("compute", "memory", "link")
    }
    slow = {name: max(own[name] for own in found) for name in ("operator", "latency")}
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    device = Device(
        peaks={precision: rates["compute"]},
        memory=pages / per_node,
        memory_bandwidth=rates["memory"],
        link=rates["link"],
        watts=0.0,
        operator_seconds=slow["operator"],
        latency=slow["latency"],
        measured=True,
        is_gpu=False,
    )
    print(
        f"this machine, {per_node} process(es) at once of {threads} thread(s): {rates['compute'] / 1e9:.4g} GFLOP/s, "
        f"{rates['memory'] / 1e9:.4g} GB/s of memory, {slow['operator'] * 1e6:.3g} us per operator"
        + (
            f", gloo {rates['link'] / 1e9:.3g} GB/s and {slow['latency'] * 1e6:.3g} us"
            if per_node > 1
            else ""
        )
    )
    return device


def _measure(
    rank: int, size: int, threads: int, precision: str, sizes: tuple[int, int], folder: str
) -> None:
    """Measures in one of several processes that work side by side; writes the rates to a file."""
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    (width, inner), dtype = sizes, DTYPES[precision]
    rows = torch.randn(1024, width, dtype=dtype)
    first, second = torch.randn(inner, width, dtype=dtype), torch.randn(width, inner, dtype=dtype)

    def feed_forward() -> None:
        (rows @ first.T) @ second.T

    # As large as the activations of a block: more than the caches hold.
    left, right, target = (torch.randn(4_000_000) for _ in range(3))
    small = torch.ones(16, requires_grad=True)

    def operators() -> None:
        value = small
        for _ in range(50):
            value = value + 1.0
        value.sum().backward()

    large, little = torch.zeros(2_000_000), torch.zeros(1)
    share = 2.0 * (size - 1) / size
    found: dict[str, Any] = {
        "compute": 4.0 * 1024 * width * inner / _seconds(feed_forward),
        "memory": 3.0 * left.nbytes / _seconds(lambda: torch.add(left, right, out=target)),
        # Forward and backward.
        "operator": _seconds(operators) / 100,
        "latency": _seconds(lambda: dist.all_reduce(little)) / max(1.0, math.log2(size)),
        "link": 1.0,
    }
    if size > 1:
        found["link"] = share * large.nbytes / _seconds(lambda: dist.all_reduce(large))
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _seconds(work: Callable[[], Any]) -> float:
    """Median time of a call, all processes starting together; rank 0 says how many calls there are."""
    work()
    start = time.perf_counter()
    work()
    calls = torch.tensor([max(3, min(5000, int(SECONDS / (time.perf_counter() - start))))])
    dist.broadcast(calls, 0)
    times = []
    for _ in range(int(calls)):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
