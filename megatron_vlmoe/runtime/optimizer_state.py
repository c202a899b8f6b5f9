"""The state of megatron-core's distributed optimizer by parameter, as it lies in memory where one rank has all of it.

megatron-core gathers the state of a data-parallel group to write it by parameter. In a group of one rank it makes five
copies of every element for that, and over gloo sends them to itself.
"""

from __future__ import annotations

import functools
from typing import Any, Callable

from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor


class _ByParameter:
    """One kind of state, such as `exp_avg`, from which megatron-core cuts the parameters of a buffer."""

    def __init__(self) -> None:
        self.state_at: dict[int, Tensor] = {}

    def __getitem__(self, where: slice) -> Tensor:
        """Flat state of the parameter that begins there in the buffer; its own memory, no copy."""
        return self.state_at[where.start]


def install_state_views() -> None:
    """Lets megatron-core write the state of a data-parallel group of one CPU process without copies, once.

    Raises:
        RuntimeError: if megatron-core's optimizer does not have the expected methods.
    """
    for name in ("get_parameter_state_dp_zero", "_get_main_param_and_optimizer_states"):
        if not hasattr(DistributedOptimizer, name):
            raise RuntimeError(f"megatron-core's DistributedOptimizer has no {name}")
    gather = DistributedOptimizer.get_parameter_state_dp_zero
    if gather.__module__ != __name__:
        DistributedOptimizer.get_parameter_state_dp_zero = _without_group_of_one(gather)


def _without_group_of_one(gather: Callable[..., Any]) -> Callable[..., Any]:
    def state(
        optimizer: Any,
        use_gloo_comm: bool = True,
        empty_data: bool = False,
        return_on_all_ranks: bool = False,
    ) -> Any:
        on_cpu = all(buffer.param_data.device.type == "cpu" for buffer in optimizer.buffers)
        if empty_data or not on_cpu or optimizer.data_parallel_group.size() > 1:
            return gather(optimizer, use_gloo_comm, empty_data, return_on_all_ranks)
        return {
            number: {
                kind: _state_of_buffer(optimizer, optimizer.buffers[number], buckets)
                for kind, buckets in maps.items()
            }
            for number, maps in enumerate(optimizer.gbuf_ranges)
        }

    return functools.update_wrapper(state, gather, assigned=("__name__", "__doc__"))


def _state_of_buffer(optimizer: Any, buffer: Any, buckets: Any) -> dict[str, _ByParameter]:
    found: dict[str, _ByParameter] = {}
    for bucket in buckets:
        for parameter in bucket["param_map"]:
            start = buffer.param_index_map[parameter][0]
            state = optimizer._get_main_param_and_optimizer_states(parameter)
            for name, tensor in state.items():
                # Stored in fp32, as megatron-core gathers it.
                found.setdefault(name, _ByParameter()).state_at[start] = tensor.detach().float()
    return found
