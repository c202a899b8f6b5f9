"""Text, images and pairs of both to indexed files, and several such datasets to one.

Text goes to ``PREFIX_text_document``, one document of one sequence per text; images to ``PREFIX_image``, one document
of one uint8 sequence, the encoded file, per image. Of pairs document i of ``PREFIX_image`` belongs to document i of
``PREFIX_text``, whose sequences are the captions of the image, as token ids without special ones.
"""

from __future__ import annotations

import io
import sys
from array import array
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile, get_sampling

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.convert.hf.images_vlmoe import load_pixels, orientation, turned
from megatron_vlmoe.data.image_files import (
    DEFAULT_RULES,
    ImageRules,
    decoding_errors,
    is_large,
    is_transparent,
    open_image_file,
    quiet_pillow,
    rgb_pixels,
    to_rgb,
)
from megatron_vlmoe.data.indexed import IndexedReader, token_dtype
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
from megatron_vlmoe.prepare.readers.images import image_parts, read_images
from megatron_vlmoe.prepare.readers.pair_formats import pair_parts, read_pairs, remote_format
from megatron_vlmoe.prepare.readers.pairs import PairInput
from megatron_vlmoe.prepare.readers.records import (
    CaptionedImage,
    ImageFile,
    LeftOut,
    PairItem,
    PassedOver,
    Reject,
    TextBlock,
    kinds_of,
    passed_over_line,
)
from megatron_vlmoe.prepare.readers.text import TextInput, block_texts, read_text, text_parts
from megatron_vlmoe.prepare.remote import Mirror
from megatron_vlmoe.prepare.shards import Share, check_shards
from megatron_vlmoe.prepare.tool import (
    BadTexts,
    DatasetOutput,
    GoodTexts,
    Run,
    chunked,
    complete_shard,
    encode_all,
    encode_groups,
    ordered_map,
    record_counts,
    rejected_words,
    report_unknown,
    without,
)
from megatron_vlmoe.runtime.progress import Progress
from megatron_vlmoe.tokenizers.text import TextTokenizer

_KEPT_FORMATS = frozenset({"JPEG", "PNG", "WEBP"})
_KEPT_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA"})
_JPEG_QUALITY = 95
# Pillow's number of 4:2:0: colours at half the resolution both ways.
_HALVED_COLOURS = 2
_CHUNK = 16  # images


@dataclass(frozen=True)
class CheckImages:
    """The work on one chunk of images: the bytes to store of each, or why there are none."""

    resize_short: int | None
    rules: ImageRules

    def __call__(self, chunk: list[ImageFile | Reject]) -> list[bytes | Reject]:
        """Checks every image."""
        checked: list[bytes | Reject] = []
        with quiet_pillow():
            for item in chunk:
                if isinstance(item, Reject):
                    checked.append(item)
                    continue
                try:
                    checked.append(checked_image(item.read(), self.resize_short, self.rules))
                except DataError as error:
                    checked.append(Reject(item.source, item.record, str(error)))
        return checked


def checked_image(
    data: bytes, resize_short: int | None = None, rules: ImageRules = DEFAULT_RULES
) -> bytes:
    """Decodes an encoded image to the end and returns the bytes to store.

    These are the given bytes, unless the image is to be resized, turned upright or put on a ground, or is of a format
    or mode that training does not read (CMYK, 16 bits, GIF, TIFF, ...). Then it becomes a JPEG of quality 95; but
    what is only turned or put on a ground stays a PNG or lossless WebP if it was one. Call it inside `quiet_pillow`.

    Args:
        data: the encoded image.
        resize_short: shorter side in pixels after shrinking; images are never enlarged.
        rules: about orientation and transparency.

    Raises:
        DataError: not an image, truncated or corrupt, too large, or a decompression bomb (the reason alone).
    """
    with decoding_errors(), open_image_file(data) as image:
        if resize_short is not None and min(image.size) > resize_short:
            return _shrunk(image, resize_short, rules)
        if is_large(image):
            raise _too_large(image)
        if image.format not in _KEPT_FORMATS or image.mode not in _KEPT_MODES:
            return _jpeg(rgb_pixels(image, rules))
        if isinstance(image, JpegImageFile):
            if rules.exif == "keep" or orientation(image) == 1:
                # At an eighth of the size all data is still parsed, in half the time.
                image.draft(None, (1, 1))
                image.load()
                return data
            # Not with the file's own quality: where a side is no multiple of 8 pixels, blocks fall
            # elsewhere, and all that it lost once it would lose again.
            halved = get_sampling(image) == _HALVED_COLOURS
            return _jpeg(turned(image, load_pixels(image, rules.exif)), None if halved else 0)
        way = load_pixels(image, rules.exif)
        transparent = rules.alpha != "drop" and is_transparent(image)
        if way == 1 and not transparent:
            return data
        upright = turned(to_rgb(image, rules.alpha) if transparent else image, way)
        return _like(data, upright)


def _shrunk(image: Image.Image, short: int, rules: ImageRules) -> bytes:
    size = image.size
    if isinstance(image, JpegImageFile):
        # Decode at no less than twice the wanted size, then filter.
        wanted = [2 * side for side in _fitted(size, short)]
        if is_large(image):
            if 2 * short > min(size):
                raise _too_large(image)
            wanted = [min(pair) for pair in zip(wanted, (side // 2 for side in size))]
        image.draft(None, (wanted[0], wanted[1]))
    way = load_pixels(image, rules.exif)
    if not isinstance(image, JpegImageFile):
        # Some formats know their size only now: a TIFF has been turned.
        size = image.size
    rgb = to_rgb(image, rules.alpha)
    resized = rgb.resize(_fitted(size, short), Image.Resampling.BICUBIC, reducing_gap=3.0)
    return _jpeg(turned(resized, way))


def _fitted(size: tuple[int, int], short: int) -> tuple[int, int]:
    """Width and height with the shorter side made ``short``."""
    factor = short / min(size)
    return max(short, round(size[0] * factor)), max(short, round(size[1] * factor))


def _too_large(image: Image.Image) -> DataError:
    return DataError(
        f"{image.width}x{image.height} pixels, more than the {Image.MAX_IMAGE_PIXELS} that are stored whole: "
        f"shrink it by --resize-short, to {min(image.size) // 2} at most"
    )


def _jpeg(image: Image.Image, subsampling: int | None = None) -> bytes:
    buffer = io.BytesIO()
    options = {} if subsampling is None else {"subsampling": subsampling}
    image.save(buffer, "JPEG", quality=_JPEG_QUALITY, **options)
    return buffer.getvalue()


def _like(data: bytes, image: Image.Image) -> bytes:
    """Pixels in the format of the PNG or WebP file ``data``; in JPEG if that was a lossy WebP."""
    # The transparent colour alone: a writer might take over the orientation, in XMP for one.
    image.info = {k: v for k, v in image.info.items() if k == "transparency"}
    buffer = io.BytesIO()
    if data.startswith(b"\x89PNG"):
        image.save(buffer, "PNG")
    elif _is_lossless_webp(data):
        image.save(buffer, "WEBP", lossless=True, exact=True)
    else:
        return _jpeg(image.convert("RGB"))
    return buffer.getvalue()


def _is_lossless_webp(data: bytes) -> bool:
    """Whether the first chunk of pixels is lossless; of an animation, of its first frame."""
    place = 12
    while place + 8 <= len(data):
        name, size = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        if name in (b"VP8 ", b"VP8L"):
            return name == b"VP8L"
        # A frame's own chunks come after 16 bytes of its place and time.
        place += 24 if name == b"ANMF" else 8 + size + size % 2
    return False


def add_images(output: DatasetOutput, images: Sequence[bytes]) -> None:
    """Adds each encoded image as a document of the part ``image``; one call for all costs as much as for one."""
    if images:
        lengths = np.array([len(data) for data in images], np.int64)
        items = np.frombuffer(b"".join(images), np.uint8)
        output.writers["image"].add_documents(items, lengths, np.ones_like(lengths))


def preprocess_images(
    inputs: tuple[str, ...], run: Run, resize_short: int | None, rules: ImageRules
) -> DatasetManifest:
    """Checks and indexes the images of folders, tars and files; returns the manifest, whatever the number of workers.

    Raises DataError for bad input (with ``on_error`` "stop"), no usable image, or a full disk; nothing is left behind.
    """
    with ExitStack() as stack:
        share = stack.enter_context(
            Share(
                run.shard,
                inputs,
                lambda: read_images(inputs),
                lambda mirror: image_parts(inputs, mirror),
                ("images", resize_short, rules),
            )
        )
        if (complete := complete_shard(run, share, "images")) is not None:
            return complete
        progress = stack.enter_context(Progress("images"))
        output = stack.enter_context(
            DatasetOutput(run.prefix, "images", [np.uint8], run.on_error, share)
        )
        passed_over = output.rejects.passed_over
        found: Iterator[ImageFile | Reject] = without(share, PassedOver, passed_over)
        chunks = chunked(found, _CHUNK)
        for result in ordered_map(CheckImages(resize_short, rules), chunks, run.workers):
            output.rejects.add([one for one in result if isinstance(one, Reject)])
            add_images(output, [one for one in result if isinstance(one, bytes)])
            progress.add(len(result))
        manifest = output.manifest(
            run.source,
            rules=rules,
            counts=record_counts(output.writers["image"].num_documents, output.rejects.count),
            passed_over=kinds_of(passed_over),
        )
        output.commit(manifest)
    progress.finish(rejected_words(manifest.rejects, manifest.documents))
    if manifest.passed_over:
        print(f"images: {passed_over_line(manifest.passed_over)}", file=sys.stderr)
    return manifest


class TokenizedText(NamedTuple):
    """The result of one block: of lines, rows or entries some are kept in the documents, and others rejected."""

    tokens: np.ndarray
    """``[sum(lengths)]``."""
    lengths: np.ndarray
    """Tokens per document, ``[N]``."""
    rejects: list[Reject]
    kept: int
    rejected: int


@dataclass(frozen=True)
class TokenizeText:
    """The work on one block: decode, parse, tokenize."""

    tokenizer_model: str

    @cached_property
    def _tokenizer(self) -> TextTokenizer:
        return TextTokenizer(self.tokenizer_model)

    def __call__(self, block: TextBlock | Reject) -> TokenizedText:
        """Tokenizes the documents of a block."""
        dtype = token_dtype(self._tokenizer.size)
        if isinstance(block, Reject):
            return TokenizedText(np.empty(0, dtype), np.empty(0, np.int64), [block], 0, 1)
        documents, bad = block_texts(block)
        rejects = [(n, Reject(block.source, f"{block.unit} {n}", reason)) for n, reason in bad]
        tokens, lengths = array("I"), array("q")
        kept = 0
        encoded = encode_all(self._tokenizer, [document.text for document in documents])
        for document, ids in zip(documents, encoded, strict=True):
            if isinstance(ids, str):
                more = f" and {document.parts - 1} more" if document.parts > 1 else ""
                record = f"{block.unit} {document.number}{more}"
                reject = Reject(block.source, record, ids, records=document.parts)
                rejects.append((document.number, reject))
            else:
                tokens.fromlist(ids)  # with "I" several times faster than extend, or than NumPy
                lengths.append(len(ids))
                kept += document.parts
        return TokenizedText(
            np.array(tokens, dtype),
            np.array(lengths, np.int64),
            [reject for _, reject in sorted(rejects, key=lambda one: one[0])],
            kept,
            sum(reject.records for _, reject in rejects),
        )


def preprocess_text(source: TextInput, tokenizer_model: str, run: Run) -> DatasetManifest:
    """Tokenizes text files into an indexed dataset; returns its manifest, whatever the number of workers.

    Raises:
        DataError: bad input (with ``on_error`` "stop"), no usable record, a tokenizer that cannot be loaded, or a full
            disk; nothing is left behind.
    """
    tokenizer = TextTokenizer(tokenizer_model)
    dtype, kept, rejected = token_dtype(tokenizer.size), 0, 0
    with ExitStack() as stack:
        share = stack.enter_context(
            Share(
                run.shard,
                source.files,
                lambda: read_text(source),
                lambda mirror: text_parts(source, mirror),
                ("text", source, tokenizer.fingerprint),
            )
        )
        if (complete := complete_shard(run, share, "text")) is not None:
            return complete
        progress = stack.enter_context(Progress("text"))
        output = stack.enter_context(
            DatasetOutput(run.prefix, "text", [dtype], run.on_error, share)
        )
        writer = output.writers["text_document"]
        work = TokenizeText(tokenizer_model)
        for result in ordered_map(work, share, run.workers):
            output.rejects.add(result.rejects)
            output.count_unknown(result.tokens, tokenizer)
            writer.add_documents(result.tokens, result.lengths, np.ones_like(result.lengths))
            kept, rejected = kept + result.kept, rejected + result.rejected
            progress.add(result.kept + result.rejected)
        counts = record_counts(kept, rejected)
        manifest = output.manifest(run.source, tokenizer, counts=counts)
        output.commit(manifest)
    progress.finish(rejected_words(rejected, kept))
    if kept != manifest.documents:
        print(f"text: {kept} records in {manifest.documents} documents", file=sys.stderr)
    report_unknown("text", manifest)
    return manifest


DEFAULT_MAX_CAPTION_TOKENS = 512
_MAX_CHARACTERS_PER_TOKEN = 64
_FATES = {
    "records": ("kept", "rejected", "left_out"),  # left out: of a split that is not wanted
    "images": ("kept", "rejected"),
    "captions": ("kept", "rejected", "lost"),  # lost: with their image or record
}


@dataclass
class PairCounts:
    """What became of records, images and captions, each counted apart.

    A record is what the input has one of per image or per caption: a row, an entry, a sample. It is
    kept if anything of it is.
    """

    fates: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By what is counted and what became of it: those of ``_FATES``."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Records left out, by reason."""
    listed: Counter[str] = field(default_factory=Counter)
    """Rejects by their unit."""

    def keep(self, item: CaptionedImage, bad: Collection[int]) -> None:
        """Counts an image and all but the bad ones of its captions, which are rejects."""
        self.fates["images", "kept"] += 1
        self.fates["captions", "kept"] += len(item.captions) - len(bad)
        place = 0
        for size in item.captions_per_record or (len(item.captions),):
            good = not size or any(p not in bad for p in range(place, place + size))
            self.fates["records", "kept" if good else "rejected"] += 1
            place += size

    def add(self, other: PairCounts) -> None:
        """Adds those of another part."""
        for name, counts in vars(self).items():
            counts.update(getattr(other, name))

    def as_dict(self) -> dict[str, dict[str, int]]:
        """For the manifest: each kind's total, ``read``, and what it is the sum of."""
        counted = {
            kind: {fate: self.fates[kind, fate] for fate in names} for kind, names in _FATES.items()
        }
        return {kind: {"read": sum(fates.values())} | fates for kind, fates in counted.items()}


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
        """Takes and counts a reject."""
        self.rejects.append(reject)
        self.counts.listed[reject.unit] += 1
        fates = self.counts.fates
        fates["records", "rejected"] += reject.records
        fates["images", "rejected"] += reject.unit == "image"
        fates["captions", "rejected"] += reject.unit == "caption"
        fates["captions", "lost"] += reject.captions


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

    @cached_property
    def _tokenizer(self) -> TextTokenizer:
        return TextTokenizer(self.tokenizer_model)

    def __call__(self, chunk: list[PairItem]) -> CheckedPairs:
        """Checks every image and caption."""
        result = CheckedPairs()
        groups = [item.captions for item in chunk if isinstance(item, CaptionedImage)]
        longest = self.options.max_caption_tokens * _MAX_CHARACTERS_PER_TOKEN
        captions = encode_groups(self._tokenizer, groups, "caption", longest)
        with quiet_pillow():
            for item in chunk:
                if isinstance(item, Reject):
                    result.reject(item)
                elif isinstance(item, LeftOut):
                    result.counts.fates["records", "left_out"] += 1
                    result.counts.left_out[item.reason] += 1
                else:
                    self._add(item, *next(captions), result)
        return result

    def _add(
        self, item: CaptionedImage, good: GoodTexts, others: BadTexts, result: CheckedPairs
    ) -> None:
        """Adds an image with its usable captions, or one reject for all of it."""
        captions, bad, most = list[list[int]](), dict(others), self.options.max_caption_tokens
        for number, _, ids in good:
            if len(ids) > most:
                bad[number] = f"caption of {len(ids)} tokens, more than {most}"
            else:
                captions.append(ids)
        try:
            if not captions:
                raise DataError(_no_caption(item, bad))
            image = checked_image(item.image.read(), self.options.resize_short, self.options.rules)
        except DataError as error:
            reason, path = str(error), item.image.path
            if captions and path and path not in reason:
                reason += f" ({path})"  # the image's own file, not the annotation that names it
            records, lost = len(item.captions_per_record) or 1, len(item.captions)
            result.reject(Reject(item.source, item.record, reason, "image", records, lost))
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
    source: PairInput, tokenizer_model: str, run: Run, options: PairOptions
) -> DatasetManifest:
    """Indexes a corpus of captioned images; returns the manifest, whatever the number of workers.

    A bad caption alone is left out; an image goes when it is bad or has no usable caption. Records,
    images and captions are counted apart (`PairCounts`).

    Raises:
        DataError: bad input (with ``on_error`` "stop"), no usable pair, a tokenizer that cannot be loaded, or a full
            disk; nothing is left behind.
    """
    tokenizer = TextTokenizer(tokenizer_model)
    work = CheckPairs(tokenizer_model, options)
    mirror = Mirror()
    chosen = remote_format(source, mirror)
    counts = PairCounts()
    dtypes: list[npt.DTypeLike] = [np.uint8, token_dtype(tokenizer.size)]
    with ExitStack() as stack:
        share = stack.enter_context(
            Share(
                run.shard,
                chosen.inputs,
                lambda: read_pairs(chosen),
                lambda mirror: pair_parts(chosen, mirror),
                ("pairs", chosen, options, tokenizer.fingerprint),
                mirror,
            )
        )
        if (complete := complete_shard(run, share, "pairs")) is not None:
            return complete
        progress = stack.enter_context(Progress("pairs"))
        output = stack.enter_context(
            DatasetOutput(run.prefix, "pairs", dtypes, run.on_error, share)
        )
        passed_over = output.rejects.passed_over
        records: Iterator[PairItem] = without(share, PassedOver, passed_over)
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
            progress.add(result.counts.as_dict()["records"]["read"])
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
    # What became of records, images, captions and other files, a line for each kind.
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
    if counts.fates["captions", "lost"]:
        lines[-1] += " with their image"
    if passed_over:
        lines.append(passed_over_line(kinds_of(passed_over)))
    if total := counts.listed.total() + len(passed_over):
        units = [f"{n} {unit}{'s' * (n > 1)}" for unit, n in sorted(counts.listed.items())]
        units += [f"{len(passed_over)} of what is passed over"] if passed_over else []
        where = f"{run.prefix}.rejects.jsonl"
        lines.append(f"{total} line{'s' * (total > 1)} in {where}: {', '.join(units)}")
    for line in lines:
        print(f"pairs: {line}", file=sys.stderr)
    report_unknown("pairs", manifest)
    return manifest


def merge_datasets(
    inputs: Sequence[str], output_prefix: str, source: Mapping[str, Any]
) -> DatasetManifest:
    """Concatenates datasets, streaming their bytes; returns the manifest.

    Codes of images (``PREFIX_codes``) are not merged: encode the merged images anew. The rejects are listed together,
    as far as their files are still there. Images that were indexed with other options for orientation or transparency
    are merged as they are, with a note on stderr. Shards of a run become what the run without shards writes.

    Raises:
        DataError: an input is damaged, of another kind or tokenizer, a task's, or is the output; among shards of a run
            one is missing or of another run; the disk is full. Nothing is left behind.
    """
    if Path(output_prefix).resolve() in {Path(prefix).resolve() for prefix in inputs}:
        raise DataError(f"{output_prefix}: is both an input and the output")
    kind = load_manifest(inputs[0]).kind
    if is_task(kind):
        raise DataError(f"{manifest_path(inputs[0])}: splits of a task ({kind}) are not merged")
    manifests = [check_dataset(prefix, kind) for prefix in inputs]
    sharded = check_shards(inputs, [m.shard for m in manifests])
    source = manifests[0].source if sharded else source
    check_same_tokenizer(inputs, manifests)
    parts = dataset_parts(kind)
    dtypes = [IndexedReader(part_prefix(inputs[0], part)).dtype for part in parts]
    with DatasetOutput(output_prefix, kind, dtypes) as output:
        for prefix in inputs:
            output.rejects.add_lines(prefix, add_up=sharded)
        for part in parts:
            for prefix in inputs:
                output.writers[part].add_dataset(IndexedReader(part_prefix(prefix, part)))
        unknown = [m.unknown_tokens for m in manifests]
        known = [m.counts for m in manifests if m.counts is not None]
        kinds = dict.fromkeys(kind for counts in known for kind in counts)
        summed = {kind: _total([counts.get(kind, {}) for counts in known]) or {} for kind in kinds}
        manifest = output.manifest(
            source,
            rejects=sum(m.rejects for m in manifests),
            counts=summed if len(known) == len(manifests) else None,
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
