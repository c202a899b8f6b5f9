"""Modules that take seconds to import, loaded by name where a command or a public class first needs them.

Help, option errors and dry runs must not wait for torch and megatron-core, so that what is imported at the top of a
command is light, and the rest is in this table.
"""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from typing import Any

from megatron_vlmoe.runtime.accelerators import check_accelerators

HEAVY = {
    "megatron_vlmoe.analysis.device": False,
    "megatron_vlmoe.analysis.filling": False,
    "megatron_vlmoe.analysis.routing": False,
    "megatron_vlmoe.analysis.routing_figures": False,
    "megatron_vlmoe.analysis.routing_page": False,
    "megatron_vlmoe.benchmarks.checkpoint": True,
    "megatron_vlmoe.benchmarks.compare": False,
    "megatron_vlmoe.benchmarks.data": False,
    "megatron_vlmoe.benchmarks.export": False,
    "megatron_vlmoe.benchmarks.moe_layer": True,
    "megatron_vlmoe.benchmarks.preprocess": True,
    "megatron_vlmoe.benchmarks.scaling": True,
    "megatron_vlmoe.benchmarks.step": True,
    "megatron_vlmoe.convert.compare": False,
    "megatron_vlmoe.convert.exporting": False,
    "megatron_vlmoe.convert.importing": False,
    "megatron_vlmoe.convert.inspect": False,
    "megatron_vlmoe.convert.public.command": False,
    "megatron_vlmoe.convert.tensors": False,
    "megatron_vlmoe.convert.upcycle.run": False,
    "megatron_vlmoe.finetune.preflight": False,
    "megatron_vlmoe.finetune.run": True,
    "megatron_vlmoe.inference.model": True,
    "megatron_vlmoe.prepare.codes": False,
    "megatron_vlmoe.runtime.distributed": True,
    "megatron_vlmoe.tokenizers.vqkd.training": False,
    "megatron_vlmoe.train.checkpoint": True,
    "megatron_vlmoe.train.failures": False,
    "megatron_vlmoe.train.pretrain": True,
    "megatron_vlmoe.train.replay": True,
}
"""Each module that is loaded late, and whether it needs megatron-core."""

# Loggers that warn about nothing a user can change: about our feed-forward spec, which is not one of megatron-core's
# own classes, once per block; and, in 0.19, that DDP lays out its own buffers, and that `common.pt` and asynchronous
# saves of its own will go.
QUIET = (
    "megatron.core.transformer.transformer_layer",
    "megatron.core.distributed.distributed_data_parallel",
    "megatron.core.dist_checkpointing.strategies.common",
    "megatron.core.dist_checkpointing.strategies.torch",
)


def load(module: str) -> Any:
    """A module of `HEAVY`; megatron-core is made ready first if the module needs it."""
    if HEAVY[module]:
        prepare_megatron()
    return importlib.import_module(module)


def prepare_megatron() -> None:
    """Makes megatron-core work in this process, on machines without a GPU too.

    Raises:
        ConfigError: if a package that megatron-core would import cannot be.
    """
    if "megatron.core" not in sys.modules:
        check_accelerators()
    # megatron-core warns on import about packages that are optional here.
    warnings.filterwarnings("ignore", module="megatron")
    # Where no bytecode is kept, Python 3.12 warns in every process of escapes in 0.19's docstrings, by the file's path.
    warnings.filterwarnings("ignore", category=SyntaxWarning, module=".*/megatron/core/")
    # torch remarks on how 0.19 calls its loading, which is right as it is.
    for start in ("The argument order of load", "torch.distributed is disabled, unavailable"):
        warnings.filterwarnings("ignore", message=start, category=UserWarning)
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)
    # torch 2.13 deprecates the collectives that megatron-core calls.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    importlib.import_module("megatron_vlmoe.runtime.cpu").install_cpu_runtime()
