"""The MoE layer of one block: routers, dispatch and the expert pools of all its modalities."""

from __future__ import annotations

import copy
import functools
from typing import Any, Callable, Sequence

from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_vlmoe.config.schema import MoEConfig
from megatron_vlmoe.moe.dispatch import (
    Dispatcher,
    FixedCapacityDispatcher,
    TokenAllToAllDispatcher,
    nothing,
)
from megatron_vlmoe.moe.experts import PooledExperts
from megatron_vlmoe.moe.router import ModalityRouter
from megatron_vlmoe.stream.batch import StreamBatch
from megatron_vlmoe.stream.block_plan import BlockPlan


def moe_submodules(
    plan: BlockPlan, moe: MoEConfig, compile: bool = False, in_fp8: bool = False
) -> MoESubmodules:
    """The spec of a block's MoE layer: swap the router or the experts here.

    Args:
        compile: as `train.compile`.
        in_fp8: whether products of training are in 8 bits.
    """
    experts = {"pools": plan.pools, "compile": compile, "in_fp8": in_fp8}
    return MoESubmodules(
        experts=ModuleSpec(module=PooledExperts, params=experts),
        router=functools.partial(ModalityRouter, plan=plan, moe=moe, compile=compile),
    )


class ModalityMoELayer(MoELayer):
    """A megatron-core MoE layer over several pools, each with its own router and tokens."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules,
        plan: BlockPlan,
        moe: MoEConfig,
    ) -> None:
        # The union of this block's pools is what megatron-core's dispatcher counts; it differs by block.
        block_config = copy.copy(config)
        block_config.num_moe_experts = sum(pool.num_experts for pool in plan.pools)
        groups = get_default_pg_collection()
        super().__init__(
            config=block_config,
            submodules=submodules,
            layer_number=plan.layer_number,
            pg_collection=groups,
        )
        self.moe = moe
        self.plan = plan
        self.fixed_capacity = FixedCapacityDispatcher(groups, moe.all_to_all_chunks)
        self.token_all_to_all = TokenAllToAllDispatcher(
            self.token_dispatcher, plan.pools, groups.ep.size()
        )

    def forward(  # type: ignore[override]
        self,
        inputs: Sequence[Tensor],
        stream: StreamBatch,
        meanwhile: Callable[[], None] = nothing,
    ) -> list[Tensor]:
        """Outputs ``[T, 1, D]`` of every pool for its tokens ``[T, 1, D]``.

        Calls `meanwhile` once, when tokens are under way to their experts.
        """
        # 0 or less drops nothing.
        capacity_factor = 0.0
        if self.moe.dispatcher != "dropless":
            moe = self.moe
            capacity_factor = moe.capacity_factor if self.training else moe.eval_capacity_factor
        flat = [tokens.flatten(0, 1) for tokens in inputs]
        router: Any = self.router
        routings = router(flat, stream, capacity_factor)
        dispatch: Dispatcher = self.token_all_to_all
        if capacity_factor > 0.0 and self.moe.dispatcher == "fixed_capacity":
            dispatch = self.fixed_capacity
        outputs = dispatch(flat, routings, self.experts, meanwhile)
        return [output.unsqueeze(1) for output in outputs]
