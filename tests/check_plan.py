"""Compares plans with steps that really ran on this machine, and prints the tables of docs/planning.md.

    python tests/check_plan.py memory      tensors at the peak of a step, FLOPs and bytes of collectives
    python tests/check_plan.py time        bounds of a step's time, between two measurements of the machine's rates

Use an otherwise idle machine for the times.
"""

from __future__ import annotations

import statistics
import sys
from collections import Counter

from helpers import Layout, Workers
from planned_runs import LAYOUTS, SMALL, Measured, measure, planned_config, timed

from megatron_vlmoe.analysis.device import this_device
from megatron_vlmoe.planning.collectives import collectives_per_step
from megatron_vlmoe.planning.estimate import memory_per_rank, stage_flops
from megatron_vlmoe.planning.step_time import Cluster, step_time
from megatron_vlmoe.stream.sizes import data_parallel_size, num_micro_batches

RECOMPUTE = ("--train.recompute", "full")
TIMED = (
    *SMALL,
    *(word for kind in ("texts", "images", "pairs") for word in (f"--data.micro_{kind}", "16")),
    *(word for kind in ("texts", "images", "pairs") for word in (f"--data.global_{kind}", "64")),
)


def planned(where: Layout, arguments: tuple[str, ...], rank: Measured) -> tuple[float, ...]:
    """Bytes of a rank at its peak, FLOPs, and bytes of all its collectives, as planned."""
    config = planned_config(where, arguments)
    memory = memory_per_rank(config, where.world, "fp32")[rank.stage].total
    count = num_micro_batches(config, data_parallel_size(config.parallel, where.world))
    sent: Counter[str] = Counter()
    for found in collectives_per_step(config, where.world, "fp32", rank.stage):
        # Only a whole run asks for signals.
        sent[found.operation] += found.bytes * (found.what != "signals to stop")
    return memory, count * sum(stage_flops(config, rank.stage)), sent.total()


def memory_table(workers: Workers) -> None:
    """Planned and measured numbers of every rank of every layout."""
    print(
        "| Layout | Rank | Peak, MB | Planned | Above idle, MB | Planned | FLOPs | Planned | Collectives, bytes |"
    )
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    cases = [(name, where, ()) for name, where in LAYOUTS.items()]
    cases.append(("1 process, recompute full", LAYOUTS["1 process"], RECOMPUTE))
    for name, where, more in cases:
        arguments = (*SMALL, *more)
        plain = workers.run(where, measure, where, arguments)
        math = (*arguments, "--model.attention_backend", "math")
        counted = workers.run(where, measure, where, math)
        for number, (rank, flops) in enumerate(zip(plain, counted)):
            memory, work, sent = planned(where, arguments, rank)
            above, more_planned = rank.peak - rank.idle, memory - rank.idle
            ran = sum(rank.bytes.values())
            as_planned = "as planned" if ran == sent else f"planned {sent:,}"
            print(
                f"| {name} | {number} | {rank.peak / 1e6:.1f} | {memory / 1e6:.1f} ({memory / rank.peak - 1:+.1%}) | "
                f"{above / 1e6:.1f} | {more_planned / 1e6:.1f} ({more_planned / above - 1:+.1%}) | "
                f"{flops.flops:.4g} | {work:.4g} ({work / flops.flops - 1:+.1%}) | "
                f"{ran:,}, {as_planned} |",
                flush=True,
            )


def time_table(workers: Workers, rounds: int = 3) -> None:
    """Bounds and medians of steps; machine and layouts take turns, so that a change of speed meets both."""
    bounds: dict[str, list[tuple[float, float]]] = {name: [] for name in LAYOUTS}
    seconds: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    for _ in range(rounds):
        devices = {}
        for name, where in LAYOUTS.items():
            config = planned_config(where, TIMED)
            if where.world not in devices:
                devices[where.world] = this_device(config, where.world)
            cluster = Cluster(devices[where.world], where.world, 1e9)
            found = step_time(config, where.world, "fp32", cluster)
            bounds[name].append((found.lower, found.upper))
            # The slowest rank ends a step.
            ranks = workers.run(where, timed, where, TIMED, 4)
            seconds[name] += [max(own) for own in zip(*ranks)]
            print(f"{name}: {bounds[name][-1]}, {seconds[name][-4:]}", file=sys.stderr, flush=True)
    print("| Layout | At least, s | Measured, s | At most, s | |")
    print("|---|---:|---:|---:|---|")
    for name in LAYOUTS:
        low, high = (statistics.median(values) for values in zip(*bounds[name]))
        middle = statistics.median(seconds[name])
        spread = f"{min(seconds[name]):.2f} - {max(seconds[name]):.2f}"
        inside = "inside" if low <= middle <= high else "OUTSIDE"
        print(
            f"| {name} | {low:.2f} | {middle:.2f} ({spread}) | {high:.2f} | {inside} |", flush=True
        )


if __name__ == "__main__":
    {"memory": memory_table, "time": time_table}[sys.argv[1]](Workers(4))
