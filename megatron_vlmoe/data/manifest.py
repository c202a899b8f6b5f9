"""The manifest ``PREFIX.json``: what a dataset holds and how its files are recognised.

The manifest is written last, so a dataset without one was never finished.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.config.tasks import find_task, task_names
from megatron_vlmoe.runtime.files import StagedFile, is_remote
from megatron_vlmoe.runtime.json_files import read_versioned
from megatron_vlmoe.runtime.sums import differing_files

FORMAT_VERSION = 2
"""Version 1 had no counts of records, unknown tokens and passed-over files, and no rules for images."""

_PARTS: Mapping[str, tuple[str, ...]] = {
    "text": ("text_document",),
    "images": ("image",),
    "pairs": ("image", "text"),
}
"""The indexed files of each kind of dataset for pretraining."""

SAMPLES_SUFFIX = "_samples.arrow"

_LENGTH_BLOCK = 1 << 20


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 (hex) of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class ShardRecord:
    """Which share of a sharded run something is, so that shards of one run are told from others."""

    index: int
    """From 0."""
    count: int
    """Shards of the run."""
    work: str
    """SHA-256 (hex) of what all shards of a run have in common: input files with their sizes, options, tokenizer."""
    unmet: Mapping[str, str] | None = None
    """Errors, by what is missing, unless another shard has it; None: this shard has no part of the input."""


@dataclass(frozen=True)
class DatasetManifest:
    """Contents of ``PREFIX.json``."""

    kind: str
    """``text``, ``images``, ``pairs``, or the name of a task, of which it is a split."""
    documents: int
    """Documents: texts, images, or (for pairs) images with their captions. Of a task with images
    the images, else its samples."""
    sequences: int
    """Sequences: equal to ``documents`` except for pairs, where it counts captions, and for tasks,
    where it counts texts (for ``imagenet`` images)."""
    tokens: int
    """Text tokens without special ones; 0 for images."""
    bytes: int
    """Bytes of all ``.bin`` files."""
    files: Mapping[str, FileRecord]
    """By what follows the prefix, as ``_image.bin``, so that a dataset may be moved and renamed."""
    source: Mapping[str, Any]
    """``command`` and ``inputs`` as they were given."""
    rejects: int = 0
    """Lines of ``PREFIX.rejects.jsonl``: what was left out as bad."""
    tokenizer_fingerprint: str | None = None
    """`TextTokenizer.fingerprint` of the tokenizer that made the ids; None for images."""
    vocab_size: int | None = None
    """Number of pieces of that tokenizer; None for images."""
    unknown_tokens: int | None = None
    """How many of ``tokens`` are the unknown token; None for images, and where it was not counted
    (datasets made before it was)."""
    caption_lengths: Mapping[str, int] | None = None
    """For pairs, and tasks with texts, ``p50``, ``p90``, ``p99`` and ``max`` of the tokens per
    caption or text; else None."""
    samples: int | None = None
    """For tasks the rows of ``PREFIX_samples.arrow``; else None."""
    counts: Mapping[str, Mapping[str, int]] | None = None
    """For records, and of pairs also for images and captions, how many were ``read`` and what became
    of them: the other numbers sum to it. A record of text is a line, row or entry, of which a
    document may join several. None: not counted."""
    passed_over: Mapping[str, int] | None = None
    """For images and pairs how many files among them were none that is read, by suffix; else None."""
    omitted: Mapping[str, int] | None = None
    """For tasks how many good samples the task itself leaves out, for pairs how many records are of
    splits that are not wanted, by reason; else None."""
    left_out: Mapping[str, str] | None = None
    """For tasks the rejected samples that have an id: the reason by id, so that a file of predictions
    can name them; else None (as in manifests of before there was this field)."""
    fallback_answer: str | None = None
    """For vqa the most frequent answer of training, which a submission gives to the questions in
    ``left_out``; else None."""
    labels_sha256: str | None = None
    """For tasks with classes `Labels.sha256` of the class names that the labels count; else None."""
    exif: str | None = None
    """What was done with the orientation that image files give: ``turn`` or ``keep``, or ``mixed``
    after a merge; None for datasets without images, and for those made before it was asked, which kept it."""
    alpha: str | None = None
    """Ground of transparent pixels, ``white`` or ``black``; ``drop`` (and, as above, None) for the
    colours under them; or ``mixed``."""
    shard: ShardRecord | None = None
    """Of one shard of a run (``--shard``); None: the dataset is whole."""
    format_version: int = FORMAT_VERSION


def is_task(kind: str) -> bool:
    """Whether datasets of a kind are splits of a downstream task; they have ``PREFIX_samples.arrow`` besides."""
    return kind not in _PARTS


def dataset_parts(kind: str) -> tuple[str, ...]:
    """The indexed files of a kind of dataset: ``PREFIX_PART.bin`` and ``PREFIX_PART.idx``.

    Raises:
        ConfigError: it is of a task that is unknown, or whose plug-in does not load.
    """
    if not is_task(kind):
        return _PARTS[kind]
    spec = find_task(kind)
    return ("image",) * bool(spec.images) + ("text",) * bool(spec.texts)


def part_prefix(prefix: str | Path, part: str) -> str:
    """Path prefix of one indexed file of a dataset: ``PREFIX_PART``."""
    return f"{prefix}_{part}"


def manifest_path(prefix: str | Path) -> Path:
    """``PREFIX.json``."""
    return Path(f"{prefix}.json")


def rejects_path(prefix: str | Path) -> Path:
    """``PREFIX.rejects.jsonl``."""
    return Path(f"{prefix}.rejects.jsonl")


def samples_path(prefix: str | Path) -> Path:
    """``PREFIX_samples.arrow``."""
    return Path(f"{prefix}{SAMPLES_SUFFIX}")


def length_percentiles(lengths: np.ndarray) -> dict[str, int]:
    """Nearest-rank percentiles ``p50``, ``p90``, ``p99`` and ``max`` of sequence lengths ``[N]``.

    pX is the smallest length that at least X % of the sequences do not exceed.
    """
    histogram = np.zeros(int(lengths.max(initial=0)) + 1, dtype=np.int64)
    for start in range(0, len(lengths), _LENGTH_BLOCK):
        block = lengths[start : start + _LENGTH_BLOCK]
        histogram += np.bincount(block, minlength=len(histogram))
    cumulative = np.cumsum(histogram)
    # Integers: 0.9 * N in floats can fall just above the rank that is meant.
    ranks = {f"p{p}": (p * int(cumulative[-1]) + 99) // 100 for p in (50, 90, 99)}
    result = {name: int(np.searchsorted(cumulative, rank)) for name, rank in ranks.items()}
    return result | {"max": len(histogram) - 1}


def stage_manifest(prefix: str | Path, manifest: DatasetManifest) -> StagedFile:
    """The complete manifest under its temporary name. Raises FileError; nothing is left behind then."""
    staged = StagedFile(manifest_path(prefix), "w")
    try:
        staged.write(json.dumps(dataclasses.asdict(manifest), indent=2, sort_keys=True) + "\n")
        staged.finish()
    except BaseException:
        staged.abort()
        raise
    return staged


def unknown_line(manifest: DatasetManifest) -> str:
    """``12 of 3456 tokens are unknown to the tokenizer (0.35%)``."""
    if manifest.unknown_tokens is None:
        return "unknown tokens were not counted"
    share = manifest.unknown_tokens / max(manifest.tokens, 1)
    return (
        f"{manifest.unknown_tokens} of {manifest.tokens} tokens are unknown to the tokenizer "
        f"({share:.2%})"
    )


def check_replaceable(prefix: str | Path) -> None:
    """Raises DataError if ``PREFIX.json`` is there and is no manifest, but annotations of that name."""
    path = manifest_path(prefix)
    if not path.exists():
        return
    try:
        content = path.read_bytes()
    except OSError:
        content = b""
    if not is_manifest(content):
        raise not_replaceable(path)


def is_manifest(content: bytes) -> bool:
    """Whether the content of a file is a manifest, of whatever version."""
    try:
        raw = json.loads(content)
    except (ValueError, RecursionError):
        return False
    return isinstance(raw, dict) and {"format_version", "files", "kind"} <= raw.keys()


def not_replaceable(path: str | Path) -> DataError:
    """The error for a file that has the name of a manifest."""
    return DataError(
        f"{path}: is no manifest of a dataset, and would be overwritten: choose another --output"
    )


def load_manifest(prefix: str | Path) -> DatasetManifest:
    """Reads ``PREFIX.json``.

    Raises:
        DataError: the file is missing, damaged or of a newer format, or the prefix an address; the message names it.
    """
    if is_remote(str(prefix)):
        raise DataError(f"{prefix}: must be a local path; `vlmoe merge-data` fetches a dataset")
    missing = "not found (no dataset, or preprocessing did not end)"
    path, what = manifest_path(prefix), "a dataset manifest"
    return read_versioned(path, FORMAT_VERSION, what, missing, _manifest_of)


def _manifest_of(raw: Any) -> DatasetManifest:
    """Raises ValueError, TypeError, KeyError or AttributeError."""
    files = {name: FileRecord(**record) for name, record in raw["files"].items()}
    shard = raw.get("shard") and ShardRecord(**raw["shard"])
    manifest = DatasetManifest(**{**raw, "files": files, "shard": shard})
    if is_task(manifest.kind) and manifest.kind not in task_names():
        raise DataError(
            f"a dataset of {manifest.kind!r}, which is no kind that is known; if it is a task, install its plug-in"
        )
    counts = ("documents", "sequences", "tokens", "bytes", "rejects", "format_version")
    numbers = {name: getattr(manifest, name) for name in counts}
    numbers |= {name: record.size for name, record in manifest.files.items()}
    for name, number in numbers.items():
        if not isinstance(number, int) or number < 0:
            raise ValueError(f"{name} is {number!r}")
    unknown = manifest.unknown_tokens
    if unknown is not None and not (isinstance(unknown, int) and 0 <= unknown <= manifest.tokens):
        raise ValueError(f"unknown_tokens is {unknown!r} of {manifest.tokens}")
    expected = {
        f"_{part}{suffix}" for part in dataset_parts(manifest.kind) for suffix in (".bin", ".idx")
    }
    if is_task(manifest.kind):
        expected.add(SAMPLES_SUFFIX)
        if not isinstance(manifest.samples, int) or manifest.samples < 0:
            raise ValueError(f"samples is {manifest.samples!r}")
    if missing := expected - set(manifest.files):
        raise ValueError(f"no record of {', '.join(sorted(missing))}")
    return manifest


def check_dataset(
    prefix: str | Path,
    kind: str,
    tokenizer_fingerprint: str | None = None,
    *,
    checksums: bool = False,
) -> DatasetManifest:
    """Loads the manifest and checks the dataset against it and against what the caller wants.

    Args:
        prefix: path prefix of the dataset.
        kind: the kind that is wanted, as in `DatasetManifest`.
        tokenizer_fingerprint: fingerprint of the tokenizer in use; None: any.
        checksums: also read every file and compare its SHA-256.

    Raises:
        DataError: another kind, another tokenizer, or a file that is missing or has changed.
    """
    manifest = load_manifest(prefix)
    path = manifest_path(prefix)
    if manifest.kind != kind:
        raise DataError(f"{path}: a dataset of {manifest.kind}, but one of {kind} is wanted")
    if tokenizer_fingerprint not in (None, manifest.tokenizer_fingerprint):
        raise DataError(
            f"{path}: made with another tokenizer (fingerprint "
            f"{str(manifest.tokenizer_fingerprint)[:12]}, in use {str(tokenizer_fingerprint)[:12]})"
        )
    for suffix, record in manifest.files.items():
        name = f"{prefix}{suffix}"
        try:
            size = os.path.getsize(name)
        except OSError as error:
            raise DataError(f"{name}: {error.strerror}") from error
        if size != record.size:
            raise DataError(f"{name}: {size} bytes, but its manifest says {record.size}")
    sums = {Path(f"{prefix}{suffix}"): r.sha256 for suffix, r in manifest.files.items()}
    if checksums and (flaws := differing_files(sums)):
        raise DataError(f"{flaws[0][0]}: contents differ from the checksum in its manifest")
    return manifest


def check_same_tokenizer(prefixes: Sequence[str], manifests: Sequence[DatasetManifest]) -> None:
    """Raises DataError unless all manifests name one tokenizer; the message names two files."""
    for prefix, manifest in zip(prefixes, manifests, strict=True):
        if manifest.tokenizer_fingerprint != manifests[0].tokenizer_fingerprint:
            raise DataError(
                f"{manifest_path(prefix)}: made with another tokenizer than "
                f"{manifest_path(prefixes[0])}"
            )
