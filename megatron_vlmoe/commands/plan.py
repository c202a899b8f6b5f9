"""The command `plan`: the best layout of a run on a number of devices, its needs and its time."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

from megatron_vlmoe.commands.options import CommandParser, output_file
from megatron_vlmoe.config.command_line import flat_options, normalize_arguments, parse_run
from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.config.schema import Precision, RunConfig
from megatron_vlmoe.planning.devices import DEVICES, Device, find_device
from megatron_vlmoe.planning.layout_search import CHOICES, search
from megatron_vlmoe.planning.report import Plan, plan_json, plan_text
from megatron_vlmoe.planning.step_time import Cluster
from megatron_vlmoe.prepare.tool import count, positive_int
from megatron_vlmoe.runtime.files import write_text_atomic
from megatron_vlmoe.runtime.lazy import load

NUMBERS = {
    "--tflops": ("peaks", 1e12, "TFLOP/s of dense matrix products, in the precision of the run"),
    "--memory-gb": ("memory", 1e9, "memory of a device in GB"),
    "--memory-bandwidth": ("memory_bandwidth", 1e9, "its bandwidth in GB/s"),
    "--link": ("link", 1e9, "GB/s, in one direction, from a device to the others of its node"),
    "--watts": ("watts", 1.0, "power of a device, for the energy"),
}
"""Options that describe a device: the field of `Device`, its unit, and help."""
TOO_FAR = (
    f"--price, --interconnect, {', '.join(NUMBERS)} or a size of the run is too large or too small"
)


def positive(text: str) -> float:
    """Argument type: a number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError("expected a number above 0")
    return value


def main(words: Sequence[str]) -> None:
    """`vlmoe plan --preset base-32e --gpus 256 --gpu h100 --gpus-per-node 8 --interconnect 400`."""
    parser = CommandParser(
        "plan",
        "Finds the fastest layout of a pretraining run on a number of devices by arithmetic: what it needs of memory "
        "and network, how long it takes, and why other layouts lost. Starts no training.",
        epilog="Every other option is one of `vlmoe pretrain` (--preset, --config, --section.option VALUE). TP, PP, "
        "EP, micro-batches and --train.recompute are chosen, unless they are given on the command line.",
    )
    add = parser.add_argument
    add("--gpus", type=positive_int, required=True, metavar="N", help="devices of the run")
    add(
        "--gpu",
        default="h100",
        metavar="NAME",
        help=f"{', '.join(DEVICES)}; custom: as the numbers below say; this: the one of this machine, a CPU being "
        "measured for half a minute (%(default)s)",
    )
    add(
        "--gpus-per-node",
        type=positive_int,
        default=8,
        metavar="N",
        help="devices of a node (%(default)s)",
    )
    add(
        "--interconnect",
        type=positive,
        default=400.0,
        metavar="GBIT",
        help="Gbit/s of one device's share of the network of its node (%(default)g)",
    )
    for option, (_, _, text) in NUMBERS.items():
        add(option, type=positive, metavar="X", help=text)
    add("--price", type=positive, metavar="X", help="of one device for an hour, in any currency")
    add("--runners-up", type=count, default=8, metavar="N", help="layouts to list (%(default)s)")
    add("--json", type=output_file, metavar="FILE", help="also write the plan for programs")
    options, others = parser.parse_passing_on(words)
    run = parse_run("pretrain", others)
    if run.dry_run or run.dry_run_world_size:
        raise ConfigError("plan starts nothing: --dry-run is for pretrain, --gpus says the ranks")
    given, values = set(normalize_arguments(others)), flat_options(asdict(run.config))
    # A micro-batch of 0 leaves an objective out, and chooses no size for the others.
    fixed = frozenset(
        name
        for name, names in CHOICES.items()
        if any(f"--{option}" in given and values[option] != 0 for option in names)
    )
    config, per_node = run.config, min(options.gpus_per_node, options.gpus)
    device, precision = _device(options, config, per_node)
    cluster = Cluster(device, per_node, options.interconnect * 1e9 / 8)
    try:
        layouts = search(config, options.gpus, precision, cluster, fixed)
        if layouts[0].time is None:
            closest = min(layouts, key=lambda layout: (not layout.memory, layout.most_memory))
            raise ConfigError(
                f"no layout runs on {options.gpus} x {options.gpu}: TP {closest.choice['TP']}, PP "
                f"{closest.choice['PP']}, EP {closest.choice['EP']}, micro-batch {closest.choice['micro-batch']}, "
                f"recompute {closest.choice['recompute']} comes closest: {closest.refused}"
            )
        plan = Plan(
            config, options.gpus, precision, options.gpu, cluster, layouts, options.price or 0.0
        )
        content = _finite_json(plan)
    except OverflowError:
        raise ConfigError(f"the result is not finite: {TOO_FAR}") from None
    print(plan_text(plan, options.runners_up))
    if options.json:
        try:
            write_text_atomic(options.json, content)
        except OSError as error:
            raise ConfigError(f"--json {options.json}: {error.strerror}") from None
        print(f"\nwrote {options.json}")


def _finite_json(plan: Plan) -> str:
    """The plan for programs.

    Raises:
        ConfigError: for a number that is not finite, which JSON does not have.
    """
    content = plan_json(plan)
    try:
        return json.dumps(content, indent=2, allow_nan=False)
    except ValueError:
        raise ConfigError(f"{_not_finite(content)} is not finite: {TOO_FAR}") from None


def _not_finite(value: Any, name: str = "") -> str:
    """Where in a plan the first number is that is not finite; empty if there is none."""
    if isinstance(value, float):
        return "" if math.isfinite(value) else name
    entries: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        entries = value.items()
    elif isinstance(value, list):
        entries = enumerate(value)
    found = (_not_finite(inner, f"{name}/{key}".lstrip("/")) for key, inner in entries)
    return next(filter(None, found), "")


def _device(
    options: argparse.Namespace, config: RunConfig, per_node: int
) -> tuple[Device, Precision]:
    """The device of `--gpu`, with the numbers that are given in place of its own, and the precision that it runs in."""
    asked = config.train.precision
    values = {
        field: getattr(options, option[2:].replace("-", "_"))
        for option, (field, _, _) in NUMBERS.items()
    }
    scaled = {field: values[field] * unit for field, unit, _ in NUMBERS.values() if values[field]}
    if options.gpu == "custom":
        needed = ("--tflops", "--memory-gb", "--memory-bandwidth")
        missing = [option for option in needed if not values[NUMBERS[option][0]]]
        if missing:
            raise ConfigError(f"--gpu custom needs {' and '.join(missing)}")
        precision: Precision = "bf16" if asked == "auto" else asked
        # Without --link a PCIe slot of the fourth generation.
        base = {"link": 32e9, "watts": 0.0, **scaled, "peaks": {precision: scaled["peaks"]}}
        return Device(**base), precision
    if options.gpu == "this":
        found = load("megatron_vlmoe.analysis.device").this_device(config, per_node)
    else:
        found = find_device(options.gpu)
    precision = asked if asked != "auto" else next(iter(_automatic(found)))
    if peak := scaled.pop("peaks", None):
        scaled["peaks"] = {**found.peaks, precision: peak}
    device = replace(found, **scaled)
    device.peak(precision)
    return device, precision


def _automatic(device: Device) -> list[Precision]:
    """Precisions of a device, that of `train.precision=auto` first."""
    order: tuple[Precision, ...] = ("bf16", "fp16", "fp32")
    return [name for name in order if name in device.peaks]
