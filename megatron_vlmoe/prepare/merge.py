"""Shards and datasets to one: what `vlmoe merge-data` does, and what ends a run in shards."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.data.codes import CodesReader, load_codes_manifest, publish_codes
from megatron_vlmoe.data.indexed import IndexedReader, IndexedWriter
from megatron_vlmoe.prepare.corpora import merge_datasets
from megatron_vlmoe.prepare.remote import Mirror, check_local, names_in, remove_remote
from megatron_vlmoe.prepare.shards import check_shards, find_shards
from megatron_vlmoe.prepare.tasks import is_task_shard, merge_task_shards
from megatron_vlmoe.runtime.files import is_remote
from megatron_vlmoe.runtime.json_files import read_json


def merge_inputs(inputs: Sequence[str], output_prefix: str, source: Mapping[str, Any]) -> None:
    """`merge_datasets` of datasets that may be remote; they are copied first, to disk. Raises DataError."""
    mirror = Mirror()
    try:
        with mirror.naming():
            merge_datasets([mirror.dataset(one) for one in inputs], output_prefix, source)
    finally:
        mirror.close()


def merge_shards(prefix: str, output_prefix: str | None = None) -> int:
    """Makes of the shards that are there what the run without shards writes; returns their number.

    Args:
        prefix: that of the run, as its ``--output``; of codes with ``_codes`` at the end.
        output_prefix: what the merged files begin with; None: ``prefix``.

    Raises:
        DataError: a shard is missing, damaged or of another run. Nothing is left behind.
    """
    shards = find_shards(prefix)
    output_prefix = output_prefix or prefix
    if is_remote(prefix):
        merge_inputs(shards, output_prefix, {})
        return len(shards)
    raw = read_json(Path(f"{shards[0]}.json"))
    if is_task_shard(raw):
        merge_task_shards(shards, output_prefix)
    elif isinstance(raw, dict) and "num_codes" in raw:
        _merge_codes(shards, output_prefix)
    else:
        merge_datasets(shards, output_prefix, {})
    return len(shards)


def delete_shards(prefix: str) -> None:
    """Deletes the shards of a run, local or remote, their manifests first. Raises DataError."""
    shards = find_shards(prefix)
    folder = prefix[: len(prefix) - len(os.path.basename(prefix))]
    names = names_in(folder or ".")
    for shard in shards:
        name = os.path.basename(shard)
        own = {one for one in names if one.startswith((f"{name}.", f"{name}_"))}
        for one in (f"{name}.json", *sorted(own - {f"{name}.json"})):
            if is_remote(prefix):
                remove_remote(folder + one)
            else:
                Path(folder, one).unlink(missing_ok=True)


def _merge_codes(shards: Sequence[str], output_prefix: str) -> None:
    check_local("the output of codes", output_prefix)
    manifests = [load_codes_manifest(shard) for shard in shards]
    check_shards(shards, [manifest.shard for manifest in manifests])
    if not output_prefix.endswith("_codes"):
        raise DataError(f"{output_prefix}: the names of codes end in _codes: {output_prefix}_codes")
    with ExitStack() as undo:
        writer = IndexedWriter(output_prefix, np.int32)
        undo.callback(writer.abort)
        for shard in shards:
            writer.add_dataset(IndexedReader(shard))
        images = sum(manifest.num_images for manifest in manifests)
        files = writer.finish()
        whole = replace(manifests[0], num_images=images, files=files, shard=None)
        publish_codes(writer, whole)
    CodesReader(output_prefix.removesuffix("_codes"))
