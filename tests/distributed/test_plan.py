"""Plans against what training steps really do at several layouts: tensors, collectives, FLOPs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from helpers import Layout, Workers, layout
from planned_runs import LAYOUTS, SMALL, Measured, measure, planned_config

from megatron_vlmoe.planning.collectives import collectives_per_step
from megatron_vlmoe.planning.estimate import memory_per_rank, stage_flops
from megatron_vlmoe.stream.sizes import data_parallel_size, num_micro_batches

RUNS: dict[str, tuple[Layout, str]] = {
    **{name: (where, "") for name, where in LAYOUTS.items()},
    "recompute": (layout(1), "--train.recompute full"),
    "head chunks": (layout(1), "--train.head_chunk_rows 48"),
    "TP 2, head chunks": (layout(2, tp=2), "--train.head_chunk_rows 9"),
    "TP 2, EP 2, recompute": (layout(2, tp=2, ep=2), "--train.recompute full"),
    "draws of a counter": (layout(1), "--train.counter_draws true"),
    # The second stage has no experts.
    "PP 2, EP 2": (layout(4, pp=2, ep=2), ""),
    "dense, DP 2": (layout(2), "--moe.modalities none"),
    "PP 2, interleaved": (layout(2, pp=2, vpp=2), ""),
    "EP 2, bf16": (layout(2, ep=2), "--train.precision bf16"),
    "EP 2, gradients all-reduced": (
        layout(2, ep=2),
        "--parallel.use_distributed_optimizer false",
    ),
    "DP 2, weights gathered late": (layout(2), "--parallel.overlap_param_gather true"),
    "TP 2, EP 2, shared router, bias": (
        layout(2, tp=2, ep=2),
        "--moe.shared_router true --moe.text_aux.local_entropy 1 --moe.vision_aux.global_entropy 1 "
        "--moe.balance_bias_rate 0.01",
    ),
    "TP 2, expert choice": (layout(2, tp=2), "--moe.routing expert_choice --moe.vision_aux.z 1"),
    "TP 2, DP 2, contrastive, bf16": (
        layout(4, tp=2),
        "--objectives.kind contrastive --data.micro_texts 0 --data.micro_images 0 "
        "--train.precision bf16",
    ),
    "EP 2, recompute, chunks": (
        layout(2, ep=2),
        "--moe.all_to_all_chunks 3 --train.recompute full",
    ),
    "EP 2, alltoall": (layout(2, ep=2), "--moe.dispatcher alltoall"),
}


@pytest.fixture(scope="module")
def measured(workers: Workers) -> Any:
    """What the ranks of a run did; every run is made once."""
    known: dict[str, list[Measured]] = {}

    def get(name: str) -> list[Measured]:
        if name not in known:
            where, options = RUNS[name]
            known[name] = workers.run(where, measure, where, (*SMALL, *options.split()))
        return known[name]

    return get


def precision_of(name: str) -> Any:
    return "bf16" if "bf16" in name else "fp32"


@pytest.mark.parametrize("name", [*LAYOUTS, "recompute", "head chunks", "draws of a counter"])
def test_memory_is_within_a_tenth_of_the_tensors_at_the_peak(name: str, measured: Any) -> None:
    """Also of what a step adds to the tensors that live between steps."""
    where, options = RUNS[name]
    config = planned_config(where, (*SMALL, *options.split()))
    stages = memory_per_rank(config, where.world, precision_of(name))
    for rank in measured(name):
        planned = stages[rank.stage].total
        assert planned == pytest.approx(rank.peak, rel=0.10)
        assert planned - rank.idle == pytest.approx(rank.peak - rank.idle, rel=0.10)


@pytest.mark.parametrize("name", [name for name, (where, _) in RUNS.items() if where.world > 1])
def test_collectives_are_those_that_ran(name: str, measured: Any) -> None:
    """Every call and every byte, of every operation in every group."""
    where, options = RUNS[name]
    config = planned_config(where, (*SMALL, *options.split()))
    for rank in measured(name):
        calls: Counter[tuple[str, str]] = Counter()
        sizes: Counter[tuple[str, str]] = Counter()
        for found in collectives_per_step(config, where.world, precision_of(name), rank.stage):
            # The loop of a whole run asks for signals; here are single steps.
            if found.what != "signals to stop":
                calls[found.operation, found.group] += found.calls
                sizes[found.operation, found.group] += found.bytes
        assert dict(calls) == rank.calls
        if "alltoall" in name:
            # As large as the routing of the step makes it.
            del sizes["all-to-all", "expert"], rank.bytes["all-to-all", "expert"]
        assert dict(sizes) == rank.bytes
        assert sum(sizes.values()) > 10_000


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("PP 2, EP 2", ""),
        ("head chunks", "--moe.modalities none"),
        # Where a CPU has all experts of a pool, it computes only the slots that are filled; here all are.
        ("recompute", "--moe.dispatcher dropless --moe.route_padding true"),
    ],
)
def test_flops_of_a_step_are_those_that_torch_counts(
    name: str, more: str, workers: Workers
) -> None:
    """With plain attention, which torch's counter knows; the first stage has no gradient of pixels."""
    where, options = RUNS[name]
    arguments = (*SMALL, *options.split(), *more.split(), "--model.attention_backend", "math")
    config = planned_config(where, arguments)
    count = num_micro_batches(config, data_parallel_size(config.parallel, where.world))
    for rank in workers.run(where, measure, where, arguments):
        planned = count * sum(stage_flops(config, rank.stage))
        assert planned == pytest.approx(rank.flops, rel=0.01)
