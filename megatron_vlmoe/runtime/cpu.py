"""Lets megatron-core run on CPU over gloo.

megatron-core places tensors on ``torch.cuda.current_device()``, uses CUDA streams and events, and compares
tensor types with CUDA spellings. :func:`install_cpu_runtime` replaces exactly those symbols. It must be called
explicitly (the entry point and the test helpers do), does nothing where CUDA is present, and fails loudly
when a symbol that it replaces is gone, which is what an incompatible megatron-core looks like.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from typing import Any, Callable

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import param_and_grad_buffer
from megatron.core.tensor_parallel import random
from megatron.core.transformer.moe import token_dispatcher
from torch.utils._device import _device_constructors

CPU = torch.device("cpu")

# Factories that megatron-core calls with device="cuda" or device=torch.cuda.current_device().
FACTORIES = (
    *("empty", "empty_like", "zeros", "ones", "full", "tensor", "arange"),
    *("rand", "randn", "randint"),
)


class _Inert:
    """Stands for a CUDA stream or event: all its work is done, and there is nothing to wait for."""

    device = CPU

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        pass

    wait_stream = wait_event = synchronize = record = wait = _nothing

    def record_event(self, event: object = None) -> _Inert:
        """An event that has already happened."""
        return self

    def query(self) -> bool:
        """All work is done."""
        return True


def _replace(owner: Any, name: str, value: Any) -> None:
    if not hasattr(owner, name):
        where = getattr(owner, "__name__", repr(owner))
        raise RuntimeError(
            f"the CPU runtime replaces {where}.{name}, which does not exist in this version; "
            "it was written for megatron-core 0.16.1 and 0.19.2, and torch 2.11 to 2.13"
        )
    setattr(owner, name, value)


def _is_cuda_name(device: Any) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


def _on_cpu(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The function, with the CPU wherever an argument names a CUDA device."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda_name(kwargs.get("device")):
            kwargs["device"] = CPU
        return function(*(CPU if _is_cuda_name(value) else value for value in args), **kwargs)

    return call


def _with_cuda_spelling(plain_type: Callable[..., Any]) -> Callable[..., Any]:
    """`Tensor.type` as megatron-core's optimizers expect it, which compare it with 'torch.cuda.FloatTensor'."""

    def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        value = plain_type(self, *args, **kwargs)
        if args or kwargs or not isinstance(value, str):
            return value
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("megatron.core") and not value.startswith("torch.cuda"):
            return value.replace("torch.", "torch.cuda.", 1)
        return value

    return tensor_type


def _without_group_of_one(collective: Callable[..., Any]) -> Callable[..., Any]:
    """A gather or scatter of DDP that does nothing in a group of one rank, where gloo copies whole buffers."""

    @functools.wraps(collective)
    def call(output: torch.Tensor, source: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        group = kwargs.get("group")
        if group is not None and group.size() == 1 and output.data_ptr() == source.data_ptr():
            return None
        return collective(output, source, *args, **kwargs)

    return call


def install_cpu_runtime() -> bool:
    """Installs the CPU runtime in this process, once.

    Returns:
        True where the process now runs (or already ran) on it, False where CUDA is present and nothing was done.

    Raises:
        RuntimeError: if a replaced symbol does not exist in the installed torch or megatron-core.
    """
    if torch.cuda.is_available():
        return False
    if getattr(torch.cuda.current_device, "__module__", "") == __name__:
        return True
    # Large tensors on huge pages: a new tensor of gradients costs a page fault for every page of it, 75,000 of them for
    # 300 MB on small pages. torch reads this when it first allocates.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # torch caches its factories for `with torch.device(...)`: fill the cache while they are its own.
    _device_constructors()
    cuda, shared = torch.cuda, _Inert()
    _replace(cuda, "current_device", lambda: CPU)
    _replace(cuda, "set_device", lambda device: None)
    _replace(cuda, "synchronize", lambda device=None: None)
    _replace(cuda, "empty_cache", lambda: None)
    _replace(cuda, "Stream", _Inert)
    _replace(cuda, "Event", _Inert)
    _replace(cuda, "stream", contextlib.nullcontext)
    _replace(cuda, "current_stream", lambda device=None: shared)
    _replace(cuda, "default_stream", lambda device=None: shared)
    _replace(cuda, "manual_seed", torch.default_generator.manual_seed)
    _replace(cuda, "get_rng_state", lambda device=None: torch.get_rng_state())
    _replace(cuda, "set_rng_state", lambda state, device=None: torch.set_rng_state(state))
    _replace(cuda.nvtx, "range_push", lambda *args, **kwargs: None)
    _replace(cuda.nvtx, "range_pop", lambda *args, **kwargs: None)
    for name in FACTORIES:
        _replace(torch, name, _on_cpu(getattr(torch, name)))
    # Its default argument is torch's own factory.
    _replace(ShardedTensor, "init_data", _on_cpu(ShardedTensor.init_data))
    _replace(torch.Tensor, "to", _on_cpu(torch.Tensor.to))
    _replace(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)
    _replace(torch.nn.Module, "cuda", lambda self, *args, **kwargs: self)
    _replace(torch.Tensor, "type", _with_cuda_spelling(torch.Tensor.type))
    _replace(random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state())
    _replace(
        random, "_set_cuda_rng_state", lambda state, *args, **kwargs: torch.set_rng_state(state)
    )

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        # The original converts CUDA tensors only, but all_to_all_single wants numpy splits on CPU too.
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    _replace(token_dispatcher, "maybe_move_tensor_to_cpu", to_host)
    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        collective = getattr(param_and_grad_buffer, name)
        _replace(param_and_grad_buffer, name, _without_group_of_one(collective))
    return True
