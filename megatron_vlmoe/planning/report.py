"""What `vlmoe plan` says: the best layout and what it needs, as text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_vlmoe.config.command_line import flat_options
from megatron_vlmoe.config.schema import Precision, RunConfig
from megatron_vlmoe.planning.collectives import collectives_per_step
from megatron_vlmoe.planning.dry_run import (
    GIB,
    checkpoint_line,
    collective_lines,
    implementation_lines,
    layout_lines,
    parameter_summary,
    table,
)
from megatron_vlmoe.planning.estimate import (
    checkpoint_bytes,
    flops_per_step,
    hardware_flops_per_step,
)
from megatron_vlmoe.planning.layout_search import (
    CHOICES,
    DOES_NOT_DIVIDE,
    OUT_OF_MEMORY,
    Layout,
    losers,
)
from megatron_vlmoe.planning.parameters import parameter_counts
from megatron_vlmoe.planning.step_time import Cluster

AS_FAST = 1.05
"""Layouts whose estimates are closer than this count as equally fast."""
SHOWN = (*CHOICES, "DP")


@dataclass(frozen=True)
class Plan:
    """What was asked and found.

    Args:
        config: the run as it was given.
        world_size: number of devices.
        precision: of the arithmetic.
        device: name of the device.
        cluster: its rates and how it is wired.
        layouts: of `search`, the best first.
        price: of one device for an hour; 0 where unknown.
    """

    config: RunConfig
    world_size: int
    precision: Precision
    device: str
    cluster: Cluster
    layouts: Sequence[Layout]
    price: float = 0.0

    @property
    def best(self) -> Layout:
        """The fastest layout, which can run."""
        return self.layouts[0]

    def counts(self) -> dict[str, int]:
        """How many layouts were looked at, and how many of them can run or why not."""
        kinds = ["can run", OUT_OF_MEMORY, DOES_NOT_DIVIDE]
        found = [layout.kind or "can run" for layout in self.layouts]
        return {"layouts": len(found), **{kind: found.count(kind) for kind in kinds}}

    def whole_run(self) -> dict[str, tuple[float, float]]:
        """Days, device hours, kWh and cost of all steps, at the lower and at the upper bound; unknown ones left out.

        Energy is the power of the boards alone, as if they always drew all of it.
        """
        time, watts = self.best.time, self.cluster.device.watts
        assert time is not None
        hours = [self.config.train.steps * seconds / 3600 for seconds in (time.lower, time.upper)]
        low, high = (self.world_size * value for value in hours)
        result = {"days": (hours[0] / 24, hours[1] / 24), "device hours": (low, high)}
        if watts:
            result["kWh"] = (low * watts / 1e3, high * watts / 1e3)
        if self.price:
            result["cost"] = (low * self.price, high * self.price)
        return result


def layout_options(layout: Layout) -> list[str]:
    """The options of `pretrain` that make a layout."""
    values = flat_options(asdict(layout.config))
    return [
        word
        for names in CHOICES.values()
        for name in names
        for word in (f"--{name}", f"{values[name]}")
    ]


def plan_text(plan: Plan, runners_up: int = 8) -> str:
    """The report that the command prints."""
    best, config = plan.best, plan.best.config
    device, time = plan.cluster.device, best.time
    assert time is not None
    model, hardware = flops_per_step(config), hardware_flops_per_step(config)
    rates = f"{device.peak(plan.precision) / 1e12:.4g} TFLOP/s in {plan.precision}"
    if device.measured:
        rates += ", measured"
    head = [
        f"Plan for {plan.world_size} x {plan.device}, {plan.cluster.per_node} per node",
        f"  each {rates}, {device.memory / 1e9:.4g} GB at {device.memory_bandwidth / 1e9:.4g} GB/s, "
        f"{device.link / 1e9:.4g} GB/s to its node, {plan.cluster.network * 8 / 1e9:.4g} Gbit/s to others",
    ]
    chosen = [
        "Best layout",
        *layout_lines(config, plan.world_size)[1:],
        *implementation_lines(config),
        f"  recompute {config.train.recompute}",
        f"  options: {' '.join(layout_options(best))}",
    ]
    parameters = [
        *parameter_summary(parameter_counts(config)),
        f"  FLOPs per step: model {model:.4g}, carried out {hardware:.4g}",
    ]
    return "\n\n".join(
        "\n".join(lines)
        for lines in (
            head,
            chosen,
            parameters,
            _memory_lines(plan),
            collective_lines(config, plan.world_size, plan.precision),
            _time_lines(plan, model),
            _run_lines(plan),
            _runners_up(plan, runners_up),
            _loser_lines(plan),
        )
        # One device sends nothing.
        if lines
    )


def _memory_lines(plan: Plan) -> list[str]:
    stages = plan.best.memory
    kept = dict.fromkeys(part for stage in stages for part in stage.kept)
    rows = [
        (name, *(f"{getattr(stage, name) / GIB:.3f}" for stage in stages))
        for name in ("weights", "gradients", "optimizer")
    ]
    rows += [
        (f"activations: {part}", *(f"{stage.kept.get(part, 0) / GIB:.3f}" for stage in stages))
        for part in kept
    ]
    for name in ("temporary", "total"):
        rows.append((name, *(f"{getattr(stage, name) / GIB:.3f}" for stage in stages)))
    header = ("part", *(f"stage {stage.stage}" for stage in stages))
    usable = plan.cluster.device.usable_memory / GIB
    return [
        f"Memory per rank in GiB, of {usable:.1f} that a plan may fill",
        *table(header, rows),
        checkpoint_line(plan.best.config, plan.precision),
    ]


def _time_lines(plan: Plan, model: float) -> list[str]:
    time = plan.best.time
    assert time is not None
    rows = [(name, f"{1e3 * seconds:.2f}") for name, seconds in time.parts.items()]
    rows.append(("lower bound", f"{1e3 * time.lower:.2f}"))
    rows.append(("upper bound, every part half as fast", f"{1e3 * time.upper:.2f}"))
    per_device = model / plan.world_size / plan.cluster.device.peak(plan.precision)
    return [
        "Time of a step in milliseconds",
        *table(("part", "ms"), rows),
        f"  model FLOPs utilization {100 * per_device / time.upper:.0f} to {100 * per_device / time.lower:.0f} %",
    ]


def _run_lines(plan: Plan) -> list[str]:
    rows = [(name, f"{low:,.4g}", f"{high:,.4g}") for name, (low, high) in plan.whole_run().items()]
    lines = [
        f"All {plan.config.train.steps:,} steps, without evaluation, checkpoints and waiting for data",
        *table(("", "at least", "at most"), rows),
    ]
    if "cost" not in plan.whole_run():
        lines.append("  --price PER_HOUR tells what it costs")
    return lines


def _cells(layout: Layout) -> tuple[str, ...]:
    return tuple(layout.choice[name] for name in SHOWN)


def _runners_up(plan: Plan, number: int) -> list[str]:
    rows = []
    for layout in plan.layouts[: number + 1]:
        if layout.time is not None:
            bounds = f"{1e3 * layout.time.lower:.1f} - {1e3 * layout.time.upper:.1f}"
            memory = f"{layout.most_memory / GIB:.1f}"
            rows.append((*_cells(layout), bounds, memory))
    counts = plan.counts()
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in counts.items() if kind != "layouts")
    return [
        f"The best of {counts['layouts']:,} layouts ({kinds})",
        *table((*SHOWN, "step, ms", "GiB"), rows),
        f"  estimates less than {100 * (AS_FAST - 1):.0f} % apart say nothing: try them for 50 steps each",
    ]


def _loser_lines(plan: Plan) -> list[str]:
    lost = losers(plan.layouts)
    if not lost:
        return ["Every choice is given"]
    rows = [(f"{loser.name} {loser.value}", *_cells(loser.layout)) for loser in lost]
    header, *lines = table(("instead", *SHOWN), rows)
    reasons = [_reason(plan, loser.layout, loser.reason) for loser in lost]
    return [
        "Why other choices lost, each in the best layout that has it",
        header,
        *(f"{line}  {reason}" for line, reason in zip(lines, reasons)),
    ]


def _reason(plan: Plan, layout: Layout, reason: str) -> str:
    if layout.seconds < AS_FAST * plan.best.seconds:
        return f"about as fast ({reason})"
    return reason


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan for programs: bytes, seconds and numbers as they are, not rounded."""
    best, config = plan.best, plan.best.config
    counts = parameter_counts(config)

    def of_layout(layout: Layout) -> dict[str, Any]:
        return {
            **layout.choice,
            "options": layout_options(layout),
            "seconds": [layout.time.lower, layout.time.upper] if layout.time else None,
            "bytes": layout.most_memory or None,
            "refused": layout.refused or None,
        }

    assert best.time is not None
    return {
        "device": plan.device,
        "devices": plan.world_size,
        "devices_per_node": plan.cluster.per_node,
        "network_bytes_per_second": plan.cluster.network,
        "device_rates": {**vars(plan.cluster.device), "peaks": dict(plan.cluster.device.peaks)},
        "precision": plan.precision,
        "parameters": {"total": counts.total, "per_token": counts.per_token},
        "flops_per_step": {
            "model": flops_per_step(config),
            "hardware": hardware_flops_per_step(config),
        },
        "checkpoint": asdict(checkpoint_bytes(config, plan.precision)),
        "best": {
            **of_layout(best),
            "seconds_by_part": dict(best.time.parts),
            "memory": [
                {
                    "stage": stage.stage,
                    "weights": stage.weights,
                    "gradients": stage.gradients,
                    "optimizer": stage.optimizer,
                    "activations": dict(stage.kept),
                    "temporary": stage.temporary,
                    "total": stage.total,
                }
                for stage in best.memory
            ],
            "collectives": [
                [
                    {**asdict(collective), "sent": collective.sent}
                    for collective in collectives_per_step(
                        config, plan.world_size, plan.precision, stage.stage
                    )
                ]
                for stage in best.memory
            ],
        },
        "steps": config.train.steps,
        "whole_run": {name: list(values) for name, values in plan.whole_run().items()},
        "counts": plan.counts(),
        "runners_up": [of_layout(layout) for layout in plan.layouts[1:51] if layout.time],
        "lost": [
            {
                "choice": loser.name,
                "value": loser.value,
                "reason": loser.reason,
                **of_layout(loser.layout),
            }
            for loser in losers(plan.layouts)
        ],
    }
