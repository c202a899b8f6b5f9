"""What a study is: runs, the columns and panels that show them, and the claims that they decide.

A study in a YAML file has the same fields, and so has the definition in a summary.json, from which table and figure
are drawn again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from megatron_vlmoe.config.errors import ConfigError, did_you_mean, unknown_name
from megatron_vlmoe.config.presets import EXPERTS

Kind = Literal["curve", "training", "values", "blocks"]
Axis = Literal["flops", "seconds", "step"]


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
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected `runs:` and the other fields of a study")
    if not content.get("runs"):
        raise ConfigError(f"{path}: has no runs")
    study = study_from({"name": path.stem, "title": path.stem, **_with_defaults(content)}, path)
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
    for claim in study.claims:
        for label in (term[2] for part in claim.parts for term in part.terms):
            if label not in labels:
                hint = unknown_name(label, labels)
                raise ConfigError(f"{path}: claim {claim.text!r}: run {label}: {hint}")
    return study


def _with_defaults(content: Mapping[str, Any]) -> dict[str, Any]:
    """Fills in the columns and panels that nobody asked for."""
    scores = tuple(content.get("scores") or ())
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
    return dataclasses.replace(
        study,
        runs=_several(Run, study.runs, f"{where}: runs"),
        panels=_several(Panel, study.panels, f"{where}: panels"),
        claims=_several(Claim, study.claims, f"{where}: claims"),
        paper=_several(PaperRow, study.paper, f"{where}: paper"),
    )


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
        is_tuple = str(fields[name].type).startswith("tuple")
        if kind is Run and name in ("options", "finetune"):
            value = _words(value, f"{where}: {name}")
        elif kind is Claim and name == "parts":
            value = tuple(_part(item, f"{where}: {name}") for item in _listed(value, where))
        elif is_tuple:
            value = tuple(_listed(value, f"{where}: {name}"))
        elif kind is not PaperRow and isinstance(value, (Mapping, list)):
            raise ConfigError(f"{where}: {name} is one value, not several")
        values[name] = value if is_tuple or isinstance(value, (bool, Mapping)) else str(value)
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


def _words(value: Any, where: str) -> tuple[str, ...]:
    """Options as words: from a list, a line as it is typed, or a section.option: value mapping."""
    if isinstance(value, Mapping):
        words: list[str] = []
        for name, setting in value.items():
            settings = setting if isinstance(setting, list) else [setting]
            words += [f"--{name}", *(_word(item) for item in settings)]
        return tuple(words)
    words = value.split() if isinstance(value, str) else [_word(v) for v in _listed(value, where)]
    return tuple(words)


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _part(content: Any, where: str) -> Part:
    """A part with terms, or one that says `below: [METRIC, LABEL, LABEL]` or `above: ...`."""
    if not isinstance(content, Mapping):
        raise ConfigError(f"{where}: expected `below: [METRIC, LABEL, LABEL]` or `above: ...`")
    for name, make in (("below", below), ("above", above)):
        if name in content:
            named = [str(item) for item in _listed(content[name], f"{where}: {name}")]
            if len(content) > 1 or len(named) != 3:
                raise ConfigError(f"{where}: expected {name}: [METRIC, LABEL, LABEL] alone")
            metric, first, second = named
            return make(metric, first, second)
    part: Part = _make(Part, content, where)
    terms = []
    for term in part.terms:
        try:
            factor, metric, label = term
            terms.append((float(factor), str(metric), str(label)))
        except (TypeError, ValueError):
            raise ConfigError(f"{where}: term {term}: expected [FACTOR, METRIC, LABEL]") from None
    return dataclasses.replace(part, terms=tuple(terms))
