"""Process groups, device, number format and ranks of this process."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, Callable, Optional, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_vlmoe.config.errors import ConfigError, TrainingError
from megatron_vlmoe.config.schema import ParallelConfig, Precision, TrainConfig
from megatron_vlmoe.runtime.cpu import install_cpu_runtime
from megatron_vlmoe.runtime.optimizer import install_fallbacks
from megatron_vlmoe.runtime.ranks import Ranks, environment_rank, environment_world_size
from megatron_vlmoe.runtime.watchdog import unwatch
from megatron_vlmoe.stream.sizes import data_parallel_size

T = TypeVar("T")


def device() -> torch.device:
    """The device that this process computes on."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
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
    start_seconds: float = 300.0,
) -> Ranks:
    """Starts torch.distributed and megatron-core's process groups.

    Works alone (a single process without torchrun) and under torchrun.

    Args:
        start_seconds: time for all ranks to find each other.

    Raises:
        ConfigError: if the layout does not fit the number of processes.
        TrainingError: if not all ranks have come in time.
    """
    on_cpu = install_cpu_runtime()
    install_fallbacks()
    data_parallel_size(parallel, environment_world_size())
    if not dist.is_initialized():
        if not on_cpu:
            torch.cuda.set_device(device())
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        timeout = timedelta(minutes=parallel.distributed_timeout_minutes)
        alone = "RANK" not in os.environ
        store = dist.HashStore() if alone else _meet(start_seconds)
        store.set_timeout(timeout)
        dist.init_process_group(
            backend="gloo" if on_cpu else "cpu:gloo,cuda:nccl",
            timeout=timeout,
            store=dist.PrefixStore("default_pg", store),
            rank=0 if alone else environment_rank(),
            world_size=1 if alone else environment_world_size(),
        )
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


def _meet(seconds: float) -> dist.Store:
    """The store of all ranks, once all of them have come.

    Raises:
        TrainingError: naming the ranks that have not, as far as known.
    """
    rank, size = environment_rank(), environment_world_size()
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    deadline = time.monotonic() + seconds
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=seconds)))
    except dist.DistError as error:
        raise TrainingError(
            f"rank {rank} of {size} has not met the others at {where} within {seconds:.0f} s "
            f"(health.start_seconds): {' '.join(str(error).split())[:200]}"
        ) from None
    keys = [f"vlmoe/here/{other}" for other in range(size)]
    store.set(keys[rank], "1")
    while not store.check(keys):
        if time.monotonic() > deadline:
            missing = [str(other) for other, key in enumerate(keys) if not store.check([key])]
            raise TrainingError(
                f"rank(s) {', '.join(missing)} of {size} have not come to {where} within {seconds:.0f} s "
                "(health.start_seconds)"
            )
        time.sleep(0.05)
    return store


def own_store() -> Optional[dist.Store]:
    """The store of all ranks over a connection of its own, for another thread; None of a rank that is alone."""
    if dist.get_world_size() == 1:
        return None
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=30),
    )


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
