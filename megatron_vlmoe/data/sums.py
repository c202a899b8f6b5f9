"""The files of a run's datasets with the sums that their manifests say, to be read in full before training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_vlmoe.config.schema import DataConfig, RunConfig
from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.data.codes import CodesReader, codes_prefix
from megatron_vlmoe.data.manifest import FileRecord, load_manifest
from megatron_vlmoe.data.order import parse_blend


def data_files(config: RunConfig, training: bool = True) -> dict[Path, FileRecord]:
    """Size and SHA-256 of every file of the datasets that a run reads, stored visual codes included.

    Raises:
        DataError: a manifest is missing or damaged.
    """
    files: dict[Path, FileRecord] = {}
    for prefix in _prefixes(config, training):
        records = {f"{prefix}{suffix}": r for suffix, r in load_manifest(prefix).files.items()}
        if config.data.codes != "compute" and Path(f"{codes_prefix(prefix)}.json").is_file():
            codes = CodesReader(prefix).manifest.files
            records |= {f"{codes_prefix(prefix)}{suffix}": r for suffix, r in codes.items()}
        files |= {Path(name): record for name, record in records.items()}
    return files


def _prefixes(config: RunConfig, training: bool) -> Iterable[str]:
    if isinstance(config, FinetuneConfig):
        splits = [config.task.train_split] if training else []
        return dict.fromkeys(
            f"{config.task.data}_{name}" for name in (*splits, *config.task.splits)
        )
    return dict.fromkeys(_pretraining_prefixes(config.data))


def _pretraining_prefixes(data: DataConfig) -> Iterator[str]:
    for objective, kind in (("texts", "text"), ("images", "images"), ("pairs", "pairs")):
        for option in (kind, f"eval_{kind}"):
            if getattr(data, f"micro_{objective}") and (values := getattr(data, option)):
                yield from parse_blend(values, f"data.{option}").prefixes
