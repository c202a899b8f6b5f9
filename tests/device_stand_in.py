"""A GPU without a GPU: tensors without content on a second device, on which code meant for CUDA runs and is watched.

torch's FakeTensorMode computes shapes, dtypes and devices only. The device is torch's spare one, since a CPU build of
torch cannot even slice a fake CUDA tensor. What CUDA would refuse, or would stop the host for, is told: operands on two
devices, collectives of host tensors (NCCL has none), values read on the host, copies between host and device.

All of it, importing this file too, changes the process for good: only for one that ends with the test.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections import Counter
from typing import Any, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from helpers import Layout
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

# Autograd knows the device only under a name of its own, which has to be given before it is used.
_setup_privateuseone_for_python_backend("standin")
DEVICE = torch.device("standin", 0)
READ = torch.ops.aten._local_scalar_dense.default
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
TYPES = {torch.float32: "Float", torch.bfloat16: "BFloat16", torch.float16: "Half"}


class Watch(TorchDispatchMode):
    """Runs operations on the device and tells what a GPU would refuse or wait for.

    Attributes:
        waits: what stopped the host: `read` or `copy` with the function of this project that asked for it.
        operations: how many were called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.operations = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.operations += 1
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if func.namespace == "c10d":
            on_host = [tensor for tensor in tensors if tensor.device != DEVICE]
            assert not on_host, f"{func} of a tensor on the host, which NCCL does not have"
            if "coalesced" in str(func):
                # FakeTensorMode does not know these; any other gives a handle to wait for.
                group = next(x for x in args if isinstance(x, torch.ScriptObject))
                return torch.ops.c10d.broadcast_(tensors[:1], group, 0, 0, False, -1)[1]
        elif func is READ and args[0].device == DEVICE:
            self.waits[f"read: {_caller()}"] += 1
            return 0.0
        elif func in COPIES:
            target = kwargs.get("device") or args[0].device
            if {torch.device(target)} != {tensor.device for tensor in tensors}:
                self.waits[f"copy: {_caller()}"] += 1
        else:
            devices = {tensor.device for tensor in tensors if tensor.dim()}
            assert len(devices) <= 1, f"{func} mixes {devices}"
        return func(*args, **kwargs)


def _caller() -> str:
    """The innermost function of this project, or of megatron-core."""
    # Comprehensions have frames of their own before Python 3.12 only.
    frames = (frame for frame in traceback.extract_stack() if not frame.name.startswith("<"))
    for frame in reversed(list(frames)):
        for package in ("megatron_vlmoe", "megatron/core"):
            if f"/{package}/" in frame.filename and not frame.filename.endswith("runtime/cpu.py"):
                return f"{package}{frame.filename.rpartition(package)[2]} {frame.name}"
    return "?"


class StandIn:
    """Makes this process believe in the device.

    Args:
        where: parallel layout, of which this process is rank 0; its peers do not exist.
    """

    def __init__(self, where: Layout) -> None:
        # torch.tensor makes its value on the host and then copies it, as for a CUDA device.
        torch._C._set_only_lift_cpu_tensors(True)
        os.environ.update(RANK="0", WORLD_SIZE=str(where.world), LOCAL_RANK="0")
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=where.world)
        new_group = dist.new_group
        self._replace(
            dist, "new_group", lambda *args, **own: new_group(*args, **{**own, "backend": "fake"})
        )
        self._replace(dist, "all_gather_object", _gather_own)
        self.mode = FakeTensorMode()
        self.watch = Watch()

    def ranks(self, config: Any) -> Any:
        """Process groups of the layout; afterwards the device is the one that everything goes to."""
        from megatron_vlmoe.runtime import cpu, distributed

        ranks = distributed.initialize(config.parallel, config.train.seed)
        self._replace(cpu, "CPU", DEVICE)
        known = distributed.device
        for name, module in list(sys.modules.items()):
            if name.startswith("megatron_vlmoe") and getattr(module, "device", None) is known:
                self._replace(module, "device", lambda: DEVICE)
        self._replace(torch, "tensor", self._tensor(torch.tensor))
        self._replace(
            torch.Tensor, "type", lambda tensor, *_: f"torch.cuda.{TYPES[tensor.dtype]}Tensor"
        )
        return ranks

    def training(self, config: Any, precision: Any, *heads: Any) -> Any:
        """The parts of a training run, on the device, with weights that are not filled in."""
        from megatron_vlmoe.stream import draws
        from megatron_vlmoe.train import setup

        build = setup.build_chunks

        def build_on_device(*args: Any) -> Any:
            # Modules cannot be moved in FakeTensorMode: they are made where they will be.
            with torch.device(DEVICE):
                return build(*args)

        self._replace(setup, "build_chunks", build_on_device)
        self._replace(setup, "initialize_parameters", lambda *args: None)
        self._replace(torch.nn.Module, "to", lambda module, *args: module)
        # There is no generator for the device.
        self._replace(draws, "keyed_generator", lambda device, *key: torch.Generator())
        with self.mode:
            parts = setup.build_training(config, precision, *heads)
        with self.mode, self.watch:
            # megatron-core 0.19 finds out once, in the first step, whether gradients have norms of their own.
            for part in getattr(parts.optimizer, "chained_optimizers", [parts.optimizer]):
                if hasattr(part, "has_grad_norm_group"):
                    part.has_grad_norm_group("mtp")
        return parts

    def batches(self, batches: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        """Batches as a loader would give them, on the host and without content."""
        from megatron_vlmoe.stream.batch import map_values

        for number, batch in enumerate(batches):
            fake = map_values(batch, self.mode.from_tensor)
            if "document_count" in batch.get("texts", {}):
                # It stays on the host, and is read there.
                with _disable_current_modes():
                    fake["texts"]["document_count"] = int(batch["texts"]["document_count"])
            yield fake | {"micro_batch": _Number(number)}

    def _tensor(self, plain: Any) -> Any:
        def tensor(data: Any, *args: Any, device: Any = None, **options: Any) -> torch.Tensor:
            value = plain(data, *args, **options)
            if device is None or torch.device(device).type == "cpu":
                return value
            # FakeTensorMode would move the value itself.
            self.watch.waits[f"copy: {_caller()}"] += 1
            return torch.empty(value.shape, dtype=value.dtype, device=DEVICE)

        return tensor

    @staticmethod
    def _replace(owner: Any, name: str, value: Any) -> None:
        assert hasattr(owner, name), f"{owner} has no {name}"
        setattr(owner, name, value)


class _Number(int):
    """The number of a micro-batch: known on the host, without content on the device."""

    def to(self, device: torch.device, non_blocking: bool) -> torch.Tensor:
        """Pinned, as a loader's is."""
        assert non_blocking
        return torch.empty((), dtype=torch.int64, device=device)


def _gather_own(places: list[Any], own: Any, group: Any = None) -> None:
    places[:] = [own] * len(places)
