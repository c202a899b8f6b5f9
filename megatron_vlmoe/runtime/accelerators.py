"""Packages that megatron-core imports where they are installed, and without which working it cannot be imported."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

from megatron_vlmoe.config.errors import ConfigError

# Name, module, statement that works where the package does, and advice where it does not.
PROBES = (
    (
        *("transformer-engine", "transformer_engine", "import transformer_engine.pytorch"),
        "uninstall it or install this package's extra `transformer-engine`, built for this torch",
    ),
    (
        # The `apex` on PyPI is an unrelated project; only NVIDIA's has this class, which needs the kernels of
        # --cuda_ext when it is made.
        *("apex", "apex", "from apex.optimizers import FusedAdam; import amp_C"),
        "uninstall it (PyPI's apex is another project) or build NVIDIA/apex from source with its CUDA extensions",
    ),
)
PROBE_SECONDS = 300.0
"""After which an import counts as failed; those of many processes from a cold shared disk take minutes."""


def installed_accelerators() -> dict[str, bool]:
    """The packages by name, and whether they are there."""
    return {name: importlib.util.find_spec(module) is not None for name, module, *_ in PROBES}


def check_accelerators() -> None:
    """Tries the packages that are there, before anything imports them.

    Raises:
        ConfigError: with advice and what their import said, if one is unusable.
    """
    installed, problems = installed_accelerators(), []
    for name, _, statement, advice in PROBES:
        if installed[name] and (said := _import_error(statement)):
            problems.append(f"{name} is installed but unusable: {advice} ({said})")
    if problems:
        raise ConfigError("; ".join(problems))


def _import_error(statement: str) -> str:
    """The last line of what a failing import says; empty if it works."""
    # In another process: a broken package may raise anything, or abort.
    try:
        done = subprocess.run(
            [sys.executable, "-c", statement],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PROBE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"not imported within {PROBE_SECONDS:.0f} s"
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return lines[-1] if done.returncode else ""
