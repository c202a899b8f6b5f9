"""What a study is: runs, the columns and panels that show them, and the claims that they decide.

A study in a YAML file has the same fields, and so has the definition in a summary.json, from which table and figure
are drawn again.
"""

from __future__ import annotations

import dataclasses
import shlex
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_vlmoe.analysis.studies.metrics import (
    DROPPED,
    HELD_OUT,
    LAST,
    SCORES,
    TRAINING,
    without_block,
)
from megatron_vlmoe.config.command_line import flat_options, read_yaml
from megatron_vlmoe.config.errors import ConfigError, did_you_mean, unknown_name
from megatron_vlmoe.config.presets import EXPERTS
from megatron_vlmoe.runtime.json_files import is_number

Kind = Literal["curve", "training", "values", "blocks"]
Axis = Literal["flops", "seconds", "step"]

# Bytes in the name of a folder.
_LONGEST_NAME = 255


@dataclass(frozen=True)
class Run:
    """One pretraining, once per seed, and what is fine-tuned from it.

    Args:
        label: how table, figure and claims call it.
        experts: second half of the preset: `dense`, `8e`, `16e` or `32e`.
        options: of `pretrain`, on top of those of the scale.
        tasks: which of the scale's tasks are fine-tuned from it.
        finetune: options of these fine-tunings, on top of those of the scale.
        size: one of the scale's sizes; empty: its main one.
    """

    label: str
    experts: str
    options: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    finetune: tuple[str, ...] = ()
    size: str = ""


@dataclass(frozen=True)
class Panel:
    """One pair of axes of the figure.

    Args:
        kind: `curve` draws held-out losses over training, `training` training losses over steps, `values` the last
            value of metrics for every run, `blocks` dropped tokens block by block.
        metrics: one for `curve` and `training`; those side by side of `values`; the prefixes of `blocks`.
        x: horizontal axis of `curve`.
        title: above the panel; empty: the name of the metric.
        labels: runs that are drawn; empty: all.
    """

    kind: Kind
    metrics: tuple[str, ...]
    x: Axis = "step"
    title: str = ""
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Part:
    """A comparison that a claim makes: a sum of metrics of runs that the claim says is above zero.

    Args:
        text: what is compared, in words.
        terms: factor, metric and label of a run; the factors of metrics with one unit add up to a difference.
        equal_flops: takes held-out losses where the run of these that trained least has ended, in FLOPs.
    """

    text: str
    terms: tuple[tuple[float, str, str], ...]
    equal_flops: bool = False


@dataclass(frozen=True)
class Claim:
    """What the paper says, or the author of a study; it holds if all of its parts do."""

    text: str
    source: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class PaperRow:
    """Numbers that the paper prints, by the metrics that are measured here."""

    label: str
    values: Mapping[str, float]


@dataclass(frozen=True)
class Study:
    """A study at one scale.

    Args:
        name: of its folder.
        title: what it shows, and where in the paper.
        runs: what is trained.
        columns: metrics of the table.
        panels: of the figure.
        claims: what is decided.
        scores: metrics of fine-tuning whose mean is the metric `average`.
        paper: the paper's own rows, shown below ours.
    """

    name: str
    title: str
    runs: tuple[Run, ...]
    columns: tuple[str, ...]
    panels: tuple[Panel, ...]
    claims: tuple[Claim, ...] = ()
    scores: tuple[str, ...] = ()
    paper: tuple[PaperRow, ...] = ()


def below(metric: str, lower: str, higher: str, equal_flops: bool = False) -> Part:
    """The part that says that a metric is lower for one run than for another."""
    text = f"{metric}: {lower} below {higher}" + (" at equal FLOPs" if equal_flops else "")
    return Part(text, ((1.0, metric, higher), (-1.0, metric, lower)), equal_flops)


def above(metric: str, higher: str, lower: str) -> Part:
    """The part that says that a metric is higher for one run than for another."""
    terms = ((1.0, metric, higher), (-1.0, metric, lower))
    return Part(f"{metric}: {higher} above {lower}", terms)


def read_study(path: Path, sizes: Sequence[str], tasks: Sequence[str]) -> Study:
    """A study of a user's own from a YAML file; see docs/studies.md.

    Args:
        sizes: names of the scale's sizes.
        tasks: names of the scale's tasks.

    Raises:
        ConfigError: the file cannot be read, or has something that is no part of a study.
    """
    content = read_yaml(path, str(path))
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected `runs:` and the other fields of a study")
    if not content.get("runs"):
        raise ConfigError(f"{path}: has no runs")
    study = study_from({"name": path.stem, "title": path.stem, **_with_defaults(content)}, path)
    _check_names(study, path, sizes, tasks)
    _check_metrics(study, path)
    return study


def _check_names(study: Study, path: Path, sizes: Sequence[str], tasks: Sequence[str]) -> None:
    """Labels, sizes, tasks and experts. Raises ConfigError."""
    labels = [run.label for run in study.runs]
    for run in study.runs:
        where = f"{path}: run {run.label}"
        if labels.count(run.label) > 1:
            raise ConfigError(f"{where}: two runs have this label")
        if run.experts not in EXPERTS:
            raise ConfigError(
                f"{where}: experts {run.experts}: {unknown_name(run.experts, EXPERTS)}"
            )
        if run.size and run.size not in sizes:
            raise ConfigError(f"{where}: size {run.size}: {unknown_name(run.size, sizes)}")
        for task in run.tasks:
            if task not in tasks:
                raise ConfigError(f"{where}: task {task}: {unknown_name(task, tasks)}")
        if run.finetune and not run.tasks:
            raise ConfigError(f"{where}: finetune: the run has no `tasks:` to fine-tune")
    named = [
        *((f"panel {panel.metrics[0]}", label) for panel in study.panels for label in panel.labels),
        *(
            (f"claim {claim.text!r}", label)
            for claim in study.claims
            for part in claim.parts
            for _, _, label in part.terms
        ),
    ]
    for what, label in named:
        if label not in labels:
            raise ConfigError(f"{path}: {what}: run {label}: {unknown_name(label, labels)}")


def metrics_of(study: Study) -> list[str]:
    """All metrics that a study names, but for those that the paper alone has."""
    printed = {name for row in study.paper for name in row.values}
    named = [
        *(name for name in study.columns if name not in printed),
        *(name for panel in study.panels for name in panel.metrics),
        *(term[1] for claim in study.claims for part in claim.parts for term in part.terms),
        *study.scores,
    ]
    return list(dict.fromkeys(named))


def _check_metrics(study: Study, path: Path) -> None:
    """Whether every metric that the study names is one that its runs may have. Raises ConfigError."""
    printed = {name for row in study.paper for name in row.values}
    tuned = list(dict.fromkeys(task for run in study.runs for task in run.tasks))
    last = (*LAST, *(("average",) if study.scores else ()))
    kinds: Mapping[Kind, Sequence[str]] = {
        **{"curve": HELD_OUT, "training": TRAINING},
        **{"values": last, "blocks": DROPPED},
    }
    named: list[tuple[str, str, Sequence[str]]] = [
        *(("columns", name, last) for name in study.columns if name not in printed),
        *(
            (f"panels[{place}]", name, kinds[panel.kind])
            for place, panel in enumerate(study.panels, 1)
            for name in panel.metrics
        ),
        *(
            (f"claim {claim.text!r}", name, HELD_OUT if part.equal_flops else last)
            for claim in study.claims
            for part in claim.parts
            for _, name, _ in part.terms
        ),
    ]
    for name in study.scores:
        if wrong := _wrong_score(name, tuned):
            raise ConfigError(f"{path}: score {name}: {wrong}")
    for where, name, known in named:
        if name in known or (known is last and without_block(name) in DROPPED):
            continue
        wrong = f"unknown{did_you_mean(name, known)}; docs/studies.md lists what is measured"
        if known is not last:
            wrong = unknown_name(name, known)
        elif name.count("/") > 1 and not did_you_mean(name, known):
            wrong = _wrong_score(name, tuned)
        if wrong:
            raise ConfigError(f"{path}: {where}: metric {name}: {wrong}")
    for row in study.paper:
        for name in row.values:
            if name not in study.columns:
                hint = did_you_mean(name, study.columns)
                raise ConfigError(f"{path}: paper {row.label}: {name} is not in `columns:`{hint}")


def _wrong_score(metric: str, tuned: Sequence[str]) -> str:
    """What is wrong with TASK/SPLIT/METRIC, where these tasks are fine-tuned; empty if nothing is."""
    task, _, rest = metric.partition("/")
    score = rest.partition("/")[2].partition("/")[0]
    if task not in tuned:
        return f"task {task}: {unknown_name(task, tuned) if tuned else 'no run has `tasks:`'}"
    if not score:
        return "expected TASK/SPLIT/METRIC"
    return "" if score in SCORES else f"{score}: {unknown_name(score, SCORES)}"


def _with_defaults(content: Mapping[str, Any]) -> dict[str, Any]:
    """Fills in the columns and panels that nobody asked for."""
    given = content.get("scores")
    scores = tuple(given) if isinstance(given, list) else ()
    losses = ("mlm", "mim", "vlm")
    columns = ("mlm", "mim", "vlm", "dropped", "seconds_per_step", *scores)
    panels: list[dict[str, Any]] = [
        {"kind": "curve", "metrics": (loss,), "x": "flops"} for loss in losses
    ]
    panels += [{"kind": "values", "metrics": scores}] if scores else []
    return {"columns": columns, "panels": panels, **content}


def study_from(content: Mapping[str, Any], where: object) -> Study:
    """The study that nested dictionaries and lists, from YAML or JSON, describe.

    Raises:
        ConfigError: naming `where` and the field that is unknown, missing or wrong.
    """
    study = _make(Study, content, str(where))
    too_long = len(study.name.encode()) > _LONGEST_NAME
    if study.name.startswith(".") or "/" in study.name or too_long:
        shown = f"{study.name[:20]}..." if too_long else study.name
        raise ConfigError(f"{where}: name {shown!r}: expected the name of a folder")
    if not study.panels:
        raise ConfigError(f"{where}: panels: expected at least one")
    study = dataclasses.replace(
        study,
        runs=_several(Run, study.runs, f"{where}: runs"),
        panels=_several(Panel, study.panels, f"{where}: panels"),
        claims=_several(Claim, study.claims, f"{where}: claims"),
        paper=_several(PaperRow, study.paper, f"{where}: paper"),
    )
    for place, panel in enumerate(study.panels, 1):
        most = 1 if panel.kind in ("curve", "training") else len(panel.metrics)
        if not 1 <= len(panel.metrics) <= most:
            expected = "one" if most == 1 else "at least one"
            raise ConfigError(f"{where}: panels[{place}]: metrics: {panel.kind} takes {expected}")
    for place, claim in enumerate(study.claims, 1):
        if not claim.parts:
            raise ConfigError(f"{where}: claims[{place}]: parts: expected at least one")
    return study


def _several(kind: Any, items: Any, where: str) -> tuple[Any, ...]:
    return tuple(_make(kind, item, f"{where}[{place}]") for place, item in enumerate(items, 1))


def _make(kind: Any, content: Any, where: str) -> Any:
    """One object from a dictionary with its fields; lists become tuples, and options words."""
    if not isinstance(content, Mapping):
        raise ConfigError(f"{where}: expected the fields of a {kind.__name__.lower()}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for name, value in content.items():
        if name not in fields:
            raise ConfigError(f"{where}: unknown field {name}{did_you_mean(str(name), fields)}")
        here, kept_as = f"{where}: {name}", str(fields[name].type)
        if kind is Run and name in ("options", "finetune"):
            values[name] = _words(value, here)
        elif kind is Claim and name == "parts":
            values[name] = tuple(_part(item, here) for item in _listed(value, here))
        elif kept_as == "tuple[str, ...]":
            values[name] = tuple(_text(item, here) for item in _listed(value, here))
        elif kept_as.startswith("tuple"):
            values[name] = tuple(_listed(value, here))
        elif kept_as.startswith("Mapping"):
            values[name] = _numbers(value, here)
        elif kept_as == "bool":
            if not isinstance(value, bool):
                raise ConfigError(f"{here}: expected true or false")
            values[name] = value
        else:
            # What has a default may be left empty too.
            is_needed = fields[name].default is dataclasses.MISSING
            values[name] = _text(value, here) if is_needed or value != "" else ""
    missing = [
        name
        for name, field in fields.items()
        if name not in values and field.default is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where}: {missing[0]} is missing")
    for name, choices in (("kind", get_args(Kind)), ("x", get_args(Axis))):
        if kind is Panel and name in values and values[name] not in choices:
            hint = unknown_name(values[name], choices)
            raise ConfigError(f"{where}: {name} {values[name]}: {hint}")
    return kind(**values)


def _listed(value: Any, where: str) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{where}: expected a list")
    return value


def _text(value: Any, where: str) -> str:
    """A text or a number, as one line that any file can hold. Raises ConfigError for anything else."""
    if isinstance(value, bool):
        hint = "YAML reads yes, no, on and off as true and false; put a text in quotes"
        raise ConfigError(f"{where}: {hint}")
    if not isinstance(value, (str, int, float)):
        raise ConfigError(f"{where}: expected a text" + (", not several" if value else ""))
    text = " ".join(str(value).split())
    if not text:
        raise ConfigError(f"{where}: is empty")
    # Control characters, and halves of surrogate pairs.
    if wrong := [letter for letter in text if unicodedata.category(letter) in ("Cc", "Cs")]:
        raise ConfigError(f"{where}: has the character {ascii(wrong[0])}, which no text has")
    return text


def _numbers(value: Any, where: str) -> dict[str, float]:
    """Numbers by metric. Raises ConfigError."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: expected METRIC: NUMBER")
    for name, number in value.items():
        if not is_number(number):
            raise ConfigError(f"{where}: {name}: expected a number")
    return {_text(name, where): float(number) for name, number in value.items()}


def _words(value: Any, where: str) -> tuple[str, ...]:
    """Options as words: from a list, a line as it is typed, or options by their names, also in sections."""
    if isinstance(value, Mapping):
        return option_words(value)
    if isinstance(value, str):
        try:
            return tuple(shlex.split(value))
        except ValueError as error:
            raise ConfigError(f"{where}: {value}: {error}") from None
    return tuple(_word(item) for item in _listed(value, where))


def option_words(sections: Mapping[str, Any]) -> tuple[str, ...]:
    """Options of a YAML file as they are typed."""
    words: list[str] = []
    for name, setting in flat_options(sections).items():
        settings = setting if isinstance(setting, list) else [setting]
        words += [f"--{name}", *(_word(item) for item in settings)]
    return tuple(words)


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _part(content: Any, where: str) -> Part:
    """A part with terms, or one that says `below: [METRIC, LABEL, LABEL]` or `above: ...`."""
    if not isinstance(content, Mapping):
        raise ConfigError(f"{where}: expected `below: [METRIC, LABEL, LABEL]` or `above: ...`")
    for name, make in (("below", below), ("above", above)):
        if name in content:
            here = f"{where}: {name}"
            named = [_text(item, here) for item in _listed(content[name], here)]
            if len(content) > 1 or len(named) != 3:
                raise ConfigError(f"{where}: expected {name}: [METRIC, LABEL, LABEL] alone")
            metric, first, second = named
            return make(metric, first, second)
    part: Part = _make(Part, content, where)
    if not part.terms:
        raise ConfigError(f"{where}: terms: expected at least one")
    terms = []
    for term in part.terms:
        here = f"{where}: term {term}"
        if not isinstance(term, (list, tuple)) or len(term) != 3 or not is_number(term[0]):
            raise ConfigError(f"{here}: expected [FACTOR, METRIC, LABEL]")
        terms.append((float(term[0]), _text(term[1], here), _text(term[2], here)))
    return dataclasses.replace(part, terms=tuple(terms))
