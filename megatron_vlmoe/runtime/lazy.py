"""Modules that take seconds to import, loaded by name where a command or a public class first needs them.

Help, option errors and dry runs must not wait for torch and megatron-core, so that what is imported at the top of a
command is light, and the rest is in this table.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

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
    "megatron_vlmoe.convert.upcycle.run": False,
    "megatron_vlmoe.finetune.run": True,
    "megatron_vlmoe.inference.model": True,
    "megatron_vlmoe.prepare.codes": False,
    "megatron_vlmoe.runtime.distributed": True,
    "megatron_vlmoe.tokenizers.vqkd.training": False,
    "megatron_vlmoe.train.checkpoint": True,
    "megatron_vlmoe.train.pretrain": True,
    "megatron_vlmoe.train.replay": True,
}
"""Each module that is loaded late, and whether it needs megatron-core."""


def load(module: str) -> Any:
    """A module of `HEAVY`; megatron-core is made ready first if the module needs it."""
    if HEAVY[module]:
        prepare_megatron()
    return importlib.import_module(module)


def prepare_megatron() -> None:
    """Makes megatron-core work in this process, on machines without a GPU too."""
    # megatron-core warns on import about packages that are optional here.
    warnings.filterwarnings("ignore", module="megatron")
    # torch 2.13 deprecates the collectives that megatron-core 0.16.1 calls.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    importlib.import_module("megatron_vlmoe.runtime.cpu").install_cpu_runtime()
