"""Showing what a dataset holds: counts, samples, and a contact sheet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from PIL import Image

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.data.augment import decode_pixels, open_image
from megatron_vlmoe.data.indexed import IndexedReader
from megatron_vlmoe.data.manifest import (
    DatasetManifest,
    check_dataset,
    dataset_parts,
    length_percentiles,
    load_manifest,
    part_prefix,
    unknown_line,
)
from megatron_vlmoe.prepare.contact_sheet import Cell, draw_sheet
from megatron_vlmoe.prepare.readers.records import passed_over_line
from megatron_vlmoe.runtime.files import open_atomic
from megatron_vlmoe.tokenizers.text import TextTokenizer

_COUNTED = ("records", "images", "captions")
_FATES = ("kept", "rejected", "lost", "left_out")
_MAX_SHOWN = 200


class DatasetView:
    """A checked dataset, opened for looking at.

    Args:
        prefix: path prefix of the dataset.
        tokenizer_model: SentencePiece model that decodes texts; None shows token ids.
        checksums: also compare the SHA-256 of every file.

    Raises:
        DataError: the dataset is damaged or was made with another tokenizer.
    """

    def __init__(
        self, prefix: str, tokenizer_model: str | None = None, checksums: bool = False
    ) -> None:
        kind = load_manifest(prefix).kind
        self.tokenizer: TextTokenizer | None = None
        fingerprint = None
        if tokenizer_model is not None and kind != "images":
            self.tokenizer = TextTokenizer(tokenizer_model)
            fingerprint = self.tokenizer.fingerprint
        self.prefix = prefix
        self.manifest: DatasetManifest = check_dataset(
            prefix, kind, fingerprint, checksums=checksums
        )
        self.readers = {
            part: IndexedReader(part_prefix(prefix, part)) for part in dataset_parts(kind)
        }

    def summary(self) -> Iterator[str]:
        """Lines of counts and percentiles."""
        manifest = self.manifest
        yield f"{self.prefix}: {manifest.kind}"
        counts = {"documents": manifest.documents}
        if manifest.kind == "pairs":
            counts["captions"] = manifest.sequences
        if manifest.kind != "images":
            counts["tokens"] = manifest.tokens
        counts |= {"bytes": manifest.bytes, "rejects": manifest.rejects}
        yield "  " + ", ".join(f"{count} {name}" for name, count in counts.items())
        known = manifest.counts or {}
        for kind in filter(known.__contains__, _COUNTED):
            fates = known[kind]
            parts = [f"{fates[fate]} {fate.replace('_', ' ')}" for fate in _FATES if fate in fates]
            yield f"  {fates['read']} {kind} read: {', '.join(parts)}"
        for reason, count in sorted((manifest.omitted or {}).items()):
            yield f"  {count} records left out: {reason}"
        if manifest.passed_over:
            yield f"  {passed_over_line(manifest.passed_over)}"
        yield from image_rules(manifest)
        if manifest.tokenizer_fingerprint:
            yield f"  tokenizer {manifest.tokenizer_fingerprint} ({manifest.vocab_size} pieces)"
            yield f"  {unknown_line(manifest)}"
        for part, reader in self.readers.items():
            unit = "bytes per image" if part == "image" else "tokens per sequence"
            shown = length_percentiles(reader.sequence_lengths)
            yield f"  {unit}: " + ", ".join(f"{name} {value}" for name, value in shown.items())

    def samples(self, count: int) -> Iterator[str]:
        """One line for each of ``count`` documents, spread evenly over the dataset."""
        for index in spread(self.manifest.documents, count):
            yield f"[{index}] " + " | ".join(self._describe(index))

    def contact_sheet(self, count: int) -> Image.Image:
        """Draws ``count`` images, spread evenly, with their first captions.

        Raises:
            DataError: the dataset has no images.
        """
        if "image" not in self.readers:
            raise DataError(f"{self.prefix}: a dataset of text has no images to draw")
        indices = spread(self.manifest.documents, count)
        has_text = "text" in self.readers
        return draw_sheet(
            Cell(
                [decode_pixels(self._image(index), image_place(self.prefix, index))],
                f"[{index}]",
                self._captions(index)[:1] if has_text else (),
            )
            for index in indices
        )

    def _describe(self, index: int) -> list[str]:
        shown = []
        if "image" in self.readers:
            image = self._image(index)
            shown.append(f"{image.format} {image.width}x{image.height} {image.mode}")
        if self.manifest.kind != "images":
            shown += [shortened(caption) for caption in self._captions(index)]
        return shown

    def _image(self, index: int) -> Image.Image:
        data = self.readers["image"].document(index)[0]
        return open_image(data, image_place(self.prefix, index))

    def _captions(self, index: int) -> list[str]:
        reader = self.readers["text" if "text" in self.readers else "text_document"]
        texts = []
        for ids in reader.document(index):
            head = ids[:_MAX_SHOWN].tolist()
            texts.append(self.tokenizer.decode(head) if self.tokenizer else str(head))
        return texts


def spread(total: int, count: int) -> list[int]:
    """``count`` numbers below ``total`` (all if there are fewer), evenly apart."""
    count = min(count, total)
    return [place * (total - 1) // max(count - 1, 1) for place in range(count)]


def image_place(prefix: str, index: int) -> str:
    """Name of an image in errors."""
    return f"{prefix}_image.bin: image {index}"


def image_rules(manifest: DatasetManifest) -> Iterator[str]:
    """A line about what was done with the images when they were indexed, if that is recorded."""
    if manifest.exif or manifest.alpha:
        yield f"  images: exif {manifest.exif}, alpha {manifest.alpha}"


def shortened(text: str) -> str:
    """The text on one line, cut where it is long."""
    line = " ".join(text.split())
    return line if len(line) <= _MAX_SHOWN else f"{line[: _MAX_SHOWN - 3]}..."


class View(Protocol):
    """A dataset opened for looking at."""

    def summary(self) -> Iterator[str]:
        """Lines of counts and percentiles."""
        ...

    def samples(self, count: int) -> Iterator[str]:
        """One line for each of ``count`` samples."""
        ...

    def contact_sheet(self, count: int) -> Image.Image:
        """A drawing of ``count`` images. Raises DataError if there are none."""
        ...


def save_contact_sheet(view: View, path: Path, count: int) -> None:
    """Writes `View.contact_sheet` as PNG. Raises FileError."""
    sheet = view.contact_sheet(count)
    with open_atomic(path) as file:
        sheet.save(file, "PNG")
