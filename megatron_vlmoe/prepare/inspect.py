"""Showing what a dataset or a prepared split of a task holds: counts, samples, and a contact sheet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.data.augment import decode_pixels, open_image
from megatron_vlmoe.data.indexed import IndexedReader
from megatron_vlmoe.data.manifest import (
    DatasetManifest,
    check_dataset,
    dataset_parts,
    is_task,
    length_percentiles,
    load_manifest,
    part_prefix,
    unknown_line,
)
from megatron_vlmoe.data.task_dataset import Labels, TaskDataset, TaskRow, load_labels
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
        yield from tokenizer_lines(manifest)
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


class TaskView:
    """A checked split of a task, opened for looking at.

    Args:
        prefix: ``P_{split}``.
        tokenizer_model: SentencePiece model that must be the one that made the tokens; None: any.
        checksums: also compare the SHA-256 of every file.

    Raises:
        DataError: the split is damaged or was made with another tokenizer.
    """

    def __init__(
        self, prefix: str, tokenizer_model: str | None = None, checksums: bool = False
    ) -> None:
        task = load_manifest(prefix).kind
        fingerprint = TextTokenizer(tokenizer_model).fingerprint if tokenizer_model else None
        self.dataset = TaskDataset.open(prefix, task, fingerprint)
        check_dataset(prefix, task, checksums=checksums)
        self.labels = self._find_labels()

    def _find_labels(self) -> Labels | None:
        """The class names, if they lie where the tool wrote them and are still the same."""
        split = self.dataset.manifest.source.get("split")
        try:
            labels = load_labels(self.dataset.prefix.removesuffix(f"_{split}"))
        except DataError:
            return None
        return labels if labels.sha256 == self.dataset.manifest.labels_sha256 else None

    def summary(self) -> Iterator[str]:
        """Lines of counts and percentiles."""
        data, manifest = self.dataset, self.dataset.manifest
        yield f"{data.prefix}: {data.task}"
        counts = {"samples": len(data), "images": data.num_images, "texts": data.num_texts}
        counts |= {"tokens": manifest.tokens, "bytes": manifest.bytes, "rejects": manifest.rejects}
        yield "  " + ", ".join(f"{count} {name}" for name, count in counts.items())
        yield from image_rules(manifest)
        for reason, count in sorted((manifest.omitted or {}).items()):
            yield f"  {count} samples left out: {reason}"
        if self.labels is not None:
            yield f"  {len(self.labels.labels)} classes"
        elif manifest.labels_sha256 is not None:
            yield "  class names: not found beside it"
        yield from tokenizer_lines(manifest)
        if data.num_texts:
            shown = length_percentiles(data.text_lengths())
            yield "  tokens per text: " + ", ".join(f"{n} {v}" for n, v in shown.items())

    def samples(self, count: int) -> Iterator[str]:
        """One line for each of ``count`` samples, spread evenly over the split."""
        for index in spread(len(self.dataset), count):
            row = self.dataset.row(index)
            images = [self._image(document) for document in row.images]
            shown = [f"{one.format} {one.width}x{one.height} {one.mode}" for one in images]
            yield f"[{index}] {row.id} | " + " | ".join([*shown, *self._words(row)])

    def contact_sheet(self, count: int) -> Image.Image:
        """Draws the images of ``count`` samples, spread evenly, with their texts and classes.

        Raises:
            DataError: the task has no images.
        """
        if not self.dataset.num_images:
            raise DataError(f"{self.dataset.prefix}: task {self.dataset.task} has no images")
        return draw_sheet(map(self._cell, spread(len(self.dataset), count)))

    def _cell(self, index: int) -> Cell:
        row = self.dataset.row(index)
        images = [
            decode_pixels(self._image(document), image_place(self.dataset.prefix, document))
            for document in row.images
        ]
        return Cell(images, f"[{index}] {row.id}", row.raw, self._targets(row))

    def _image(self, document: int) -> Image.Image:
        data = self.dataset.image_bytes(document)
        return open_image(data, image_place(self.dataset.prefix, document))

    def _words(self, row: TaskRow) -> list[str]:
        """Texts and targets of a sample."""
        targets = self._targets(row)
        return [*map(shortened, row.raw), *([targets] if targets else [])]

    def _targets(self, row: TaskRow) -> str:
        """Names of the classes of a sample, with their scores where these are not 1; empty if unknown."""
        targets = []
        for label, score in zip(row.labels, row.scores, strict=True):
            name = str(label)
            if self.labels is not None and label < len(self.labels.labels):
                name = (self.labels.names or self.labels.labels)[label]
            targets.append(name if score == 1.0 else f"{name} ({score:.1f})")
        return ", ".join(targets)


def spread(total: int, count: int) -> list[int]:
    """``count`` numbers below ``total`` (all if there are fewer), evenly apart."""
    count = min(count, total)
    return [place * (total - 1) // max(count - 1, 1) for place in range(count)]


def image_place(prefix: str, index: int) -> str:
    """Name of an image in errors."""
    return f"{prefix}_image.bin: image {index}"


def tokenizer_lines(manifest: DatasetManifest) -> Iterator[str]:
    """The tokenizer that made the ids, and how much it did not know, if there are any."""
    if manifest.tokenizer_fingerprint:
        yield f"  tokenizer {manifest.tokenizer_fingerprint} ({manifest.vocab_size} pieces)"
        yield f"  {unknown_line(manifest)}"


def image_rules(manifest: DatasetManifest) -> Iterator[str]:
    """A line about what was done with the images when they were indexed, if that is recorded."""
    if manifest.exif or manifest.alpha:
        yield f"  images: exif {manifest.exif}, alpha {manifest.alpha}"


def shortened(text: str) -> str:
    """The text on one line, cut where it is long."""
    line = " ".join(text.split())
    return line if len(line) <= _MAX_SHOWN else f"{line[: _MAX_SHOWN - 3]}..."


View = DatasetView | TaskView


def open_view(prefix: str, tokenizer_model: str | None, checksums: bool) -> View:
    """The view that fits the kind of a dataset; the arguments are those of `DatasetView`."""
    view = TaskView if is_task(load_manifest(prefix).kind) else DatasetView
    return view(prefix, tokenizer_model, checksums)


def save_contact_sheet(view: View, path: Path, count: int) -> None:
    """Writes the contact sheet of a view as PNG. Raises FileError."""
    sheet = view.contact_sheet(count)
    with open_atomic(path) as file:
        sheet.save(file, "PNG")
