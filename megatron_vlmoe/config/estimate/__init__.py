"""Parameters, FLOPs and memory of a run by arithmetic alone: no torch, no process group."""

from megatron_vlmoe.config.estimate.flops import (
    flops_per_step,
    hardware_flops_per_step,
)
from megatron_vlmoe.config.estimate.memory import MemoryEstimate, memory_per_rank
from megatron_vlmoe.config.estimate.parameters import (
    ParameterCounts,
    StageParameters,
    parameter_counts,
    parameters_per_rank,
    with_assumed_vocabularies,
)

__all__ = [
    "MemoryEstimate",
    "ParameterCounts",
    "StageParameters",
    "flops_per_step",
    "hardware_flops_per_step",
    "memory_per_rank",
    "parameter_counts",
    "parameters_per_rank",
    "with_assumed_vocabularies",
]
