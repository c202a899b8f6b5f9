"""Image-caption pairs to ``PREFIX_image`` and ``PREFIX_text``.

Document i of the one belongs to document i of the other; the sequences of a text document are the
captions of the image, as token ids without special ones.
"""

from __future__ import annotations

import sys
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.data.image_files import DEFAULT_RULES, ImageRules, quiet_pillow
from megatron_vlmoe.data.indexed import token_dtype
from megatron_vlmoe.data.manifest import (
    DatasetManifest,
    rejects_path,
)
from megatron_vlmoe.prepare.images import add_images, checked_image
from megatron_vlmoe.prepare.readers.pair_formats import read_pairs, with_format
from megatron_vlmoe.prepare.readers.pairs import PairInput
from megatron_vlmoe.prepare.readers.records import (
    CaptionedImage,
    LeftOut,
    PairItem,
    PassedOver,
    Reject,
    kinds_of,
    passed_over_line,
)
from megatron_vlmoe.prepare.tool import (
    DatasetOutput,
    Run,
    checked_text,
    chunked,
    encode_all,
    ordered_map,
    report_unknown,
    without,
)
from megatron_vlmoe.runtime.progress import Progress
from megatron_vlmoe.tokenizers.text import TextTokenizer

DEFAULT_MAX_CAPTION_TOKENS = 512
_MAX_CHARACTERS_PER_TOKEN = 64
_CHUNK = 16


@dataclass
class PairCounts:
    """What became of records, images and captions, each counted apart.

    A record is what the input has one of per image or per caption: a row, an entry, a sample. It is
    kept if anything of it is.
    """

    records: Counter[str] = field(default_factory=Counter)
    """``kept``, ``rejected``, ``left_out`` (of a split that is not wanted)."""
    images: Counter[str] = field(default_factory=Counter)
    """``kept``, ``rejected``."""
    captions: Counter[str] = field(default_factory=Counter)
    """``kept``, ``rejected``, ``lost`` (with their image or record)."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Records left out, by reason."""
    listed: Counter[str] = field(default_factory=Counter)
    """Rejects by their unit."""

    def reject(self, reject: Reject) -> None:
        """Counts what is rejected."""
        self.listed[reject.unit] += 1
        self.records["rejected"] += reject.records
        self.images["rejected"] += reject.unit == "image"
        self.captions["rejected"] += reject.unit == "caption"
        self.captions["lost"] += reject.captions

    def leave_out(self, item: LeftOut) -> None:
        """Counts a record that nobody asked for."""
        self.records["left_out"] += 1
        self.left_out[item.reason] += 1

    def keep(self, item: CaptionedImage, bad: Collection[int]) -> None:
        """Counts an image and all but the bad ones of its captions, which are rejects."""
        self.images["kept"] += 1
        self.captions["kept"] += len(item.captions) - len(bad)
        place = 0
        for size in item.captions_per_record or (len(item.captions),):
            good = not size or any(p not in bad for p in range(place, place + size))
            self.records["kept" if good else "rejected"] += 1
            place += size

    def add(self, other: PairCounts) -> None:
        """Adds those of another part."""
        for name, counts in vars(self).items():
            counts.update(getattr(other, name))

    def as_dict(self) -> dict[str, dict[str, int]]:
        """For the manifest: each kind's total, ``read``, and what it is the sum of."""
        fates = {
            "records": (self.records, ("kept", "rejected", "left_out")),
            "images": (self.images, ("kept", "rejected")),
            "captions": (self.captions, ("kept", "rejected", "lost")),
        }
        return {
            kind: {"read": counts.total()} | {fate: counts[fate] for fate in names}
            for kind, (counts, names) in fates.items()
        }


@dataclass
class CheckedPairs:
    """The result of one chunk: documents, flat, in order."""

    images: list[bytes] = field(default_factory=list)
    tokens: array[int] = field(default_factory=lambda: array("I"))
    caption_lengths: array[int] = field(default_factory=lambda: array("q"))
    captions_per_image: array[int] = field(default_factory=lambda: array("q"))
    rejects: list[Reject] = field(default_factory=list)
    counts: PairCounts = field(default_factory=PairCounts)

    def reject(self, reject: Reject) -> None:
        """Takes a reject."""
        self.rejects.append(reject)
        self.counts.reject(reject)


def _named(item: CaptionedImage, error: DataError) -> str:
    """The reason with the image's own file, which is not the annotation that names it."""
    message, path = str(error), item.image.path
    return message if not path or path in message else f"{message} ({path})"


@dataclass(frozen=True)
class PairOptions:
    """How images and captions are stored.

    Attributes:
        resize_short: shorter side in pixels after shrinking; None keeps the images.
        max_caption_tokens: longer captions are rejected.
        rules: about orientation and transparency of images.
    """

    resize_short: int | None = None
    max_caption_tokens: int = DEFAULT_MAX_CAPTION_TOKENS
    rules: ImageRules = DEFAULT_RULES


@dataclass(frozen=True)
class CheckPairs:
    """The work on one chunk: tokenize the captions, decode the images."""

    tokenizer_model: str
    options: PairOptions

    def build(self) -> Callable[[list[PairItem]], CheckedPairs]:
        """Loads the tokenizer."""
        tokenizer = TextTokenizer(self.tokenizer_model)
        return lambda chunk: self._check(tokenizer, chunk)

    def _check(self, tokenizer: TextTokenizer, chunk: list[PairItem]) -> CheckedPairs:
        result = CheckedPairs()
        with quiet_pillow():
            for item in chunk:
                if isinstance(item, Reject):
                    result.reject(item)
                elif isinstance(item, LeftOut):
                    result.counts.leave_out(item)
                else:
                    self._add(tokenizer, item, result)
        return result

    def _add(self, tokenizer: TextTokenizer, item: CaptionedImage, result: CheckedPairs) -> None:
        """Adds an image with its usable captions, or one reject for all of it."""
        captions, bad = self._captions(tokenizer, item)
        try:
            if not captions:
                raise DataError(_no_caption(item, bad))
            image = checked_image(item.image.read(), self.options.resize_short, self.options.rules)
        except DataError as error:
            reason = _named(item, error) if captions else str(error)
            lost = len(item.captions)
            records = len(item.captions_per_record) or 1
            result.reject(
                Reject(
                    item.source, item.record, reason, unit="image", records=records, captions=lost
                )
            )
            return
        for number, reason in sorted(bad.items()):
            record = item.caption_record(number)
            result.reject(Reject(item.source, record, reason, unit="caption", records=0))
        result.images.append(image)
        result.captions_per_image.append(len(captions))
        result.counts.keep(item, bad)
        for ids in captions:
            result.tokens.fromlist(ids)
            result.caption_lengths.append(len(ids))

    def _captions(
        self, tokenizer: TextTokenizer, item: CaptionedImage
    ) -> tuple[list[list[int]], dict[int, str]]:
        """Ids of the usable captions, and by their numbers what is wrong with the others."""
        longest = self.options.max_caption_tokens * _MAX_CHARACTERS_PER_TOKEN
        usable: list[tuple[int, str]] = []
        bad: dict[int, str] = {}
        for number, caption in enumerate(item.captions):
            try:
                usable.append((number, checked_text(caption, "caption", longest)))
            except DataError as error:
                bad[number] = str(error)
        result = []
        encoded = encode_all(tokenizer, [text for _, text in usable], "caption")
        for (number, _), ids in zip(usable, encoded, strict=True):
            if isinstance(ids, str):
                bad[number] = ids
            elif len(ids) > self.options.max_caption_tokens:
                bad[number] = (
                    f"caption of {len(ids)} tokens, more than {self.options.max_caption_tokens}"
                )
            else:
                result.append(ids)
        return result, bad


def _no_caption(item: CaptionedImage, bad: Mapping[int, str]) -> str:
    """Why an image has no usable caption: what is wrong with which."""
    numbers: dict[str, list[str]] = {}
    for number, reason in sorted(bad.items()):
        numbers.setdefault(reason, []).append(item.caption_record(number))
    if len(bad) <= 1:
        return "no usable caption" + "".join(f": {reason}" for reason in numbers)
    reasons = [f"{reason} ({', '.join(records)})" for reason, records in numbers.items()]
    return f"no usable caption: {'; '.join(reasons)}"


def preprocess_pairs(
    source: PairInput,
    tokenizer_model: str,
    run: Run,
    options: PairOptions | None = None,
) -> DatasetManifest:
    """Indexes a corpus of captioned images; returns the manifest.

    A bad caption alone is left out; an image goes when it is bad or has no usable caption. Records,
    images and captions are counted apart (`PairCounts`). The result does not depend on
    ``run.workers``.

    Raises:
        DataError: bad input (with ``on_error`` "stop"), no usable pair, or a full disk; nothing
            is left behind.
        ValueError: the tokenizer cannot be loaded.
    """
    options = options or PairOptions()
    tokenizer = TextTokenizer(tokenizer_model)
    work = CheckPairs(tokenizer_model, options)
    chosen = with_format(source)
    counts = PairCounts()
    dtypes: list[npt.DTypeLike] = [np.uint8, token_dtype(tokenizer.size)]
    with (
        Progress("pairs") as progress,
        DatasetOutput(run.output_prefix, "pairs", dtypes, run.on_error) as output,
    ):
        passed_over = output.rejects.passed_over
        records: Iterator[PairItem] = without(read_pairs(chosen), PassedOver, passed_over)
        chunks = chunked(records, _CHUNK)
        for result in ordered_map(work, chunks, run.workers):
            output.rejects.add(result.rejects)
            add_images(output, result.images)
            tokens = np.array(result.tokens)
            output.count_unknown(tokens, tokenizer)
            output.writers["text"].add_documents(
                tokens,
                np.array(result.caption_lengths, np.int64),
                np.array(result.captions_per_image, np.int64),
            )
            counts.add(result.counts)
            progress.add(result.counts.records.total())
        manifest = output.manifest(
            run.source,
            tokenizer,
            options.rules,
            counts=counts.as_dict(),
            passed_over=kinds_of(passed_over),
            omitted=dict(counts.left_out),
        )
        output.commit(manifest)
    progress.finish()  # what is rejected follows, kind by kind
    if source.format == "auto":
        print(f"pairs: read as --format {chosen.format}", file=sys.stderr)
    for line in _summary(counts, run.output_prefix, output.rejects.passed_over):
        print(f"pairs: {line}", file=sys.stderr)
    report_unknown("pairs", manifest)
    return manifest


def _summary(counts: PairCounts, prefix: str, passed_over: Mapping[PassedOver, int]) -> list[str]:
    """What became of records, images, captions and other files, a line for each kind."""
    lines = []
    for kind, fates in counts.as_dict().items():
        shown = [
            f"{count} {fate.replace('_', ' ')}"
            for fate, count in fates.items()
            if fate in ("kept", "rejected") or (fate != "read" and count)
        ]
        lines.append(f"{fates['read']} {kind}: {', '.join(shown)}")
    left_out = [f"{count} of {reason}" for reason, count in sorted(counts.left_out.items())]
    if left_out:
        lines[0] += f" ({', '.join(left_out)}; choose with --split)"
    if counts.captions["lost"]:
        lines[-1] += " with their image"
    if passed_over:
        lines.append(passed_over_line(kinds_of(passed_over)))
    if total := counts.listed.total() + len(passed_over):
        units = [f"{n} {unit}{'s' * (n > 1)}" for unit, n in sorted(counts.listed.items())]
        units += [f"{len(passed_over)} of what is passed over"] if passed_over else []
        lines.append(
            f"{total} line{'s' * (total > 1)} in {rejects_path(prefix)}: {', '.join(units)}"
        )
    return lines
