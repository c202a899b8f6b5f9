"""The command `study`: the paper's figures and tables, or a user's own comparison, from plan to picture."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_vlmoe.analysis.studies.figures import draw_study
from megatron_vlmoe.analysis.studies.plan import (
    RUNS,
    PlannedRow,
    Planner,
    Request,
    check_options,
    data_files,
)
from megatron_vlmoe.analysis.studies.results import (
    is_finished,
    read_summary,
    summarize,
    write_summary,
)
from megatron_vlmoe.analysis.studies.runner import (
    Runner,
    command_lines,
    estimate,
    locked,
    unique_runs,
)
from megatron_vlmoe.analysis.studies.scales import INDEXED, SCALES, TASKS, Scale
from megatron_vlmoe.analysis.studies.study import Study, read_study, study_from
from megatron_vlmoe.analysis.studies.table import STUDIES
from megatron_vlmoe.analysis.studies.tables import table
from megatron_vlmoe.commands.options import CommandParser
from megatron_vlmoe.config.command_line import normalize_arguments
from megatron_vlmoe.config.errors import ConfigError, unknown_name, user_files
from megatron_vlmoe.prepare.tool import positive_int
from megatron_vlmoe.runtime.files import write_text_atomic

OUTPUT = "runs/studies"
_MOST_JOBS = 4


@user_files()
def main(words: Sequence[str]) -> int:
    """Returns 1 if a run failed, 130 if the study was stopped.

    vlmoe study scaling --only tiny-dense tiny-8e --seeds 1 2 3
    """
    own, finetune = options_apart(words)
    options, others = _parser().parse_passing_on(own)
    for name in ("output", "tasks"):
        if getattr(options, name) == "":
            raise ConfigError(f"--{name} is empty")
    if options.redraw is not None:
        return _redraw(options, others)
    if options.study is None:
        raise ConfigError(f"NAME is missing: one of {', '.join(STUDIES)}, or FILE.yaml")
    check_options(others, finetune)
    scale = SCALES[options.scale]
    study = _study(options.study, scale)
    if study.name == RUNS:
        raise ConfigError(f"{options.study}: the name {RUNS} is that of the folder of all runs")
    processes = options.processes or scale.processes
    request = Request(
        output=Path(options.output),
        seeds=tuple(options.seeds or scale.seeds),
        processes=processes,
        # `--option=value` as two words, and short forms in full.
        options=tuple(normalize_arguments(others)),
        finetune=tuple(finetune),
        tasks=options.tasks or "",
        only=tuple(options.only or ()),
    )
    if len(set(request.seeds)) != len(request.seeds):
        raise ConfigError("--seeds names a seed twice")
    if options.slurm and not options.print_commands:
        raise ConfigError("--slurm goes with --print-commands")
    rows = Planner(scale, request).plan(study)
    # Processes of one run share the machine's GPUs; single ones share its cores.
    jobs = options.jobs or (min(_MOST_JOBS, os.cpu_count() or 1) if processes == 1 else 1)
    if options.dry_run:
        print("\n".join(_dry_run_lines(study, rows, scale, jobs)))
        return 0
    if _missing(rows) and options.scale == "tiny" and not options.print_commands:
        if _prepare(rows):
            # Runs are known by the content of their data, which was not there before.
            rows = Planner(scale, request).plan(study)
    _check_data(rows)
    if options.print_commands:
        print("\n".join(command_lines(unique_runs(rows), options.gpus_per_node, options.slurm)))
        return 0
    runs = unique_runs(rows)
    if processes > options.gpus_per_node and not all(map(is_finished, runs)):
        raise ConfigError(
            f"--processes {processes}: more than the {options.gpus_per_node} of a machine (--gpus-per-node); "
            "start them as `vlmoe study ... --print-commands --slurm` prints, then come back for the results"
        )
    about = {"scale": options.scale, "command": shlex.join(["vlmoe", "study", *words])}
    folder = request.output / study.name
    with locked(request.output) as lock:
        runner = Runner(runs, jobs, lock)
        runner.run()
        summary = summarize(study, rows, about, runner.failures)
        write_summary(summary, folder / "summary.json")
        _show(study, summary, folder)
    if runner.is_stopped:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    return 1 if runner.failures else 0


def _parser() -> CommandParser:
    listed = "\n".join(
        f"  {name:<12}{study(SCALES['base']).title}" for name, study in STUDIES.items()
    )
    sizes = "\n".join(f"  {name:<12}{scale.about}" for name, scale in SCALES.items())
    parser = CommandParser(
        "study",
        "Runs what a figure or table of the paper needs, and draws it: OUTPUT/NAME/{summary.json,table.md,figure.png}. "
        "What is finished is not run again, also where another study ran it; what was interrupted goes on.",
        epilog=f"Studies:\n{listed}\n\nScales:\n{sizes}\n\nEvery other option, --section.option VALUE, goes to every "
        "pretraining, and --finetune.section.option VALUE\nto every fine-tuning, where it wins over the study's own.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "study",
        nargs="?",
        metavar="NAME",
        help="a study of the list below, or a YAML file of your own",
    )
    add("--scale", choices=list(SCALES), default="tiny", help="of the list below (%(default)s)")
    add("--only", nargs="+", metavar="LABEL", help="these of its runs")
    add("--seeds", nargs="+", type=int, metavar="N", help="of every run (as the scale has it)")
    add(
        "--jobs",
        type=positive_int,
        metavar="N",
        help=f"runs side by side (one per core, at most {_MOST_JOBS}; 1 if a run has several processes)",
    )
    add(
        "--processes",
        type=positive_int,
        metavar="N",
        help="of every run, which changes what experts can hold (as the scale has it)",
    )
    add(
        "--gpus-per-node",
        type=positive_int,
        default=8,
        metavar="N",
        help="most processes on a machine (%(default)s)",
    )
    add("--tasks", metavar="DIR", help="folder of the tasks that `vlmoe index-task` prepared")
    add("--output", default=OUTPUT, metavar="DIR", help="folder of studies and runs (%(default)s)")
    add("--dry-run", action="store_true", help="check all runs, list them with a guess of the time")
    add(
        "--print-commands",
        action="store_true",
        help="print a script of the runs that are not finished, instead of running them",
    )
    add("--slurm", action="store_true", help="of jobs for Slurm, with --print-commands")
    add(
        "--redraw",
        metavar="SUMMARY",
        type=Path,
        help="draw table and figure from a summary.json, without any run",
    )
    return parser


def options_apart(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words without `--finetune.section.option VALUE ...`, and these as the options of a fine-tuning."""
    own: list[str] = []
    finetune: list[str] = []
    target = own
    for word in words:
        if word.startswith("--"):
            is_of_task = word.startswith("--finetune.")
            target = finetune if is_of_task else own
            word = f"--{word.removeprefix('--finetune.')}" if is_of_task else word
        target.append(word)
    return own, finetune


def _study(name: str, scale: Scale) -> Study:
    if name in STUDIES:
        return STUDIES[name](scale)
    if name.endswith((".yaml", ".yml")):
        return read_study(Path(name), list(scale.sizes), [task.name for task in scale.tasks])
    names = [*STUDIES, "FILE.yaml"]
    raise ConfigError(f"study {name}: {unknown_name(name, names)}")


def _redraw(options: argparse.Namespace, others: Sequence[str]) -> int:
    if others:
        raise ConfigError(f"{others[0]}: --redraw runs nothing")
    summary = read_summary(options.redraw)
    study = study_from(summary["study"], options.redraw)
    _show(study, summary, Path(options.output) / study.name)
    return 0


def _show(study: Study, summary: dict[str, Any], folder: Path) -> None:
    text = table(study, summary)
    write_text_atomic(folder / "table.md", text)
    draw_study(study, summary, folder / "figure.png")
    print(text)
    print(f"wrote {folder}/table.md and {folder}/figure.png")


def _dry_run_lines(study: Study, rows: Sequence[PlannedRow], scale: Scale, jobs: int) -> list[str]:
    """Every run with the time that it will take."""
    runs = unique_runs(rows)
    guess = estimate(runs, scale)
    seconds = guess.seconds
    lines = [f"{study.name}: {study.title}", ""]
    for run in runs:
        state = "finished"
        if run.folder in seconds:
            own = seconds[run.folder]
            state = "length known with its data" if own is None else f"about {own / 60:.1f} min"
        lines.append(f"  {run.folder.name}: {run.command}, {state}")
    known = [value for value in seconds.values() if value is not None]
    basis = f"measured on {guess.measured} finished run(s)" if guess.measured else "a guess"
    lines += [
        "",
        f"{len(runs)} runs, {len(runs) - len(seconds)} finished; about {sum(known) / jobs / 60:.0f} min left, "
        f"{jobs} side by side, at {guess.rate / 1e9:.0f} GFLOP/s a process ({basis})",
    ]
    if len(known) < len(seconds):
        lines.append(
            f"without {len(seconds) - len(known)} run(s) whose length depends on their data"
        )
    return lines


def _missing(rows: Sequence[PlannedRow]) -> list[str]:
    """Data that are not there, of runs that are not finished."""
    files = [file for run in unique_runs(rows) if not is_finished(run) for file in data_files(run)]
    return [str(file) for file in dict.fromkeys(files) if not file.exists()]


def _check_data(rows: Sequence[PlannedRow]) -> None:
    data = rows[0].pretraining.config.data
    for name in ("text", "images", "pairs", "text_tokenizer"):
        if not getattr(data, name):
            raise ConfigError(
                f"--data.{name} is missing: where the data are your own, all of them are to be named (docs/data.md)"
            )
    if missing := _missing(rows):
        raise ConfigError(
            f"{missing[0]} is missing" + f", and {len(missing) - 1} more" * (len(missing) > 1)
        )


def _prepare(rows: Sequence[PlannedRow]) -> bool:
    """Makes the quick start's data where the runs ask for these; whether it did."""
    missing = _missing(rows)
    if not all(name.startswith((f"{INDEXED}/", f"{TASKS}/")) for name in missing):
        return False
    script = Path(__file__).resolve().parents[2] / "examples" / "sample_data.sh"
    if not script.is_file():
        raise ConfigError(
            f"{missing[0]} is missing, and so is examples/sample_data.sh of the repository, which makes it"
        )
    print(f"making the sample data: {missing[0]} is not there", flush=True)
    here = Path.cwd()
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "PYTHONPATH": os.pathsep.join([str(script.parents[1]), os.environ.get("PYTHONPATH", "")]),
        "CORPUS": str(here / "corpora" / "sample-2000"),
        "INDEXED": str(here / INDEXED),
        "TASKS": str(here / TASKS) if any(name.startswith(TASKS) for name in missing) else "",
    }
    if subprocess.run(["bash", str(script)], env=environment, check=False).returncode:
        raise ConfigError("the sample data could not be made; see above")
    return True
