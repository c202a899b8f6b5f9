"""Process groups, device, number format and ranks of this process."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, Callable, Optional, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_vlmoe.config.errors import ConfigError, StartupError
from megatron_vlmoe.config.schema import ParallelConfig, Precision, TrainConfig
from megatron_vlmoe.runtime.cpu import install_cpu_runtime
from megatron_vlmoe.runtime.optimizer import install_fallbacks
from megatron_vlmoe.runtime.ranks import (
    MASTER_PORT,
    Ranks,
    environment_rank,
    environment_world_size,
    gpu_of_process,
)
from megatron_vlmoe.runtime.watchdog import unwatch
from megatron_vlmoe.stream.sizes import data_parallel_size

T = TypeVar("T")


def device() -> torch.device:
    """The device that this process computes on.

    Raises:
        ConfigError: if the node has fewer GPUs than processes.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", gpu_of_process(torch.cuda.device_count()))
    return torch.device("cpu")


def resolve_precision(train: TrainConfig) -> Precision:
    """The precision of this machine.

    Raises:
        ConfigError: if the device cannot compute in the requested format.
    """
    if not torch.cuda.is_available():
        if train.precision == "fp16":
            raise ConfigError("train.precision=fp16 needs a GPU; use fp32 or bf16 on CPU")
        return "fp32" if train.precision == "auto" else train.precision
    bf16 = torch.cuda.get_device_capability()[0] >= 8
    if train.precision == "bf16" and not bf16:
        raise ConfigError(
            "train.precision=bf16 needs a GPU of compute capability 8.0; use fp16 here"
        )
    if train.precision == "auto":
        return "bf16" if bf16 else "fp16"
    return train.precision


def initialize(
    parallel: ParallelConfig,
    seed: int,
    deterministic: bool = False,
) -> Ranks:
    """Starts torch.distributed and megatron-core's process groups.

    Works alone (a single process without a launcher) and under torchrun or what `adopt_launcher` knows.

    Raises:
        ConfigError: if the layout does not fit the number of processes.
        StartupError: if the processes do not come together.
    """
    on_cpu = install_cpu_runtime()
    install_fallbacks(on_cpu)
    data_parallel_size(parallel, environment_world_size())
    if not dist.is_initialized():
        if not on_cpu:
            torch.cuda.set_device(device())
        backend = "gloo" if on_cpu else "cpu:gloo,cuda:nccl"
        if "RANK" in os.environ:
            _come_together(backend, parallel)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    virtual = parallel.virtual_pipeline_model_parallel_size
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=1,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,
        create_gloo_process_groups=True,
    )
    seed_everything(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    if deterministic and not on_cpu:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    return current_ranks()


def _come_together(backend: str, parallel: ParallelConfig) -> None:
    """The process group of all processes of the launcher, which have met within `startup_timeout_minutes`.

    Raises:
        StartupError: naming the ranks that have not come, or what keeps processes from reaching each other.
    """
    rank, world = environment_rank(), environment_world_size()
    limit = timedelta(minutes=parallel.startup_timeout_minutes)
    within = f"within parallel.startup_timeout_minutes={parallel.startup_timeout_minutes:g}"
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    port = int(os.environ.get("MASTER_PORT", MASTER_PORT))
    # Where torchrun's agent keeps the store, rank 0 does not.
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        server: dist.Store = dist.TCPStore(
            *(address, port, None, rank == 0 and not by_agent, limit),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except dist.DistError as error:
        raise StartupError(
            f"rank {rank} does not reach MASTER_ADDR={address} MASTER_PORT={port} {within}: {_reason(error)}"
        ) from None
    store = _of_this_start(server)
    keys = [f"started/{number}" for number in range(world)]
    try:
        store.set(keys[rank], "")
        store.wait(keys, limit)
    except dist.DistError as error:
        with contextlib.suppress(dist.DistError):
            absent = [str(number) for number, key in enumerate(keys) if not store.check([key])]
            named = ", ".join(absent[:16]) + (", ..." if len(absent) > 16 else "")
            raise StartupError(
                f"{len(absent)} of {world} ranks have not started {within}: {named}"
            ) from None
        raise StartupError(f"rank {rank} lost MASTER_ADDR={address}: {_reason(error)}") from None
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
        dist.barrier()
    except RuntimeError as error:
        raise StartupError(
            f"rank {rank} does not reach the others over gloo; GLOO_SOCKET_IFNAME names the network interface: "
            f"{_reason(error)}"
        ) from None
    # What follows may take longer: a rank reads data or writes a checkpoint while others wait.
    whole = timedelta(minutes=parallel.distributed_timeout_minutes)
    store.set_timeout(whole)
    dist.distributed_c10d._set_pg_timeout(whole)


def _reason(error: BaseException) -> str:
    """What torch says first; a stack of C++ may follow."""
    return str(error).partition("\n")[0]


def own_store() -> Optional[dist.Store]:
    """The store of all ranks over a connection of its own, for another thread; None of a rank that is alone.

    Raises:
        StartupError: it is gone again.
    """
    if dist.get_world_size() == 1:
        return None
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    try:
        store = dist.TCPStore(
            address,
            int(os.environ.get("MASTER_PORT", MASTER_PORT)),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=30),
        )
    except dist.DistError as error:
        raise StartupError(
            f"rank {environment_rank()} lost MASTER_ADDR={address}: {_reason(error)}"
        ) from None
    return _of_this_start(store)


def _of_this_start(store: dist.Store) -> dist.Store:
    """A store of which processes that are started again do not read what those before have left.

    torchrun's agent keeps its store over a restart. Rank 0's own is new, and there the count of restarts may differ:
    that of a node that joins begins anew.
    """
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if by_agent else "0"
    return dist.PrefixStore(attempt, store)


def seed_everything(seed: int) -> None:
    """Seeds the global generators; the model's own draws are keyed and do not use them."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def current_ranks() -> Ranks:
    """The ranks of this process in the initialized groups."""
    return Ranks(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size())),
        tensor=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=parallel_state.get_pipeline_model_parallel_world_size(),
        data=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        expert=parallel_state.get_expert_model_parallel_rank(),
        expert_size=parallel_state.get_expert_model_parallel_world_size(),
    )


def destroy() -> None:
    """Ends the process groups, so that another layout can be initialized in this process."""
    unwatch()
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def is_rank_zero() -> bool:
    """Whether this process prints and writes for all."""
    return not dist.is_initialized() or dist.get_rank() == 0


def barrier() -> None:
    """Waits for all ranks."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def agree(flag: bool) -> bool:
    """True on every rank if it is true on any rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return flag
    # On the host, over gloo: a GPU need not finish what it has to do before.
    value = torch.tensor([int(flag)])
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def from_rank_zero(find: Callable[[], T]) -> T:
    """What rank 0 finds, on every rank, and the error where it fails; every rank must call it.

    Nodes may see different states of a shared file system for a while. A decision that is taken from files, and that
    decides which collectives follow, is taken once.

    Args:
        find: is called on rank 0 alone; the result is sent as a pickle.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return find()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = find()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0, device=torch.device("cpu"))
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]  # type: ignore[no-any-return]


def union_over_ranks(keys: Iterable[str]) -> set[str]:
    """Keys of all ranks: a pipeline stage knows only its own. Every rank must call it."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, sorted(set(keys)))
    return set().union(*gathered)
