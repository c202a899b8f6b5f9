"""Downstream tasks to ``P_{split}_image``, ``_text`` and ``_samples.arrow``, one manifest per split.

A reader yields samples with paths of images and raw texts; workers check and tokenize them; the
sink numbers images and texts in order of first use.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.config.tasks import TaskSpec, find_task, load_code
from megatron_vlmoe.data.image_files import DEFAULT_RULES, ImageRules, quiet_pillow
from megatron_vlmoe.data.indexed import token_dtype
from megatron_vlmoe.data.manifest import DatasetManifest, ShardRecord
from megatron_vlmoe.data.task_dataset import TaskRow, check_task
from megatron_vlmoe.data.task_labels import Labels, write_labels
from megatron_vlmoe.prepare.corpora import add_images, checked_image
from megatron_vlmoe.prepare.readers.records import ImageFile, LeftOut, Reject
from megatron_vlmoe.prepare.readers.tasks.records import TaskInput, TaskSample, TaskSource
from megatron_vlmoe.prepare.remote import check_local
from megatron_vlmoe.prepare.shards import Shard, check_shards
from megatron_vlmoe.prepare.task_shards import KIND, ResultsWriter, read_about, read_results
from megatron_vlmoe.prepare.tool import (
    BadTexts,
    DatasetOutput,
    GoodTexts,
    OutputPlace,
    Run,
    chunked,
    delete_left,
    encode_groups,
    ordered_map,
    rejected_words,
    report_unknown,
    without,
)
from megatron_vlmoe.runtime.progress import Progress
from megatron_vlmoe.tokenizers.text import TextTokenizer

_MAX_CHARACTERS = 1 << 16
_IMAGE_CHUNK = 16
_TEXT_CHUNK = 512

ImageKey = tuple[str, int]


def _key(image: ImageFile) -> ImageKey:
    return image.path, image.offset


class SampleChunk(NamedTuple):
    """Some consecutive samples, and the images that no chunk before them had."""

    items: list[TaskSample | Reject]
    images: list[ImageFile]


class CheckedSample(NamedTuple):
    """A sample with its usable texts."""

    sample: TaskSample
    texts: GoodTexts


@dataclass
class CheckedChunk:
    """The result of one chunk: samples in order, and of each image its bytes or what is wrong."""

    items: list[CheckedSample | Reject] = field(default_factory=list)
    images: dict[ImageKey, bytes | str] = field(default_factory=dict)
    records: int = 0


@dataclass(frozen=True)
class TaskOptions:
    """How the samples are stored, and which.

    Attributes:
        tokenizer_model: SentencePiece model; None for a task without texts.
        resize_short: shorter side of images in pixels after shrinking; None keeps the images.
        splits: splits to prepare; empty: all that the task has.
        rules: about orientation and transparency of images.
    """

    tokenizer_model: str | None = None
    resize_short: int | None = None
    splits: tuple[str, ...] = ()
    rules: ImageRules = DEFAULT_RULES


@dataclass(frozen=True)
class CheckSamples:
    """The work on one chunk: decode the images, tokenize the texts.

    Attributes:
        task: its name.
        options: how samples are stored.
        num_classes: how many classes there are; 0 for a task without.
    """

    task: str
    options: TaskOptions
    num_classes: int

    @cached_property
    def _tokenizer(self) -> TextTokenizer | None:
        model = self.options.tokenizer_model
        return None if model is None else TextTokenizer(model)

    def __call__(self, chunk: SampleChunk) -> CheckedChunk:
        """Checks every image and text."""
        result = CheckedChunk(records=len(chunk.items))
        with quiet_pillow():
            for image in chunk.images:
                try:
                    data = checked_image(
                        image.read(), self.options.resize_short, self.options.rules
                    )
                    result.images[_key(image)] = data
                except DataError as error:
                    # With the image's own file, where it has one that is not the record that names it.
                    own = image.data is None and image.path not in str(error)
                    result.images[_key(image)] = f"{error} ({image.path})" if own else str(error)
        spec = find_task(self.task)
        what = "caption" if spec.target == "match" else "text"
        items = [
            Reject(item.source, item.record, reason, sample=_shown_id(item))
            if isinstance(item, TaskSample) and (reason := _misfit(item, spec, self.num_classes))
            else item
            for item in chunk.items
        ]
        groups = [item.texts for item in items if isinstance(item, TaskSample)]
        texts: Iterator[tuple[GoodTexts, BadTexts]] = (([], []) for _ in groups)
        if self._tokenizer is not None:
            texts = encode_groups(self._tokenizer, groups, what, _MAX_CHARACTERS)
        for item in items:
            if isinstance(item, Reject):
                result.items.append(item)
            else:
                result.items += _checked(item, spec, *next(texts))
        return result


def _misfit(sample: TaskSample, spec: TaskSpec, num_classes: int) -> str:
    """What of a sample does not fit its task; empty if all does. A reader may be a plug-in's, so nothing is sure."""
    if not isinstance(sample.id, str):
        return f"its id {sample.id!r} is neither a text nor a whole number"
    for name in ("texts", "labels", "scores", "answers"):
        if not isinstance(getattr(sample, name), tuple | list):
            return f"its {name} are {getattr(sample, name)!r}, which is no tuple"
    names = (sample.id, *sample.answers, sample.answer_type)
    if bad := [name for name in names if not isinstance(name, str)]:
        return f"its answer {bad[0]!r} is not a text"
    try:
        "".join(names).encode("utf-8")
    except UnicodeEncodeError:
        return "invalid Unicode in its id or answers"
    if len(sample.images) != len(spec.images):
        return f"{len(sample.images)} images, but a sample of {spec.name} has {len(spec.images)}"
    # An image has as many captions as there are.
    if spec.target != "match" and len(sample.texts) != len(spec.texts):
        return f"{len(sample.texts)} texts, but a sample of {spec.name} has {len(spec.texts)}"
    return _misfit_labels(sample, spec, num_classes)


def _misfit_labels(sample: TaskSample, spec: TaskSpec, num_classes: int) -> str:
    for label in sample.labels:
        if not isinstance(label, Integral) or isinstance(label, bool):
            return f"label {label!r} is not a whole number"
        if not 0 <= label < num_classes:
            return f"label {label} is none of the {num_classes} classes, which count from 0"
    if len(sample.labels) != len(sample.scores):
        return f"{len(sample.labels)} labels, but {len(sample.scores)} scores"
    if len(sample.labels) > 1 and not spec.has_answers:
        return f"{len(sample.labels)} labels, but a sample of {spec.name} has one class"
    for score in sample.scores:
        # Written so that a NaN is refused too.
        if not isinstance(score, Real) or not 0 <= float(score) <= 1:
            return f"score {score!r} of its label is not a number from 0 to 1"
    return ""


def _shown_id(sample: TaskSample) -> str:
    return str(sample.id).encode("utf-8", "replace").decode()


def _checked(
    sample: TaskSample, spec: TaskSpec, good: GoodTexts, bad: BadTexts
) -> list[CheckedSample | Reject]:
    """The sample with its texts; bad captions go alone, any other bad text takes all."""
    checked = CheckedSample(sample, good)
    rejects: list[CheckedSample | Reject] = []
    # An image's captions are samples of their own.
    captions = spec.target == "match"
    for place, reason in bad:
        number = f", caption {place}" if captions else f", text {place + 1}"
        record = sample.record + (number if captions or len(spec.texts) > 1 else "")
        name = f"{sample.id}#{place}" if captions else sample.id
        rejects.append(Reject(sample.source, record, reason, sample=name))
    if not captions:
        # One line for a sample: a count of rejects is a count of samples.
        return rejects[:1] or [checked]
    nothing = Reject(sample.source, sample.record, "no usable caption", sample=sample.id)
    return [*rejects, checked if good else nothing]


def sample_chunks(
    items: Iterable[TaskSample | Reject], size: int, shared: bool
) -> Iterator[SampleChunk]:
    """Cuts samples into chunks of ``size`` and finds the images that come for the first time.

    Where several samples may have an image in common (``shared``) every path is remembered; else memory does not grow.
    """
    seen: set[ImageKey] = set()
    for chunk in chunked(items, size):
        new: dict[ImageKey, ImageFile] = {}
        for item in chunk:
            for image in item.images if isinstance(item, TaskSample) else ():
                if _key(image) not in seen:
                    new[_key(image)] = image
        if shared:
            seen.update(new)
        # Samples keep the names of their images alone: workers would get and return every byte of them.
        named = [
            replace(item, images=tuple(replace(image, data=None) for image in item.images))
            if isinstance(item, TaskSample) and any(i.data is not None for i in item.images)
            else item
            for item in chunk
        ]
        yield SampleChunk(named, list(new.values()))


def _with_images(
    item: CheckedSample | Reject, images: Mapping[ImageKey, bytes | str]
) -> CheckedSample | Reject:
    """The sample, or why it is of no use if that is one of its images."""
    if isinstance(item, Reject):
        return item
    sample = item.sample
    found = [images.get(_key(image)) for image in sample.images]
    reason = next((image for image in found if isinstance(image, str)), None)
    if reason is None:
        return item
    return Reject(sample.source, sample.record, reason, sample=sample.id)


@dataclass(frozen=True)
class TokenizerFacts:
    """What of a text tokenizer is stored with token ids, as `TextTokenizer` has it."""

    fingerprint: str
    size: int
    unk_id: int


@dataclass(frozen=True)
class TaskFacts:
    """What the sink of a task has to know besides the checked samples.

    Attributes:
        task: its name.
        labels: the classes; None for a task without.
        fallback_answer: as in the manifest.
        tokenizer: of the texts; None for a task without.
        rules: about orientation and transparency of images.
    """

    task: str
    labels: Labels | None
    fallback_answer: str | None
    tokenizer: TokenizerFacts | None
    rules: ImageRules


class SampleSink:
    """Puts checked samples into the files of a split."""

    def __init__(self, output: DatasetOutput, task: str, tokenizer: TokenizerFacts | None) -> None:
        assert output.samples is not None
        self._output = output
        self._tokenizer = tokenizer
        self._samples = output.samples
        self._spec = find_task(task)
        self._documents: dict[ImageKey, int] = {}
        # Checked images before their first use, and for good the bad ones with what is wrong.
        self._images: dict[ImageKey, bytes | str] = {}
        self.left_out: dict[str, str] = {}
        """Reason by id of the rejected samples that have one."""

    def add(self, chunk: CheckedChunk) -> None:
        """Takes the next chunk. Raises DataError as `RejectLog.add` does, or on a full disk."""
        self._images.update(chunk.images)
        for checked in chunk.items:
            item = _with_images(checked, self._images)
            if isinstance(item, CheckedSample):
                self._add_sample(item)
                continue
            self._output.rejects.add([item])
            if item.sample:
                self.left_out[item.sample] = item.reason
        if not self._spec.shared_images:
            self._images.clear()

    def _add_sample(self, item: CheckedSample) -> None:
        sample = item.sample
        # A record of the same id that came before was not usable; this one is.
        self.left_out.pop(sample.id, None)
        images = tuple(self._document(_key(image)) for image in sample.images)
        texts: tuple[int, ...] = ()
        if self._spec.texts:
            writer = self._output.writers["text"]
            first = writer.num_sequences
            arrays = [np.asarray(ids) for _, _, ids in item.texts]
            assert self._tokenizer is not None
            self._output.count_unknown(np.concatenate(arrays), self._tokenizer)
            writer.add_document(arrays)
            texts = tuple(range(first, writer.num_sequences))
        if self._spec.target == "match":
            for (place, raw, _), text in zip(item.texts, texts, strict=True):
                self._samples.add(TaskRow(f"{sample.id}#{place}", images, (text,), (raw,)))
            return
        targets = (sample.labels, sample.scores, sample.answers, sample.answer_type)
        raws = tuple(raw for _, raw, _ in item.texts)
        self._samples.add(TaskRow(sample.id, images, texts, raws, *targets))

    def _document(self, key: ImageKey) -> int:
        """Number of an image, which is stored at its first use."""
        if key in self._documents:
            return self._documents[key]
        number = self._output.writers["image"].num_documents
        data = self._images[key]
        assert isinstance(data, bytes)
        add_images(self._output, [data])
        if self._spec.shared_images:
            self._documents[key] = number
            del self._images[key]
        return number


def prepare_task(source: TaskInput, run: Run, options: TaskOptions) -> dict[str, DatasetManifest]:
    """Prepares splits of a task under ``run.output_prefix``; returns their manifests.

    All splits are looked for before the first is read. Splits are published one by one, the class
    names (``P_labels.json``) before the first. The result does not depend on ``run.workers``. A shard leaves what
    `merge_task_shards` makes them of, and returns none.

    Raises:
        DataError: an unknown task, bad input (with ``on_error`` "stop"), a missing file, a tokenizer that cannot be
            loaded, a split without a usable sample, or a full disk; of the split in which it happens nothing is left.
    """
    check_task(source.task)
    spec = find_task(source.task)
    if spec.texts and options.tokenizer_model is None:
        raise DataError(f"task {source.task} needs --text-tokenizer")
    check_local("--raw", source.raw)
    check_local("--output of a task", run.output_prefix)
    if not os.path.isdir(source.raw):
        raise DataError(f"{source.raw}: not a folder")
    raw: TaskSource = load_code(spec.reader, spec.name)(source)
    splits = tuple(dict.fromkeys(options.splits)) or raw.splits()
    streams = {split: raw.read(split) for split in splits}
    model = options.tokenizer_model if spec.texts else None
    facts = TaskFacts(
        source.task, raw.labels, raw.fallback_answer, _tokenizer_facts(model), options.rules
    )
    if facts.labels is not None:
        print(f"{source.task}: {len(facts.labels.labels)} classes", file=sys.stderr)
    num_classes = 0 if facts.labels is None else len(facts.labels.labels)
    work = CheckSamples(source.task, replace(options, tokenizer_model=model), num_classes)
    size = _IMAGE_CHUNK if spec.images else _TEXT_CHUNK
    chunks: dict[str, Iterator[SampleChunk]] = {}
    omitted: dict[str, Counter[LeftOut]] = {}
    for split, stream in streams.items():
        omitted[split] = Counter()
        kept: Iterator[TaskSample | Reject] = without(stream, LeftOut, omitted[split])
        chunks[split] = sample_chunks(kept, size, spec.shared_images)
    if run.shard is not None:
        settings = (source, replace(options, tokenizer_model=None), splits, facts)
        _write_shard(run, run.shard, work, facts, chunks, omitted, settings)
        return {}
    return {
        split: _write_split(
            split, facts, run, ordered_map(work, chunks[split], run.workers), omitted[split]
        )
        for split in splits
    }


def _tokenizer_facts(model: str | None) -> TokenizerFacts | None:
    if model is None:
        return None
    tokenizer = TextTokenizer(model)
    return TokenizerFacts(tokenizer.fingerprint, tokenizer.size, tokenizer.unk_id)


def _write_split(
    split: str,
    facts: TaskFacts,
    run: Run,
    results: Iterable[CheckedChunk],
    omitted: Mapping[LeftOut, int],
) -> DatasetManifest:
    """Writes one split; ``omitted`` is filled while the results come."""
    name, spec, tokenizer = f"{facts.task} {split}", find_task(facts.task), facts.tokenizer
    dtypes: list[npt.DTypeLike] = [np.uint8] if spec.images else []
    if tokenizer is not None:
        dtypes.append(token_dtype(tokenizer.size))
    inputs = ", ".join(map(str, run.source.get("inputs", ("the input",))))
    labels = facts.labels
    with (
        Progress(name) as progress,
        DatasetOutput(f"{run.output_prefix}_{split}", facts.task, dtypes, run.on_error) as output,
    ):
        sink = SampleSink(output, facts.task, tokenizer)
        for result in results:
            sink.add(result)
            progress.add(result.records)
        manifest = output.manifest(
            {**run.source, "split": split},
            tokenizer,
            facts.rules,
            f"split {split} of {inputs}",
            omitted={item.reason: count for item, count in omitted.items()},
            left_out=sink.left_out,
            fallback_answer=facts.fallback_answer,
            labels_sha256=None if labels is None else labels.sha256,
        )
        if labels is not None:
            write_labels(run.output_prefix, labels)
        output.commit(manifest)
    progress.finish(rejected_words(manifest.rejects))
    if manifest.unknown_tokens is not None:
        report_unknown(name, manifest)
    for reason, count in sorted((manifest.omitted or {}).items()):
        print(f"{name}: {count} samples left out: {reason}", file=sys.stderr)
    return manifest


def _write_shard(
    run: Run,
    shard: Shard,
    work: CheckSamples,
    facts: TaskFacts,
    chunks: Mapping[str, Iterator[SampleChunk]],
    omitted: Mapping[str, Mapping[LeftOut, int]],
    settings: object,
) -> None:
    """Checks every chunk whose number is the shard's, modulo their count, and stores the results for the merge.

    All samples are read, but the images and texts of the shard alone.
    """
    digest = hashlib.sha256(f"{settings}".encode("utf-8", "surrogateescape")).hexdigest()
    record = ShardRecord(shard.index, shard.count, digest)
    with contextlib.suppress(DataError):  # not there, or damaged
        if ShardRecord(**read_about(run.prefix)["shard"]) == record:
            print(f"{run.prefix}: shard {shard} is complete, nothing to do", file=sys.stderr)
            return
    OutputPlace(run.prefix)  # makes the folder, and refuses to overwrite what is no shard
    delete_left(run.prefix)
    numbers: dict[str, int] = {}
    with ResultsWriter(run.prefix) as writer:
        for split, stream in chunks.items():
            total = itertools.count()
            # The count goes on while chunks are taken; those of other shards cost their reading alone.
            own = (chunk for chunk in stream if next(total) % shard.count == shard.index)
            with Progress(f"{facts.task} {split}") as progress:
                for result in ordered_map(work, own, run.workers):
                    if run.on_error == "stop":
                        _check_good(result)
                    writer.add(result)
                    progress.add(result.records)
            progress.finish()
            numbers[split] = next(total)
        about = {
            "shard": dataclasses.asdict(record),
            "source": run.source,
            "on_error": run.on_error,
            "facts": dataclasses.asdict(facts),
            "chunks": list(numbers.items()),
            "omitted": {
                split: {item.reason: count for item, count in of.items()}
                for split, of in omitted.items()
            },
        }
        writer.publish(about)


def _check_good(chunk: CheckedChunk) -> None:
    """Raises DataError for the first sample that is of no use, as far as its own chunk shows it."""
    for item in chunk.items:
        found = _with_images(item, chunk.images)
        if isinstance(found, Reject):
            raise DataError(str(found))


def is_task_shard(about: Any) -> bool:
    """Whether the JSON file of a shard is that of a task."""
    return isinstance(about, dict) and about.get("kind") == KIND


def merge_task_shards(shards: Sequence[str], output_prefix: str) -> dict[str, DatasetManifest]:
    """Writes the splits of a task from all shards of a run, as the run without shards does; returns their manifests.

    Raises:
        DataError: a shard is damaged or of another run, or as `prepare_task` does.
    """
    abouts = [read_about(shard) for shard in shards]
    check_shards(shards, [ShardRecord(**about["shard"]) for about in abouts])
    first = abouts[0]
    for shard, about in zip(shards, abouts, strict=True):
        if about["chunks"] != first["chunks"]:
            raise DataError(f"{shard}: its raw data differ from those of {shards[0]}")
    kept = first["facts"]
    labels, tokenizer = kept["labels"], kept["tokenizer"]
    if labels is not None:
        names = labels["names"]
        labels = Labels(labels["task"], tuple(labels["labels"]), names and tuple(names))
    facts = TaskFacts(
        kept["task"],
        labels,
        kept["fallback_answer"],
        tokenizer and TokenizerFacts(**tokenizer),
        ImageRules(**kept["rules"]),
    )
    run = Run(output_prefix, 1, first["on_error"], first["source"])
    results = [read_results(shard) for shard in shards]
    manifests: dict[str, DatasetManifest] = {}
    for split, number in first["chunks"]:
        in_order = (next(results[place % len(shards)]) for place in range(number))
        omitted = {LeftOut(reason): count for reason, count in first["omitted"][split].items()}
        manifests[split] = _write_split(split, facts, run, in_order, omitted)
    return manifests
