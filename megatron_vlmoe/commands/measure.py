"""The commands that measure a run and show what came of one."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from megatron_vlmoe.analysis.layouts import compare_layouts
from megatron_vlmoe.analysis.plots import (
    draw_experts,
    draw_losses,
    draw_runs,
    experts_of_pools,
    last_evaluation_table,
    picture_file,
    read_metrics,
    run_folders,
    run_names,
)
from megatron_vlmoe.analysis.report import check_output, make_report, open_runs, write_report
from megatron_vlmoe.commands.options import CommandParser, output_file, output_folder
from megatron_vlmoe.config.errors import ConfigError, user_files
from megatron_vlmoe.finetune.metrics import downstream_table, guessing_rate, table_lines
from megatron_vlmoe.finetune.predictions import write_json
from megatron_vlmoe.prepare.tool import positive_int


@user_files()
def layouts(words: Sequence[str]) -> int:
    """Returns 1 above the tolerance. Other options go to `pretrain`, the data options among them.

    vlmoe compare-layouts --preset tiny-8e --layouts tp1 tp2 pp2 ep2 tp2,ep2 --steps 3 --random-data
    """
    parser = CommandParser(
        "compare-layouts",
        "Run one preset at several parallel layouts from one seed checkpoint and compare them.",
        epilog="Every other option goes to `vlmoe pretrain`.",
    )
    add = parser.add_argument
    add(
        "--layouts",
        nargs="+",
        required=True,
        metavar="L",
        help="such as tp1 tp2 pp2 ep2 tp2,ep2 pp2,vpp2 dp2; the first is the reference",
    )
    add("--steps", type=positive_int, default=3, help="steps of every run (%(default)s)")
    add("--tolerance", type=float, default=1e-4, help="largest relative difference (%(default)s)")
    add("--random-data", action="store_true", help="needs no datasets")
    add("--output", default="", help="keeps the runs in this new folder")
    options, others = parser.parse_passing_on(words)
    if options.output and Path(options.output).exists():
        raise ConfigError(f"--output {options.output} exists; name a new folder")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.output or temporary)
        command = "pretrain-random" if options.random_data else "pretrain"
        worst = compare_layouts(options.layouts, options.steps, others, folder, command)
    if worst > options.tolerance:
        print(f"above the tolerance {options.tolerance:g}")
        return 1
    return 0


@user_files()
def plot(words: Sequence[str]) -> None:
    """`vlmoe plot --run runs/quickstart`."""
    parser = CommandParser(
        "plot",
        "Draws what runs logged as one picture: losses, accuracy, gradient norm, learning rate, speed, memory, and "
        "what their experts did, of one run block by block. Prints the last evaluation.",
    )
    add = parser.add_argument
    add(
        "--run",
        nargs="+",
        required=True,
        metavar="DIR",
        help="run folders of pretraining or fine-tuning, also of runs that are going on",
    )
    add(
        "--output",
        type=output_file,
        metavar="FILE",
        help="picture to draw (of one run: plot.png in its folder)",
    )
    options = parser.parse_args(words)
    if options.output is None and len(options.run) > 1:
        own = Path(options.run[0]) / "plot.png"
        raise ConfigError(f"--output: name the picture of several runs; {own} is that of one")
    output = picture_file(options.output or Path(options.run[0]) / "plot.png")
    folders = run_folders(options.run)
    names = run_names(folders)
    runs = {name: read_metrics(folder) for name, folder in zip(names, folders)}
    experts = {name: experts_of_pools(folder) for name, folder in zip(names, folders)}
    drawn = draw_runs(runs, experts, output)
    for name, rows in runs.items():
        print(last_evaluation_table(name, rows))
    print(f"wrote {drawn}")


@user_files()
def plot_losses(words: Sequence[str]) -> None:
    """`vlmoe plot-losses --run runs/quickstart --output runs/quickstart/losses.png`."""
    parser = CommandParser(
        "plot-losses",
        "Draws the losses of one or more runs with the entropy of guessing beside them, and prints the last values. "
        "`vlmoe plot` draws everything.",
    )
    parser.add_argument(
        "--run", nargs="+", required=True, metavar="DIR", help="run folders (with metrics.jsonl)"
    )
    parser.add_argument(
        "--output", type=output_file, required=True, metavar="PNG", help="picture to draw"
    )
    parser.add_argument(
        "--experts",
        type=output_file,
        metavar="PNG",
        help="also draw load, drops and router entropy of the first run",
    )
    options = parser.parse_args(words)
    for picture in filter(None, (options.output, options.experts)):
        picture_file(picture)
    runs = {path: read_metrics(Path(path)) for path in options.run}
    drawn = draw_losses(runs, options.output)
    for path, rows in runs.items():
        print(last_evaluation_table(path, rows))
    print(f"wrote {drawn}")
    if options.experts:
        first = options.run[0]
        experts = experts_of_pools(Path(first))
        drawn = draw_experts(first, runs[first], experts, options.experts)
        print(f"wrote {drawn}")


@user_files()
def report(words: Sequence[str]) -> None:
    """`vlmoe report runs/quickstart runs/dense runs/downstream/*/moe --output runs/report`."""
    parser = CommandParser(
        "report",
        "Compares runs of pretraining, fine-tuning and evaluation in one page: options that differ, losses, balance of "
        "experts, speed, memory, parameters, downstream results beside those of the paper.",
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="DIR", help="run folders; the first is the reference")
    add(
        "--output",
        type=output_folder,
        required=True,
        metavar="DIR",
        help="folder for report.html, report.md and its figures/",
    )
    options = parser.parse_args(words)
    check_output(options.output)
    made = make_report(open_runs(options.runs), guessing_rate)
    for path in write_report(made, options.output):
        print(f"wrote {path}")


def downstream(words: Sequence[str]) -> None:
    """`vlmoe downstream-table --runs runs/downstream --data corpora/tasks --output runs/downstream/table.json`."""
    parser = CommandParser(
        "downstream-table",
        "Put fine-tuning results side by side: guessing, from scratch, from pretrained dense, from pretrained experts.",
    )
    add = parser.add_argument
    add("--runs", type=Path, required=True, metavar="DIR", help="of TASK/{scratch,dense,moe}")
    add("--data", type=Path, required=True, metavar="DIR", help="folder of the prepared tasks")
    add("--output", type=output_file, metavar="FILE", help="JSON file")
    options = parser.parse_args(words)
    table = downstream_table(options.runs, options.data)
    print("\n".join(table_lines(table)))
    if options.output:
        try:
            write_json(options.output, table)
        except OSError as error:
            raise ConfigError(f"--output {options.output}: {error.strerror}") from None
