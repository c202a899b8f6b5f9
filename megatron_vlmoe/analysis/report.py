"""A report that compares runs: what differs between them, what they reached, what their experts did, what they cost.

It is one HTML page that needs nothing else, and the same as Markdown with its pictures beside it. What a run folder
lacks is said in the report; numbers are those of the files that runs leave: config.yaml, metrics.jsonl, metrics.json.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Optional

import yaml
from markupsafe import Markup

from megatron_vlmoe.analysis.paper_tables import TABLE_1, TABLE_2, Column, PaperTable
from megatron_vlmoe.analysis.plots import (
    LOSSES,
    NOT_FINITE,
    Key,
    Panel,
    Row,
    Section,
    divergence,
    draw_sections,
    expert_section,
    experts_of_pools,
    last_row,
    logs_blocks,
    loss_names,
    panel_svg,
    pools_of,
    read_metrics,
    run_folders,
    run_keys,
    run_names,
    sections_of,
    series,
)
from megatron_vlmoe.config.command_line import flat_options, from_dict
from megatron_vlmoe.config.errors import ConfigError, DataError, UserError
from megatron_vlmoe.config.presets import preset
from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.config.tasks import find_task
from megatron_vlmoe.config.yaml_files import parse_yaml
from megatron_vlmoe.data.manifest import load_manifest
from megatron_vlmoe.planning.estimate import flops_per_step
from megatron_vlmoe.planning.parameters import parameters
from megatron_vlmoe.planning.validate import check_architecture
from megatron_vlmoe.runtime.files import write_text_atomic
from megatron_vlmoe.runtime.json_files import read_json
from megatron_vlmoe.runtime.pages import write_page
from megatron_vlmoe.train.run_files import run_file

NONE = "\N{EN DASH}"
"""What stands in a table where there is no value."""
Guess = Callable[[str, str, str], float]
"""What guessing scores, in percent: of a task, a prefix of its data, and a split."""

_FILES = ("metrics.jsonl", "metrics.json", "config.yaml")
_NUMBER = re.compile(rf"[+-]?\d[\d.,:e+-]*[kKMB]?( |$)|{NONE}$|{NOT_FINITE}$")
# Different in every run, and of no account for what it computes.
_OWN_OPTIONS = ("checkpoint.save", "checkpoint.load", "checkpoint.step", "train.seed")
# What fine-tuning takes from the pretrained model as it is: by these, a folder of its name is recognised.
_ARCHITECTURE = (
    *(
        "model.num_layers",
        "model.hidden_size",
        "model.num_attention_heads",
        "model.ffn_hidden_size",
    ),
    *("model.num_vl_layers", "model.patch_size", "model.vocab_size", "moe.num_vision_experts"),
    *("moe.num_text_experts", "moe.num_vl_experts", "moe.layers"),
)
_ITERATION = re.compile(r"((best|checkpoints)/)?iter_\d+$")
# Settings of an evaluation that are no option of its run.
_EVALUATION = (
    *("image_size", "capacity", "micro_batch_size", "world_size", "data_parallel_size"),
    "precision",
)


_PAPER_TITLES = {column.title for paper in (TABLE_1, TABLE_2) for column in paper.columns}


@dataclass(frozen=True)
class Run:
    """What a run folder holds.

    Args:
        name: what the report calls it.
        folder: where it is.
        source: the run folder that `options` are from: its own, or that of the run that it evaluates; None where
            neither has options.
        rows: logged steps; none of a mere evaluation.
        options: of config.yaml, by `section.option`; of an evaluation those of the run that it evaluates.
        config: the same, checked; None where this program cannot read it.
        task: the downstream task; empty for pretraining.
        scores: percentages by `SPLIT/NAME` of metrics.json, of every seed.
        settings: of that evaluation.
        left_out: how many samples of every split are not among the scored ones, because they cannot be read.
        missing: what the folder lacks, in sentences.
    """

    name: str
    folder: Path
    source: Optional[Path]
    rows: Sequence[Row]
    options: Mapping[str, Any]
    config: Optional[RunConfig]
    task: str
    scores: Sequence[Mapping[str, float]]
    settings: Mapping[str, Any]
    left_out: Mapping[str, int]
    missing: tuple[str, ...]

    @property
    def is_trained(self) -> bool:
        """Whether it is a training run, and not the evaluation of one."""
        return self.source == self.folder

    @property
    def samples(self) -> dict[str, int]:
        """How many samples every evaluated split of the task has, as far as that was written."""
        found: dict[str, int] = {}
        for key, value in self.scores[0].items() if self.scores else ():
            split, _, name = key.partition("/")
            if name == "samples":
                unlabelled = self.scores[0].get(f"{split}/unlabelled", 0.0)
                found[split] = int(value + unlabelled) + self.left_out.get(split, 0)
        return found

    @property
    def data(self) -> str:
        """Prefix of the data of the task; empty where it is not known."""
        return str(self.settings.get("data") or self.options.get("task.data", ""))

    @property
    def kind(self) -> str:
        """Pretraining, fine-tuning or an evaluation of one of its checkpoints."""
        if not self.task:
            return "pretraining"
        return f"{self.task}: {'fine-tuning' if self.rows else 'evaluation'}"

    @classmethod
    def open(cls, folder: Path, name: str) -> Run:
        """Reads a run folder.

        Raises:
            DataError: it is none; or metrics.json or config.yaml is damaged.
            MetricsError: metrics.jsonl is damaged.
        """
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder")
        if not any((folder / file).is_file() for file in _FILES):
            below = [*folder.glob("*/metrics.json*"), *folder.glob("*/*/metrics.json*")]
            names = sorted({str(path.parent) for path in below})
            hint = f"; it holds runs, such as {names[0]}" if names else ""
            raise DataError(f"{folder}: not a run folder: has none of {', '.join(_FILES)}{hint}")
        has = {file: (folder / file).is_file() for file in _FILES}
        rows = read_metrics(folder) if has["metrics.jsonl"] else []
        task, scores, settings, left_out = _results(folder / "metrics.json")
        source: Optional[Path] = folder if has["config.yaml"] else None
        # Empty where weights were evaluated that were not saved.
        checkpoint = str(settings.get("checkpoint") or "")
        if source is None and checkpoint:
            source = _run_of(checkpoint, list(Path(os.path.abspath(folder)).parents), {}, task)
        options, config, wrong = (
            _configuration(source / "config.yaml") if source else ({}, None, "")
        )
        task = task or str(options.get("task.name", ""))
        missing = []
        if source is None:
            missing.append("no config.yaml: options, parameters and FLOPs are not known")
            if checkpoint:
                missing.append(f"the run of its checkpoint {checkpoint} was not found")
        elif wrong:
            missing.append(f"{wrong}: parameters and FLOPs are not known")
        if not rows and not scores:
            missing.append("nothing logged yet: no curves, speed or memory")
        elif not rows:
            missing.append("no metrics.jsonl: no curves, speed or memory")
        if task and not scores:
            missing.append("no metrics.json: the run has not ended, and is in no table of results")
        if rows and not task and not any(key.startswith("eval/") for row in rows for key in row):
            missing.append("no evaluation logged")
        if text := divergence(rows):
            missing.append(text)
        return cls(
            *(name, folder, source, rows, options, config, task, scores, settings, left_out),
            tuple(missing),
        )


def _results(
    path: Path,
) -> tuple[str, Sequence[Mapping[str, float]], Mapping[str, Any], Mapping[str, int]]:
    """Task, scores of every seed, settings and unread samples of a metrics.json; nothing if there is none.

    Raises:
        DataError: it is not such a file.
    """
    if not path.is_file():
        return "", (), {}, {}
    raw = read_json(path)
    try:
        found = list(raw["seeds"].values()) if "seeds" in raw else [raw["metrics"]]
        scores = [
            # What is not finite is null in the files of this program; others write it as it is.
            {str(k): float(v) for k, v in one.items() if v is not None and math.isfinite(float(v))}
            for one in found
        ]
        left_out = {str(split): int(count) for split, count in raw.get("left_out", {}).items()}
        return str(raw["task"]), scores, dict(raw.get("settings", {})), left_out
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError):
        raise DataError(f"{path}: not the results of a downstream task") from None


def _configuration(path: Path) -> tuple[Mapping[str, Any], Optional[RunConfig], str]:
    """Options of a config.yaml, the configuration, and what is wrong with it where this program cannot read it.

    Raises:
        DataError: it is no YAML file with sections.
    """
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError):
        raise DataError(f"{path}: not valid YAML") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: not a run's configuration")
    options = flat_options(content)
    try:
        start: RunConfig = FinetuneConfig() if "task" in content else RunConfig()
        config = from_dict(content, start, path.name)
        check_architecture(config)
        return options, config, ""
    except ConfigError as error:
        return options, None, str(error)


def _trained_in(folder: Path, options: Mapping[str, Any]) -> list[Path]:
    """The folders that relative names in a run's options may start from, most likely first.

    Where its folder still ends as the run's `--save`, that is the folder that it was started in; if the run was moved
    or saved elsewhere, all folders above it. The folder that the reader is in says nothing.
    """
    place = Path(os.path.abspath(folder))
    save = Path(os.path.normpath(str(options.get("checkpoint.save") or ".")))
    if save.parts and not save.is_absolute() and place.parts[-len(save.parts) :] == save.parts:
        return [place.parents[len(save.parts) - 1]]
    return list(place.parents)


def _run_of(
    name: str, places: Sequence[Path], like: Mapping[str, Any], task: str = ""
) -> Optional[Path]:
    """The folder of the run that a `--load` or a checkpoint names, if it can be that run.

    Args:
        places: what a relative name may start from.
        like: options of a run that started from it, whose architecture is the same.
        task: the task of a run; empty: any, or none.
    """
    for place in places:
        # A folder that is gone has none, whatever lies above it.
        folder = place / name if (place / name).exists() else place / _ITERATION.sub("", name)
        found = run_file(folder, "config.yaml") if folder.exists() else None
        if found is None:
            continue
        try:
            options = _configuration(found)[0]
        except DataError:
            continue
        if task and options.get("task.name") != task:
            continue
        # An unknown vocabulary is 0, an option of another version of this program is missing.
        if all(
            own == other
            for own, other in ((like.get(key), options.get(key)) for key in _ARCHITECTURE)
            if own not in (None, 0) and other not in (None, 0)
        ):
            return found.parent
    return None


@dataclass(frozen=True)
class Table:
    """A table: what its first column and the others are called, and its rows; the paper's are marked."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    note: str = ""
    paper_rows: Sequence[Sequence[str]] = ()

    @property
    def numbers(self) -> list[bool]:
        """Which columns hold numbers, which stand at the right."""
        rows = [*self.rows, *self.paper_rows]
        return [all(_NUMBER.match(row[place]) for row in rows) for place in range(len(self.header))]


@dataclass(frozen=True)
class Figure:
    """Sections of panels, the colours of runs, and the file of the picture of all of them in the Markdown report."""

    title: str
    sections: Sequence[Section]
    keys: Sequence[Key]
    file: str


@dataclass(frozen=True)
class Chapter:
    """A heading, sentences, tables and figures."""

    title: str
    notes: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()

    @property
    def anchor(self) -> str:
        """Its name in links."""
        return re.sub(r"\W+", "-", self.title.lower())


@dataclass(frozen=True)
class Report:
    """What the report says, from top to bottom."""

    title: str
    chapters: Sequence[Chapter] = field(default_factory=tuple)


def check_output(folder: Path) -> None:
    """Raises ConfigError if a folder for a report is that of a run, whose own report would be overwritten."""
    if any((folder / file).is_file() for file in _FILES):
        raise ConfigError(f"--output {folder}: is the folder of a run; name another one")


def open_runs(folders: Sequence[str]) -> list[Run]:
    """The runs in these folders, where one that only holds runs of several seeds stands for these.

    Raises:
        UserError: as `Run.open`.
    """
    found = run_folders(folders)
    return [Run.open(folder, name) for folder, name in zip(found, run_names(found))]


def make_report(runs: Sequence[Run], guess: Guess) -> Report:
    """Compares runs; `guess` raises UserError where the data of a task are not there any more."""
    pretraining = [run for run in runs if not run.task]
    tasks = list(dict.fromkeys(run.task for run in runs if run.task))
    starts = {run.name: _start(run, runs) for run in runs if run.scores}
    chapters = [_runs_chapter(runs, starts), _cost_chapter(runs)]
    if pretraining:
        chapters.append(_training_chapter("Pretraining", pretraining, [_held_out(pretraining)]))
    if any(run.scores for run in runs):
        chapters.append(_downstream_chapter(runs, starts, guess))
    for task in tasks:
        own = [run for run in runs if run.task == task]
        chapters.append(_training_chapter(f"Task {task}", own, [_scores(own)]))
    names = ", ".join(run.name for run in runs)
    title = f"Run {names}" if len(runs) == 1 else f"Comparison of {len(runs)} runs"
    return Report(title, chapters)


def _runs_chapter(runs: Sequence[Run], starts: Mapping[str, _Start]) -> Chapter:
    rows = []
    for run in runs:
        planned = run.options.get("train.steps")
        done = run.rows[-1]["step"] if run.rows else None
        known = isinstance(planned, int) and planned > 0
        steps = NONE if done is None else f"{done:,}" + (f" of {planned:,}" if known else "")
        load = str(run.options.get("checkpoint.load", "")) if run.options else NONE
        start = load or str(run.options.get("task.architecture", "")) or "initial weights"
        rows.append((run.name, run.kind, steps, start, str(run.folder)))
    notes = [f"{run.name}: {text}." for run in runs for text in run.missing]
    lost: dict[str, list[str]] = {}
    for run in runs:
        for text in _not_found(run, starts[run.name]) if run.name in starts else ():
            lost.setdefault(text, []).append(run.name)
        if run.scores and (first := _original(run, runs)) is not run:
            lost.setdefault(f"a copy of {first.name}, which counts once", []).append(run.name)
    notes += [f"{', '.join(names)}: {text}." for text, names in lost.items()]
    return Chapter("Runs", notes, [Table(("run", "what", "steps", "starts from", "folder"), rows)])


def _cost_chapter(runs: Sequence[Run]) -> Chapter:
    """Parameters and FLOPs by arithmetic; speed and memory as they were logged."""
    rows = []
    for run in runs:
        total, per_token, flops = _arithmetic(run.config)
        done = run.rows[-1]["step"] if run.rows else 0
        rows.append(
            (
                run.name,
                _form(total, "{:,}"),
                _form(per_token, "{:,}"),
                _form(flops, "{:.4g}"),
                _form(flops * done if flops and done else None, "{:.4g}"),
                _form(_median(run.rows, "step_seconds"), "{:.3f}"),
                _form(_median(run.rows, "tokens_per_second"), "{:,.0f}"),
                _form(_median(run.rows, "tflops_per_second_per_rank"), "{:.4g}"),
                _form(_percent(_median(run.rows, "mfu")), "{:.1f}"),
                _form(max(series(run.rows, "memory_gb")[1], default=None), "{:.2f}"),
                _time(run.rows),
            )
        )
    header = (
        *("run", "parameters", "per token of a pair", "FLOPs per step", "FLOPs so far"),
        *("seconds per step", "token slots/s", "TFLOP/s per rank", "MFU, %", "peak memory, GB"),
        "training time",
    )
    note = (
        "Parameters and FLOPs follow from config.yaml: the heads of a run are counted in its parameters, but not per "
        "token; FLOPs are those of the model (forward and backward, k experts per token, no recomputation; of "
        "fine-tuning, without the heads). Seconds, token slots and TFLOP/s are medians over the logged intervals, "
        "memory is the largest of rank 0, training time is without evaluation and saving."
    )
    return Chapter("Cost", (), [_without_empty(Table(header, rows, note=note))])


def _arithmetic(
    config: Optional[RunConfig],
) -> tuple[Optional[int], Optional[int], Optional[float]]:
    """Parameters, parameters per token of a pair, and model FLOPs of a step; None where they cannot be told."""
    try:
        if config is None:
            return None, None, None
        found = parameters(config)
        total, per_token = (sum(one.size for one in found), sum(one.activated for one in found))
        return total, per_token, flops_per_step(config)
    except ConfigError:
        return None, None, None


def _median(rows: Sequence[Row], key: str) -> Optional[float]:
    values = series(rows, key)[1]
    return statistics.median(values) if values else None


def _time(rows: Sequence[Row]) -> str:
    """Hours and minutes of all steps, at the speed of the interval that each is in."""
    before, seconds = 0, 0.0
    for step, own in zip(*series(rows, "step_seconds")):
        seconds += own * (step - before)
        before = int(step)
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if before else NONE


def _held_out(runs: Sequence[Run]) -> Table:
    """The last evaluation of pretraining runs, loss by loss."""
    columns = (
        ("loss, nats", "eval/loss/{}", "{:.4f}", 1.0),
        ("guessing by frequency", "unigram/{}", "{:.4f}", 1.0),
        ("right, %", "acc/{}", "{:.2f}", 100.0),
        ("right in the foreground, %", "acc/{}_foreground", "{:.2f}", 100.0),
        ("right in the background, %", "acc/{}_background", "{:.2f}", 100.0),
        ("grounding, nats", "eval/grounding/{}", "{:.4f}", 1.0),
    )
    rows = []
    for name in dict.fromkeys(itertools.chain.from_iterable(loss_names(run.rows) for run in runs)):
        loss = f"eval/loss/{name}"
        first = last_row(runs[0].rows, loss)
        for run in runs:
            # All cells are of this line: an older one says nothing of where the run is now.
            row = last_row(run.rows, loss)
            if not row:
                continue
            cells = []
            for _, key, form, scale in columns:
                value = row.get(key.format(name), NONE)
                if value is None:
                    value = NOT_FINITE
                cells.append(value if isinstance(value, str) else form.format(scale * value))
            against = NONE
            if run is not runs[0] and first:
                known = None not in (row[loss], first[loss])
                against = f"{row[loss] - first[loss]:+.4f}" if known else NOT_FINITE
            rows.append(
                (
                    LOSSES.get(name, name),
                    run.name,
                    f"{row['step']:,}",
                    cells[0],
                    against,
                    *cells[1:],
                )
            )
    header = ("task", "run", "step", columns[0][0], f"against {runs[0].name}")
    note = (
        "Grounding is what the other half of a pair is worth: the loss beside a wrong picture or caption minus that "
        "of the true pair. Foreground patches show more than the picture's ground."
    )
    table = Table((*header, *(title for title, *_ in columns[1:])), rows, "Last evaluation", note)
    return _without_empty(table)


def _training_chapter(title: str, runs: Sequence[Run], tables: Sequence[Table]) -> Chapter:
    """Results, balance of experts, options that differ, and curves of runs of one kind."""
    rows = {run.name: run.rows for run in runs if run.rows}
    experts = {run.name: experts_of_pools(run.folder) for run in runs}
    options = _differences(runs)
    notes = ("The options of these runs do not differ.",) if options and not options.rows else ()
    slug = re.sub(r"[^a-z0-9]+", "-", title.lower())
    figures = []
    if sections := sections_of(rows, experts):
        heading = "Curves" if len(rows) == 1 else "Curves of all runs"
        figures.append(Figure(heading, sections, run_keys(rows), f"{slug}.svg"))
    # Together they have a line each; here is what each did block by block.
    for name in filter(lambda name: logs_blocks(rows[name]), rows if len(rows) > 1 else ()):
        section = expert_section({name: rows[name]}, experts)
        assert section is not None
        figures.append(Figure(section.title, [section], (), f"{slug}-experts-{len(figures)}.svg"))
    own = [*tables, _balance(runs, experts), *([options] if options else [])]
    shown = [table for table in own if table.rows]
    if not (shown or figures or notes):
        notes = ("Nothing was logged that could be shown here.",)
    return Chapter(title, notes, shown, figures)


def _balance(runs: Sequence[Run], experts: Mapping[str, Mapping[str, int]]) -> Table:
    """What experts did at the end of runs: means over the last tenth of what was logged."""
    metrics = (
        ("fullest expert", "load_max", "{:.3f}", 1.0),
        ("emptiest expert", "load_min", "{:.3f}", 1.0),
        ("dead experts", "dead_experts", "{:.2f}", 1.0),
        ("dropped, %", "dropped_fraction", "{:.2f}", 100.0),
        ("of texts, %", "dropped_fraction/mlm", "{:.2f}", 100.0),
        ("of images, %", "dropped_fraction/mim", "{:.2f}", 100.0),
        ("of captions, %", "dropped_fraction/vlm_text", "{:.2f}", 100.0),
        ("of pairs' images, %", "dropped_fraction/vlm_image", "{:.2f}", 100.0),
        ("router entropy, nats", "router_entropy", "{:.3f}", 1.0),
        ("slots per routed token", "effective_capacity_factor", "{:.3f}", 1.0),
    )
    rows = []
    for run in runs:
        for pool in pools_of(run.rows):
            cells = [
                _recent(run.rows, f"moe/{pool}/{metric}", scale, form)
                for _, metric, form, scale in metrics
            ]
            aux = _recent(run.rows, f"loss/aux/{pool}", 1.0, "{:.4g}")
            count = _form(experts[run.name].get(pool), "{}")
            rows.append((run.name, pool, count, *cells, aux))
    note = (
        "Means over the last tenth of the logged intervals. Load is relative to the mean; the fullest and the emptiest "
        "are of any block, dead experts are summed over blocks, the auxiliary loss has its coefficient."
    )
    header = (
        "run",
        "pool",
        "experts per block",
        *(title for title, *_ in metrics),
        "auxiliary loss",
    )
    return _without_empty(Table(header, rows, "Balance of experts", note))


def _recent(rows: Sequence[Row], key: str, scale: float, form: str) -> str:
    """The mean over the last tenth of the intervals that logged a value, but at least one of them, as text."""
    values = [row[key] for row in rows if key in row]
    last = values[-max(1, len(values) // 10) :]
    if not last:
        return NONE
    return NOT_FINITE if None in last else form.format(scale * statistics.fmean(last))


def _differences(runs: Sequence[Run]) -> Optional[Table]:
    """The options that are not the same in all runs whose options are known; None if there is nothing to compare."""
    known = [run for run in runs if run.options]
    if len(known) < 2:
        return None
    options = [{**run.options, **_evaluation_options(run)} for run in known]
    names = dict.fromkeys(itertools.chain.from_iterable(options))
    rows = []
    for name in names:
        values = [_option(own.get(name)) for own in options]
        if name != "checkpoint.save" and len(set(values)) > 1:
            rows.append((name, *values))
    header = ("option", *(run.name for run in known))
    return Table(header, rows, "Options that differ")


def _evaluation_options(run: Run) -> dict[str, Any]:
    return {
        f"evaluation: {name}": run.settings[name] for name in _EVALUATION if name in run.settings
    }


def _option(value: Any) -> str:
    if value is None:
        return NONE
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "none"
    return str(value).lower() if isinstance(value, bool) else str(value) or "none"


def _scores(runs: Sequence[Run]) -> Table:
    """All scores of metrics.json, in percent, and numbers of samples."""
    known = [run for run in runs if run.scores]
    names = dict.fromkeys(key for run in known for one in run.scores for key in one)
    rows = []
    for name in names:
        form = "{:,.0f}" if name.endswith(("/samples", "/unlabelled")) else "{:.2f}"
        cells = [_mean([one[name] for one in run.scores if name in one], form) for run in known]
        rows.append((name, *cells))
    return Table(("score", *(run.name for run in known)), rows, "Scores, %")


def _mean(values: Sequence[float], form: str = "{:.2f}") -> str:
    """The mean; of several seeds with the standard deviation and their number."""
    if not values:
        return NONE
    mean = form.format(statistics.fmean(values))
    if len(values) == 1 or "0f" in form:
        return mean
    return f"{mean} \N{PLUS-MINUS SIGN} {form.format(statistics.stdev(values))} ({len(values)})"


@dataclass(frozen=True)
class _Start:
    """What a fine-tuned model was pretrained as.

    Args:
        label: name of the pretrained run, or of the architecture.
        key: what tells it from other models, which may have the same label.
        folder: of the pretrained run, if it is still there.
        options: of that run.
        config: of that run, or of the architecture where a model was trained from scratch.
        lost: the run that was not found on the way there; empty where all were found.
    """

    label: str
    key: str
    folder: Optional[Path] = None
    options: Mapping[str, Any] = field(default_factory=dict)
    config: Optional[RunConfig] = None
    lost: str = ""


@dataclass
class _Setting:
    """Runs of a task that differ in nothing but their seed.

    `data` are all names of their data, `samples` how many every split has, and `scores` are by column and checkpoint.
    """

    options: str
    data: set[str]
    samples: dict[str, int]
    names: list[str] = field(default_factory=list)
    scores: dict[str, dict[str, float]] = field(default_factory=dict)

    def takes(self, options: str, data: set[str], samples: Mapping[str, int]) -> bool:
        """Whether a run with these belongs here."""
        same = all(self.samples.get(split, count) == count for split, count in samples.items())
        return self.options == options and not self.data.isdisjoint(data) and same


@dataclass
class _Model:
    """A pretrained model, and what it was fine-tuned to: settings by the dataset that they are about."""

    starts: list[_Start]
    settings: dict[str, list[_Setting]] = field(default_factory=dict)


def _downstream_chapter(runs: Sequence[Run], starts: Mapping[str, _Start], guess: Guess) -> Chapter:
    """Tables 1 and 2 of the paper with rows for these runs, one for every pretrained model."""
    models: dict[str, _Model] = {}
    columns: dict[str, Column] = {}
    sources: dict[str, list[Run]] = {}
    for run in runs:
        own_columns = list(_columns(run)) if run.scores else []
        if not own_columns:
            continue
        start = starts[run.name]
        model = models.setdefault(start.key, _Model([]))
        model.starts.append(start)
        checkpoint = str(run.settings.get("checkpoint", ""))
        own = {name: value for name, value in run.options.items() if name not in _OWN_OPTIONS}
        own |= _evaluation_options(run) | {"weights": Path(checkpoint).parent.name == "best"}
        own.pop("task.data", None)
        options, names = repr(sorted(own.items())), {os.path.normpath(run.data)}
        if run.source is not None:
            # One place may have several names.
            names |= {
                os.path.normpath(place / run.data)
                for place in _trained_in(run.source, run.options)[:1]
            }
        # What is in the same columns, though it be of several datasets.
        first = own_columns[0].title
        kind = first.split()[0] if first in _PAPER_TITLES else Path(run.data).name
        settings = model.settings.setdefault(f"{run.task} {kind}", [])
        setting = next((s for s in settings if s.takes(options, names, run.samples)), None)
        if setting is None:
            setting = _Setting(options, set(), {})
            settings.append(setting)
        setting.data |= names
        setting.samples |= run.samples
        setting.names.append(run.name)
        for column in own_columns:
            columns[column.title] = column
            sources.setdefault(column.title, []).append(run)
            # A checkpoint that is evaluated twice in the same way is one result.
            for number, one in enumerate(run.scores):
                score = one[column.metric]
                place = f"{_evaluated(run, checkpoint, runs) or f'{checkpoint} {score}'} {number}"
                setting.scores.setdefault(column.title, {})[place] = score
    tables = []
    for paper in (TABLE_1, TABLE_2):
        tasks = {column.task for column in paper.columns}
        shown = [column for column in columns.values() if column.task in tasks]
        if shown:
            tables.append(_downstream_table(paper, shown, models, sources, guess))
    known = {column.task for paper in (TABLE_1, TABLE_2) for column in paper.columns}
    others = [column for column in columns.values() if column.task not in known]
    if others:
        paper = PaperTable("Other tasks", (), ())
        tables.append(_downstream_table(paper, others, models, sources, guess))
    data = dict.fromkeys(f"{run.task}: {run.data or 'not known'}" for run in runs if run.scores)
    notes = [
        "Scores are percentages. Rows marked \N{LEFT DOUBLE QUOTATION MARK}paper\N{RIGHT DOUBLE QUOTATION MARK} are "
        "the numbers that arXiv 2303.07226 reports (* reproduced by its authors), on the official data; runs on other "
        "data, such as the sample corpus, cannot be compared with them.",
        f"Data of these runs: {'; '.join(data)}.",
        "A row is a pretrained model. Where several runs of it differ in their seed alone, their mean, standard "
        "deviation and number are given; runs that differ in more have rows of their own.",
    ]
    return Chapter("Downstream tasks", notes, tables)


def _columns(run: Run) -> Iterator[Column]:
    """The columns that a run has a number for: those of the paper where its data have the size of the official ones.

    Scores on other data have columns of their own: those that the paper has columns for, and the task's main score.
    """
    task, data, samples = run.task, run.data, run.samples
    known = [
        column for paper in (TABLE_1, TABLE_2) for column in paper.columns if column.task == task
    ]
    scored = set(run.scores[0]).intersection(*run.scores[1:])
    found = [
        column
        for column in known
        if column.metric in scored
        and samples.get(column.metric.partition("/")[0]) == column.samples
    ]
    yield from found
    try:
        spec = find_task(task)
    except ConfigError:
        return  # of a plug-in that is not installed here
    main = f"{spec.table_split or spec.splits[0]}/{spec.best_metric}"
    others = {column.metric for column in known} - {column.metric for column in found}
    extra = [main] if main not in {column.metric for column in known} else []
    for metric in (*extra, *sorted(others)):
        if metric in scored:
            name = f"{Path(data).name} " if Path(data).name != task else ""
            yield Column(f"{task} {name}{metric}", task, metric)


def _original(run: Run, runs: Sequence[Run]) -> Run:
    """The first of these runs that a training run is a copy of, down to its speed; itself if there is none."""
    if not run.is_trained or not run.rows:
        return run
    same = (
        other
        for other in runs
        if other.is_trained
        and (other.options, other.scores, other.rows) == (run.options, run.scores, run.rows)
    )
    return next(same, run)


def _evaluated(run: Run, checkpoint: str, runs: Sequence[Run]) -> str:
    """The checkpoint that scores are of, from the folder of its run, wherever that was when it was trained.

    Empty where that run is not there.
    """
    if run.source is None:
        return ""
    source = run.source.resolve()
    trained = (other for other in runs if other.is_trained and other.folder.resolve() == source)
    own = next(trained, None)
    folder = run.source if own is None else _original(own, runs).folder
    iteration = _ITERATION.search(checkpoint)
    return f"{folder.resolve()} {iteration[0] if iteration else ''}"


def _downstream_table(
    paper: PaperTable,
    own: Sequence[Column],
    models: Mapping[str, _Model],
    sources: Mapping[str, Sequence[Run]],
    guess: Guess,
) -> Table:
    """A table of the paper: its columns and those of these runs, rows of these runs, then its own rows."""
    titles = list(dict.fromkeys(column.title for column in (*paper.columns, *own)))
    rows = []
    labels = [model.starts[0].label for model in models.values()]
    for model in models.values():
        start = model.starts[0]
        for place in range(max(map(len, model.settings.values()))):
            scores: dict[str, list[float]] = {}
            names: list[str] = []
            for settings in model.settings.values():
                for setting in settings[place : place + 1]:
                    scores |= {title: list(one.values()) for title, one in setting.scores.items()}
                    # The row says whose numbers it has where there are others.
                    several = len(settings) > 1 or labels.count(start.label) > 1
                    if several and not set(titles).isdisjoint(setting.scores):
                        names += setting.names
            if not set(titles).isdisjoint(scores):
                label = start.label + (f" ({', '.join(names)})" if names else "")
                cells = [_mean(scores.get(title, ())) for title in titles]
                rows.append((label, *_facts(model.starts), *cells))
    guesses = list(_guesses(titles, own, sources, guess))
    if set(guesses) != {NONE}:
        rows.append(("guessing", NONE, NONE, NONE, *guesses))
    paper_rows = [
        (
            f"paper: {row.model}",
            *(row.images, row.steps, row.parameters or NONE),
            *(
                _form(score, "{:.2f}" if paper is TABLE_1 and place < 4 else "{:.1f}")
                for place, score in enumerate(row.scores)
            ),
            *[NONE] * (len(titles) - len(row.scores)),
        )
        for row in paper.rows
    ]
    header = ("model", "pretrained images", "pretraining steps", "parameters per token", *titles)
    return _without_empty(Table(header, rows, paper.title, paper_rows=paper_rows))


def _facts(starts: Sequence[_Start]) -> tuple[str, str, str]:
    """Images of pairs and steps of pretraining, and parameters per token of a model, where they are known."""
    steps = starts[0].options.get("train.steps")
    # From scratch: a task without texts does not know the vocabulary, so that nothing is said of it.
    per_token = max(
        (value for start in starts if (value := _arithmetic(start.config)[1])), default=None
    )
    return (
        _form(_pretraining_images(starts[0]), "{:,}"),
        _form(steps if isinstance(steps, int) else None, "{:,}"),
        NONE if per_token is None else f"{per_token / 1e6:.3g}M",
    )


def _pretraining_images(start: _Start) -> Optional[int]:
    """How many images the pairs of a pretrained model have; None where their dataset is not there any more."""
    if start.folder is None:
        return None
    total = 0
    for prefix in map(str, start.options.get("data.pairs", ())):
        # Weights stand between the prefixes of a blend.
        if re.fullmatch(r"[\d.]+", prefix):
            continue
        for place in _trained_in(start.folder, start.options):
            try:
                manifest = load_manifest(str(place / prefix))
            except DataError:
                continue
            if manifest.vocab_size in (None, start.options.get("model.vocab_size")):
                total += manifest.documents
                break
        else:
            return None
    return total or None


def _task_data(run: Run, split: str) -> Optional[str]:
    """Where the prepared data of a task are, if a split is still there and has as many samples as were scored."""
    places: Sequence[Path] = list(Path(os.path.abspath(run.folder)).parents)
    if run.source is not None:
        places = _trained_in(run.source, run.options)
    for place in places if run.data else ():
        try:
            manifest = load_manifest(f"{place / run.data}_{split}")
        except DataError:
            continue
        counted = manifest.samples is not None and split in run.samples
        samples = (manifest.samples or 0) + run.left_out.get(split, 0)
        if manifest.kind == run.task and not (counted and samples != run.samples[split]):
            return str(place / run.data)
    return None


def _guesses(
    titles: Sequence[str],
    own: Sequence[Column],
    sources: Mapping[str, Sequence[Run]],
    guess: Guess,
) -> Iterator[str]:
    """What guessing scores in every column; a dash where it is not known, or another on each of several datasets."""
    columns = {column.title: column for column in own}
    for title in titles:
        found: set[Optional[float]] = set()
        if title in columns:
            column = columns[title]
            split, _, metric = column.metric.partition("/")
            places = {_task_data(run, split) for run in sources[title]} - {None}
            for place in sorted(filter(None, places)):
                try:
                    if metric == find_task(column.task).best_metric:
                        found.add(guess(column.task, place, split))
                except UserError:
                    found.add(None)
        yield _form(found.pop() if len(found) == 1 else None, "{:.2f}")


def _start(run: Run, runs: Sequence[Run]) -> _Start:
    """What a fine-tuned model was pretrained as, as far back as the runs are still there."""
    names = {other.folder.resolve(): other.name for other in runs}
    options, folder, seen = run.options, run.source, set[Path]()
    while folder is not None and (load := str(options.get("checkpoint.load", ""))):
        found = _run_of(load, _trained_in(folder, options), options)
        if found is None or found.resolve() in seen:
            # Not to be told from others of this name and architecture.
            shape = [options.get(key) for key in _ARCHITECTURE]
            return _Start(load, f"{os.path.normpath(load)} {shape}", lost=load)
        folder = found
        seen.add(folder.resolve())
        options, config, _ = _configuration(folder / "config.yaml")
        if "task.name" not in options:
            label = names.get(folder.resolve(), load)
            return _Start(label, _identity(folder), folder, options, config)
    architecture = options.get("task.architecture")
    if not architecture:
        return _Start(run.name, run.name)
    shape = [options.get(key) for key in _ARCHITECTURE if key != "model.vocab_size"]
    config = _architecture(str(architecture), run.config)
    return _Start(f"{architecture}, from scratch", f"{architecture} {shape}", config=config)


def _identity(folder: Path) -> str:
    """The same for a pretrained run and copies of it: what it logged, with its speed. Without that, where it is."""
    try:
        content = (folder / "metrics.jsonl").read_bytes() + (folder / "config.yaml").read_bytes()
    except OSError:
        return str(folder.resolve())
    return hashlib.sha256(content).hexdigest()


def _architecture(name: str, config: Optional[RunConfig]) -> Optional[RunConfig]:
    """The pretraining model of an architecture, in the size and with the vocabulary of a run from scratch.

    Tasks have lengths of text of their own. None where the run has no texts, and so no vocabulary.
    """
    try:
        start = preset(name)
    except ConfigError:
        return None
    if config is None or not config.model.vocab_size:
        return None
    lengths = {
        name: getattr(start.model, name)
        for name in ("text_length", "pair_text_length", "image_size")
    }
    return replace(start, model=replace(config.model, **lengths), moe=config.moe)


def _not_found(run: Run, start: _Start) -> Iterator[str]:
    """What the downstream tables lack because it is not where the run had it, in sentences."""
    if not any(_columns(run)):
        yield f"the downstream tables have no column for its scores; chapter Task {run.task} has them"
        return
    if start.lost:
        yield (
            f"the run {start.lost} that training started from was not found, or has another architecture: pretrained "
            "images, pretraining steps and parameters per token are not known"
        )
    elif start.folder is not None and _pretraining_images(start) is None:
        if start.options.get("data.pairs"):
            yield f"the pairs that {start.label} was pretrained on were not found: no number of images"
    if not any(_task_data(run, split) for split in {key.split("/")[0] for key in run.scores[0]}):
        name = run.data or "of the task"
        yield f"the data {name} were not found, or are not those of the run: guessing is not known"


def _form(value: Any, form: str) -> str:
    """A value as text; a dash where there is none."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return NONE
    return form.format(value)


def _percent(value: Optional[float]) -> Optional[float]:
    return None if value is None else 100.0 * value


def _without_empty(table: Table) -> Table:
    """The table without columns in which no row has a value."""
    every = [*table.rows, *table.paper_rows]
    kept = [
        place
        for place in range(len(table.header))
        if any(row[place] != NONE for row in every) or not every
    ]

    def cut(row: Sequence[str]) -> list[str]:
        return [row[place] for place in kept]

    rows, paper_rows = list(map(cut, table.rows)), list(map(cut, table.paper_rows))
    return Table(cut(table.header), rows, table.title, table.note, paper_rows)


def write_report(report: Report, folder: Path) -> list[Path]:
    """Writes FOLDER/report.html, FOLDER/report.md and the pictures of the latter; returns the first two.

    Raises:
        FileError: a file cannot be written.
    """
    page, text = folder / "report.html", folder / "report.md"
    for chapter in report.chapters:
        for figure in chapter.figures:
            title = f"{chapter.title}: {figure.title}"
            draw_sections(title, figure.sections, figure.keys, folder / "figures" / figure.file)
    numbers = itertools.count()

    def svg(panel: Panel) -> Markup:
        return Markup(_element(panel_svg(panel), f"p{next(numbers)}", panel.title))

    template = Path(__file__).with_name("report.html.j2")
    dashes = {"-": "", "--": "6 3", ":": "2 3", "-.": "6 2 2 2"}
    write_page(page, template, {"svg": svg}, report=report, dashes=dashes)
    write_text_atomic(text, "\n".join(_markdown(report)) + "\n")
    return [page, text]


def _element(svg: str, prefix: str, title: str) -> str:
    """A drawing for a page that has others: its own names for its parts, and a title for those who do not see it."""
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    label = title.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def _markdown(report: Report) -> Iterator[str]:
    """The lines of the report as Markdown."""
    yield from (f"# {_escaped(report.title)}", "")
    for chapter in report.chapters:
        yield from (f"## {_escaped(chapter.title)}", "")
        for note in chapter.notes:
            yield from (_escaped(note), "")
        for table in chapter.tables:
            if table.title:
                yield from (f"### {_escaped(table.title)}", "")
            yield _line(table.header)
            yield f"|{'|'.join('---:' if number else '---' for number in table.numbers)}|"
            yield from map(_line, (*table.rows, *table.paper_rows))
            yield from ("", *((_escaped(table.note), "") if table.note else ()))
        for figure in chapter.figures:
            title = _escaped(figure.title)
            yield from (f"### {title}", "", f"![{title}](figures/{figure.file})", "")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_escaped, cells))} |"


def _escaped(text: str) -> str:
    """A text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_\[\]<>|#&$])", r"\\\1", " ".join(text.split()))
