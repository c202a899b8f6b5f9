"""Imported once by the server that test processes are forked from, so that they start in milliseconds."""

import functools
import multiprocessing
import warnings
from typing import Any

import torch

from megatron_vlmoe.runtime.cpu import install_cpu_runtime

warnings.filterwarnings("ignore")
torch.set_num_threads(1)
install_cpu_runtime()

from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: E402

import megatron_vlmoe.train.trainer  # noqa: E402, F401  (after the CPU runtime is in place)


@functools.cache
def results_queue() -> Any:
    """The queue of megatron-core's checkpoint writers, whose manager it would start by importing all anew."""
    return multiprocessing.get_context("forkserver").Manager().Queue()


assert callable(filesystem_async._get_write_results_queue)
filesystem_async._get_write_results_queue = results_queue
