"""Make a sparse checkpoint of a dense one: every expert a copy of the FFN of its modality; or E experts to 2E.

vlmoe upcycle --load runs/base-dense --preset base-32e --output runs/base-32e-start
vlmoe upcycle --load runs/base-dense --num-experts 8 --moe.topk 2 --output runs/base-8e-top2
vlmoe upcycle --load runs/base-8e --num-experts 16 --output runs/base-16e-start
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_vlmoe.commands.options import CommandParser
from megatron_vlmoe.config.errors import user_files
from megatron_vlmoe.convert.upcycle.plan import UpcycleOptions, sparse_config
from megatron_vlmoe.runtime.lazy import load
from megatron_vlmoe.runtime.memory import give_back_freed_tensors


def build_parser() -> CommandParser:
    """The options; those of `moe` are left to the training's own parser."""
    parser = CommandParser(
        "upcycle",
        "Make a sparse checkpoint of a dense one: every expert a copy of the FFN of its modality; or E experts to 2E.",
        epilog="Any --moe.OPTION VALUE of pretraining may follow. Which defaults and why: docs/upcycling.md.",
    )
    add = parser.add_argument
    add("--load", required=True, metavar="CKPT", help="run, checkpoint or iteration folder")
    add("--output", required=True, type=Path, metavar="CKPT", help="checkpoint folder to make")
    add("--preset", default="", metavar="NAME", help="whose MoE section is taken, such as base-32e")
    add("--num-experts", type=int, default=0, metavar="N", help="experts of every pool")
    add(
        "--router",
        choices=("auto", "small", "fresh", "zero"),
        default="auto",
        help="how new routers start (auto: fresh with moe.normalize_gate, else small)",
    )
    add(
        "--shared-from",
        choices=("vision", "text", "mean"),
        default="vision",
        help="FFN that a shared pool starts from; the function changes with each (%(default)s)",
    )
    add("--noise", type=float, default=0.0, metavar="STD", help="relative to each matrix's own")
    add("--drop-fraction", type=float, default=0.0, metavar="F", help="inner channels drawn anew")
    add("--seed", type=int, default=1234, help="of routers, noise and channels (%(default)s)")
    add(
        "--optimizer",
        choices=("reset", "carry"),
        default="reset",
        help="carry takes moments, schedule and step along (%(default)s)",
    )
    add("--overwrite", action="store_true", help="replace a checkpoint that is there")
    return parser


@user_files()
def main(words: Sequence[str]) -> None:
    """Upcycles and prints what was done."""
    arguments, others = build_parser().parse_known_args(words)
    give_back_freed_tensors()
    options = UpcycleOptions(
        router=arguments.router,
        shared_from=arguments.shared_from,
        noise=arguments.noise,
        drop_fraction=arguments.drop_fraction,
        seed=arguments.seed,
        carry_optimizer=arguments.optimizer == "carry",
    )
    run = load("megatron_vlmoe.convert.upcycle.run")
    reader = run.read_source(arguments.load)
    config = sparse_config(
        reader.config, str(reader.path), arguments.preset, arguments.num_experts, others
    )
    made = run.upcycle_checkpoint(reader, config, arguments.output, options, arguments.overwrite)
    print("\n".join(run.report_lines(made, options)))
