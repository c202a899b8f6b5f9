"""The best layout of a run on a number of devices, and why the others lost."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_vlmoe.config.errors import ConfigError, divisors
from megatron_vlmoe.config.schema import DataConfig, Precision, RunConfig
from megatron_vlmoe.planning.estimate import MemoryEstimate, memory_per_rank
from megatron_vlmoe.planning.parameters import (
    Parameter,
    estimated_parameters,
    with_assumed_vocabularies,
)
from megatron_vlmoe.planning.step_time import Cluster, StepTime, step_time
from megatron_vlmoe.planning.validate import validate
from megatron_vlmoe.stream.block_plan import block_plans
from megatron_vlmoe.stream.sizes import check_parallel_sizes

GIB = 2**30
CHOICES = {
    "TP": ("parallel.tensor_model_parallel_size",),
    "PP": ("parallel.pipeline_model_parallel_size",),
    "EP": ("parallel.expert_model_parallel_size",),
    "micro-batch": ("data.micro_texts", "data.micro_images", "data.micro_pairs"),
    "recompute": ("train.recompute",),
}
"""What the search chooses, and the options that say it."""
DOES_NOT_DIVIDE, OUT_OF_MEMORY = "the sizes do not divide", "not enough memory"
"""Kinds of reasons why a layout cannot run."""
LARGEST_BATCH = 10**12
"""Of larger ones the divisors are not looked for."""
MOST_LAYOUTS = 10_000
"""More are not compared, which would take more than a minute."""


@dataclass(frozen=True)
class Layout:
    """One way to lay a run out.

    Args:
        config: the run with it.
        choice: value of each of `CHOICES`, and DP, `-` where TP and PP do not divide the devices.
        refused: why it cannot run; empty if it can.
        kind: the reason in short, to count by.
        memory: of a rank of every stage; empty where the options contradict themselves.
        time: None where it cannot run.
    """

    config: RunConfig
    choice: Mapping[str, str]
    refused: str = ""
    kind: str = ""
    memory: Sequence[MemoryEstimate] = ()
    time: StepTime | None = None

    @property
    def seconds(self) -> float:
        """The middle of the bounds of a step; infinite where it cannot run."""
        return self.time.middle if self.time else math.inf

    @property
    def most_memory(self) -> int:
        """Bytes of the fullest rank."""
        return max((stage.total for stage in self.memory), default=0)


def search(
    config: RunConfig,
    world_size: int,
    precision: Precision,
    cluster: Cluster,
    fixed: frozenset[str] = frozenset(),
) -> list[Layout]:
    """Every layout of a run that divides it evenly, the fastest first and those that cannot run last.

    Global batch, model and all other options stay as they are. TP stays within a node, since every block waits for its
    collectives: where it is chosen here, no group of it may straddle two. It, PP and EP go through the divisors of
    heads, blocks and experts, and the micro-batch through what divides the global batch. Full recomputation is tried
    wherever it is not needed, too.

    Args:
        fixed: names of `CHOICES` that keep the value of `config`.

    Raises:
        ConfigError: for what is wrong with the run whatever its layout, or if there are more than `MOST_LAYOUTS`.
    """
    config = with_assumed_vocabularies(config)
    for kind in ("texts", "images", "pairs") if "micro-batch" not in fixed else ():
        total = getattr(config.data, f"global_{kind}")
        if total > LARGEST_BATCH:
            raise ConfigError(
                f"data.global_{kind}={total:.4g}: micro-batches are looked for in global batches of at most "
                f"{LARGEST_BATCH:.0e}; give --data.micro_{kind} N"
            )
    _check_apart_from_layout(config)
    parameters = estimated_parameters(config)
    candidates = _candidates(config, world_size, cluster, fixed)
    chosen = list(itertools.islice(candidates, MOST_LAYOUTS + 1))
    if len(chosen) > MOST_LAYOUTS:
        raise ConfigError(
            f"more than {MOST_LAYOUTS:,} layouts to compare, since the global batch has many divisors: choose some "
            "yourself, such as --data.micro_texts N --data.micro_images N --data.micro_pairs N"
        )
    found = [
        _judge(candidate, world_size, precision, cluster, parameters, "TP" in fixed)
        for candidate in chosen
    ]
    return sorted(found, key=lambda one: (one.time is None, one.seconds, one.most_memory))


def _check_apart_from_layout(config: RunConfig) -> None:
    """Checks the run as one process with one micro-batch would make it."""
    check_parallel_sizes(config.parallel)
    alone = replace(
        config.parallel,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        virtual_pipeline_model_parallel_size=1,
        expert_model_parallel_size=1,
    )
    whole: dict[str, Any] = {}
    for kind in ("texts", "images", "pairs"):
        micro, total = (getattr(config.data, f"{scope}_{kind}") for scope in ("micro", "global"))
        whole[f"micro_{kind}"] = total if micro > 0 and total > 0 else micro
    validate(replace(config, parallel=alone, data=replace(config.data, **whole)))


def _candidates(
    config: RunConfig, world_size: int, cluster: Cluster, fixed: frozenset[str]
) -> Iterator[RunConfig]:
    parallel, data = config.parallel, config.data
    experts = [
        pool.num_experts for plan in block_plans(config.model, config.moe) for pool in plan.pools
    ]
    tensors = [n for n in divisors(config.model.num_attention_heads) if n <= cluster.per_node]
    pipelines = divisors(config.model.num_layers)
    if "TP" in fixed:
        tensors = [parallel.tensor_model_parallel_size]
    if "PP" in fixed:
        pipelines = [parallel.pipeline_model_parallel_size]
    for tensor in tensors:
        for pipeline in pipelines:
            ranks, rest = divmod(world_size, tensor * pipeline)
            if rest:
                sizes = [parallel.expert_model_parallel_size if "EP" in fixed else 1]
            else:
                sizes = divisors(math.gcd(ranks * tensor, *experts)) if experts else [1]
                if "EP" in fixed:
                    sizes = [parallel.expert_model_parallel_size]
            batches = [data]
            if "micro-batch" not in fixed and not rest:
                batches = _micro_batches(config, ranks, tensor) or [data]
            for expert in sizes:
                layout = replace(
                    parallel,
                    tensor_model_parallel_size=tensor,
                    pipeline_model_parallel_size=pipeline,
                    expert_model_parallel_size=expert,
                )
                for batch in batches:
                    modes = [replace(config.train, recompute=mode) for mode in ("none", "full")]
                    for train in [config.train] if "recompute" in fixed else modes:
                        yield replace(config, parallel=layout, data=batch, train=train)


def _micro_batches(config: RunConfig, ranks: int, tensor: int) -> list[DataConfig]:
    """Data options with every micro-batch that divides the global batch over so many data-parallel ranks."""
    data = config.data
    kinds = [kind for kind in ("texts", "images", "pairs") if getattr(data, f"micro_{kind}")]
    totals = [getattr(data, f"global_{kind}") for kind in kinds]
    if any(total % ranks for total in totals):
        return []
    share = math.gcd(*(total // ranks for total in totals))
    found = []
    for count in divisors(share):
        sizes = {f"micro_{kind}": total // ranks // count for kind, total in zip(kinds, totals)}
        if all(size % tensor == 0 for size in sizes.values()):
            found.append(replace(data, **sizes))
    return found


def _judge(
    config: RunConfig,
    world_size: int,
    precision: Precision,
    cluster: Cluster,
    parameters: Sequence[Parameter],
    is_tensor_fixed: bool,
) -> Layout:
    parallel, data = config.parallel, config.data
    ranks, rest = divmod(
        world_size, parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    )
    choice = {
        "TP": str(parallel.tensor_model_parallel_size),
        "PP": str(parallel.pipeline_model_parallel_size),
        "EP": str(parallel.expert_model_parallel_size),
        "DP": "-" if rest else str(ranks),
        "micro-batch": f"{data.micro_texts}+{data.micro_images}+{data.micro_pairs}",
        "recompute": config.train.recompute,
    }
    try:
        validate(config, world_size)
    except ConfigError as error:
        return Layout(config, choice, str(error), DOES_NOT_DIVIDE)
    tensor, per_node = parallel.tensor_model_parallel_size, cluster.per_node
    if world_size > per_node and per_node % tensor and not is_tensor_fixed:
        refused = f"TP {tensor} does not divide nodes of {per_node}: some of its groups would straddle two nodes"
        return Layout(config, choice, refused, DOES_NOT_DIVIDE)
    memory = memory_per_rank(config, world_size, precision, parameters)
    usable, needed = cluster.device.usable_memory, max(stage.total for stage in memory)
    if needed > usable:
        refused = f"needs {needed / GIB:.1f} GiB of {usable / GIB:.1f} GiB"
        return Layout(config, choice, refused, OUT_OF_MEMORY, memory)
    time = step_time(config, world_size, precision, cluster, parameters)
    return Layout(config, choice, memory=memory, time=time)


@dataclass(frozen=True)
class Loser:
    """A value that the best layout does not have, and the best layout that has it.

    Args:
        name: one of `CHOICES`.
        value: its value.
        layout: the fastest with it, or one that cannot run if none can.
        reason: why it lost.
    """

    name: str
    value: str
    layout: Layout
    reason: str


def losers(layouts: Sequence[Layout]) -> list[Loser]:
    """Every value of every choice but the best layout's, with the reason why it lost to that.

    Of a value that can run, this is the part of the step that grew most against the best layout; of one that cannot,
    the error or the memory of the layout that comes closest.
    """
    best = layouts[0]
    assert best.time is not None
    result = []
    for name in CHOICES:
        # By their numbers, also those of `16+16+16`.
        values = sorted(
            {layout.choice[name] for layout in layouts},
            key=lambda value: [int(number) for number in re.findall(r"\d+", value)],
        )
        for value in values:
            if value == best.choice[name]:
                continue
            own = [layout for layout in layouts if layout.choice[name] == value]
            first = own[0]
            if first.time is None:
                # Out of memory says more than sizes that do not divide; the least memory comes closest.
                fits = [layout for layout in own if layout.memory] or own
                first = min(fits, key=lambda layout: layout.most_memory)
                result.append(Loser(name, value, first, first.refused))
                continue
            before = best.time.parts
            grown = {name: now - before.get(name, 0.0) for name, now in first.time.parts.items()}
            part, seconds = max(grown.items(), key=lambda entry: entry[1])
            ratio = first.seconds / best.seconds
            reason = f"{ratio:.2f} x the time"
            if seconds > 0:
                reason += f": {part} +{1e3 * seconds:.3g} ms"
            result.append(Loser(name, value, first, reason))
    return result
