"""Measures training steps of presets against each other on random data, in turn within one run.

Unknown options (`--section.option VALUE`) go to every preset. Under torchrun, ranks step together.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Mapping

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_vlmoe.cli import run_guarded


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Own options, and those for the presets."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--presets", nargs="+", required=True, help="the first is the reference")
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="turns of every preset")
    parser.add_argument("--steps", type=int, default=2, help="measured steps of a turn")
    parser.add_argument("--warmup", type=int, default=1, help="steps of a turn before them")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    parser.add_argument("--vocab-size", type=int, default=64_000)
    parser.add_argument("--visual-vocab-size", type=int, default=8_192)
    parser.add_argument("--caption-mask-slots", type=int, default=16)
    parser.add_argument("--dispatcher", choices=["fixed_capacity", "alltoall", "dropless"])
    parser.add_argument("--output", type=Path, help="JSON file, rewritten after every round")
    options, extra = parser.parse_known_args(arguments)
    if options.rounds < 1 or options.steps < 1 or options.warmup < 0:
        parser.error("--rounds and --steps must be at least 1 and --warmup at least 0")
    if len(set(options.presets)) != len(options.presets):
        parser.error("--presets names a preset twice")
    if options.dispatcher:
        extra += ["--moe.dispatcher", options.dispatcher]
    return options, extra


def bench(options: argparse.Namespace, extra: list[str]) -> int:
    """Runs, prints the table, writes the JSON."""
    import torch

    from megatron_vlmoe.analysis.bench import (
        BenchOptions,
        PresetTimes,
        bench_config,
        run_bench,
        summarize,
        table,
        write_json,
    )
    from megatron_vlmoe.runtime.distributed import destroy, initialize, is_rank_zero

    if options.threads:
        torch.set_num_threads(options.threads)
    names = [field.name for field in fields(BenchOptions)]
    wanted = BenchOptions(**{name: getattr(options, name) for name in names})
    configs = [bench_config(wanted, name, extra, 1) for name in wanted.presets]
    warnings.filterwarnings("ignore")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    ranks = initialize(configs[0].parallel, configs[0].train.seed)

    def progress(line: str) -> None:
        if is_rank_zero():
            print(line, file=sys.stderr, flush=True)

    def after_round(times: Mapping[str, PresetTimes]) -> None:
        if is_rank_zero() and options.output:
            write_json(summarize(wanted, times, configs[0]), options.output)

    times = run_bench(wanted, extra, ranks, progress, after_round)
    if is_rank_zero():
        print("\n".join(table(summarize(wanted, times, configs[0]))))
    destroy()
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Parses and runs."""
    options, extra = parse(arguments)
    return run_guarded(lambda: bench(options, extra))


if __name__ == "__main__":
    raise SystemExit(main())
