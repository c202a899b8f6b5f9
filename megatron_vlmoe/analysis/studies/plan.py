"""From a study to its runs: the options of each, the folder it has, and which runs are the same.

A run is known by what decides its result: the resolved options but for those that only say where it writes and how
often, the content of its data, and the number of processes. The folder's name ends with a digest of these, so that
studies share what is the same, and a changed option or dataset makes a new run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from megatron_vlmoe.analysis.studies.scales import Scale, TaskRecipe
from megatron_vlmoe.analysis.studies.study import Run, Study, option_words
from megatron_vlmoe.config.command_line import (
    PROGRAM_OPTIONS,
    flat_options,
    from_dict,
    normalize_arguments,
    option_types,
    parse_options,
    parse_run,
    read_yaml,
)
from megatron_vlmoe.config.errors import ConfigError, unknown_name
from megatron_vlmoe.config.presets import EXPERTS, apply_recipe, recipe_names
from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.planning.validate import validate, validate_task

RUNS = "runs"
"""Folder of all runs beside those of the studies."""

# Options that change neither the weights nor what is measured.
_NEUTRAL = (
    *("checkpoint.save", "checkpoint.keep_last", "checkpoint.async_save", "checkpoint.require"),
    *("profile.", "log.tensorboard", "log.wandb"),
    *("train.exit_", "data.num_workers", "data.prefetch", "data.cache_dir", "task.report_examples"),
    *("parallel.distributed_timeout", "parallel.startup_timeout"),
)
# What the study itself decides.
_OWN = (
    *("--preset", "--train.seed", "--task.name", "--dry-run", "--dry-run-world-size"),
    *("--dry-run-gpus-per-node", "--checkpoint.save", "--checkpoint.load", "--checkpoint.step"),
    "--help",
)
# Of a folder with an image tokenizer; its other files are about the training.
_TOKENIZER_FILES = ("config.json", "model.safetensors")


Config = TypeVar("Config", bound=RunConfig)


@dataclass(frozen=True)
class Request:
    """What a user asks for beside the name of the study.

    Args:
        output: folder of the studies.
        seeds: of every run.
        processes: of every run.
        options: of every pretraining, on top of the study's.
        finetune: of every fine-tuning, on top of the study's.
        tasks: folder of the prepared tasks.
        only: labels; empty: all.
    """

    output: Path
    seeds: tuple[int, ...]
    processes: int
    options: tuple[str, ...] = ()
    finetune: tuple[str, ...] = ()
    tasks: str = ""
    only: tuple[str, ...] = ()


@dataclass(frozen=True)
class PlannedRun:
    """One run of a training command.

    Args:
        command: which.
        folder: of the run.
        words: its options, but for `--save`.
        config: the same, resolved; what the data decide is still open.
        processes: number of ranks.
        digest: of what decides its result.
        after: the run whose folder it starts from.
    """

    command: Literal["pretrain", "finetune"]
    folder: Path
    words: tuple[str, ...]
    config: RunConfig
    processes: int
    digest: str
    after: PlannedRun | None = None


@dataclass(frozen=True)
class PlannedRow:
    """A run of a study with one seed: the pretraining, and the fine-tunings by the names of their tasks."""

    label: str
    seed: int
    pretraining: PlannedRun
    tasks: dict[str, PlannedRun]

    @property
    def runs(self) -> tuple[PlannedRun, ...]:
        """In an order in which they can be run."""
        return (self.pretraining, *self.tasks.values())


class Planner:
    """Plans runs of one request; options and data that several runs share are read once."""

    def __init__(self, scale: Scale, request: Request) -> None:
        self.scale = scale
        self.request = request
        # By what the options start from, and the options.
        self._parsed: dict[Hashable, RunConfig] = {}
        self._fingerprints: dict[tuple[Path, ...], str] = {}
        self._folders: dict[str, Path] = {}
        self._options = own_options(request.options, RunConfig)
        self._finetune = own_options(request.finetune, FinetuneConfig, "--finetune: ")

    def plan(self, study: Study) -> list[PlannedRow]:
        """The rows of a study, seed by seed, so that what is there at any time can be compared.

        Raises:
            ConfigError: a label of `only` that the study does not have, or options that contradict each other; the
                message names the run.
        """
        labels = [run.label for run in study.runs]
        for label in self.request.only:
            if label not in labels:
                raise ConfigError(f"--only {label}: {unknown_name(label, labels)}")
        chosen = [run for run in study.runs if run.label in (self.request.only or labels)]
        return [self._row(run, seed) for seed in self.request.seeds for run in chosen]

    def has_changed(self, run: PlannedRun) -> bool:
        """Whether the data of a planned run are others now, so that it would be another run."""
        self._fingerprints.clear()
        start = run.after.digest if run.after else ""
        return self._digest(run.config, run.command, start) != run.digest

    def _row(self, run: Run, seed: int) -> PlannedRow:
        try:
            pretraining = self._pretraining(run, seed)
            tasks: dict[str, PlannedRun] = {}
            for recipe in self.scale.tasks:
                # Also one that only another task starts from.
                wanted = {name for name in run.tasks} | {
                    other.start for other in self.scale.tasks if other.name in run.tasks
                }
                if recipe.name in wanted:
                    start = tasks[recipe.start] if recipe.start else pretraining
                    tasks[recipe.name] = self._finetuning(run, recipe, start, seed)
        except ConfigError as error:
            raise ConfigError(f"{run.label}: {error}") from None
        return PlannedRow(run.label, seed, pretraining, tasks)

    def _pretraining(self, run: Run, seed: int) -> PlannedRun:
        scale, request = self.scale, self.request
        size = run.size or scale.main
        preset, size_options = scale.sizes[size]
        data = () if self._has_own_data(run) else scale.data
        words = (
            *("--preset", f"{preset}-{run.experts}", *scale.options, *data, *size_options),
            *(*self._expert_parallel(run.experts), *self._options_of(run)),
        )
        if words not in self._parsed:
            self._parsed[words] = parse_run("pretrain", words).config
        config = self._parsed[words]
        if scale.one_micro_batch:
            totals = {
                f"micro_{name}": getattr(config.data, f"global_{name}")
                for name in ("texts", "images", "pairs")
                if f"--data.micro_{name}" not in words
            }
            shares: dict[str, Any] = {
                name: max(1, total // request.processes) if total else 0
                for name, total in totals.items()
            }
            for name, share in shares.items():
                words += (f"--data.{name}", str(share))
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, **shares))
        config = _with_seed(config, seed)
        validate(config, request.processes)
        digest = self._digest(config, "pretrain", "")
        name = _slug(f"{size}-{run.experts}", run.options, seed)
        return PlannedRun(
            "pretrain",
            self._folder(name, digest),
            (*words, "--train.seed", str(seed)),
            config,
            request.processes,
            digest,
        )

    def _options_of(self, run: Run) -> tuple[str, ...]:
        return (*own_options(run.options, RunConfig), *self._options)

    def _has_own_data(self, run: Run) -> bool:
        """Held-out data, tokenizers and tasks of the scale do not go with a user's training data."""
        return not {"--data.text", "--data.images", "--data.pairs"}.isdisjoint(
            self._options_of(run)
        )

    def _expert_parallel(self, experts: str) -> tuple[str, ...]:
        """As many ranks hold the experts as divide both numbers."""
        size = math.gcd(self.request.processes, EXPERTS[experts]) if EXPERTS[experts] else 1
        return ("--parallel.expert_model_parallel_size", str(size)) if size > 1 else ()

    def _finetuning(self, run: Run, task: TaskRecipe, start: PlannedRun, seed: int) -> PlannedRun:
        request = self.request
        folder = request.tasks or ("" if self._has_own_data(run) else self.scale.folder) or "data"
        given = (
            *("--task", task.task, "--preset", task.recipe),
            *("--task.data", f"{folder}/{task.data or task.name}"),
            *(*task.options, *own_options(run.finetune, FinetuneConfig), *self._finetune),
        )
        # The recipe is put on the architecture of what it starts from, which has no checkpoint yet.
        base = _with_seed(start.config, 0)
        key = (base, *given)
        if key not in self._parsed:
            words = normalize_arguments(given, FinetuneConfig)
            recipe = apply_recipe(task.recipe, base)
            self._parsed[key] = parse_options("finetune", words, recipe, recipe_names()).config
        config = self._parsed[key]
        assert isinstance(config, FinetuneConfig)
        share = max(1, config.task.global_batch_size // request.processes)
        if share < config.task.micro_batch_size:
            given += ("--task.micro_batch_size", str(share))
            own = dataclasses.replace(config.task, micro_batch_size=share)
            config = dataclasses.replace(config, task=own)
        given += ("--train.seed", str(seed))
        config = _with_seed(config, seed)
        validate_task(config, request.processes)
        digest = self._digest(config, "finetune", start.digest)
        name = f"{task.name}-{_slug_of(start.folder.name)}"
        words_of = (*given, "--load", str(start.folder))
        if run.finetune:
            name = f"{task.name}-{_slug('', run.finetune)}-{_slug_of(start.folder.name)}"
        return PlannedRun(
            "finetune",
            self._folder(name, digest),
            words_of,
            config,
            request.processes,
            digest,
            start,
        )

    def _folder(self, name: str, digest: str) -> Path:
        """The run with this digest, whatever another study has called it, or a new one."""
        if digest not in self._folders:
            root = self.request.output / RUNS
            found = sorted(root.glob(f"*-{digest}"))
            self._folders[digest] = found[0] if found else root / f"{name}-{digest}"
        return self._folders[digest]

    def _digest(self, config: RunConfig, command: str, start: str) -> str:
        # Options at their defaults are left out: a later version that has more of them knows the run again.
        defaults = flat_options(dataclasses.asdict(type(config)()))
        content: dict[str, Any] = {}
        for name, value in flat_options(dataclasses.asdict(config)).items():
            if value == defaults[name] or name.startswith(_NEUTRAL):
                continue
            if name in DATASETS:
                value = [self._fingerprint(prefix) for prefix in value]
            elif name in ("data.text_tokenizer", "data.image_tokenizer", "task.data"):
                value = self._fingerprint(value, getattr(config, "task", None))
            content[name] = value
        content |= {"command": command, "start": start, "processes": self.request.processes}
        text = json.dumps(content, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:10]

    def _fingerprint(self, path: str, task: Any = None) -> str:
        """A digest of a dataset, tokenizer or task, wherever it lies; its path where there is nothing yet."""
        files = tuple(_content_files(path, task))
        if not files:
            return path
        # Of one task other runs may read other splits.
        if files not in self._fingerprints:
            digest = hashlib.sha256()
            for file in files:
                digest.update(_content(file))
            self._fingerprints[files] = digest.hexdigest()
        return self._fingerprints[files]


DATASETS = (
    *("data.text", "data.images", "data.pairs"),
    *("data.eval_text", "data.eval_images", "data.eval_pairs"),
)


def data_files(run: PlannedRun) -> list[Path]:
    """The file of every dataset and tokenizer that a run reads, which is written last."""
    options = flat_options(dataclasses.asdict(run.config))
    tokenizers = [options["data.text_tokenizer"], options["data.image_tokenizer"]]
    paths = [Path(path) for path in tokenizers if path]
    files = [path / _TOKENIZER_FILES[0] if path.is_dir() else path for path in paths]
    if isinstance(run.config, FinetuneConfig):
        task = run.config.task
        return [Path(f"{task.data}_{split}.json") for split in (task.train_split, *task.splits)]
    prefixes = [value for name in DATASETS for value in options[name] if not _is_number(value)]
    return files + [Path(f"{prefix}.json") for prefix in prefixes]


def _with_seed(config: Config, seed: int) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))


def _content_files(path: str, task: Any) -> Iterator[Path]:
    where = Path(path)
    names = [f"{path}.json", f"{path}_codes.json", f"{path}_labels.json"]
    if task is not None:
        names += [f"{path}_{split}.json" for split in (task.train_split, *task.splits)]
    if path and where.is_file():
        yield where
    elif path and where.is_dir():
        yield from (file for name in _TOKENIZER_FILES if (file := where / name).is_file())
    yield from (Path(name) for name in dict.fromkeys(names) if path and Path(name).is_file())


def _content(file: Path) -> bytes:
    """What a file holds; of a manifest the checksums of its files, whenever and wherever it was made."""
    content = file.read_bytes()
    if file.suffix == ".json":
        try:
            files = json.loads(content)["files"]
        except (ValueError, KeyError, TypeError):
            return content
        return json.dumps(files, sort_keys=True).encode()
    return content


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _slug(model: str, options: Sequence[str], seed: int | None = None) -> str:
    """A readable name: size and experts, the last words of options and their values, seed."""
    parts = [model] if model else []
    for word in options:
        parts.append(word.rpartition(".")[2] if word.startswith("--") else word)
    text = re.sub(r"[^A-Za-z0-9_]+", "-", "-".join(parts))[:60].rstrip("-")
    return text if seed is None else f"{text}-seed{seed}"


def _slug_of(name: str) -> str:
    """A folder's name without the digest at its end."""
    return name.rpartition("-")[0]


def own_options(words: Sequence[str], root: type[RunConfig], where: str = "") -> tuple[str, ...]:
    """A user's or a run's options as names in full and values in turn; those of files stand in their place.

    So they win over what stands before them, as if they were typed.

    Args:
        root: whose options they are.
        where: what messages begin with.

    Raises:
        ConfigError: naming the option that does not exist, or that the study itself decides.
    """
    found: list[str] = []
    known = {f"--{name}" for name in option_types(root)}
    try:
        rest = iter(normalize_arguments(words, root))
        for name in rest:
            values = [] if PROGRAM_OPTIONS.get(name, str) is None else [next(rest)]
            if name == "--config" or not (name in known or name in PROGRAM_OPTIONS):
                found += _options_of_file(name, Path(values[0]), root)
            else:
                found += [name, *values]
    except ConfigError as error:
        raise ConfigError(f"{where}{error}") from None
    for name in _OWN:
        if name in found:
            how = {"--train.seed": "; use --seeds", "--preset": "; see --scale"}.get(name, "")
            raise ConfigError(f"{name} is not for studies, which decide it for every run{how}")
    return tuple(found)


def _options_of_file(option: str, file: Path, root: type[RunConfig]) -> list[str]:
    """The options in the file of `--config`, or of a section such as `--model`, as names and values in turn."""
    where = f"{option} {file}"
    content = read_yaml(file, where)
    if option != "--config":
        for part in reversed(option[2:].split(".")):
            content = {part: content}
    if not isinstance(content, dict):
        raise ConfigError(f"{where}: expected sections such as `model:`")
    from_dict(content, root(), where)
    # A section without any option is None.
    given = {name: value for name, value in flat_options(content).items() if value is not None}
    return normalize_arguments(option_words(given), root)
