"""Image-caption pairs to ``PREFIX_image`` and ``PREFIX_text``.

Document i of the one belongs to document i of the other; the sequences of a text document are the
captions of the image, as token ids without special ones.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from megatron_vlmoe.data.errors import DataError
from megatron_vlmoe.data.indexed import token_dtype
from megatron_vlmoe.data.manifest import DatasetManifest, FileRecord, length_percentiles
from megatron_vlmoe.data.preprocess import (
    DatasetOutput,
    Progress,
    Run,
    TokenizerLike,
    checked_text,
    chunked,
    encode_all,
    load_tokenizer,
    ordered_map,
    report_unknown,
)
from megatron_vlmoe.data.preprocess_images import add_images, checked_image, quiet_pillow
from megatron_vlmoe.data.readers.pairs import PairInput, read_pairs
from megatron_vlmoe.data.readers.records import CaptionedImage, Reject

DEFAULT_MAX_CAPTION_TOKENS = 512
_MAX_CHARACTERS_PER_TOKEN = 64
_CHUNK = 16


@dataclass
class CheckedPairs:
    """The result of one chunk: documents, flat, in order."""

    images: list[bytes] = field(default_factory=list)
    tokens: array[int] = field(default_factory=lambda: array("I"))
    caption_lengths: array[int] = field(default_factory=lambda: array("q"))
    captions_per_image: array[int] = field(default_factory=lambda: array("q"))
    rejects: list[Reject] = field(default_factory=list)
    records: int = 0


def _named(item: CaptionedImage, error: DataError) -> str:
    """The reason with the image's own file, which is not the annotation that names it."""
    message, path = str(error), item.image.path
    return message if not path or path in message else f"{message} ({path})"


@dataclass(frozen=True)
class CheckPairs:
    """The work on one chunk: tokenize the captions, decode the images."""

    tokenizer_model: str
    resize_short: int | None = None
    max_caption_tokens: int = DEFAULT_MAX_CAPTION_TOKENS
    load: Callable[[str], TokenizerLike] = load_tokenizer

    def build(self) -> Callable[[list[CaptionedImage | Reject]], CheckedPairs]:
        """Loads the tokenizer."""
        tokenizer = self.load(self.tokenizer_model)
        return lambda chunk: self._check(tokenizer, chunk)

    def _check(
        self, tokenizer: TokenizerLike, chunk: list[CaptionedImage | Reject]
    ) -> CheckedPairs:
        result = CheckedPairs(records=len(chunk))
        with quiet_pillow():
            for item in chunk:
                if isinstance(item, Reject):
                    result.rejects.append(item)
                    continue
                captions = self._captions(tokenizer, item, result.rejects)
                if not captions:
                    result.rejects.append(Reject(item.source, item.record, "no usable caption"))
                    continue
                try:
                    image = checked_image(item.image.read(), self.resize_short)
                except DataError as error:
                    result.rejects.append(Reject(item.source, item.record, _named(item, error)))
                    continue
                result.images.append(image)
                result.captions_per_image.append(len(captions))
                for ids in captions:
                    result.tokens.fromlist(ids)
                    result.caption_lengths.append(len(ids))
        return result

    def _captions(
        self, tokenizer: TokenizerLike, item: CaptionedImage, rejects: list[Reject]
    ) -> list[list[int]]:
        """Ids of the usable captions; the others go to ``rejects``, counted from 0."""
        longest = self.max_caption_tokens * _MAX_CHARACTERS_PER_TOKEN
        usable: list[tuple[int, str]] = []
        for number, caption in enumerate(item.captions):
            try:
                usable.append((number, checked_text(caption, "caption", longest)))
            except DataError as error:
                rejects.append(_caption_reject(item, number, str(error)))
        result = []
        encoded = encode_all(tokenizer, [text for _, text in usable], "caption")
        for (number, _), ids in zip(usable, encoded, strict=True):
            if isinstance(ids, str):
                rejects.append(_caption_reject(item, number, ids))
            elif len(ids) > self.max_caption_tokens:
                reason = f"caption of {len(ids)} tokens, more than {self.max_caption_tokens}"
                rejects.append(_caption_reject(item, number, reason))
            else:
                result.append(ids)
        return result


def _caption_reject(item: CaptionedImage, number: int, reason: str) -> Reject:
    return Reject(item.source, f"{item.record}, caption {number}", reason)


@dataclass(frozen=True)
class PairOptions:
    """How images and captions are stored.

    Attributes:
        resize_short: shorter side in pixels after shrinking; None keeps the images.
        max_caption_tokens: longer captions are rejected.
    """

    resize_short: int | None = None
    max_caption_tokens: int = DEFAULT_MAX_CAPTION_TOKENS


def preprocess_pairs(
    source: PairInput,
    tokenizer_model: str,
    run: Run,
    options: PairOptions | None = None,
    load: Callable[[str], TokenizerLike] = load_tokenizer,
) -> DatasetManifest:
    """Indexes a corpus of captioned images; returns the manifest.

    A bad caption alone is left out; an image goes when it is bad or has no usable caption. The
    result does not depend on ``run.workers``.

    Raises:
        DataError: bad input (with ``on_error`` "stop"), no usable pair, or a full disk; nothing
            is left behind.
        ValueError: the tokenizer cannot be loaded.
    """
    options = options or PairOptions()
    tokenizer = load(tokenizer_model)
    work = CheckPairs(tokenizer_model, options.resize_short, options.max_caption_tokens, load)
    progress = Progress("pairs")
    dtype = token_dtype(tokenizer.size)
    with DatasetOutput(run.output_prefix, "pairs", [np.uint8, dtype], run.on_error) as output:
        chunks = chunked(read_pairs(source), _CHUNK)
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
            progress.add(result.records)
        manifest = pairs_manifest(
            output, output.finish(run.source.get("inputs", "the input")), run, tokenizer
        )
        output.commit(manifest)
    progress.finish(manifest.rejects)
    report_unknown("pairs", manifest)
    return manifest


def pairs_manifest(
    output: DatasetOutput, files: dict[str, FileRecord], run: Run, tokenizer: TokenizerLike
) -> DatasetManifest:
    """The manifest of finished but not yet published pairs."""
    text = output.writers["text"]
    return DatasetManifest(
        kind="pairs",
        documents=text.num_documents,
        sequences=text.num_sequences,
        tokens=text.num_items,
        bytes=files["_image.bin"].size + files["_text.bin"].size,
        files=files,
        source=run.source,
        rejects=output.rejects.count,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.size,
        unknown_tokens=output.unknown_tokens,
        caption_lengths=length_percentiles(text.staged_lengths()),
    )
