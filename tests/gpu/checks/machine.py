"""What the machine has, and whether it computes at all."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.distributed as dist

from checks.report import Report, difference, milliseconds

PACKAGES = (
    *("torch", "triton", "megatron-core", "jsonargparse", "transformers", "transformer-engine"),
    *("apex", "deepspeed", "numpy", "nvidia-cudnn-cu13", "nvidia-nccl-cu13"),
)


def versions(report: Report) -> None:
    """Versions; one matrix product in bf16, one collective of a single process."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    report.note(python=platform.python_version(), packages=found, cores=os.cpu_count())
    release = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    report.expect((2, 11) <= release < (2, 14), f"torch {torch.__version__} is not 2.11 to 2.13")
    core = "0.16.1" if sys.version_info < (3, 12) else "0.19."
    report.expect(found["megatron-core"].startswith(core), f"megatron-core is not {core}")
    if report.on_gpu:
        _device(report)
    else:
        report.left_out("cuDNN, NCCL, driver, device")
    _product(report)
    _collective(report)


def _device(report: Report) -> None:
    own = torch.cuda.get_device_properties(0)
    driver = "no nvidia-smi"
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    capability = torch.cuda.get_device_capability()
    report.note(
        device=own.name,
        gigabytes=round(own.total_memory / 1e9, 1),
        multiprocessors=own.multi_processor_count,
        capability=list(capability),
        driver=driver,
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
        nccl=list(torch.cuda.nccl.version()),
        devices=torch.cuda.device_count(),
    )
    report.expect(capability[0] >= 8, f"compute capability {capability} has no bf16")
    report.expect(bool(torch.backends.cudnn.version()), "torch has no cuDNN")


def _product(report: Report) -> None:
    size = report.size(8192, 256)
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(size, size, generator=generator) for _ in range(2))
    a, b = (x.to(report.device, torch.bfloat16) for x in (left, right))
    # The same bf16 entries, added up exactly.
    expected = a[:64].cpu().double() @ b.cpu().double()
    off = difference((a[:64] @ b).cpu(), expected)
    report.expect(off < 1e-2, f"a bf16 matrix product is off by {off:.2g}")
    taken = milliseconds(lambda: a @ b)
    report.note(product_off_by=off, product_ms=taken, product_tflops=2e-9 * size**3 / taken)


def _collective(report: Report) -> None:
    backend = "nccl" if report.on_gpu else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        value = torch.arange(8.0, device=report.device)
        dist.all_reduce(value)
        gathered = [torch.empty_like(value)]
        dist.all_gather(gathered, value)
        good = gathered[0].tolist() == list(range(8))
        report.expect(good, f"{backend} returns {gathered[0].tolist()}")
    finally:
        dist.destroy_process_group()
