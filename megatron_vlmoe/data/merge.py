"""Merging datasets of one kind into one, in the given order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_vlmoe.data.errors import DataError
from megatron_vlmoe.data.indexed import IndexedReader
from megatron_vlmoe.data.manifest import (
    DATASET_PARTS,
    TASKS,
    DatasetManifest,
    check_dataset,
    check_same_tokenizer,
    length_percentiles,
    load_manifest,
    manifest_path,
    part_prefix,
)
from megatron_vlmoe.data.preprocess import DatasetOutput


def merge_datasets(
    inputs: Sequence[str], output_prefix: str, source: Mapping[str, Any]
) -> DatasetManifest:
    """Concatenates datasets, streaming their bytes; returns the manifest.

    Codes of images (``PREFIX_codes``) are not merged: encode the merged images anew.

    Raises:
        DataError: an input is damaged, of another kind or tokenizer, a task's, or is the output;
            the disk is full. Nothing is left behind.
    """
    if Path(output_prefix).resolve() in {Path(prefix).resolve() for prefix in inputs}:
        raise DataError(f"{output_prefix}: is both an input and the output")
    kind = load_manifest(inputs[0]).kind
    if kind in TASKS:
        raise DataError(f"{manifest_path(inputs[0])}: splits of a task ({kind}) are not merged")
    manifests = [check_dataset(prefix, kind) for prefix in inputs]
    check_same_tokenizer(inputs, manifests)
    parts = DATASET_PARTS[kind]
    dtypes = [IndexedReader(part_prefix(inputs[0], part)).dtype for part in parts]
    with DatasetOutput(output_prefix, kind, dtypes) as output:
        for part in parts:
            for prefix in inputs:
                output.writers[part].add_dataset(IndexedReader(part_prefix(prefix, part)))
        files = output.finish()
        main = output.writers[parts[-1]]
        unknown = [m.unknown_tokens for m in manifests]
        lengths = length_percentiles(main.staged_lengths()) if kind == "pairs" else None
        manifest = DatasetManifest(
            kind=kind,
            documents=main.num_documents,
            sequences=main.num_sequences,
            tokens=0 if kind == "images" else main.num_items,
            bytes=sum(record.size for name, record in files.items() if name.endswith(".bin")),
            files=files,
            source=source,
            rejects=sum(m.rejects for m in manifests),
            tokenizer_fingerprint=manifests[0].tokenizer_fingerprint,
            vocab_size=manifests[0].vocab_size,
            unknown_tokens=None if None in unknown else sum(filter(None, unknown)),
            caption_lengths=lengths,
        )
        output.commit(manifest)
    return manifest
