"""Merging datasets of one kind into one, in the given order."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.data.indexed import IndexedReader
from megatron_vlmoe.data.manifest import (
    DatasetManifest,
    check_dataset,
    check_same_tokenizer,
    dataset_parts,
    is_task,
    load_manifest,
    manifest_path,
    part_prefix,
)
from megatron_vlmoe.prepare.tool import DatasetOutput


def merge_datasets(
    inputs: Sequence[str], output_prefix: str, source: Mapping[str, Any]
) -> DatasetManifest:
    """Concatenates datasets, streaming their bytes; returns the manifest.

    Codes of images (``PREFIX_codes``) are not merged: encode the merged images anew. The rejects are listed
    together, as far as their files are still there. Images that were
    indexed with other options for orientation or transparency are merged as they are, with a note on stderr.

    Raises:
        DataError: an input is damaged, of another kind or tokenizer, a task's, or is the output;
            the disk is full. Nothing is left behind.
    """
    if Path(output_prefix).resolve() in {Path(prefix).resolve() for prefix in inputs}:
        raise DataError(f"{output_prefix}: is both an input and the output")
    kind = load_manifest(inputs[0]).kind
    if is_task(kind):
        raise DataError(f"{manifest_path(inputs[0])}: splits of a task ({kind}) are not merged")
    manifests = [check_dataset(prefix, kind) for prefix in inputs]
    check_same_tokenizer(inputs, manifests)
    parts = dataset_parts(kind)
    dtypes = [IndexedReader(part_prefix(inputs[0], part)).dtype for part in parts]
    with DatasetOutput(output_prefix, kind, dtypes) as output:
        for prefix in inputs:
            output.rejects.add_lines(prefix)
        for part in parts:
            for prefix in inputs:
                output.writers[part].add_dataset(IndexedReader(part_prefix(prefix, part)))
        unknown = [m.unknown_tokens for m in manifests]
        manifest = output.manifest(
            source,
            rejects=sum(m.rejects for m in manifests),
            counts=_summed([m.counts for m in manifests]),
            passed_over=_total([m.passed_over for m in manifests]),
            omitted=_total([m.omitted for m in manifests]),
            tokenizer_fingerprint=manifests[0].tokenizer_fingerprint,
            vocab_size=manifests[0].vocab_size,
            unknown_tokens=None if None in unknown else sum(filter(None, unknown)),
            exif=_common(inputs, "exif", [m.exif for m in manifests]),
            alpha=_common(inputs, "alpha", [m.alpha for m in manifests]),
        )
        output.commit(manifest)
    counted = " + ".join(f"{m.documents:,}" for m in manifests)
    print(
        f"{output_prefix}: {kind}, {counted} = {manifest.documents:,} documents, {manifest.sequences:,} sequences",
        file=sys.stderr,
    )
    return manifest


def _summed(
    counts: Sequence[Mapping[str, Mapping[str, int]] | None],
) -> dict[str, dict[str, int]] | None:
    """The sums of `DatasetManifest.counts`; None if a dataset has none."""
    known = [kinds for kinds in counts if kinds is not None]
    if len(known) < len(counts):
        return None
    every = dict.fromkeys(kind for kinds in known for kind in kinds)
    return {kind: _total([kinds.get(kind, {}) for kinds in known]) or {} for kind in every}


def _total(counts: Sequence[Mapping[str, int] | None]) -> dict[str, int] | None:
    """The sums of numbers by name; None if a dataset has none."""
    if None in counts:
        return None
    total: Counter[str] = Counter()
    for one in counts:
        total.update(one)
    return dict(total)


def _common(inputs: Sequence[str], option: str, values: Sequence[str | None]) -> str | None:
    """What all datasets record about an option of indexing; ``mixed``, with a note, if they differ."""
    if len(set(values)) == 1:
        return values[0]
    records = ", ".join(f"{p}: {v or 'none'}" for p, v in zip(inputs, values, strict=True))
    print(f"note: images indexed with different --{option} ({records})", file=sys.stderr)
    return "mixed"
