"""Imported once by the server that test processes are forked from, so that they start in milliseconds."""

import warnings

import torch

from megatron_vlmoe.runtime.cpu import install_cpu_runtime

warnings.filterwarnings("ignore")
torch.set_num_threads(1)
install_cpu_runtime()

import megatron_vlmoe.train.trainer  # noqa: E402, F401  (after the CPU runtime is in place)
from megatron_vlmoe.runtime.results_queue import install_results_queue  # noqa: E402

# The manager of checkpoint writers would start by importing all anew.
install_results_queue("forkserver")
