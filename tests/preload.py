"""Imported once by the server that test processes are forked from, so that they start in milliseconds."""

import gc
import warnings

import torch

from megatron_vlmoe.runtime.lazy import HEAVY, load

FILTERS = list(warnings.filters)
"""Those of a new interpreter, for command lines."""

warnings.filterwarnings("ignore")
torch.set_num_threads(1)
for name in HEAVY:
    load(name)

from megatron_vlmoe.runtime.results_queue import install_results_queue  # noqa: E402

# The manager of checkpoint writers would start by importing all anew.
install_results_queue("forkserver")

# What is here by now stays: without this each run of a test looks through all of it again, half of its time.
gc.collect()
gc.freeze()
