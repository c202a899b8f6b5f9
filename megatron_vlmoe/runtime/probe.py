"""What accelerator packages are installed, what is used, and what to do about an unusable one."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import torch

# Name, module, statement that works where the package does, and advice where it does not.
PROBES = (
    (
        *("transformer-engine", "transformer_engine", "import transformer_engine.pytorch"),
        "uninstall it or install `transformer-engine[pytorch]>=2.9,<2.12` built for this torch",
    ),
    (
        # The `apex` on PyPI is an unrelated project; only NVIDIA's has this class.
        *("apex", "apex", "from apex.optimizers import FusedAdam"),
        "uninstall it (PyPI's apex is another project) or build NVIDIA/apex from source",
    ),
)


def accelerator_report() -> str:
    """One line: device, optional packages and whether they work."""
    where = "no GPU: CPU runtime over gloo"
    if torch.cuda.is_available():
        where = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    parts = [f"torch {torch.__version__}", where]
    for name, module, statement, advice in PROBES:
        state = "not installed"
        if importlib.util.find_spec(module) is not None:
            state = "used" if _works(statement) else f"unusable ({advice})"
        parts.append(f"{name}: {state}")
    return ", ".join(parts)


def unusable_packages() -> list[str]:
    """Installed packages that fail to import, with advice; megatron-core itself cannot be imported beside them."""
    problems = []
    for name, module, statement, advice in PROBES:
        if importlib.util.find_spec(module) is not None and not _works(statement):
            problems.append(f"{name} is installed but unusable: {advice}")
    return problems


def _works(statement: str) -> bool:
    """Imports in another process: a broken package may raise anything, or abort."""
    result = subprocess.run([sys.executable, "-c", statement], capture_output=True, timeout=120)
    return result.returncode == 0
