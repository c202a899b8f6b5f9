"""What the preprocessing tools share: worker processes, rejects, publishing.

A tool is a reader (records in order), some `Work` (done to a chunk of records in a worker) and a sink
(results, in the order of the input, into a `DatasetOutput`).
"""

from __future__ import annotations

import argparse
import glob
import itertools
import json
import multiprocessing
import os
import re
import sys
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol, Self, TypeVar, cast

import numpy as np
import numpy.typing as npt

from megatron_vlmoe.config.errors import ConfigError, DataError
from megatron_vlmoe.data.image_files import ImageRules
from megatron_vlmoe.data.indexed import IndexedWriter
from megatron_vlmoe.data.manifest import (
    SAMPLES_SUFFIX,
    DatasetManifest,
    check_dataset,
    check_replaceable,
    dataset_parts,
    is_manifest,
    is_task,
    length_percentiles,
    load_manifest,
    manifest_path,
    not_replaceable,
    part_prefix,
    rejects_path,
    stage_manifest,
    unknown_line,
)
from megatron_vlmoe.data.task_dataset import SamplesWriter
from megatron_vlmoe.prepare.readers.records import (
    PassedOver,
    Reject,
    decoded,
    kinds_of,
    passed_over_line,
)
from megatron_vlmoe.prepare.remote import put_file, read_remote, remove_remote
from megatron_vlmoe.prepare.shards import Shard, Share
from megatron_vlmoe.runtime.files import StagedFile, delete_left_files, is_remote
from megatron_vlmoe.runtime.helper_processes import end_with_parent, without_interrupts
from megatron_vlmoe.tokenizers.text import TextTokenizer

OnError = Literal["stop", "skip"]
Chunk = TypeVar("Chunk")
Item = TypeVar("Item")
Other = TypeVar("Other")
Result = TypeVar("Result")
Work = Callable[[Chunk], Result]
"""What is done to a chunk: hashable and picklable. What it loads it keeps, and each worker keeps it."""

_CHUNKS_IN_FLIGHT_PER_WORKER = 3
_UNKNOWN_SHARE = 0.01
_PASSED_OVER = re.compile(r"passed over: (.*) (\d+)", re.DOTALL)


class StoredTokenizer(Protocol):
    """What of a text tokenizer is stored with the ids that it made."""

    @property
    def fingerprint(self) -> str:
        """`TextTokenizer.fingerprint`."""

    @property
    def size(self) -> int:
        """Pieces."""

    @property
    def unk_id(self) -> int:
        """Id of the unknown token."""


@dataclass(frozen=True)
class Run:
    """Options that all preprocessing tools have.

    Attributes:
        output_prefix: where the dataset goes.
        workers: processes; 1 works in this one.
        on_error: ``stop`` at the first bad record, or ``skip`` and list it.
        source: what the manifest records: ``command`` and ``inputs``; of a shard those of the run without shards.
        shard: which share of the input is read; None: all.
    """

    output_prefix: str
    workers: int
    on_error: OnError
    source: Mapping[str, Any]
    shard: Shard | None = None

    @property
    def prefix(self) -> str:
        """Path that the names of the files of this run, or of this shard of it, begin with."""
        return self.output_prefix if self.shard is None else self.shard.of(self.output_prefix)


@dataclass(frozen=True)
class Execution:
    """Where the work is done.

    Attributes:
        executor: ``local`` or ``ray``.
        num_shards: how many shards there are; None: one run on this machine, and with Ray four per worker.
        ray_address: of a cluster; None: that of the variable RAY_ADDRESS, else workers on this machine.
        on_gpus: whether a Ray task has a GPU, on clusters that have any.
    """

    executor: Literal["local", "ray"] = "local"
    num_shards: int | None = None
    ray_address: str | None = None
    on_gpus: bool = False

    def check(self, run: Run) -> None:
        """Raises ConfigError for options that contradict each other."""
        if run.shard is not None and (self.num_shards is not None or self.executor != "local"):
            other = "--num-shards" if self.num_shards is not None else "--executor ray"
            raise ConfigError(f"--shard does one shard alone: leave out {other}, or --shard")
        if self.ray_address is not None and self.executor != "ray":
            raise ConfigError("--ray-address is for --executor ray")


def encode_all(
    tokenizer: TextTokenizer, texts: Sequence[str], what: str = "text"
) -> list[list[int] | str]:
    """Ids of each text, at least one, or the reason why it is of no use, which calls it ``what``, as ``caption``."""
    try:
        # One call for many texts is several times faster than a call for each.
        encoded = tokenizer.encode_batch(texts)
    except ValueError:  # a lone surrogate, from JSON
        if len(texts) == 1:
            return ["invalid Unicode"]
        return [encode_all(tokenizer, [text], what)[0] for text in texts]
    return [
        f"empty {what}"
        if not ids
        else f"{what} without a word that the tokenizer knows"
        if tokenizer.is_unknown(ids)
        else ids
        for ids in encoded
    ]


def checked_text(value: object, what: str, max_characters: int) -> str:
    """A raw text as a string without space around it; bytes are decoded.

    Raises DataError with the reason why it is no usable text, which calls it ``what``; one of more than
    ``max_characters`` is refused before it is tokenized.
    """
    if isinstance(value, bytes):
        value = decoded(value)
    if not isinstance(value, str):
        raise DataError(f"{what} is not a string")
    text = value.strip()
    if not text:
        raise DataError(f"empty {what}")
    if len(text) > max_characters:
        raise DataError(f"{what} of {len(text)} characters, not tokenized")
    return text


GoodTexts = list[tuple[int, str, list[int]]]
"""Place, stripped text and ids of usable texts."""
BadTexts = list[tuple[int, str]]
"""Places of the others, and what is wrong with them."""


def encode_groups(
    tokenizer: TextTokenizer, groups: Sequence[Sequence[object]], what: str, max_characters: int
) -> Iterator[tuple[GoodTexts, BadTexts]]:
    """The texts of each group as `checked_text` and `encode_all` take them; they are tokenized in one call."""
    good, bad = [GoodTexts() for _ in groups], [BadTexts() for _ in groups]
    usable: list[tuple[int, int, str]] = []
    for number, group in enumerate(groups):
        for place, text in enumerate(group):
            try:
                usable.append((number, place, checked_text(text, what, max_characters)))
            except DataError as error:
                bad[number].append((place, str(error)))
    encoded = encode_all(tokenizer, [text for *_, text in usable], what)
    for (number, place, text), ids in zip(usable, encoded, strict=True):
        if isinstance(ids, str):
            bad[number].append((place, ids))
        else:
            good[number].append((place, text, ids))
    yield from zip(good, map(sorted, bad), strict=True)


@lru_cache(maxsize=1)
def _first_of_equal(work: Work[Any, Any]) -> Work[Any, Any]:
    return work


def _run_in_worker(work: Work[Any, Any], chunk: Any) -> Any:
    return _first_of_equal(work)(chunk)


def ordered_map(
    work: Work[Chunk, Result], chunks: Iterable[Chunk], workers: int
) -> Iterator[Result]:
    """Yields ``work`` of each chunk in order, a bounded number of chunks ahead. Raises DataError if a worker dies."""
    if workers == 1:
        yield from map(work, chunks)
        return
    # Spawned, not forked: libraries of the parent may have threads.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, end_with_parent, (os.getpid(),))
    waiting: deque[Future[Result]] = deque()
    try:
        for chunk in chunks:
            with without_interrupts():
                waiting.append(pool.submit(_run_in_worker, work, chunk))
            if len(waiting) >= _CHUNKS_IN_FLIGHT_PER_WORKER * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError("a worker process died (out of memory, or killed)") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def chunked(records: Iterable[Chunk], size: int) -> Iterator[list[Chunk]]:
    """Lists of ``size`` consecutive records; the last may be shorter."""
    iterator = iter(records)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def without(
    items: Iterable[Item | Other], kind: type[Other], counts: Counter[Other]
) -> Iterator[Item]:
    """The items, but for those of one kind: these are counted."""
    for item in items:
        if isinstance(item, kind):
            counts[item] += 1
        else:
            yield cast(Item, item)


def rejected_words(rejected: int, kept: int | None = None) -> str:
    """The end of a line of progress; ``kept`` where records are what is kept and rejected."""
    shown = "" if kept is None else f", {kept} kept"
    return f"{shown}, {rejected} rejected" if rejected else ""


def report_unknown(name: str, manifest: DatasetManifest) -> None:
    """Says on stderr how much of the texts the tokenizer did not know; warns above 1%."""
    print(f"{name}: {unknown_line(manifest)}", file=sys.stderr)
    if (manifest.unknown_tokens or 0) > _UNKNOWN_SHARE * manifest.tokens:
        print(
            f"warning: {name}: more than {_UNKNOWN_SHARE:.0%} of the tokens are <unk>: the tokenizer "
            "was trained without such characters; train one on these texts, or with --byte-fallback",
            file=sys.stderr,
        )


def record_counts(kept: int, rejected: int) -> dict[str, dict[str, int]]:
    """`DatasetManifest.counts` where each record is kept or rejected."""
    return {"records": {"read": kept + rejected, "kept": kept, "rejected": rejected}}


class RejectLog:
    """Stops at the first reject, or counts them and writes them to ``PREFIX.rejects.jsonl``.

    What is `PassedOver`, files among images that are none, stops nothing, and is listed at the end. ``named`` puts
    names as the user gave them into the place of others.
    """

    def __init__(self, prefix: str, on_error: OnError, named: Callable[[str], str] = str) -> None:
        self._on_error = on_error
        self._named = named
        self._path = rejects_path(prefix)
        self._staged: StagedFile | None = None
        self.count = 0
        self.first: Reject | None = None
        self.passed_over: Counter[PassedOver] = Counter()

    def add(self, rejects: Sequence[Reject]) -> None:
        """Takes rejects in order. Raises DataError if the run is to stop at errors."""
        for reject in rejects:
            if self._on_error == "stop":
                raise DataError(str(reject))
            self.first = self.first or reject
            self.count += 1
            names = ("source", "record", "reason", "unit")
            self._write({name: getattr(reject, name) for name in names})

    def add_lines(self, prefix: str, add_up: bool) -> None:
        """Takes over the list of another dataset, if it is there, with its numbers of files that were passed over as
        they are, or added up (``add_up``), as for shards. Raises DataError.
        """
        try:
            with open(rejects_path(prefix), encoding="ascii") as lines:
                for row in map(json.loads, lines):
                    over = (
                        _PASSED_OVER.fullmatch(row["reason"])
                        if add_up and row["unit"] == "files"
                        else None
                    )
                    if over is None:
                        self._write(row)
                    else:
                        self.passed_over[PassedOver(row["source"], over[1])] += int(over[2])
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{rejects_path(prefix)}: {error}") from error

    def _write(self, line: Mapping[str, str]) -> None:
        if self._staged is None:
            self._staged = StagedFile(self._path, "w")
        self._staged.write(
            json.dumps({key: self._named(text) for key, text in line.items()}) + "\n"
        )

    def finish(self) -> None:
        """Adds what was passed over, and syncs the file. Raises FileError."""
        kinds = ((self._named(item.source), item.kind, n) for item, n in self.passed_over.items())
        for source, kind, count in sorted(kinds):
            reason = f"passed over: {kind} {count}"
            line = {"source": source, "record": "", "reason": reason, "unit": "files"}
            self._write(line)
        if self._staged is not None:
            self._staged.finish()

    def publish(self) -> None:
        """Gives the file its name; without rejects removes one of an earlier run."""
        if self._staged is None:
            self._path.unlink(missing_ok=True)
        else:
            self._staged.publish()

    def abort(self) -> None:
        """Deletes the temporary file."""
        if self._staged is not None:
            self._staged.abort()


class OutputPlace:
    """Where files are written whose names begin with a prefix: there, or for an address in a temporary folder.

    Attributes:
        local: the prefix of the files that are written.

    Raises:
        DataError: a prefix without a name, ``PREFIX.json`` is something else, or the folder cannot be made.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = self.local = prefix
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        if not Path(prefix).name or prefix.endswith(os.sep):
            raise DataError(f"{prefix}: an output prefix needs a name after its folder")
        if is_remote(prefix):
            there = read_remote(f"{prefix}.json")
            self._folder = tempfile.TemporaryDirectory(prefix="vlmoe-")
            self.local = str(Path(self._folder.name, Path(prefix).name))
            if there is not None and not is_manifest(there):
                raise not_replaceable(f"{prefix}.json")
            return
        check_replaceable(prefix)
        try:
            Path(prefix).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{Path(prefix).parent}: {error.strerror}") from error

    def upload(self, suffixes: Sequence[str]) -> None:
        """Uploads finished files to an address, the manifest last; that of an earlier run goes first."""
        if not is_remote(self.prefix):
            return
        remove_remote(f"{self.prefix}{suffixes[-1]}")
        for suffix in suffixes:
            if os.path.exists(f"{self.local}{suffix}"):
                put_file(f"{self.local}{suffix}", f"{self.prefix}{suffix}")
            else:
                remove_remote(f"{self.prefix}{suffix}")

    def close(self) -> None:
        """Deletes the temporary folder."""
        if self._folder is not None:
            self._folder.cleanup()


def delete_left(prefix: str) -> None:
    """Deletes temporary files that a killed worker has left of a shard, on whatever machine."""
    for path in glob.glob(f"{glob.escape(prefix)}*.tmp-*"):
        Path(path).unlink(missing_ok=True)


def complete_shard(run: Run, share: Share[Any], kind: str) -> DatasetManifest | None:
    """The manifest of a run's shard that is there already; None: it is to be made."""
    if run.shard is None:
        return None
    try:
        path = share.mirror.local(f"{run.prefix}.json")
        found = path.removesuffix(".json")
        manifest = load_manifest(found) if is_remote(run.prefix) else check_dataset(found, kind)
    except DataError:  # not there, or damaged
        return None
    if manifest.shard is None or manifest.shard.work != share.work:
        return None
    print(f"{run.prefix}: shard {run.shard} is complete, nothing to do", file=sys.stderr)
    return manifest


class DatasetOutput:
    """All files of one dataset: published together by `commit`, deleted without it.

    Args:
        prefix: path prefix of the dataset; its folder is made if need be.
        kind: as in `DatasetManifest`; a task also gets a table of samples.
        dtypes: the dtype of each part of this kind (`dataset_parts`), in order.
        on_error: what a reject does.
        share: what is read, if that may be a shard or remote. A shard may hold no usable record.
    """

    def __init__(
        self,
        prefix: str,
        kind: str,
        dtypes: Sequence[npt.DTypeLike],
        on_error: OnError = "stop",
        share: Share[Any] | None = None,
    ) -> None:
        self.kind, self._share = kind, share
        self._place = OutputPlace(prefix)
        self.prefix = prefix = self._place.local
        named = str if share is None else share.mirror.named
        self.rejects = RejectLog(prefix, on_error, named)
        sharded = share is not None and share.shard is not None
        self.writers: dict[str, IndexedWriter] = {}
        self.samples: SamplesWriter | None = None
        self.unknown_tokens = 0
        with ExitStack() as undo:
            undo.callback(self._place.close)
            if sharded:
                delete_left(prefix)
            else:
                for part in ("samples", "rejects", *dataset_parts(kind)):
                    delete_left_files(part_prefix(prefix, part))
                delete_left_files(prefix)
            undo.callback(self.rejects.abort)
            for part, dtype in zip(dataset_parts(kind), dtypes, strict=True):
                self.writers[part] = IndexedWriter(part_prefix(prefix, part), dtype, sharded)
                undo.callback(self.writers[part].abort)
            if is_task(kind):
                self.samples = SamplesWriter(prefix, kind)
                undo.callback(self.samples.abort)
            self._undo = undo.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def count_unknown(self, tokens: npt.NDArray[np.integer], tokenizer: StoredTokenizer) -> None:
        """Counts the unknown ones of token ids ``[N]`` that are stored."""
        self.unknown_tokens += int(np.count_nonzero(tokens == tokenizer.unk_id))

    def manifest(
        self,
        source: Mapping[str, Any],
        tokenizer: StoredTokenizer | None = None,
        rules: ImageRules | None = None,
        inputs: object = None,
        **known: Any,
    ) -> DatasetManifest:
        """Completes all files under temporary names, and says what is in them.

        Args:
            source: as in the manifest.
            tokenizer: the one that made the token ids, if there are any.
            rules: about orientation and transparency of images, if there are any.
            inputs: name or names of what was read, for the error; None: those of ``source``.
            known: further fields of the manifest, which count more than what is found here.

        Raises DataError if the disk is full, or there was no usable record.
        """
        shard = None if self._share is None else self._share.record()
        if shard is None and not any(writer.num_documents for writer in self.writers.values()):
            inputs = inputs or source.get("inputs", "the input")
            names = ", ".join(map(str, inputs)) if isinstance(inputs, (list, tuple)) else inputs
            if self.rejects.passed_over:
                names = f"{names} ({passed_over_line(kinds_of(self.rejects.passed_over))})"
            why = f" ({self.rejects.count} rejected; the first: {self.rejects.first})"
            raise DataError(f"no usable record in {names}{why if self.rejects.first else ''}")
        self.rejects.finish()
        files = {
            f"_{part}{suffix}": record
            for part, writer in self.writers.items()
            for suffix, record in writer.finish().items()
        }
        if self.samples is not None:
            files[SAMPLES_SUFFIX] = self.samples.finish()
        writers = list(self.writers.values())
        first, last = writers[0], writers[-1]
        has_text = last is not self.writers.get("image")
        fields: dict[str, Any] = {
            "kind": self.kind,
            "documents": first.num_documents,
            "sequences": last.num_sequences,
            "tokens": last.num_items if has_text else 0,
            "bytes": sum(record.size for name, record in files.items() if name.endswith(".bin")),
            "files": files,
            "source": source,
            "rejects": self.rejects.count,
            "shard": shard,
            "unknown_tokens": self.unknown_tokens if has_text else None,
        }
        if tokenizer is not None:
            fields |= {"tokenizer_fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.size}
        if rules is not None and "image" in self.writers:
            fields |= {"exif": rules.exif, "alpha": rules.alpha}
        if "text" in self.writers:
            fields["caption_lengths"] = length_percentiles(last.staged_lengths())
        if self.samples is not None:
            fields["samples"] = self.samples.num_rows
        return DatasetManifest(**fields | known)

    def commit(self, manifest: DatasetManifest) -> None:
        """Publishes the finished files, the manifest last.

        The manifest of a dataset that is being replaced goes first, so that at no time a manifest
        stands beside files that are not its own.
        """
        self._publish(manifest)
        self._place.upload([*manifest.files, ".rejects.jsonl", ".json"])

    def _publish(self, manifest: DatasetManifest) -> None:
        staged = stage_manifest(self.prefix, manifest)
        try:
            manifest_path(self.prefix).unlink(missing_ok=True)
            self.rejects.publish()
            for writer in self.writers.values():
                writer.publish()
            if self.samples is not None:
                self.samples.publish()
            staged.publish()
        finally:
            staged.abort()


def positive_int(text: str) -> int:
    """Argument type: an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("expected a whole number of at least 1")
    return int(text)


def count(text: str) -> int:
    """Argument type: an integer of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError("expected a whole number of at least 0")
    return int(text)
