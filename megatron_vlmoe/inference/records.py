"""Records: JSON objects, or options of the same names, with what a task reads, and what a model says about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from megatron_vlmoe.config.errors import ConfigError, DataError
from megatron_vlmoe.config.tasks import find_task
from megatron_vlmoe.finetune.predictions import json_line
from megatron_vlmoe.inference.answers import Decision, Scored
from megatron_vlmoe.inference.inputs import UNKNOWN_SHARE
from megatron_vlmoe.prepare.readers.files import DAMAGE, check_characters, read_whole
from megatron_vlmoe.runtime.json_files import parse_json

if TYPE_CHECKING:
    from megatron_vlmoe.inference.model import VLMoE


@dataclass(frozen=True)
class Record:
    """What is asked.

    Args:
        where: file and line, for errors; empty for the command line.
        content: by the names of the task's inputs (`TaskSpec`); other keys of a file are handed on.
    """

    where: str
    content: Mapping[str, Any]

    def check(self, task: str) -> None:
        """Checks that it has what a task reads, and that its images are there.

        Raises:
            ConfigError: for the command line.
            DataError: for a file.
        """
        spec = find_task(task)
        wanted = (*spec.images, *spec.texts)
        for name in wanted:
            value = self.content.get(name)
            if value is None:
                raise self._error(name, f"missing: {task} reads {', '.join(wanted)}")
            if not isinstance(value, str) or not value.strip():
                raise self._error(name, "empty" if isinstance(value, str) else "not a string")
            if name in spec.images and not Path(value).is_file():
                raise self._error(name, f"{value}: no such file")
        if not self.where and (extra := sorted(set(self.content) - set(wanted))):
            raise self._error(extra[0], f"no input of {task}, which reads {', '.join(wanted)}")

    def _error(self, name: str, reason: str) -> Exception:
        if self.where:
            return DataError(f"{self.where}: {name}: {reason}")
        return ConfigError(f"--{name}: {reason}")


def read_records(path: Path) -> list[Record]:
    """The records of a file, compressed or not, with one JSON object per line; empty lines are passed over.

    Raises:
        ConfigError: the file cannot be read.
        DataError: a line is no JSON object, or there is none.
    """
    try:
        lines = read_whole(str(path)).splitlines()
    except OSError as error:
        raise ConfigError(f"--input {path}: {error.strerror or error}") from None
    except DAMAGE as error:
        raise DataError(f"{path}: {error}") from error
    check_characters(str(path))
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            content = parse_json(line)
            json_line({"record": content}).encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f"{where}: invalid Unicode") from error
        except (DataError, RecursionError) as error:
            raise DataError(f"{where}: {error}") from error
        if not isinstance(content, dict):
            raise DataError(f"{where}: not a JSON object")
        records.append(Record(where, content))
    if not records:
        raise DataError(f"{path}: no record in it")
    return records


def predict(model: VLMoE, records: Sequence[Record], top_k: int) -> list[dict[str, Any]]:
    """What the model says about each record, in keys as those of an evaluation's predictions.

    Raises:
        DataError: naming the record that has a bad image or text.
    """
    try:
        return _predict(model, records, top_k)
    except DataError as error:
        # Which record it was is found out by asking about each alone.
        for record in records if records[0].where else ():
            try:
                _predict(model, [record], top_k)
            except DataError as own:
                raise DataError(f"{record.where}: {own}") from error
        raise


def _predict(model: VLMoE, records: Sequence[Record], top_k: int) -> list[dict[str, Any]]:
    spec = model.spec
    # The methods have arguments of the same names.
    given: dict[str, Any] = {
        name: [record.content[name] for record in records] for name in (*spec.images, *spec.texts)
    }
    if not spec.has_labels:
        scores = cast(list[float], model.score(**given))
        if not model.has_matching:
            return [{"score": score} for score in scores]
        matches = cast(list[float], model.match(**given))
        return [{"score": s, "match": p} for s, p in zip(scores, matches, strict=True)]
    if not spec.decides:
        return [_classified(best) for best in cast(list[list[Scored]], model.rank(top_k, **given))]
    rows = []
    for decision in cast(list[Decision], model.decide(**given)):
        best = sorted(decision.scores.items(), key=lambda item: -item[1])
        rows.append(_classified([Scored(label, label, score) for label, score in best]))
    return rows


def unknown_texts(model: VLMoE, records: Sequence[Record]) -> str:
    """A line about the records with texts that the tokenizer does not know; empty if there are none."""
    poor: list[str] = []
    for record in records:
        shares = {
            name: cast(float, model.unknown_share(record.content[name]))
            for name in model.spec.texts
        }
        name = max(shares, key=lambda name: shares[name], default="")
        if name and shares[name] > UNKNOWN_SHARE:
            where = f"{record.where}: {name}" if record.where else name
            poor.append(f"{where}: {shares[name]:.0%} of its tokens are unknown to the tokenizer")
    if not poor:
        return ""
    return poor[0] + (f" ({len(poor)} of {len(records)} records)" if len(records) > 1 else "")


def _classified(best: Sequence[Scored]) -> dict[str, Any]:
    named = any(item.name != item.label for item in best)
    row: dict[str, Any] = {"prediction": best[0].label}
    if named:
        row["prediction_name"] = best[0].name
    row["score"] = best[0].score
    row["most_likely"] = [
        {"label": item.label, **({"name": item.name} if named else {}), "score": item.score}
        for item in best
    ]
    return row


def text_lines(row: Mapping[str, Any]) -> list[str]:
    """A row for people: a number and what it belongs to on each line, best first."""
    if "most_likely" not in row:
        return [f"{value:.4f}  {name}" for name, value in row.items()]
    return [
        f"{item['score']:.4f}  {'  '.join(str(item[key]) for key in ('label', 'name') if key in item)}"
        for item in row["most_likely"]
    ]
