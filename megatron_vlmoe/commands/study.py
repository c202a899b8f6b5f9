"""The command `study`: the paper's figures and tables, or a user's own comparison, from plan to picture."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_vlmoe.analysis.studies.figures import draw_study
from megatron_vlmoe.analysis.studies.plan import (
    RUNS,
    PlannedRow,
    Planner,
    Request,
    data_files,
)
from megatron_vlmoe.analysis.studies.results import (
    is_finished,
    read_summary,
    summarize,
    write_summary,
)
from megatron_vlmoe.analysis.studies.runner import (
    SLURM_SCRIPT,
    Runner,
    command_lines,
    estimate,
    locked,
    unique_runs,
)
from megatron_vlmoe.analysis.studies.scales import INDEXED, SCALES, TASKS, Scale
from megatron_vlmoe.analysis.studies.study import Study, metrics_of, read_study, study_from
from megatron_vlmoe.analysis.studies.table import STUDIES
from megatron_vlmoe.analysis.studies.tables import table
from megatron_vlmoe.commands.options import CommandParser, pick_options
from megatron_vlmoe.config.command_line import option_types
from megatron_vlmoe.config.errors import ConfigError, unknown_name, user_files
from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.planning.validate import SEEDS
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
        return _redraw(options, words)
    scale = SCALES[options.scale]
    request = _request(options, others, finetune, scale)
    study = _study(options.study, scale)
    planner = Planner(scale, request)
    rows = planner.plan(study)
    _check_tasks(study, rows, request, is_own=options.study not in STUDIES)
    # Processes of one run share the machine's GPUs; single ones share its cores.
    single = request.processes == 1
    jobs = options.jobs or (min(_MOST_JOBS, os.cpu_count() or 1) if single else 1)
    if options.dry_run:
        print("\n".join(_dry_run_lines(study, rows, scale, jobs)))
        return 0
    starts = not (options.print_commands or options.collect)
    if starts and options.scale == "tiny" and _missing(rows) and _prepare(rows):
        # Runs are known by the content of their data, which was not there before.
        planner = Planner(scale, request)
        rows = planner.plan(study)
    _check_data(rows)
    runs = unique_runs(rows)
    if options.print_commands:
        print("\n".join(command_lines(runs, options.gpus_per_node, options.slurm)))
        return 0
    about = {"scale": options.scale, "command": shlex.join(["vlmoe", "study", *words])}
    folder = request.output / study.name
    if options.collect:
        counts = Counter(_leave(study, rows, about, {}, folder).values())
        others_of = [f"{count} {word}" for word, count in counts.items() if word != "finished"]
        finished = f"{counts['finished']} of {len(runs)} runs are finished"
        print(", ".join([finished, *others_of]))
        return 0
    if request.processes > options.gpus_per_node and not all(map(is_finished, runs)):
        raise ConfigError(
            f"--processes {request.processes}: more than the {options.gpus_per_node} of a machine (--gpus-per-node); "
            "start them as `vlmoe study ... --print-commands --slurm` prints, then --collect the results"
        )
    with locked(request.output) as lock:
        # Before the runs, for it may not be possible.
        folder.mkdir(parents=True, exist_ok=True)
        runner = Runner(runs, jobs, lock, planner.has_changed)
        runner.run()
        states = _leave(study, rows, about, runner.failures, folder)
    if runner.is_stopped:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0 if set(states.values()) == {"finished"} else 1


def _request(
    options: argparse.Namespace, others: Sequence[str], finetune: Sequence[str], scale: Scale
) -> Request:
    """What is asked for. Raises ConfigError where options do not fit each other."""
    if options.study is None:
        raise ConfigError(f"NAME is missing: one of {', '.join(STUDIES)}, or FILE.yaml")
    seeds = tuple(options.seeds or scale.seeds)
    if len(set(seeds)) != len(seeds):
        raise ConfigError("--seeds names a seed twice")
    for seed in seeds:
        if seed not in SEEDS:
            raise ConfigError(f"--seeds {seed}: not a whole number of 64 bits with its sign")
    if options.slurm and not options.print_commands:
        raise ConfigError("--slurm goes with --print-commands")
    processes = options.processes or scale.processes
    if options.print_commands:
        _check_machines(processes, options.gpus_per_node, options.slurm)
    return Request(
        output=Path(options.output or OUTPUT),
        seeds=seeds,
        processes=processes,
        options=tuple(others),
        finetune=tuple(finetune),
        tasks=options.tasks or "",
        only=tuple(options.only or ()),
    )


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
    add("--output", metavar="DIR", help=f"folder of studies and runs ({OUTPUT})")
    instead = parser.add_mutually_exclusive_group().add_argument
    instead(
        "--dry-run",
        action="store_true",
        help="check all runs, list them with a guess of the time",
    )
    instead(
        "--print-commands",
        action="store_true",
        help="print a script of the runs that are not finished, instead of running them",
    )
    instead(
        "--collect",
        action="store_true",
        help="summary, table and figure of what is there, also while runs go on; starts nothing",
    )
    add("--slurm", action="store_true", help="of jobs for Slurm, with --print-commands")
    add(
        "--redraw",
        metavar="SUMMARY",
        type=Path,
        help="draw table and figure from a summary.json, without any run; beside it, or in OUTPUT/NAME",
    )
    return parser


def options_apart(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words without `--finetune.section.option VALUE ...`, and these as the options of a fine-tuning."""
    prefix = "--finetune."
    types = {f"finetune.{name}": kind for name, kind in option_types(FinetuneConfig).items()}
    own, finetune = pick_options(words, lambda name: name.startswith(prefix), types)
    return own, [
        f"--{word[len(prefix) :]}" if word.startswith(prefix) else word for word in finetune
    ]


def _study(name: str, scale: Scale) -> Study:
    if name in STUDIES:
        return STUDIES[name](scale)
    if name.endswith((".yaml", ".yml")):
        study = read_study(Path(name), list(scale.sizes), [task.name for task in scale.tasks])
        if study.name in (RUNS, *STUDIES):
            what = "the folder of all runs" if study.name == RUNS else "a built-in study"
            raise ConfigError(
                f"{name}: the name {study.name} is that of {what}; give it another `name:`"
            )
        return study
    names = [*STUDIES, "FILE.yaml"]
    raise ConfigError(f"study {name}: {unknown_name(name, names)}")


def _redraw(options: argparse.Namespace, words: Sequence[str]) -> int:
    given = [word.partition("=")[0] for word in words if word.startswith("--")]
    others = [name for name in given if name not in ("--redraw", "--output")]
    if options.study is not None or others:
        raise ConfigError(f"{options.study or others[0]}: --redraw runs nothing")
    summary = read_summary(options.redraw)
    study = study_from(summary["study"], options.redraw)
    # Not where a study of this name may have results of its own.
    folder = Path(options.output) / study.name if options.output else options.redraw.parent
    _show(study, summary, folder)
    return 0


def _check_machines(processes: int, gpus_per_node: int, slurm: bool) -> None:
    """Whether the lines that are printed start this number of processes, and from this folder.

    Raises:
        ConfigError: they do not.
    """
    if processes <= gpus_per_node and not slurm:
        return
    machines = (
        f"--processes {processes}: more than the {gpus_per_node} of a machine (--gpus-per-node)"
    )
    if not slurm:
        raise ConfigError(f"{machines}; add --slurm")
    if processes > gpus_per_node and processes % gpus_per_node:
        raise ConfigError(f"{machines}, and no multiple of them")
    if not Path(SLURM_SCRIPT).is_file():
        raise ConfigError(f"--slurm: {SLURM_SCRIPT} is not here; start it in the repository's root")


def _check_tasks(study: Study, rows: Sequence[PlannedRow], request: Request, is_own: bool) -> None:
    """Whether fine-tunings take place that options and, in a user's own study, metrics are of.

    Raises:
        ConfigError: they do not.
    """
    splits: dict[str, list[str]] = {}
    for name, run in ((name, run) for row in rows for name, run in row.tasks.items()):
        assert isinstance(run.config, FinetuneConfig)
        splits.setdefault(name, []).extend(run.config.task.splits)
    if request.finetune and not splits:
        option = request.finetune[0].replace("--", "--finetune.", 1)
        raise ConfigError(f"{option}: nothing is fine-tuned in {study.name}")
    # Of the runs that are left out, others may have other splits.
    for metric in metrics_of(study) if is_own and not request.only else ():
        task, _, rest = metric.partition("/")
        split = rest.partition("/")[0]
        if task in splits and split not in splits[task]:
            hint = unknown_name(split, dict.fromkeys(splits[task]))
            raise ConfigError(f"{study.name}: metric {metric}: split {split}: {hint}")


def _leave(
    study: Study,
    rows: Sequence[PlannedRow],
    about: Mapping[str, Any],
    failures: Mapping[Path, str],
    folder: Path,
) -> dict[str, str]:
    """Writes and shows the results; returns what became of each run, in a word, by its folder's name."""
    summary = summarize(study, rows, about, failures)
    write_summary(summary, folder / "summary.json")
    _show(study, summary, folder)
    states = {name: state for row in summary["rows"] for name, state in row["states"].items()}
    told = {path.name for path in failures}
    for name, state in states.items():
        if state.startswith(("failed", "diverged")) and name not in told:
            print(f"warning: {name}: {state}", file=sys.stderr)
    return {name: state.partition(":")[0] for name, state in states.items()}


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
    for row in rows:
        data = row.pretraining.config.data
        needed = [
            name
            for name, count in (
                ("text", data.micro_texts),
                ("images", data.micro_images),
                ("pairs", data.micro_pairs),
                ("text_tokenizer", data.micro_texts + data.micro_pairs),
            )
            if count
        ]
        for name in needed:
            if not getattr(data, name):
                raise ConfigError(
                    f"{row.label}: --data.{name} is missing: where the data are your own, all of them are to be named "
                    "(docs/data.md)"
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
